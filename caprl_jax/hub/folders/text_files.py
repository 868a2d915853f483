"""A checkpoint's small files as people have them -> their contents."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from caprl_jax.json_files import decode, parse_json, shown

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
TEXT_KINDS = (".json", ".jinja", ".txt")


def is_pointer(path: pathlib.Path) -> bool:
  """Whether git-lfs left a pointer in the place of a file."""
  with path.open("rb") as file:
    return file.read(len(LFS_POINTER)) == LFS_POINTER


def pointer_message(path: pathlib.Path) -> str:
  """What to say of such a file."""
  return (
    f"{path} ({path.stat().st_size:,} bytes) is a git-lfs pointer and not the file itself: run "
    f"`git lfs install && git lfs pull` in {path.parent}, or download the model with `hf download`"
  )


def read_bytes(path: pathlib.Path) -> bytes:
  """A small file; text of another encoding, or with a byte order mark, as plain UTF-8.

  Raises:
    ValueError: it is a git-lfs pointer, cannot be read, or is not in the encoding it says.
  """
  try:
    if is_pointer(path):
      raise ValueError(pointer_message(path))
    data = path.read_bytes()
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}; check the path") from error
  if path.suffix not in TEXT_KINDS:
    return data
  try:
    return decode(data).encode("utf-8")
  except UnicodeError as error:
    raise ValueError(
      f"{path} ({path.stat().st_size:,} bytes) is not text: {error}. Download it again."
    ) from error


def read_json(path: str | os.PathLike) -> dict[str, Any]:
  """The object in a JSON file of a checkpoint; a ValueError says where it is missing or broken."""
  path = pathlib.Path(path)
  if path.is_symlink() and not path.exists():
    raise ValueError(f"{path} is a link to a file that is gone. Download the model again")
  if not path.exists():
    present = sorted(file.name for file in path.parent.glob("*"))[:20]
    raise ValueError(
      f"{path}: no such file; the directory holds {present or 'nothing'}. Download "
      "the model again, or name the .gguf file if there is one."
    )
  data = read_bytes(path)
  try:
    value = parse_json(data, path.name)
  except ValueError as error:
    raise ValueError(
      f"{path} ({path.stat().st_size:,} bytes) is not valid JSON: {error}. Download it again."
    ) from error
  if not isinstance(value, dict):
    raise ValueError(f"{path}: must hold an object, not {shown(value)}. Download it again.")
  return value


def json_of(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
  """The object in one of a checkpoint's small files; {} where there is no such file.

  Raises:
    ValueError: it holds something else.
  """
  if name not in files:
    return {}
  value = parse_json(files[name], name)
  if not isinstance(value, dict):
    raise ValueError(f"{name}: must hold an object, not {shown(value)}; take the model's own file")
  return value
