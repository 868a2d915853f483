"""JSON as people have it -> values; values as messages show them.

Everything that reads JSON which somebody else may have written reads it here: byte order marks and
UTF-16 are taken, and whatever is wrong is a ValueError that names the place.
"""

import codecs
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

_MARKS = {  # the longest first: UTF-32's begins as UTF-16's does
  codecs.BOM_UTF32_LE: "utf-32",
  codecs.BOM_UTF32_BE: "utf-32",
  codecs.BOM_UTF16_LE: "utf-16",
  codecs.BOM_UTF16_BE: "utf-16",
  codecs.BOM_UTF8: "utf-8-sig",
}


def shown(value: Any, limit: int = 80) -> str:
  """A value as a message shows it: its repr, cut in the middle to `limit` characters."""
  # A huge value is cut before its repr is made.
  text = repr(value[: 2 * limit] if isinstance(value, (str, bytes)) else value)
  if isinstance(value, (str, bytes)) and len(value) > 2 * limit:
    unit = "characters" if isinstance(value, str) else "bytes"
    return f"{text[: limit - 20]}... ({len(value):,} {unit})"
  if len(text) <= limit:
    return text
  return f"{text[: limit - 20]} ... {text[-15:]}"


def cut(text: Any, limit: int = 80) -> str:
  """A text as a message holds it without quotes, such as a flag or another library's message: cut
  in the middle to `limit` characters."""
  text = str(text)
  return text if len(text) <= limit else f"{text[: limit - 20]} ... {text[-15:]}"


def listed(messages: Sequence[str], most: int = 10, room: int = 1200) -> str:
  """The first of several messages, an indented line each, and how many more there are.

  Args:
    most: messages that are shown, where they fit into `room` characters.
  """
  shown_ones: list[str] = []
  for message in messages[:most]:
    message = cut(message, 400)
    room -= len(message)
    if shown_ones and room < 0:
      break
    shown_ones.append(message)
  left = len(messages) - len(shown_ones)
  return "\n  ".join(["", *shown_ones, *([f"and {left} more"] if left else [])])


def parse_json(data: bytes | str, where: str, *, halves: bool = False, finite: bool = False) -> Any:
  """The value of a JSON text.

  Args:
    data: in UTF-8, or in what its byte order mark says.
    where: begins the message.
    halves: halves of surrogate pairs pass: so Python has names of files that are no UTF-8.
    finite: a number that is infinite or none does not pass.

  Raises:
    ValueError: it is no JSON, is nested too deeply, names a key of an object twice, or holds half
      of a surrogate pair, which no file can hold.
  """
  try:
    text = decode(data) if isinstance(data, bytes) else data.removeprefix("\ufeff")
    numbers = {"parse_float": _finite, "parse_constant": _finite} if finite else {}
    value = json.loads(text, object_pairs_hook=_unique, **numbers)
    if not halves and "\\ud" in text.lower():
      json.dumps(value, ensure_ascii=False).encode()
  except RecursionError:
    raise ValueError(f"{where}: not JSON that can be read: it is nested too deeply") from None
  except UnicodeEncodeError as error:
    raise ValueError(f"{where}: half of a surrogate pair, {error.object[error.start]!r}") from None
  except ValueError as error:  # bad JSON and bad UTF-8 alike
    raise ValueError(f"{where}: not JSON ({error})") from error
  return value


def decode(data: bytes) -> str:
  """Text of bytes in UTF-8, or in what their byte order mark says. Raises UnicodeDecodeError."""
  return data.decode(_encoding(data[:4]))


def read_record(path: str | os.PathLike[str]) -> Any:
  """The value of a JSON file that this package wrote, and may write again: its numbers are finite,
  and names of files may be of any bytes. Raises ValueError with the path: unreadable, or as
  `parse_json`."""
  return read_json(path, halves=True, finite=True)


def read_json(path: str | os.PathLike[str], *, halves: bool = False, finite: bool = False) -> Any:
  """The value of a JSON file. Raises ValueError with the path: unreadable, or as `parse_json`."""
  path = pathlib.Path(path)
  try:
    data = path.read_bytes()
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}; check the path") from error
  return parse_json(data, str(path), halves=halves, finite=finite)


def json_lines(path: str | os.PathLike[str], *, halves: bool = False) -> Iterator[tuple[str, Any]]:
  """`file:line` and value of each line that is not blank; a ValueError in place of a bad value.

  Raises:
    ValueError: the file cannot be read.
  """
  path = pathlib.Path(path)
  for number, line in enumerate(_lines(path), 1):
    if not line.strip():
      continue
    where = f"{path}:{number}"
    try:
      value = parse_json(line, where, halves=halves)
    except ValueError as error:
      value = error
    yield where, value


def starts_with(path: str | os.PathLike[str]) -> str:
  """The first character of a file that is no space, or "". Raises ValueError as `read_json`."""
  for line in _lines(pathlib.Path(path)):
    text = line if isinstance(line, str) else line.decode("utf-8", "replace")
    if text.strip():
      return text.strip()[0]
  return ""


def _lines(path: pathlib.Path) -> Iterator[bytes | str]:
  try:
    with path.open("rb") as file:
      encoding = _encoding(file.read(4))
    if encoding in ("utf-16", "utf-32"):
      with path.open(encoding=encoding, newline="\n") as text:
        yield from text
      return
    with path.open("rb") as file:  # a line that is no UTF-8 spoils no other
      if encoding == "utf-8-sig":
        file.seek(len(codecs.BOM_UTF8))
      yield from file
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}; check the path") from error
  except UnicodeError as error:
    raise ValueError(f"{path}: not {encoding}, as its byte order mark says ({error})") from error


def _encoding(start: bytes) -> str:
  return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")


def _finite(number: str) -> float:
  value = float(number)
  if not math.isfinite(value):
    raise ValueError(f"{shown(number)} is no finite number")
  return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"the key {shown(twice)} stands twice in one object")
  return found
