"""A list of images (JSON lines, JSON, CSV, a path per line) -> rows to caption."""

import csv
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Iterator
from typing import Any

from caprl_jax.data.readers.image_spellings import spelled_image
from caprl_jax.data.readers.inputs.options import NOTHING_MORE, ListingOptions, address_of
from caprl_jax.data.rows import CaptionRow, ImageSource
from caprl_jax.image_files import HEAD_BYTES, sniff
from caprl_jax.json_files import decode, json_lines, parse_json, read_json, shown, starts_with

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


@dataclasses.dataclass(frozen=True)
class LineImage:
  """An image in a line of JSON, which is read again when it is needed: a list may hold more than
  memory does. Two are one if their `digest`, SHA-256 of the encoded image, is."""

  path: pathlib.Path = dataclasses.field(compare=False)
  offset: int = dataclasses.field(compare=False)  # bytes
  size: int = dataclasses.field(compare=False)
  where: str = dataclasses.field(compare=False)
  digest: bytes
  column: str | None = None

  def read(self) -> bytes:
    try:
      with open(self.path, "rb") as file:
        file.seek(self.offset)
        line = file.read(self.size)
    except OSError as error:
      raise ValueError(f"{self.where}: {error.strerror}; put the list back") from error
    value, _ = _said(parse_json(line, self.where, halves=True), self.where, self.column)
    image = spelled_image(value, self.path.parent, self.where).image
    if not isinstance(image, bytes) or _digest(image) != self.digest:
      raise ValueError(f"{self.where}: its image is another since the list was read; begin anew")
    return image


@dataclasses.dataclass(frozen=True)
class _ListRow:
  """where: for messages. span: the line's first byte and its bytes, where it is one of JSON."""

  where: str
  value: Any
  span: tuple[int, int] | None = None


def scan_list(path: pathlib.Path, options: ListingOptions = NOTHING_MORE) -> Iterator[CaptionRow]:
  """The images of a list, as `image_spellings` reads them, from the list's folder.

  A .txt file has one on a line; .csv and .tsv a column of one of the names `IMAGE_KEYS`; JSON
  lines, or a JSON list, objects with such a key, or the image itself. A row is named by what it
  says; an image that stands in it by its `name`, or by its digest; what cannot be read by its
  line, and it fails when it is read.

  Raises:
    ValueError: no list; a row that is none, with its line; no row; a column that is not there.
  """
  empty = True
  for row in _rows(path, options):
    empty = False
    yield _caption_row(row, path, options)
  if empty:
    raise ValueError(f"{path} has no rows; write one image a line")


def _caption_row(row: _ListRow, path: pathlib.Path, options: ListingOptions) -> CaptionRow:
  value, name = _said(row.value, row.where, options.column)
  fields = options.kept(row.value) if isinstance(row.value, dict) else None
  image, name = _image(row, path, value, name, options)
  return CaptionRow(image, "", name, fields=fields)


def _image(
  row: _ListRow, path: pathlib.Path, value: Any, name: str | None, options: ListingOptions
) -> tuple[ImageSource, str]:
  """A row's image and what it is called. value, name: as `_said` has them."""
  address = address_of(value)
  if address is not None and options.fetch is not None:
    return options.fetch.image(address, row.where), address
  try:
    found = spelled_image(value, path.parent, row.where)
  except ValueError as error:
    short = isinstance(value, str) and value.strip() and len(value) <= _LONGEST_NAME
    name = address or (value if short else pathlib.PurePath(row.where).name)
    return UnreadableImage(row.where, str(error)), name
  if isinstance(found.image, pathlib.Path):
    return found.image, found.name
  name = name if name and found.name.startswith("sha256-") else found.name
  if row.span is None:
    return found.image, name
  digest = _digest(found.image)
  return LineImage(path, *row.span, row.where, digest, options.column), name


def _digest(data: bytes) -> bytes:
  return hashlib.sha256(data).digest()


def _said(value: Any, where: str, column: str | None) -> tuple[Any, str | None]:
  """What a row says of its image, and its `name` if it has one."""
  name = None
  if isinstance(value, dict):
    keys = IMAGE_KEYS if column is None else (column,)
    key = next((key for key in keys if value.get(key) is not None), None)
    if key is None and column is not None:
      raise ValueError(
        f"{where}: no {column!r}, which caption.column names; it has the keys {shown(list(value))}"
      )
    if key is None:
      what = f"it has the keys {shown(list(value))}" if value else "it is empty"
      raise _no_row(where, what)
    name = value.get("name") if isinstance(value.get("name"), str) else None
    value = value[key]
  elif isinstance(value, list):
    raise _no_row(where, f"it is {shown(value)}")
  if not isinstance(value, (str, dict, list)):
    raise _no_row(where, f"image is {shown(value)}")
  return value, name


def _no_row(where: str, what: str) -> ValueError:
  return ValueError(
    f"{where}: not a JSON object with an 'image' path ({what}); mend or drop the line"
  )


def _rows(path: pathlib.Path, options: ListingOptions) -> Iterator[_ListRow]:
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
    values = read_json(path, halves=True)
    yield from (_ListRow(f"{path}[{i}]", value) for i, value in enumerate(values))
  elif suffix in _COLUMNS:
    yield from _of_table(path, _COLUMNS[suffix], options)
  elif suffix == ".txt" and start != "{":
    for number, line in enumerate(io.StringIO(_text(path), newline=None), 1):
      if line.strip():
        yield _ListRow(f"{path}:{number}", line.strip())
  elif marked:
    yield from (
      _ListRow(where, _good(value, where)) for where, value in json_lines(path, halves=True)
    )
  else:
    yield from _of_lines(path)


def _of_lines(path: pathlib.Path) -> Iterator[_ListRow]:
  """JSON lines in UTF-8, with their places."""
  offset = 0
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        where = f"{path}:{number}"
        try:
          value = parse_json(line, where, halves=True)
        except ValueError as error:
          value = error
        yield _ListRow(where, _good(value, where), (offset, len(line)))
      offset += len(line)


def _good(value: Any, where: str) -> Any:
  if isinstance(value, ValueError):
    raise _no_row(where, str(value).removeprefix(f"{where}: "))
  return value


def _of_table(path: pathlib.Path, delimiter: str, options: ListingOptions) -> Iterator[_ListRow]:
  csv.field_size_limit(1 << 30)  # base64 is longer than the 131,072 characters that csv allows
  reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter)
  try:
    names = reader.fieldnames or []
    wanted = IMAGE_KEYS if options.column is None else (options.column,)
    key = next((key for key in wanted if key in names), None)
    if key is None and names:
      raise ValueError(
        f"{path}: no column {', '.join(wanted)} among {shown(list(names), 400)}; name one so in "
        "the first line, or name the column of images in caption.column"
      )
    for row in reader:
      row.pop(None, None)  # what stands behind the last column
      more = row if options.fields else {"name": row["name"]} if row.get("name") else {}
      yield _ListRow(f"{path}:{reader.line_num}", {**more, key: row[key] or ""})
  except csv.Error as error:
    raise ValueError(f"{path}:{reader.line_num}: not CSV ({error}); mend the line") from error


def _text(path: pathlib.Path) -> str:
  try:
    return decode(path.read_bytes())
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}; check the path") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not text in UTF-8 ({error}); save it so") from error
