"""Rows -> batches of fixed shape, shuffled, resumable, the same for any number of processes: a
Grain pipeline.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from PIL import Image

from caprl_jax.data.image_prompts import build_prompt, stack_prompts
from caprl_jax.data.judge_questions import (
  QuestionShape,
  TokenizedQuestion,
  pad_questions,
  pick_questions,
)
from caprl_jax.data.rows import CaptionRow, QARow, image_place, open_image, read_image
from caprl_jax.data.shapes.order import BatchOrder
from caprl_jax.models.image_processor import pad_image
from caprl_jax.models.policy import PolicyConfig
from caprl_jax.types import Batch, Images, Prompts, Sight


@dataclasses.dataclass(frozen=True)
class ImageShape:
  """Padded sizes of a run's images: patch slots S and image tokens I."""

  slots: int
  tokens: int


def pixels_for(pixels: Any, row: Any) -> Any:
  """A processor (`PolicyConfig.vision.pixels`) within the row's own limits of pixels; itself for a
  row that has none."""
  limits = getattr(row, "limits", None)
  return pixels.within(limits.min_pixels, limits.max_pixels) if limits else pixels


def image_shape(rows: Sequence[QARow | CaptionRow], cfg: PolicyConfig) -> ImageShape:
  """The smallest shape that holds every image; reads only the files' headers. Raises ValueError as
  `read_image`, and for an extreme aspect ratio."""
  slots, tokens = 0, 0
  found = {(header_size(row), getattr(row, "limits", None)): row for row in rows}
  for ((width, height), _), row in found.items():
    try:
      shape = pixels_for(cfg.vision.pixels, row).shape(height, width)
    except ValueError as error:
      raise ValueError(f"row {row.name!r} ({image_place(row)}): {error} or drop the row") from error
    slots, tokens = max(slots, shape[0]), max(tokens, shape[1])
  return ImageShape(slots, tokens)


def header_size(row: QARow | CaptionRow) -> tuple[int, int]:
  """Width and height of the row's image, upright, by the file's header. Raises ValueError as
  `read_image`."""
  try:
    with open_image(row) as image:
      # turned by EXIF; of a TIFF, Pillow gives the size after that
      turned = image.format != "TIFF" and image.getexif().get(0x0112) in (5, 6, 7, 8)
      return image.size[::-1] if turned else image.size
  except Exception:  # noqa: BLE001  decoders raise anything; this raises an error that names the row
    return read_image(row).size


