"""A stream of rows, the bucket of each -> batches of one bucket each, the same wherever a run is
taken up."""

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from caprl_jax.progress import going_on

FAR = 1000  # batches, after which it is said that they are looked for


class BatchOrder:
  """`order(n)`: places in the stream of the rows of its n-th batch, int [B], ascending.

  Rows are read in the stream's order, and each waits until its bucket has a batch full: that is the
  next batch. So a row comes as often as in the stream, and a bucket as often as its rows; at most
  B - 1 rows of a bucket wait, at the end of an epoch for the next one. Of one bucket, batches are
  the stream cut into pieces. May be called by several threads, in any order; the first call after a
  start reads the stream from its beginning, which takes some fifteen seconds per million rows.

  Args:
    stream: endless; gives the index of a row.
    buckets: the bucket of each row, from 0.
  """

  def __init__(self, stream: Any, buckets: Sequence[int], batch_size: int):
    self._stream, self._buckets, self._size = stream, buckets, batch_size
    self._waiting: list[list[int]] = [[] for _ in range(max(buckets) + 1)]
    self._batches: list[np.ndarray] = []
    self._read = 0  # rows of the stream
    self._lock = threading.Lock()

  def __call__(self, number: int) -> np.ndarray:
    with self._lock:
      far = number - len(self._batches) > FAR
      with going_on("finding the place in the order of rows") if far else contextlib.nullcontext():
        while len(self._batches) <= number:
          self._take()
      return self._batches[number]

  def _take(self) -> None:
    """Reads the stream's next row."""
    place = self._read
    waiting = self._waiting[self._buckets[int(self._stream[place])]]
    waiting.append(place)
    self._read += 1
    if len(waiting) == self._size:
      self._batches.append(np.array(waiting))
      waiting.clear()
