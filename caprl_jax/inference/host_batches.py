"""Rows with images -> batches of one shape each, prepared in threads while the device works."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Generic, NamedTuple, TypeVar

from caprl_jax.data.batches import ImageShape, image_shape, shape_bucket
from caprl_jax.data.rows import CaptionRow, QARow
from caprl_jax.models.policy import PolicyConfig

# Pictures are decoded and cut by libraries that let go of Python's lock.
PREPARE_THREADS = min(16, os.cpu_count() or 1)
# Prepared while the device is busy; each costs the memory of a batch's pictures.
BATCHES_AHEAD = 2

Item = TypeVar("Item")
Ready = TypeVar("Ready")
Outputs = TypeVar("Outputs")
NumberedRow = tuple[int, CaptionRow | QARow]


@dataclasses.dataclass(frozen=True)
class HostBatch(Generic[Item, Ready]):
  """items: those that could be prepared, at most a batch. ready: what was made of each, the last
  one repeated until the batch is full; empty where there is no item. failed: the other items.
  """

  shape: ImageShape
  items: list[Item]
  ready: list[Ready]
  failed: list[tuple[Item, ValueError]]


class HostPipeline:
  """Threads that open images and prepare batches of them. A context manager.

  The images of a job are opened twice: for their sizes, from the files' headers, because a batch
  holds images of one bucket and all sizes must be known to fill it; and for their pixels, when the
  turn of their batch comes, because the pixels of all of them would not fit into memory.
  """

  def __init__(self, cfg: PolicyConfig, batch_size: int, ahead: int = BATCHES_AHEAD):
    """ahead: batches in the making, after the one that is given."""
    self.cfg, self.batch_size, self.ahead = cfg, batch_size, ahead
    self._pool = futures.ThreadPoolExecutor(PREPARE_THREADS, "pictures")

  def __enter__(self) -> "HostPipeline":
    return self

  def __exit__(self, *failure) -> None:
    self.close()

  def close(self) -> None:
    """Ends the threads; what has not begun is given up."""
    self._pool.shutdown(cancel_futures=True)

  def bucket(
    self, rows: Sequence[NumberedRow]
  ) -> tuple[dict[ImageShape, list[NumberedRow]], list[tuple[NumberedRow, ValueError]]]:
    """Numbered rows by the bucket of their image's shape, smaller ones first, and those whose image
    cannot be opened or is too narrow.
    """
    buckets: dict[ImageShape, list[NumberedRow]] = {}
    failed: list[tuple[NumberedRow, ValueError]] = []
    for numbered, shape in zip(rows, self._pool.map(self._shape, (row for _, row in rows))):
      if isinstance(shape, ValueError):
        failed.append((numbered, shape))
      else:
        buckets.setdefault(shape, []).append(numbered)
    order = sorted(buckets, key=lambda shape: (shape.tokens, shape.slots))
    return {shape: buckets[shape] for shape in order}, failed

  def _shape(self, row: CaptionRow | QARow) -> ImageShape | ValueError:
    try:
      return shape_bucket(image_shape([row], self.cfg), self.cfg.vision.slots_multiple)
    except ValueError as error:
      return error

  def batches(
    self,
    buckets: Mapping[ImageShape, Sequence[Item]],
    prepare: Callable[[ImageShape, Item], Ready],
  ) -> "BatchesAhead[Item, Ready]":
    """The items, bucket by bucket, `batch_size` at a time; the next batches are in the making.

    Args:
      prepare: what a thread does with an item. Its ValueErrors stand in the batch's `failed`.
    """

    def attempt(shape: ImageShape, item: Item) -> Ready | ValueError:
      try:
        return prepare(shape, item)
      except ValueError as error:
        return error

    def begun() -> Iterator[_Begun[Item, Ready]]:
      for shape, members in buckets.items():
        for start in range(0, len(members), self.batch_size):
          items = members[start : start + self.batch_size]
          yield _Begun(shape, items, [self._pool.submit(attempt, shape, item) for item in items])

    return BatchesAhead(begun(), self.batch_size, self.ahead)


class _Begun(NamedTuple, Generic[Item, Ready]):
  """A batch in the making."""

  shape: ImageShape
  items: Sequence[Item]
  made: list[futures.Future[Ready | ValueError]]


class BatchesAhead(Generic[Item, Ready]):
  """An iterator over batches, `ahead` of which are in the making after the one that is given."""

  def __init__(self, begun: Iterator[_Begun[Item, Ready]], batch_size: int, ahead: int):
    self._begun, self._batch_size, self._ahead = begun, batch_size, ahead
    self._queue: collections.deque[_Begun[Item, Ready]] = collections.deque()

  def _fill(self) -> None:
    missing = 1 + self._ahead - len(self._queue)
    self._queue.extend(itertools.islice(self._begun, missing))

  def ready(self) -> bool:
    """Whether the next batch can be had without waiting, or there is none."""
    self._fill()
    return not self._queue or all(one.done() for one in self._queue[0].made)

  def __iter__(self) -> "BatchesAhead[Item, Ready]":
    return self

  def __next__(self) -> HostBatch[Item, Ready]:
    self._fill()
    if not self._queue:
      raise StopIteration
    shape, items, made = self._queue.popleft()
    found = list(zip(items, (one.result() for one in made)))
    good = [(item, ready) for item, ready in found if not isinstance(ready, ValueError)]
    ready = [ready for _, ready in good]
    ready += ready[-1:] * (self._batch_size - len(ready))
    failed = [(item, error) for item, error in found if isinstance(error, ValueError)]
    return HostBatch(shape, [item for item, _ in good], ready, failed)


def one_ahead(
  batches: Iterable[Item], dispatch: Callable[[Item], Outputs]
) -> Iterator[tuple[Item, Outputs]]:
  """Each batch with what `dispatch` gave, after the batch that follows it was dispatched as well:
  the device has work while the outputs are fetched and turned into text.
  """
  running: list[tuple[Any, Any]] = []
  for batch in batches:
    running.append((batch, dispatch(batch)))
    if len(running) > 1:
      yield running.pop(0)
  yield from running
