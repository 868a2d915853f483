"""The images there are, a filter -> those that are captioned."""

import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

from caprl_jax.data.rows import CaptionRow
from caprl_jax.json_files import decode, shown
from caprl_jax.modes.caption.columns import ONE
from caprl_jax.modes.caption.formats.place import Place
from caprl_jax.modes.caption.formats.read_back import guess_rows
from caprl_jax.modes.caption.formats.texts import text_path

log = logging.getLogger("caprl_jax.modes.caption.selection")


@dataclasses.dataclass(frozen=True)
class FilterConfig:
  """Which images are captioned; a name is what `image` says in the output.

  names: only those in whose name this regular expression is found.
  leave_out: not those in whose name this one is found.
  files: only those that this file lists, one on a line: whole names, or their ends (b/1.png).
  not_in: not those that have a caption in this output of another job: JSON lines, parquet, a folder
    of format hf, webdataset, tfds or txt. Images that failed there are captioned.
  """

  names: str | None = None
  leave_out: str | None = None
  files: str | None = None
  not_in: str | None = None

  def __post_init__(self):
    for key in ("names", "leave_out"):
      pattern = getattr(self, key)
      try:
        re.compile(pattern or "")
      except re.error as error:
        raise ValueError(f"{key} = {shown(pattern)} is no regular expression: {error}") from error


def selected(rows: Sequence[CaptionRow], cfg: FilterConfig, base: pathlib.Path) -> list[CaptionRow]:
  """The rows that a filter leaves.

  Args:
    base: the folder that a tree of texts mirrors from.

  Raises:
    ValueError: none is left; a list or output that is not there or cannot be read.
  """
  kept, told = list(rows), [f"{len(rows)} images"]
  for key, keep in _steps(cfg, kept, base):
    kept = [row for row in kept if keep(row)]
    told.append(f"{len(kept)} after caption.filter.{key}")
  if len(told) > 1:
    log.info("%s", ", ".join(told))
  if not kept:
    raise ValueError(f"caption.filter leaves no image: {', '.join(told)}")
  return kept


def _steps(cfg: FilterConfig, rows: list[CaptionRow], base: pathlib.Path) -> Iterator:
  """The key of each condition that is set, and a function of a row that says whether it is met."""
  if cfg.names is not None:
    names = re.compile(cfg.names)
    yield "names", lambda row: names.search(row.name)
  if cfg.leave_out is not None:
    others = re.compile(cfg.leave_out)
    yield "leave_out", lambda row: not others.search(row.name)
  if cfg.files is not None:
    listed = _listed(cfg.files)
    met: set[str] = set()

    def is_listed(row: CaptionRow) -> bool:
      found = {row.name, *_ends(row.name)} & listed
      met.update(found)
      return bool(found)

    yield "files", is_listed
    if absent := listed - met:
      log.warning(
        "%s: %d of %d lines name no image, such as %s",
        cfg.files,
        len(absent),
        len(listed),
        shown(min(absent)),
      )
  if cfg.not_in is not None:
    there = _captioned_in(cfg.not_in, rows, base)
    yield "not_in", lambda row: row.name not in there


def _ends(name: str) -> list[str]:
  parts = name.split("/")
  return ["/".join(parts[i:]) for i in range(1, len(parts))]


def _listed(path: str) -> set[str]:
  place = pathlib.Path(os.path.expanduser(path))
  try:
    text = decode(place.read_bytes())
  except OSError as error:
    raise ValueError(f"caption.filter.files = {shown(path)}: {error.strerror}") from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f"caption.filter.files = {shown(path)}: not text in UTF-8 ({error})"
    ) from error
  found = {line.strip() for line in text.splitlines() if line.strip()}
  if not found:
    raise ValueError(f"caption.filter.files = {shown(path)} is empty; write one image a line")
  return found


def _captioned_in(path: str, rows: list[CaptionRow], base: pathlib.Path) -> set[str]:
  """The names of the rows that have a caption in an output."""
  place = pathlib.Path(os.path.expanduser(path))
  if not place.exists():
    raise ValueError(
      f"caption.filter.not_in = {shown(path)}: no such file or folder; name a job's output"
    )
  held = (place / "data", place / "dataset_info.json", *place.glob("*.tar"))
  texts = place.is_dir() and not any(path.exists() for path in held)
  if texts:
    tree = Place(place, "txt", base)
    return {row.name for row in rows if text_path(tree, row, ONE[0]).exists()}
  found = {row.get("image") for row in guess_rows(place) if "error" not in row}
  if not found:
    log.warning("caption.filter.not_in = %s: no captioned image is in it", shown(path))
  return {name for name in found if isinstance(name, str)}