def shape_bucket(shape: ImageShape, multiple: int) -> ImageShape:
  """The shape rounded up by at most a quarter, so that few programs are compiled."""

  def up(n: int, multiple: int) -> int:
    step = max(multiple, 1 << max(n.bit_length() - 3, 0))
    step = -(-step // multiple) * multiple
    return -(-n // step) * step

  return ImageShape(up(shape.slots, multiple), up(shape.tokens, 4))


class ImagePrompt:
  """A row -> its image and prompt, padded to the run's shape. `pieces`: token ids before and after
  the image's.
  """

  def __init__(self, cfg: PolicyConfig, pieces: tuple[list[int], list[int]], shape: ImageShape):
    self.cfg, self.shape = cfg, shape
    self.before, self.after = pieces
    self.length = len(self.before) + shape.tokens + len(self.after)

  def padded_to(self, shape: ImageShape) -> "ImagePrompt":
    """The same, padded to another shape."""
    return ImagePrompt(self.cfg, (self.before, self.after), shape)

  def __call__(
    self, row: QARow | CaptionRow, image: Image.Image | None = None
  ) -> tuple[Images, Prompts]:
    """Arrays without a batch axis. `image` replaces the row's own (an augmented one)."""
    try:
      pixels = pixels_for(self.cfg.vision.pixels, row)
      patches = pixels.patchify(image or read_image(row))
      padded = pad_image(patches, self.shape.slots, self.shape.tokens)
    except ValueError as error:
      raise ValueError(f"row {row.name!r}: {error}") from error
    prompt = build_prompt(
      self.before,
      patches.grid_units,
      self.after,
      self.cfg.image_token,
      self.cfg.text.mrope_sections is not None,
    )
    return Images(**padded), jax.tree.map(lambda x: x[0], stack_prompts([prompt], self.length))


class QABatcher:
  """Row indices -> `types.Batch`: images, prompts and K questions each."""

  def __init__(
    self,
    rows: Sequence[QARow],
    tokenized: Sequence[Sequence[TokenizedQuestion]],
    prompt: ImagePrompt,
    questions: int,
    shape: QuestionShape,
    sight: ImagePrompt | None = None,
    shapes: Callable[[int], Sequence[ImageShape]] | None = None,
  ):
    """
    Args:
      sight: what a judge that sees the image is shown.
      shapes: what the image of a row is padded to for each of the two, where that is not their own.
    """
    self.sight, self.shapes = sight, shapes
    self.rows, self.tokenized, self.prompt, self.count, self.shape = (
      rows,
      tokenized,
      prompt,
      questions,
      shape,
    )

  def padded(self, shapes: Callable[[int], Sequence[ImageShape]] | None) -> "QABatcher":
    """The same, with each row's image padded as `shapes` says."""
    return QABatcher(
      self.rows, self.tokenized, self.prompt, self.count, self.shape, self.sight, shapes
    )

  def example(self, index: int, rng: np.random.Generator) -> Batch:
    """One row's arrays without a batch axis; `rng` picks its questions."""
    row, image, sight = self.rows[index], None, None
    prompt, seeing = self.prompt, self.sight
    if self.shapes is not None:
      shape, *others = self.shapes(index)
      prompt = prompt.padded_to(shape)
      seeing = seeing.padded_to(*others) if seeing else None
    if seeing is not None:
      image = read_image(row)  # for both
      sight = Sight(*seeing(row, image))
    images, prompts = prompt(row, image)
    picked = pick_questions(self.tokenized[index], self.count, rng)
    questions = [self.tokenized[index][i] for i in picked]
    return Batch(
      images,
      prompts,
      pad_questions(questions, self.count, self.shape),
      np.int32(index),
      np.pad(np.asarray(picked, np.int32), (0, self.count - len(picked)), constant_values=-1),
      sight,
    )


def stack(examples: Sequence) -> Batch:
  """Examples -> one batch, along a new first axis."""
  return jax.tree.map(lambda *x: np.stack(x), *examples)


def index_stream(parts: Sequence[tuple[int, float | None]], seed: int) -> grain.MapDataset:
  """An endless stream of row indices, every row once before any comes again.

  Args:
    parts: (rows, weight) of the sources of a mixture, whose rows stand one after the other. With
      weights each source is shuffled and repeated by itself, and gets its share of the stream;
      without, all rows are alike.
  """
  weights = [weight for _, weight in parts]
  if len(parts) == 1 or None in weights:
    return grain.MapDataset.range(sum(rows for rows, _ in parts)).seed(seed).shuffle().repeat()
  ends = np.cumsum([rows for rows, _ in parts]).tolist()
  spans = [
    grain.MapDataset.range(end - rows, end).seed(seed + i).shuffle().repeat()
    for i, ((rows, _), end) in enumerate(zip(parts, ends, strict=True))
  ]
  return grain.MapDataset.mix(spans, np.asarray(weights, float) / sum(weights)).seed(seed)


def train_iterator(
  example: Callable,
  parts: int | Sequence[tuple[int, float | None]],
  batch_size: int,
  seed: int,
  share: Sequence[int] | None = None,
  threads: int | None = None,
  buckets: Sequence[int] | None = None,
) -> grain.DatasetIterator:
  """Endless shuffled batches; `get_state` / `set_state` resume it exactly, with any number of
  processes.

  Args:
    example: (row index, numpy Generator) -> arrays without a batch axis; the generator is seeded by
      the position in the stream, so what is drawn does not depend on what was skipped.
    parts: rows; or the sources of a mixture (`index_stream`).
    share: places in each batch that are made here (`sharding.batch_share`): only those are read.
      None: all.
    threads: that make examples, by default one per core, 16 at most. They are ahead of the training
      by a few batches.
    buckets: of each row, where a batch is to be of rows of one bucket (`shapes/order.py`).
  """
  places = range(batch_size) if share is None else [int(i) for i in share]
  threads = threads or min(16, os.cpu_count() or 1)
  rows = index_stream([(parts, None)] if isinstance(parts, int) else parts, seed)
  stream = rows.random_map(lambda index, rng: example(int(index), rng))
  in_turn = lambda number: range(number * batch_size, (number + 1) * batch_size)
  order = in_turn if buckets is None else BatchOrder(rows, buckets, batch_size)
  pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="examples")

  def made(number: int) -> Any:
    batch = order(number)
    return stack(list(pool.map(lambda i: stream[int(batch[i])], places)))

  dataset = grain.MapDataset.range(len(stream) // batch_size).map(made)
  return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def eval_batches(
  example: Callable, count: int, batch_size: int, seed: int, share: Sequence[int] | None = None
) -> Iterator[tuple[Any, int]]:
  """Every row once, in order, in batches; yields (batch, real rows in it): the last one is filled
  up with its last row. Each row's generator is seeded by (seed, index). `share` is that of
  `train_iterator`; the real rows are counted in the whole batch."""
  places = range(batch_size) if share is None else share
  for start in range(0, count, batch_size):
    index = [min(start + int(i), count - 1) for i in places]
    yield (
      stack([example(i, np.random.default_rng([seed, i])) for i in index]),
      min(batch_size, count - start),
    )
