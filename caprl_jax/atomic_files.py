"""Atomic writes of small files."""

import hashlib
import json
import os
import pathlib
from typing import Any

_LONG_NAME = 200  # bytes: file systems have 255, and the temporary name is longer


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file so that a crash leaves the old one or the new one."""
  write_bytes(path, text.encode("utf-8"))


def write_bytes(path: pathlib.Path, data: bytes) -> None:
  """Writes a file so that a crash, of the machine too, leaves the old one or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  name = path.name
  if len(os.fsencode(name)) > _LONG_NAME:
    name = hashlib.sha256(os.fsencode(name)).hexdigest()
  temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
  with open(temporary, "wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())  # or the name could reach the disk before the bytes do
  os.replace(temporary, path)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON with `write_text`. Numbers that are not finite are a ValueError: JSON has none."""
  write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
