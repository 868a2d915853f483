"""Files of captions -> the images that all of them have, and their pictures."""

import logging
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from caprl_jax.data.readers.image_sources import find_images
from caprl_jax.data.readers.image_spellings import spelled_image
from caprl_jax.data.rows import CaptionRow, QARow, read_image
from caprl_jax.json_files import json_lines, shown
from caprl_jax.modes.gallery.page import ComparedImage, GivenCaption

log = logging.getLogger("caprl_jax.modes.gallery.captions")


def read_captions(path: pathlib.Path) -> dict[str, GivenCaption]:
  """Image -> what was said of it, from JSON lines.

  Raises ValueError for a file that is not there or empty; with file and line, for one that is no
  row of mode `caption` and for an image that was there before.
  """
  found: dict[str, GivenCaption] = {}
  lines: dict[str, str] = {}
  if not path.is_file():
    raise ValueError(f"{path}: No such file; gallery.captions names .jsonl files of mode caption")
  for where, value in json_lines(path, halves=True):
    try:
      if isinstance(value, ValueError):
        raise value
      name, said = _parse(value)
    except ValueError as error:
      why = str(error).removeprefix(f"{where}: ")
      raise ValueError(
        f"{where}: not a row of mode caption ({why}); mend or drop the line"
      ) from error
    line = where.rpartition(":")[2]
    if name in found:
      raise ValueError(
        f"{where}: image {shown(name)} stands in line {lines[name]} too; keep one of them"
      )
    found[name], lines[name] = said, line
  if not found:
    raise ValueError(f"{path} has no rows")
  return found


def _parse(row: Any) -> tuple[str, GivenCaption]:
  if not isinstance(row, dict):
    raise ValueError(f"a {type(row).__name__}, not an object")
  for key, kind in (
    ("image", str),
    ("caption", str),
    ("error", str),
    ("finish", str),
    ("tokens", list),
  ):
    if key in row and row[key] is not None and not isinstance(row[key], kind):
      raise ValueError(f"{key} is {row[key]!r:.60}, not a {kind.__name__}")
  if row.get("image") is None:
    raise ValueError("the key 'image' is missing")
  if row.get("error") is not None:
    return row["image"], GivenCaption(None, row["error"])
  if row.get("caption") is None:
    raise ValueError("neither 'caption' nor 'error'")
  tokens = row.get("tokens")
  return row["image"], GivenCaption(
    row["caption"],
    "",
    None if tokens is None else len(tokens),
    row["finish"] == "length" if row.get("finish") is not None else None,
  )


def match_names(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
  """Those of `names` that are in `others` -> what they are called there: the same, or one path ends
  in the other whole ("/data/images/1.png" and "images/1.png"), where just one does."""
  known = set(others)
  found = {name: name for name in names if name in known}
  left = [name for name in names if name not in found]
  if not left:
    return found
  tails: dict[str, set[str]] = {}
  for other in known:
    for tail in _tails(other):
      tails.setdefault(tail, set()).add(other)
  taken: dict[str, list[str]] = {}
  for name in left:
    fitting = tails.get("/".join(_parts(name)), set()) | {
      other
      for tail in _tails(name)
      for other in tails.get(tail, ())
      if "/".join(_parts(other)) == tail
    }
    if len(fitting) == 1:
      taken.setdefault(fitting.pop(), []).append(name)
  used = set(found.values())
  return found | {
    who[0]: other for other, who in taken.items() if len(who) == 1 and other not in used
  }


def _parts(name: str) -> list[str]:
  return [part for part in pathlib.PurePath(name).parts if part not in ("/", "..")]


def _tails(name: str) -> Iterator[str]:
  parts = _parts(name)
  return ("/".join(parts[i:]) for i in range(len(parts)))


def common_images(
  files: Mapping[str, Mapping[str, GivenCaption]], paths: Mapping[str, str]
) -> list[ComparedImage]:
  """The images of the first file that all others have. Raises ValueError where there are none."""
  (first, captions), *others = files.items()
  names = list(captions)
  called = {who: match_names(names, list(theirs)) for who, theirs in others}
  common = [name for name in names if all(name in table for table in called.values())]
  if not common:
    listed = "; ".join(
      f"{paths[who]} has {len(theirs):,}, such as {shown(next(iter(theirs)))}"
      for who, theirs in files.items()
    )
    raise ValueError(
      f"the captions have no image in common: {listed}. Caption one caption.input "
      "with each captioner"
    )
  for who, theirs in files.items():
    if len(theirs) > len(common):
      log.info(
        "%s: %d of its %d images are not in all files, and are left aside",
        who,
        len(theirs) - len(common),
        len(theirs),
      )
  return [
    ComparedImage(
      name,
      {first: captions[name]} | {who: files[who][table[name]] for who, table in called.items()},
    )
    for name in common
  ]


class Pictures:
  """Finds the picture of an image: among those of `gallery.pictures`, with its questions, or where
  its name points.

  `missing` counts those that `read` did not find.
  """

  def __init__(self, source: str | None, names: Sequence[str], folders: Sequence[pathlib.Path]):
    self.folders, self.missing = folders, 0
    alike = len(names) > 1 and len({os.path.isabs(name) for name in names}) == 1
    self.common = os.path.commonpath(names) if alike else None
    self.rows: dict[str, CaptionRow] = {}
    if source is not None:
      rows = {row.name: row for row in find_images(source, "gallery.pictures")}
      self.rows = {name: rows[other] for name, other in match_names(names, list(rows)).items()}
      if not self.rows:
        raise ValueError(
          f"gallery.pictures = {source!r}: none of its {len(rows):,} images, such "
          f"as {shown(next(iter(rows)))}, is one of those captioned, such as "
          f"{shown(names[0])}; give the caption.input that was captioned"
        )

  def short(self, shared: ComparedImage) -> str:
    """Its name without the folder that all have in common, which is nobody's business on a page
    that is passed on.
    """
    if self.common is None:
      return (os.path.basename(shared.name) or shared.name)[-255:]
    return os.path.relpath(shared.name, self.common) if self.common else shared.name

  def read(self, shared: ComparedImage) -> Image.Image | None:
    for row in self._rows(shared):
      try:
        return read_image(row)
      except ValueError:
        continue
    self.missing += 1
    return None

  def _rows(self, shared: ComparedImage) -> Iterator[CaptionRow | QARow]:
    if shared.name in self.rows:
      yield self.rows[shared.name]
    if shared.row:
      yield shared.row
    for folder in self.folders:
      try:  # other tools write data: URIs
        image = spelled_image(shared.name, folder, "").image
      except ValueError:
        return
      if isinstance(image, bytes) or os.path.isfile(image):  # long names: no error, as pathlib's
        yield CaptionRow(image, "", shared.name)
