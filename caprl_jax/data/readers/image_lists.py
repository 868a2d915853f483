"""A list of images (JSON lines, JSON, CSV, a path per line) -> rows to caption."""

import csv
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

from caprl_jax.data.readers.image_spellings import spelled_image
from caprl_jax.data.rows import CaptionRow
from caprl_jax.image_files import HEAD_BYTES, sniff
from caprl_jax.json_files import decode, json_lines, read_json, shown, starts_with

LIST_SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".csv", ".tsv")
IMAGE_KEYS = ("image", "image_path", "images", "file_name", "path")  # the first that is there
_LONGEST_NAME = 256  # characters: what is longer is named by its place
_COLUMNS = {".csv": ",", ".tsv": "\t"}


@dataclasses.dataclass(frozen=True)
class UnreadableImage:
  """What a row says of its image and nobody can read: the row fails when its turn comes."""

  where: str
  message: str

  def read(self) -> bytes:
    raise ValueError(self.message)


def scan_list(path: pathlib.Path) -> Iterator[CaptionRow]:
  """The images of a list, as `image_spellings` reads them, from the list's folder.

  A .txt file has one on a line; .csv and .tsv a column of one of the names `IMAGE_KEYS`; JSON
  lines, or a JSON list, objects with such a key, or the image itself. A row is named by what it
  says; an image that stands in it by its `name`, or by its digest; what cannot be read by its
  line, and it fails when it is read.

  Raises:
    ValueError: no list; a row that is none, with its line; no row.
  """
  empty = True
  for where, value in _values(path):
    empty = False
    yield _row(value, path.parent, where)
  if empty:
    raise ValueError(f"{path} has no rows; write one image a line")


def _row(value: Any, root: pathlib.Path, where: str) -> CaptionRow:
  name = None
  if isinstance(value, dict):
    key = next((key for key in IMAGE_KEYS if value.get(key) is not None), None)
    if key is None:
      what = f"it has the keys {shown(list(value))}" if value else "it is empty"
      raise _no_row(where, what)
    name = value.get("name") if isinstance(value.get("name"), str) else None
    value = value[key]
  elif isinstance(value, list):
    raise _no_row(where, f"it is {shown(value)}")
  if not isinstance(value, (str, dict, list)):
    raise _no_row(where, f"image is {shown(value)}")
  try:
    found = spelled_image(value, root, where)
  except ValueError as error:
    short = isinstance(value, str) and value.strip() and len(value) <= _LONGEST_NAME
    said = value if short else pathlib.PurePath(where).name
    return CaptionRow(UnreadableImage(where, str(error)), "", said)
  inside = isinstance(found.image, bytes) and found.name.startswith("sha256-")
  return CaptionRow(found.image, "", name if inside and name else found.name)


def _no_row(where: str, what: str) -> ValueError:
  return ValueError(
    f"{where}: not a JSON object with an 'image' path ({what}); mend or drop the line"
  )


def _values(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Place and value of each row."""
  try:
    with path.open("rb") as file:
      head = file.read(HEAD_BYTES)
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}; check the path") from error
  marked = head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))  # UTF-16 and 32
  if head.startswith(b"PK\3\4") or (b"\0" in head and not marked) or sniff(head):
    raise ValueError(
      f"{path} is neither a list of images nor a tar file that can be read; unpack an archive "
      f"first and name its folder, or name a list ({', '.join(LIST_SUFFIXES)})"
    )
  suffix, start = path.suffix.lower(), starts_with(path)
  if start == "[" and suffix != ".jsonl":
    yield from _of_json(path)
  elif suffix in _COLUMNS:
    yield from _of_table(path, _COLUMNS[suffix])
  elif suffix == ".txt" and start != "{":
    for number, line in enumerate(_text(path).splitlines(), 1):
      if line.strip():
        yield f"{path}:{number}", line.strip()
  else:
    for where, value in json_lines(path, halves=True):
      if isinstance(value, ValueError):
        raise _no_row(where, str(value).removeprefix(f"{where}: "))
      yield where, value


def _of_json(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  values = read_json(path, halves=True)
  yield from ((f"{path}[{i}]", value) for i, value in enumerate(values))


def _of_table(path: pathlib.Path, delimiter: str) -> Iterator[tuple[str, Any]]:
  csv.field_size_limit(1 << 30)  # base64 is longer than the 131,072 characters that csv allows
  reader = csv.DictReader(_text(path).splitlines(keepends=True), delimiter=delimiter)
  try:
    names = reader.fieldnames or []
    key = next((key for key in IMAGE_KEYS if key in names), None)
    if key is None and names:
      raise ValueError(
        f"{path}: no column {', '.join(IMAGE_KEYS)} among {shown(names)}; name one so in the "
        "first line"
      )
    for row in reader:
      name = {"name": row["name"]} if row.get("name") else {}
      yield f"{path}:{reader.line_num}", {key: row[key] or "", **name}
  except csv.Error as error:
    raise ValueError(f"{path}:{reader.line_num}: not CSV ({error}); mend the line") from error


def _text(path: pathlib.Path) -> str:
  try:
    return decode(path.read_bytes())
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}; check the path") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not text in UTF-8 ({error}); save it so") from error
