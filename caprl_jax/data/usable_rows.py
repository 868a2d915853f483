"""Rows and what was found about their images -> the rows that can be used, and why the others
cannot.

What is said here is what the makers of batches would raise later: the same decoder, the same
sizes, the same tokenizers are asked.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.batches import ImageShape, pixels_for
from caprl_jax.data.rows import (
  BadRow,
  ImageSource,
  decode,
  failure_reason,
  image_place,
  unreadable,
  what_failed,
)
from caprl_jax.json_files import shown
from caprl_jax.progress import counted


class RowError(ValueError):
  """Why a row cannot be used; `reason` is the class that it is counted in."""

  def __init__(self, said: str, reason: str):
    super().__init__(said)
    self.reason = reason


@dataclasses.dataclass(frozen=True)
class ImageFacts:
  """What an image is, from its bytes alone.

  width, height: in pixels, upright as its EXIF orientation asks.
  problem, reason: why it cannot be decoded, and the class of that; both empty where it can be.
  """

  sha256: str = ""
  bytes: int = 0
  format: str = ""
  width: int = 0
  height: int = 0
  problem: str = ""
  reason: str = ""


class HasImage(Protocol):
  """A row of any kind."""

  @property
  def image(self) -> ImageSource | None:
    """Where its image is; None for a row of text."""

  @property
  def name(self) -> str:
    """What messages call it."""
    ...


Row = TypeVar("Row", bound=HasImage)
# Raises ValueError for a row that cannot be used, whose image is as the facts say.
Check = Callable[[Any, ImageFacts], None]


def source_bytes(source: ImageSource) -> bytes:
  """The encoded image. Raises whatever reading it stumbles over."""
  if isinstance(source, bytes):
    return source
  return source.read_bytes() if isinstance(source, pathlib.Path) else source.read()


def look_at(data: bytes, digest: str | None = None) -> ImageFacts:
  """Decodes an image in full, as `rows.read_image` does. digest: its sha256, where it is known."""
  digest = digest or hashlib.sha256(data).hexdigest()
  try:
    image, kind = decode(data)
  except Exception as error:  # noqa: BLE001  decoders raise anything
    return ImageFacts(digest, len(data), problem=what_failed(error), reason=failure_reason(error))
  return ImageFacts(digest, len(data), kind, *image.size)


def not_there(error: Exception) -> ImageFacts:
  """The facts of an image whose bytes cannot be read."""
  return ImageFacts(problem=what_failed(error), reason=failure_reason(error))


def usable(
  rows: Iterable[Row], facts: Iterable[ImageFacts], checks: Sequence[Check] = ()
) -> Iterator[Row | BadRow]:
  """Each row, or in its place a BadRow that says why it cannot be used.

  Args:
    facts: of each row's image; those of a row without one are not looked at.
    checks: asked in order, of rows whose image can be decoded.
  """
  for row, fact in counted(zip(rows, facts, strict=True), "checking rows", "row"):
    if row.image is not None and fact.problem:
      yield bad_row(row, unreadable(row, fact.problem), fact.reason)
      continue
    try:
      for check in checks:
        check(row, fact)
      yield row
    except ValueError as error:
      yield bad_row(row, error)


def bad_row(row: HasImage, error: ValueError, reason: str = "") -> BadRow:
  """The BadRow of a row that an error tells of: its place, and the row named once."""
  said = str(error)
  if shown(row.name) not in said:
    said = f"row {shown(row.name)}: {said}"
  where = getattr(row, "where", "")
  if where and not said.startswith(where):
    said = f"{where}: {said}"
  reason = reason or getattr(error, "reason", "") or failure_reason(error)
  return BadRow(where or f"row {shown(row.name)}", said, reason)


def fits(pixels) -> Check:
  """A check that a processor (`PolicyConfig.vision.pixels`) takes images of the row's size."""

  def check(row: HasImage, facts: ImageFacts) -> None:
    if row.image is None:
      return
    try:
      pixels_for(pixels, row).shape(facts.height, facts.width)
    except ValueError as error:
      where = f"row {shown(row.name)} ({image_place(row)})"
      raise ValueError(f"{where}: {error} or drop the row") from error

  return check


def shapes_of(
  rows: Iterable[HasImage], facts: Iterable[ImageFacts], pixels: Sequence[Any]
) -> list[tuple[ImageShape, ...]]:
  """The shapes of each row's image, which `fits` has taken, by each of several processors."""
  known: dict[Any, tuple[ImageShape, ...]] = {}
  found = []
  for row, fact in zip(rows, facts, strict=True):
    key = (fact.height, fact.width, getattr(row, "limits", None))
    if key not in known:
      size = (fact.height, fact.width)
      cut = [pixels_for(one, row).shape(*size) if fact.width else (0, 0) for one in pixels]
      known[key] = tuple(ImageShape(*shape) for shape in cut)
    found.append(known[key])
  return found


def shape_of(facts: Iterable[ImageFacts], pixels) -> ImageShape:
  """The smallest shape that holds all of the images, which `fits` has taken."""
  sizes = {(fact.height, fact.width) for fact in facts if fact.width}
  shapes = [pixels.shape(*size) for size in sizes] or [(0, 0)]
  return ImageShape(max(slots for slots, _ in shapes), max(tokens for _, tokens in shapes))


class NextUsable:
  """(row index, generator) -> the row's example or, where it cannot be made, that of the next row
  of which it can; after the last row comes the first.

  Rows are checked before a run begins, so this is for what fails all the same: a disk, a file that
  somebody changed. What stands in for a row depends on the index and on which rows fail, on nothing
  that was read before: a run that goes on from a checkpoint makes the same batches, as does each
  process of several. (Where two processes make the same places of a batch, because the devices that
  share them are not of one process, a row must fail in both.)

  Args:
    example: as `batches.train_iterator` takes it.
    rows: that the indices are of.
    bad: what is told of each row that fails; raises ValueError where bad rows are refused.
    mark: what is made of an example that stands in for another; None takes it as it is.
    places: what the indices are of, where that is not `rows`: the row in each place, -1 for one
      that is not there any more (`row_places.py`).
    buckets: of each place, where only one of its bucket may stand in for another: it is padded as
      the others of the batch are.
  """

  def __init__(
    self,
    example: Callable[[int, np.random.Generator], Any],
    rows: Sequence[HasImage],
    bad: BadRowList,
    mark: Callable[[Any], Any] | None = None,
    places: Sequence[int] | None = None,
    buckets: Sequence[int] | None = None,
  ):
    self.buckets = buckets
    self.example, self.rows, self.bad, self.mark = example, rows, bad, mark
    self.places = range(len(rows)) if places is None else places

  def __call__(self, index: int, rng: np.random.Generator) -> Any:
    for further in range(len(self.places)):
      place = (index + further) % len(self.places)
      number = self.places[place]
      if number < 0 or (self.buckets is not None and self.buckets[place] != self.buckets[index]):
        continue
      try:
        made = self.example(number, rng)
      except ValueError as error:
        self.bad.late(bad_row(self.rows[number], error))
        continue
      return self.mark(made) if self.mark and further else made
    some = (
      "of the rows of a bucket of image shapes"
      if self.buckets is not None
      else f"of {len(self.rows)} rows"
    )
    raise ValueError(f"none {some} can be read any more; see the log for why")
