"""Atomic writes of small files."""

import json
import os
import pathlib
from typing import Any


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file so that a crash leaves the old one or the new one."""
  write_bytes(path, text.encode("utf-8"))


def write_bytes(path: pathlib.Path, data: bytes) -> None:
  """Writes a file so that a crash leaves the old one or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  temporary.write_bytes(data)
  os.replace(temporary, path)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON with `write_text`. Numbers that are not finite are a ValueError: JSON has none."""
  write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
