"""The training rows of a config -> the shapes of its batches' images, from the files' headers."""

import concurrent.futures
import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.batches import ImageShape, header_size, image_shape
from caprl_jax.data.readers.qa_sources import read_parts
from caprl_jax.data.rows import QARow
from caprl_jax.data.shapes.buckets import Parts, ShapeBuckets, Shapes, choose_buckets, saved, shares
from caprl_jax.harness.settings import Settings
from caprl_jax.harness.training.state import rollout_images
from caprl_jax.models.policy import PolicyConfig
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.progress import counted

log = logging.getLogger("caprl_jax.modes.plan.data_shapes")


@dataclasses.dataclass(frozen=True)
class Bucket:
  """Images of batches of one shape. shape: what they are padded to for the captioner. image: height
  and width of the one with the most patches. share: of the images of training."""

  shape: ImageShape
  image: tuple[int, int]
  share: float

  def as_json(self) -> dict[str, Any]:
    """For plan.json."""
    return {"image_tokens": self.shape.tokens, "image": list(self.image), "share": self.share}

  def plan(self, plan: PlanConfig) -> PlanConfig:
    """The plan of a step with images of this bucket."""
    return dataclasses.replace(plan, image=self.image)


@dataclasses.dataclass(frozen=True)
class DataShapes:
  """buckets: smaller ones first. saved: the share of patches that need not be computed, of those
  with one shape for all. padding: the share of patches that is padding all the same."""

  rows: int
  buckets: list[Bucket]
  saved: float
  padding: float

  def as_json(self) -> dict[str, Any]:
    """For plan.json."""
    found = dataclasses.asdict(self)
    return found | {"buckets": [bucket.as_json() for bucket in self.buckets]}

  def text(self, step_secs: Sequence[float] = ()) -> str:
    """The buckets in lines. step_secs: of a step of each, where they are known."""
    secs = [f", a step {one:.1f} s" for one in step_secs] or [""] * len(self.buckets)
    lines = [
      f"{bucket.share:>8.1%} of up to {bucket.shape.tokens:,} tokens (the largest has "
      f"{bucket.image[1]} x {bucket.image[0]} pixels){one}"
      for bucket, one in zip(self.buckets, secs, strict=True)
    ]
    count = len(self.buckets)
    head = f"{self.rows:,} images of data.train in {count} bucket{'s' * (count > 1)} of shapes, "
    head += f"which saves {self.saved:.1%} of the patches; " if count > 1 else ""
    lines = [f"{head}{self.padding:.1%} of the patches are padding:", *lines]
    if step_secs and count > 1:
      mean = sum(b.share * one for b, one in zip(self.buckets, step_secs, strict=True))
      lines.append(f"a step takes {mean:.1f} s on average, and {step_secs[-1]:.1f} s without them")
    return "\n".join(lines)


def read_data_shapes(settings: Settings, models: Sequence[PolicyConfig]) -> DataShapes:
  """The buckets that a run begins with, but for rows whose images cannot be decoded.

  Args:
    models: that see the images: the captioner, then a judge that does.

  Raises:
    ValueError: as `read_parts`; none of the images can be opened.
  """
  bad = BadRowList("drop", None)
  data = settings.data
  read = read_parts(data.train, settings.seed, data.max_train_rows, bad, drawn=data.draw_train_rows)

  def look(row: QARow) -> tuple[Shapes, tuple[int, int]] | None:
    try:
      width, height = header_size(row)
      return tuple(image_shape([row], cfg) for cfg in models), (height, width)
    except ValueError:
      return None

  found, parts = [], []
  with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
    for part, rows in read:
      looked = counted(pool.map(look, rows), f"sizes of {part.source}", "image", len(rows))
      good = [one for one in looked if one is not None]
      found, parts = [*found, *good], [*parts, (len(good), part.weight)]
  if not found:
    raise ValueError(f"data.train = {settings.data.train!r}: none of its images can be opened")
  if failed := len(bad.rows) + sum(len(rows) for _, rows in read) - len(found):
    log.warning("%d rows that cannot be used are left out", failed)
  return _data_shapes(settings, models[0].vision.slots_multiple, found, parts)


def _data_shapes(
  settings: Settings,
  multiple: int,
  found: Sequence[tuple[Shapes, tuple[int, int]]],
  parts: Parts,
) -> DataShapes:
  shapes = [one for one, _ in found]
  wanted = settings.data.shape_buckets
  one = ShapeBuckets((shapes[0],), [0] * len(shapes)).moved([0] * len(shapes), shapes)
  buckets = choose_buckets(shapes, parts, rollout_images(settings), wanted, multiple) or one
  largest: dict[int, tuple[int, tuple[int, int]]] = {}
  for bucket, (shape, size) in zip(buckets.of_row, found, strict=True):
    largest[bucket] = max(largest.get(bucket, (0, (0, 0))), (shape[0].slots, size))
  listed = [
    Bucket(padded[0], largest[bucket][1], share)
    for bucket, (padded, share) in enumerate(zip(buckets.shapes, shares(buckets, parts)))
  ]
  number = {shape: i for i, shape in enumerate(dict.fromkeys(shapes))}
  exact = ShapeBuckets((*number, *one.shapes), [number[shape] for shape in shapes])
  padding = 1 - (1 - saved(exact, parts)) / (1 - saved(buckets, parts))
  return DataShapes(len(found), listed, saved(buckets, parts), padding)
