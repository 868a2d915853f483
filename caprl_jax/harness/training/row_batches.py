"""The rows of a run -> the endless iterator over its training batches, the same at every start."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import grain

from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.batches import train_iterator
from caprl_jax.data.shapes.buckets import Parts, Shapes, choose_buckets
from caprl_jax.data.usable_rows import HasImage, NextUsable
from caprl_jax.harness.training.row_places import row_places
from caprl_jax.models.policy import PolicyConfig

# What makes a row's example: (its number, generator) -> arrays without a batch axis.
Example = Callable[[int, Any], Any]


@dataclasses.dataclass(frozen=True)
class TrainingRows:
  """rows: that can be used, of all sources. parts: rows and weight of each source, in order.
  digests: of the rows (`row_digests`). shapes: of their images (`usable_rows.shapes_of`). bad: what
  is done with a row that fails when its turn comes."""

  rows: Sequence[HasImage]
  parts: Parts
  digests: Sequence[str]
  shapes: Sequence[Shapes]
  bad: BadRowList


def training_batches(
  path: pathlib.Path,
  given: TrainingRows,
  example: Callable[[Callable[[int], Shapes] | None], Example],
  *,
  cfg: PolicyConfig,
  batch_size: int,
  shape_buckets: int | None,
  seed: int,
  share: Sequence[int],
  goes_on: bool,
) -> grain.DatasetIterator:
  """As `train_iterator`, of the places that the rows had at the first start (`row_places`), with
  images in the buckets of shapes that were chosen then.

  Args:
    path: the file that remembers the rows.
    example: what makes examples, given what the image of each row is padded to; None: all are
      padded to one shape.
    cfg: of the captioner.
    shape_buckets: the most of them, as `choose_buckets` takes it.
    goes_on: the run has made steps already.

  Raises:
    ValueError: as `row_places`.
  """
  choose = functools.partial(
    choose_buckets,
    given.shapes,
    given.parts,
    batch_size,
    shape_buckets,
    cfg.vision.slots_multiple,
  )
  places = row_places(path, given.rows, given.parts, goes_on, given.digests, choose)
  buckets = places.row_buckets(given.shapes)
  bucket_of = None if places.buckets is None else places.buckets.of_row
  made = NextUsable(
    example(None if buckets is None else buckets.of),
    given.rows,
    given.bad,
    places=places.rows,
    buckets=bucket_of,
  )
  return train_iterator(made, places.parts, batch_size, seed, share, buckets=bucket_of)
