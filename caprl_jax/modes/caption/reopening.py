"""A job that is done or in work, some of it missing, damaged or failed -> shards in which exactly
that is left to do.
"""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import Any

from caprl_jax.data.rows import CaptionRow
from caprl_jax.harness.row_shards import RowResult, ShardedJob, parse_row
from caprl_jax.json_files import json_lines
from caprl_jax.modes.caption.captioning import kept
from caprl_jax.modes.caption.columns import units_of
from caprl_jax.modes.caption.formats.place import Place
from caprl_jax.modes.caption.formats.read_back import read_rows
from caprl_jax.modes.caption.formats.texts import text_path, text_there

log = logging.getLogger("caprl_jax.modes.caption.reopening")

_AGAIN = "tried again"  # in what is told about an image that failed twice


def kept_units(place: Place, rows: list[CaptionRow], retry_failed: bool) -> dict[int, dict]:
  """The units of a finished job's output that are whole, by number: with those that failed, unless
  they are to be tried again.
  """
  found: dict[int, dict[str, Any]] = {}
  count = len(place.columns)
  if place.kind == "txt":
    failed = _failed_texts(place)
    for number, row in enumerate(rows):
      for at, column in enumerate(place.columns):
        if row.name in failed:
          found[number * count + at] = failed[row.name]
        elif text_path(place, row, column).exists():
          found[number * count + at] = kept(row, _text(place, row, column), column)
  else:
    numbers = {row.name: number for number, row in enumerate(rows)}
    for row in read_rows(place):
      number = numbers.get(row.get("image", ""))
      if number is not None:
        units = enumerate(units_of(row, place.columns), number * count)
        found |= {unit: value for unit, value in units if value is not None}
  if retry_failed:
    found = {unit: value for unit, value in found.items() if "error" not in value}
  return found


def _failed_texts(place: Place) -> dict[str, dict[str, Any]]:
  if not place.failed_path.is_file():
    return {}
  lines = (value for _, value in json_lines(place.failed_path, halves=True))
  return {
    value["image"]: {"image": value["image"], "error": value["error"]}
    for value in lines
    if isinstance(value, dict) and isinstance(value.get("error"), str) and "image" in value
  }


def _text(place: Place, row: CaptionRow, column) -> str:
  try:
    return text_there(place, row, column) or ""
  except ValueError:
    return ""  # it stays as it is, whatever it holds


def seed(job: ShardedJob[CaptionRow], units: dict[int, dict[str, Any]]) -> None:
  """Makes a job's folder with units that are done. It appears whole or not at all."""
  temporary = job.folder.with_name(job.folder.name + ".seed")
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  for shard in range(job.shards):
    numbers = job.numbers(shard)
    done = [number for number in numbers if number in units]
    suffix = "" if len(done) == len(numbers) else ".partial"
    _write(
      temporary / (job.path(shard).name + suffix),
      (RowResult(number, None, units[number], _about(units[number])) for number in done),
    )
  os.rename(temporary, job.folder)


def _about(unit: dict[str, Any]) -> dict[str, Any]:
  return {"reason": "failed before"} if "error" in unit else {}


def tried_again(found: list[RowResult[CaptionRow]]) -> list[RowResult[CaptionRow]]:
  """The results, those that failed marked as tried again: for other hosts, and the next start."""
  return [
    dataclasses.replace(item, about=item.about | {_AGAIN: True}) if "error" in item.row else item
    for item in found
  ]


def _to_be_tried(item: RowResult[CaptionRow]) -> bool:
  return "error" in item.row and _AGAIN not in item.about


def made_again(job: ShardedJob[CaptionRow], *, retry_failed: bool) -> Callable[[int], bool]:
  """What says of a whole shard of any host whether nothing of it is left to be mended: its host may
  not have looked at it yet. It remembers those of which that was so."""
  known: set[int] = set()

  def whole(shard: int) -> bool:
    if shard in known:
      return True
    try:
      good, damaged = _good_lines(job, job.path(shard), job.numbers(shard))
    except FileNotFoundError:  # its host has just begun to mend it
      return False
    left = retry_failed and any(map(_to_be_tried, good.values()))
    if damaged or left or len(good) < len(job.numbers(shard)):
      return False
    known.add(shard)
    return True

  return whole


def mend(job: ShardedJob[CaptionRow], *, retry_failed: bool) -> int:
  """Takes out of this host's shards what is damaged and, if they are to be tried again, images that
  failed and were not tried again since. Returns how many units of shards that were whole are left
  to do now.
  """
  again = 0
  for shard in job.mine:
    path = job.path(shard)
    partial = path.with_name(path.name + ".partial")
    was_whole = path.exists()
    source = path if was_whole else partial
    if not source.exists():
      continue
    good, damaged = _good_lines(job, source, job.numbers(shard))
    if retry_failed:
      good = {number: item for number, item in good.items() if not _to_be_tried(item)}
    left = len(job.numbers(shard)) - len(good)
    if was_whole and not left and not damaged:
      continue
    if was_whole and left:
      again += left
    temporary = partial.with_name(partial.name + ".tmp")
    _write(temporary, good.values())
    os.replace(temporary, partial)
    path.unlink(
      missing_ok=True
    )  # a kill before this leaves the shard as it was, to be mended again
  return again


def _good_lines(
  job: ShardedJob[CaptionRow], path: pathlib.Path, numbers: range
) -> tuple[dict[int, RowResult[CaptionRow]], bool]:
  """The results in a shard's lines by number, and whether a line holds none."""
  good: dict[int, RowResult[CaptionRow]] = {}
  damaged = False
  for line in path.read_bytes().split(b"\n"):
    if not line:
      continue
    try:
      item = parse_row(line, job.rows)
      assert item.number in numbers and isinstance(item.row["image"], str)
    except (ValueError, TypeError, KeyError, IndexError, AssertionError):
      damaged = True
      continue
    good[item.number] = item
  return good, damaged


def _write(path: pathlib.Path, items: Iterable[RowResult]) -> None:
  with open(path, "wb") as file:
    for item in items:
      file.write(json.dumps([item.number, item.row, item.about]).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
