"""Atomic writes of small files, and of folders; what a kill leaves of them."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

from caprl_jax.errors import DISK_FULL, UserError

_LONG_NAME = 200  # bytes: file systems have 255, and the temporary name is longer


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file so that a crash leaves the old one or the new one."""
  write_bytes(path, text.encode("utf-8"))


def write_bytes(path: pathlib.Path, data: bytes) -> None:
  """Writes a file so that a crash, of the machine too, leaves the old one or the new one."""
  with whole_file(path) as temporary:
    temporary.write_bytes(data)


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Where to write what is to take the place of `path` once it is whole. A crash, of the machine
  too, leaves the old file or the new one; an exception leaves the old one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  name = path.name
  if len(os.fsencode(name)) > _LONG_NAME:
    name = hashlib.sha256(os.fsencode(name)).hexdigest()
  temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
  try:
    yield temporary
    with open(temporary, "rb") as file:
      os.fsync(file.fileno())  # or the name could reach the disk before the bytes do
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


class DiskFullError(UserError):
  """No room is left on a disk; says where and how to go on."""

  exit_code = DISK_FULL


@contextlib.contextmanager
def saying_full_disk(path: pathlib.Path, remedy: str) -> Iterator[None]:
  """Around work that writes below the folder of `path`: a full disk is said with its name and how
  much is free there, which the system's own message does not tell.

  Raises:
    DiskFullError: instead of the system's error; `remedy` ends it.
  """
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    raise DiskFullError(
      f"{place}: {error.strerror} ({free / (1 << 20):,.0f} MiB are free); {remedy}"
    ) from error


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON with `write_text`. Numbers that are not finite are a ValueError: JSON has none."""
  write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


# ---- folders ----

_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<what>partial|replaced)-(?P<process>\d+)")
_LEFT_FILE = re.compile(r"\..+\.\d+\.tmp")


def partial_folder(path: pathlib.Path) -> pathlib.Path:
  """Where this process makes a folder that is to take the place of `path`; empty."""
  partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
  shutil.rmtree(partial, ignore_errors=True)  # left by a killed process with the same id
  partial.mkdir()
  return partial


def replace_folder(path: pathlib.Path, new: pathlib.Path) -> None:
  """Puts `new`, of `partial_folder` and whole, in the place of `path`.

  A kill leaves the old one or the new one: at once where the system can exchange two names (Linux),
  elsewhere after `mend_folders`.
  """
  if path.exists() and _exchange(path, new):
    shutil.rmtree(new, ignore_errors=True)  # the old one now
    return
  old = path.with_name(f".{path.name}.replaced-{os.getpid()}")
  if path.exists():
    path.rename(old)
  new.rename(path)
  shutil.rmtree(old, ignore_errors=True)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
  """Gives two paths each other's name; False where the system or its file system cannot."""
  rename = getattr(ctypes.CDLL(None), "renameat2", None)
  if rename is None:
    return False
  here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
  return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def mend_folders(parent: pathlib.Path) -> list[str]:
  """Takes away what killed processes left of folders and files that they were writing in `parent`,
  and puts a folder in its place where a kill came between two renames. Nobody may be writing there.

  Returns:
    The names of what was found.
  """
  found = [(path, match) for path in parent.glob(".*") if (match := _LEFT.fullmatch(path.name))]
  for path, match in found:
    target = parent / match["name"]
    if match["what"] == "replaced" and not target.exists():
      # the new one was whole before the old one was moved
      new = parent / f".{match['name']}.partial-{match['process']}"
      (new if new.exists() else path).rename(target)
  for path, _ in found:
    shutil.rmtree(path, ignore_errors=True)
  files = [path for path in parent.glob(".*.tmp") if _LEFT_FILE.fullmatch(path.name)]
  for path in files:
    path.unlink(missing_ok=True)
  return [path.name for path in [*(path for path, _ in found), *files]]
