"""JSON files of rows, however they are laid out -> the rows' values with their places."""

import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from caprl_jax import json_files
from caprl_jax.data.rows import BadRow, Row

WRAPPERS = ("data", "rows", "examples")  # {"data": [rows]}
_PACKED = {
  b"\x1f\x8b": "gunzip",
  b"BZh": "bunzip2",
  b"\xfd7zXZ": "unxz",
  b"\x28\xb5\x2f\xfd": "unzstd",
  b"PK\x03\x04": "unzip",
}


def read_items(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
  """Yields the place and the value of each row, or a BadRow in the place of a line that is no JSON.

  The file holds, whatever its suffix, one row per line; a list of rows; an object with such a list
  under "data", "rows" or "examples"; or one row alone. Blank lines count but are skipped.

  Raises:
    ValueError: the file cannot be read, is compressed, or holds none of these.
  """
  path = pathlib.Path(path)
  check_unpacked(path)
  start = json_files.starts_with(path)
  if start == "[":
    yield from _of_list(json_files.read_json(path), str(path))
    return
  whole = whole_object(path) if start == "{" else None
  if whole is None:
    for where, value in json_files.json_lines(path):
      yield where, _or_bad(where, value)
  elif whole:
    key = _wrapped(whole)
    yield from _of_list(whole[key], f"{path}, {key}") if key else [(str(path), whole)]
  else:
    raise ValueError(f"{path}: holds dict, but it must be a list of rows, or one row per line")


def whole_object(
  path: pathlib.Path, wrappers: Sequence[str] = WRAPPERS, halves: bool = False
) -> dict | None:
  """The object of a file that begins with a brace and is one: on several lines, or with all rows
  under one of the keys `wrappers`. None for an object a line.

  Raises:
    ValueError: it is on several lines and cannot be read, with the place of the fault.
  """
  lines = json_files.json_lines(path, halves=halves)
  value = next(lines)[1]
  if not isinstance(value, ValueError):
    holds = value == {} or _wrapped(value, wrappers)
    return value if holds and next(lines, None) is None else None
  try:
    whole = json_files.read_json(path, halves=halves)
  except ValueError:
    if _goes_on(path) and not any(isinstance(value, dict) and value for _, value in lines):
      raise
    return None  # lines, the first of them bad
  return whole if isinstance(whole, dict) else None


def _goes_on(path: pathlib.Path) -> bool:
  """Whether a file's first line ends where an object on several lines may: {"data": ["""
  with path.open("rb") as file:
    line = file.read(1 << 16).strip().split(b"\n")[0].strip()
  return line.endswith((b"{", b"[", b","))


def read_rows(path: pathlib.Path, parse: Callable[[Any, str], Row]) -> Iterator[Row | BadRow]:
  """What `parse` makes of each value and its place in the file, as `read_items` reads it; a BadRow
  where it raises ValueError. A file without rows is a ValueError itself."""
  empty = True
  for where, item in read_items(path):
    empty = False
    if isinstance(item, BadRow):
      yield item
      continue
    try:
      yield parse(item, where)
    except ValueError as error:
      yield BadRow(where, str(error))
  if empty:
    raise ValueError(f"{path}: no rows; write one JSON object a line, or a list of them")


def check_unpacked(path: pathlib.Path) -> None:
  """Raises ValueError for a compressed file, with the command that unpacks it."""
  try:
    with path.open("rb") as file:
      start = file.read(6)
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}; check the path") from error
  for magic, command in _PACKED.items():
    if start.startswith(magic):
      raise ValueError(f"{path} is compressed; unpack it first ({command} {path.name})")


def _of_list(items: list, place: str) -> Iterator[tuple[str, Any]]:
  for number, item in enumerate(items):
    yield f"{place}, item {number}", item


def _wrapped(value: Any, wrappers: Sequence[str] = WRAPPERS) -> str:
  """The key that a file's one object holds its rows under, or ""."""
  held = [key for key in wrappers if isinstance(value, dict) and isinstance(value.get(key), list)]
  return held[0] if len(held) == 1 else ""


def _or_bad(where: str, value: Any) -> Any:
  if isinstance(value, ValueError):
    return BadRow(where, f"{value}; write one whole JSON object a line, in UTF-8")
  return value
