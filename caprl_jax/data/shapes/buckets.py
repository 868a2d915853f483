"""The shape of each row's image -> a few buckets, so that a batch of small images is not padded to
the largest of the data."""

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence

from caprl_jax.data.batches import ImageShape, shape_bucket

log = logging.getLogger("caprl_jax.data")

# Of one image, for each model that sees it: the captioner, then a judge that sees images.
Shapes = tuple[ImageShape, ...]
Parts = Sequence[
  tuple[int, float | None]
]  # rows and weight of each source (`batches.index_stream`)

# Without a number of buckets in the config: each is a program to compile, and must be worth it.
AUTO_MOST = 4
AUTO_GAIN = 0.1  # patches that one more bucket saves, of those that all images in one shape have
AUTO_BATCHES = 8  # that a bucket fills in an epoch


@dataclasses.dataclass(frozen=True)
class ShapeBuckets:
  """shapes: what a bucket's images are padded to, smaller ones first. of_row: the bucket of each
  row."""

  shapes: tuple[Shapes, ...]
  of_row: Sequence[int]

  def of(self, row: int) -> Shapes:
    """What the row's image is padded to."""
    return self.shapes[self.of_row[row]]

  def moved(self, of_row: Sequence[int], shapes: Sequence[Shapes]) -> "ShapeBuckets":
    """The same buckets of other rows, -1 for those that are in none; larger where one of these
    would not fit.

    Args:
      shapes: of the rows' images.
    """
    held = list(self.shapes)
    for bucket, shape in {*zip(of_row, shapes, strict=True)}:
      if bucket >= 0:
        held[bucket] = _holding(held[bucket], shape)
    return ShapeBuckets(tuple(held), of_row)


def choose_buckets(
  shapes: Sequence[Shapes], parts: Parts, batch_size: int, most: int | None, multiple: int
) -> ShapeBuckets | None:
  """The buckets that leave the fewest patches to compute; None where one shape for all rows is to
  be had.

  Args:
    shapes: of the rows' images.
    parts: sources of the rows; with weights an image counts as often as it will be seen.
    batch_size: images of a batch. A bucket fills at least one in an epoch, so that no row waits for
      longer than that.
    most: buckets. None: up to `AUTO_MOST`, as long as one more saves a share of `AUTO_GAIN`.
    multiple: of patch slots, as `shape_bucket` takes it.
  """
  if not shapes:
    return None
  if most == 1:
    could = choose_buckets(shapes, parts, batch_size, None, multiple)
    if could is not None:
      share = saved(could, parts)
      log.info("shape_buckets = 1 pads all images to one shape; None saves %.1f%%", 100 * share)
    return None
  kinds = _kinds(shapes, parts, multiple)
  least = batch_size * (AUTO_BATCHES if most is None else 1) / len(shapes)
  cuts = _cheapest_cuts(kinds, most or AUTO_MOST, least)
  if not cuts:
    return None
  (one, _), *more = cuts
  gain = AUTO_GAIN * one if most is None else 1e-9 * one
  chosen, cost = 1, one
  for saving, _ in more:
    if cost - saving < gain:
      break
    chosen, cost = chosen + 1, saving
  if chosen == 1:
    return None
  ends = cuts[chosen - 1][1]
  held, bucket_of = [], {}
  for bucket, (start, end) in enumerate(zip((0, *ends), ends)):
    held.append(_holding(*(kind.shapes for kind in kinds[start:end])))
    bucket_of |= {kind.rounded: bucket for kind in kinds[start:end]}
  return ShapeBuckets(
    tuple(held), [bucket_of[shape_bucket(shape[0], multiple)] for shape in shapes]
  )


def shares(buckets: ShapeBuckets, parts: Parts) -> list[float]:
  """The share of the images of training that is in each bucket."""
  found = [0.0] * len(buckets.shapes)
  for bucket, share in zip(buckets.of_row, _row_shares(parts), strict=True):
    found[bucket] += share
  return found


def saved(buckets: ShapeBuckets, parts: Parts) -> float:
  """The share of the patches that need not be computed, of those with one shape for all."""
  cost = sum(share * _slots(s) for share, s in zip(shares(buckets, parts), buckets.shapes))
  return max(0.0, 1 - cost / _slots(_holding(*buckets.shapes)))


def bucket_text(buckets: ShapeBuckets, parts: Parts) -> str:
  """The buckets in one line, for the log."""
  each = ", ".join(
    f"{share:.1%} of up to {shapes[0].tokens:,} tokens"
    for share, shapes in zip(shares(buckets, parts), buckets.shapes)
  )
  return (
    f"images in {len(buckets.shapes)} buckets of shapes: {each}; each batch is of one, which saves "
    f"{saved(buckets, parts):.1%} of the patches"
  )


@dataclasses.dataclass(frozen=True)
class _Kind:
  """Images of about one shape. rounded: their common `shape_bucket`. shapes: which holds all of
  them. share: of the images of training."""

  rounded: ImageShape
  shapes: Shapes
  share: float


def _kinds(shapes: Sequence[Shapes], parts: Parts, multiple: int) -> list[_Kind]:
  """Of all images, smaller ones first."""
  found: dict[ImageShape, _Kind] = {}
  for shape, share in zip(shapes, _row_shares(parts), strict=True):
    rounded = shape_bucket(shape[0], multiple)
    kind = found.get(rounded, _Kind(rounded, shape, 0.0))
    found[rounded] = _Kind(rounded, _holding(kind.shapes, shape), kind.share + share)
  return sorted(found.values(), key=lambda kind: (kind.rounded.slots, kind.rounded.tokens))


def _cheapest_cuts(
  kinds: Sequence[_Kind], most: int, least: float
) -> list[tuple[float, tuple[int, ...]]]:
  """(patches per image, ends of the pieces) of the cheapest cuts of kinds into 1, 2, ... `most`
  pieces that have at least a share `least` of the images each."""
  costs = {}
  for start in range(len(kinds)):
    share, shapes = 0.0, kinds[start].shapes
    for end in range(start + 1, len(kinds) + 1):
      share, shapes = share + kinds[end - 1].share, _holding(shapes, kinds[end - 1].shapes)
      if share >= least - 1e-9:
        costs[start, end] = share * _slots(shapes)
  cuts: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
  found = []
  for _ in range(most):
    longer: dict[int, tuple[float, tuple[int, ...]]] = {}
    for (start, end), cost in costs.items():
      if start in cuts:
        tried = (cuts[start][0] + cost, (*cuts[start][1], end))
        longer[end] = min(longer.get(end, tried), tried)
    cuts = longer
    if len(kinds) not in cuts:
      break
    found.append(cuts[len(kinds)])
  return found


def _row_shares(parts: Parts) -> Iterator[float]:
  """How often each row is seen, of all; as `batches.index_stream` mixes the sources."""
  total = sum(rows for rows, _ in parts)
  weights = [weight for _, weight in parts if weight is not None]
  for rows, weight in parts:
    alike = weight is None or len(weights) < len(parts) or len(parts) == 1
    yield from itertools.repeat(1 / total if alike else weight / sum(weights) / max(rows, 1), rows)


def _holding(*shapes: Shapes) -> Shapes:
  """The smallest shapes that hold all of these."""
  models = zip(*shapes, strict=True)
  return tuple(ImageShape(max(s.slots for s in m), max(s.tokens for s in m)) for m in models)


def _slots(shapes: Shapes) -> int:
  return sum(shape.slots for shape in shapes)
