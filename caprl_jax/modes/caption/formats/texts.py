"""Captions -> a text per image, beside it or in a tree of their own; the texts that are there."""

import os
import pathlib
from collections.abc import Iterator, Sequence

from caprl_jax.atomic_files import write_text
from caprl_jax.data.readers.image_sources import mirrored
from caprl_jax.data.rows import CaptionRow
from caprl_jax.json_files import decode, listed, shown
from caprl_jax.modes.caption.columns import CAPTION, Column, is_kept, texts_of
from caprl_jax.modes.caption.formats.place import Place, Results, captioned

LONGEST_NAME = 255  # bytes of a file's name, on most file systems


def text_path(place: Place, row: CaptionRow, column: Column) -> pathlib.Path:
  """Where the text of an image and a column goes. Raises ValueError as `mirrored`."""
  alone = len(place.columns) == 1 or column.name == CAPTION
  suffix = ".txt" if alone else f".{column.name}.txt"
  return (place.path / mirrored(row, place.base)).with_suffix(suffix)


def text_there(place: Place, row: CaptionRow, column: Column) -> str | None:
  """The text that is there already; None where none is. Raises ValueError, with its name, for one
  in an encoding that it does not say.
  """
  path = text_path(place, row, column)
  try:
    return decode(path.read_bytes()).rstrip("\r\n")
  except (FileNotFoundError, NotADirectoryError):
    return None
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path} is there and is not UTF-8, nor UTF-16 with its byte order mark ({error.reason} at "
      f"byte {error.start}); save it as UTF-8, or take caption.existing = skip or overwrite"
    ) from error


def check_texts(place: Place, inputs: Sequence[CaptionRow]) -> None:
  """Every text has a place of its own, and what is there may be there. Raises ValueError."""
  first: dict[pathlib.Path, CaptionRow] = {}
  for row in inputs:
    for column in place.columns:
      path = text_path(place, row, column)
      if path in first:
        raise ValueError(
          f"{first[path].name!r} and {row.name!r} would both be captioned in {path}; "
          "rename one, or caption into .jsonl or .parquet"
        )
      if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise ValueError(
          f"{shown(row.name)} would be captioned in a file whose name has more than {LONGEST_NAME} "
          "bytes; rename it, or caption into .jsonl or .parquet"
        )
      first[path] = row
  there = list(_there(first))
  if there and place.existing in (None, "refuse"):
    raise ValueError(
      f"{len(there)} of the texts to write are there already, such as {min(there)}; "
      "move them, name another caption.output, or set caption.existing to skip, overwrite, append "
      "or prepend"
    )
  if place.existing in ("append", "prepend"):
    bad = []
    for path in there:
      try:
        decode(path.read_bytes())
      except UnicodeDecodeError:
        bad.append(str(path))
    if bad:
      raise ValueError(
        f"{len(bad)} of {len(there)} texts that are there are neither UTF-8 nor UTF-16 with a byte "
        f"order mark, and caption.existing = {place.existing} would mangle them; save them as "
        f"UTF-8, or take skip or overwrite:{listed(sorted(bad))}"
      )


def _there(paths: dict[pathlib.Path, CaptionRow]) -> Iterator[pathlib.Path]:
  """Those of the paths that are files. Raises ValueError where a folder cannot be made."""
  for folder in sorted({path.parent for path in paths}):
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if not above.is_dir():
      raise ValueError(
        f"{folder} cannot be made for texts: {above} is a file; name another caption.output"
      )
    if above == folder:
      yield from (folder / name for name in os.listdir(folder) if folder / name in paths)


def write_texts(place: Place, found: Results) -> None:
  """Writes each text whole; what was there and stays is not touched."""
  place.path.mkdir(parents=True, exist_ok=True)
  for item in captioned(place, found):
    for column in place.columns:
      if is_kept(item.row, column):
        continue
      texts = texts_of(item.row, column)
      if len(texts) > 1:
        texts = [" ".join(text.split()) for text in texts]
      text = "\n".join(texts).encode("utf-8", "replace").decode()
      write_text(text_path(place, item.source, column), text + "\n")
