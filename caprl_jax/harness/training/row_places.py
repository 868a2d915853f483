"""The rows that a run was begun with -> where each of them is now.

Which rows can be used may change while a run is stopped: a file is lost, a bad one is mended. The
stream of batches is drawn over the rows of the first start, so that a run that goes on makes the
batches that it would have made: a row that is lost has the next one in its place
(`usable_rows.NextUsable`), and one that is new is not used. The buckets of image shapes, too, are
those of the first start.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax

from caprl_jax.atomic_files import write_text
from caprl_jax.data.batches import ImageShape
from caprl_jax.data.shapes.buckets import ShapeBuckets, Shapes, bucket_text
from caprl_jax.data.usable_rows import HasImage
from caprl_jax.harness.process.first import from_first
from caprl_jax.json_files import read_record, shown

log = logging.getLogger("caprl_jax.harness.training.row_places")

Parts = Sequence[tuple[int, float | None]]


@dataclasses.dataclass(frozen=True)
class RowPlaces:
  """rows: of each row of the first start its number now, -1 where it cannot be used any more.
  parts: rows and weight of each source, as `batches.train_iterator` takes them, at the first
  start.
  buckets: of the places, as the first start chose them; None where all images have one shape.
  """

  rows: list[int]
  parts: Parts
  buckets: ShapeBuckets | None = None

  def row_buckets(self, shapes: Sequence[Shapes]) -> ShapeBuckets | None:
    """The buckets of the rows as they are numbered now. shapes: of their images."""
    if self.buckets is None:
      return None
    of_row = [-1] * len(shapes)
    for row, bucket in zip(self.rows, self.buckets.of_row, strict=True):
      if row >= 0:
        of_row[row] = bucket
    return self.buckets.moved(of_row, shapes)


def row_places(
  path: pathlib.Path,
  rows: Sequence[HasImage],
  parts: Parts,
  goes_on: bool,
  digests: Sequence[str] = (),
  choose: Callable[[], ShapeBuckets | None] | None = None,
) -> RowPlaces:
  """The places of a run's rows. All processes call it.

  Args:
    path: the file that remembers the rows; the first process writes it.
    goes_on: the run has made steps already, with the rows that the file names. Without the file (of
      an older version) the rows are taken as they are.
    digests: of the rows' contents (`row_digests`): then a row is known by these, wherever it lies.
    choose: gives the buckets of the rows; those of a run that has made steps are the file's, or
      none. None: all images have one shape.

  Raises:
    ValueError: none of the rows of the first start is left, some have other contents, or the file
      is damaged.
  """
  keys = _keys(rows)
  first = jax.process_index() == 0
  begun = from_first(lambda: _read(path) if goes_on and path.exists() else None)
  if begun is None:
    buckets = choose() if choose and not goes_on else None
    if first and not goes_on:
      held = {"parts": [list(part) for part in parts], "rows": keys, "digests": list(digests)}
      if buckets is not None:
        held |= {"shapes": buckets.shapes, "buckets": list(buckets.of_row)}
      write_text(path, json.dumps(held, default=dataclasses.astuple) + "\n")
    return _said(RowPlaces(list(range(len(rows))), parts, buckets))
  number = {key: i for i, key in enumerate(keys)}
  found = [number.get(key, -1) for key in begun["rows"]]
  if digests and begun.get("digests"):
    found = _by_contents(path, rows, digests, begun["digests"], found)
  gone = found.count(-1)
  new = len(rows) - (len(found) - gone)
  if gone == len(found):
    raise ValueError(
      f"{path}: none of the {gone} rows that this run was begun with is among the {len(rows)} that "
      "there are now; bring them back, or use another --workdir"
    )
  if gone or new:
    log.warning(
      "this run was begun with %d rows: %d of them cannot be used any more, and the next ones "
      "take their places; %d rows are new and not used, which only a new --workdir changes",
      len(found),
      gone,
      new,
    )
  parts = [(count, weight) for count, weight in begun["parts"]]
  return _said(RowPlaces(found, parts, _buckets(begun)))


def _said(places: RowPlaces) -> RowPlaces:
  if places.buckets is not None:
    log.info("%s", bucket_text(places.buckets, places.parts))
  return places


def _buckets(begun: dict[str, Any]) -> ShapeBuckets | None:
  """What a file says of buckets; None where it says nothing."""
  if "buckets" not in begun:
    return None
  shapes = tuple(tuple(ImageShape(*shape) for shape in one) for one in begun["shapes"])
  return ShapeBuckets(shapes, begun["buckets"])


def _by_contents(
  path: pathlib.Path,
  rows: Sequence[HasImage],
  digests: Sequence[str],
  begun: Sequence[str],
  named: Sequence[int],
) -> list[int]:
  """The number of each row of the first start, by contents.

  Args:
    begun: digests of the rows of the first start.
    named: the numbers that these have by place and name.

  Raises:
    ValueError: a row is there by name, but its contents are nowhere.
  """
  left: dict[str, list[int]] = {}
  for i, digest in enumerate(digests):
    left.setdefault(digest, []).append(i)
  for numbers in left.values():
    numbers.reverse()  # the first ones go first
  found = [left[digest].pop() if left.get(digest) else -1 for digest in begun]
  taken = {*found}
  changed = [i for i, j in zip(named, found, strict=True) if j < 0 <= i and i not in taken]
  if changed:
    raise ValueError(
      f"{path}: {len(changed)} of the {len(begun)} rows have other questions, captions or another "
      f"image than when this run was begun, such as row {shown(rows[changed[0]].name)}; bring them "
      "back as they were, or use another --workdir (its policy.checkpoint may be what this run has "
      "learnt, which mode export writes)"
    )
  return found


def _keys(rows: Sequence[HasImage]) -> list[str]:
  """What tells rows apart: place and name, and a number where these are the same."""
  seen: Counter[str] = Counter()
  keys = []
  for row in rows:
    text = f"{getattr(row, 'where', '')}\0{row.name}"
    key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    seen[key] += 1
    keys.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
  return keys


def _read(path: pathlib.Path) -> dict[str, Any]:
  begun = read_record(path)
  whole = isinstance(begun, dict) and begun.get("rows") and "parts" in begun
  if (
    not whole
    or len(begun.get("digests") or begun["rows"]) != len(begun["rows"])
    or not _has_buckets(begun)
  ):
    raise ValueError(f"{path} is damaged: it must name rows and parts; use another --workdir")
  return begun


def _has_buckets(begun: dict[str, Any]) -> bool:
  """Whether each row has a bucket, and each bucket a shape; or there are none."""
  try:
    found = _buckets(begun)
    return found is None or (
      len(found.of_row) == len(begun["rows"]) and {*found.of_row} <= {*range(len(found.shapes))}
    )
  except (TypeError, KeyError):
    return False
