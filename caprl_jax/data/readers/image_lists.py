"""A list of images (JSON lines, JSON, CSV, a path per line) -> rows to caption."""

import csv
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Iterator
from typing import Any

from caprl_jax.data.json_rows import WRAPPERS, whole_object
from caprl_jax.data.readers.image_spellings import spelled_image, spelled_or_found
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
  waiting: list[_ListRow] | None = []  # rows of text alone, until one names an image
  for row in _rows(path, options):
    alone = _is_text_alone(row.value, options.column)
    if waiting is None:
      yield _without_image(row) if alone else _caption_row(row, path, options)
    elif alone:
      waiting.append(row)
    else:
      yield from map(_without_image, waiting)
      waiting = None
      yield _caption_row(row, path, options)
  if waiting:
    raise _no_row(waiting[0].where, f"it has the keys {shown(list(waiting[0].value))}")
  if waiting is not None:
    raise ValueError(f"{path} has no rows; write one image a line")


def _is_text_alone(value: Any, column: str | None) -> bool:
  """Whether a row says that it has no image, as text-only rows of mixed data do."""
  if not isinstance(value, dict):
    return False
  held = [value[key] for key in (IMAGE_KEYS if column is None else (column,)) if key in value]
  nothing = all(one is None or one == "" or one != one for one in held)  # NaN, pandas' nothing
  return nothing and (bool(held) or "conversations" in value or "messages" in value)


def _without_image(row: _ListRow) -> CaptionRow:
  """It fails when its turn comes, and is counted."""
  message = f"{row.where}: it names no image; add one or drop the row"
  return CaptionRow(UnreadableImage(row.where, message), "", pathlib.PurePath(row.where).name)


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
    found = spelled_or_found(value, path.parent, row.where)
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
    f"{where}: not a JSON object with an 'image' path ({what}); mend or drop the line, or name the "
    "key of the images in caption.column"
  )


def _rows(path: pathlib.Path, options: ListingOptions) -> Iterator[_ListRow]:
  try:
    with path.open("rb") as file:
      head = file.read(HEAD_BYTES)
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}; check the path") from error
  marked = head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))  # UTF-16 and 32
  suffix, start = path.suffix.lower(), starts_with(path)
  binary = b"\0" in head and not marked
  # A name may begin like a picture, as in "GIF89a_1.png".
  if head.startswith(b"PK\3\4") or binary or (sniff(head) and suffix not in LIST_SUFFIXES):
    raise ValueError(
      f"{path} is neither a list of images nor a tar file that can be read; unpack an archive "
      f"first and name its folder, or name a list ({', '.join(LIST_SUFFIXES)})"
    )
  if suffix in _COLUMNS:
    yield from _of_table(path, _COLUMNS[suffix], options)
    return
  values = _values(path, start, suffix)
  if values is not None:
    yield from (_ListRow(f"{path}[{i}]", value) for i, value in enumerate(values))
  elif suffix == ".txt" and not (start == "{" and (marked or _is_json(head))):
    for number, line in enumerate(io.StringIO(_text(path), newline=None), 1):
      if line.strip():
        yield _ListRow(f"{path}:{number}", line.strip())
  elif marked:
    yield from (
      _ListRow(where, _good(value, where)) for where, value in json_lines(path, halves=True)
    )
  else:
    yield from _of_lines(path)


def _values(path: pathlib.Path, start: str, suffix: str) -> list | None:
  """The rows of a file that is one JSON value: a list, an object with a list, or one row on several
  lines. None for rows a line, and for names a line that only begin like JSON."""
  if start == "[":
    try:
      return read_json(path, halves=True)
    except ValueError:
      if suffix in (".json", ""):
        raise
      return None
  if start != "{":
    return None
  whole = whole_object(path, (*WRAPPERS, "images"), halves=True)
  if whole is None:
    return None
  key = next((key for key in WRAPPERS if isinstance(whole.get(key), list)), None)
  if key and not any(name in whole for name in IMAGE_KEYS):
    return whole[key]
  images = whole.get("images")
  of_coco = isinstance(images, list) and ("annotations" in whole or len(images) > 1)
  return images if of_coco else [whole]  # a row may have a list of its one image


def _is_json(head: bytes) -> bool:
  """Whether a text that begins with a brace goes on like an object."""
  return head.lstrip(b"\xef\xbb\xbf \r\n\t")[1:].lstrip()[:1] in (b'"', b"}", b"")


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
  text = _text(path)
  blank = len(text) - len(text.lstrip("\r\n"))
  before = len(text[:blank].splitlines())  # lines in front of the first
  reader = csv.DictReader(io.StringIO(text[blank:], newline=""), delimiter=delimiter, strict=True)
  line = before + 1
  try:
    names = reader.fieldnames or []
    wanted = IMAGE_KEYS if options.column is None else (options.column,)
    key = next((key for key in wanted if key in names), None)
    if key is None and names:
      raise ValueError(
        f"{path}: no column {', '.join(wanted)} among {shown(list(names), 400)}; name one so in "
        "the first line, or name the column of images in caption.column"
        + _other_separator(list(names), delimiter)
      )
    line = before + reader.line_num + 1
    for row in reader:
      where = f"{path}:{before + reader.line_num}"
      if any(cell.strip() for cell in row.pop(None, None) or ()):
        raise ValueError(
          f"{where}: it has more cells than the first line names; put quotes around a text with "
          f"{shown(delimiter)} in it"
        )
      more = row if options.fields else {"name": row["name"]} if row.get("name") else {}
      yield _ListRow(where, {**more, key: row[key] or ""})
      line = before + reader.line_num + 1
  except csv.Error as error:
    raise ValueError(
      f"{path}:{line}: not CSV ({error}); mend the row that begins there, where a quote may be open"
    ) from error


def _other_separator(names: list[str], delimiter: str) -> str:
  """What to say of a first line whose cells another separator keeps apart."""
  other = next((mark for mark in ";,\t|" if mark != delimiter and mark in "".join(names)), None)
  return (
    f" (its cells seem to be kept apart by {shown(other)}; save it with {shown(delimiter)})"
    * bool(other)
  )


def _text(path: pathlib.Path) -> str:
  try:
    return decode(path.read_bytes())
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}; check the path") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not text in UTF-8 ({error}); save it so") from error
