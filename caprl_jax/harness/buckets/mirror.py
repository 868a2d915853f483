"""A folder in a bucket <-> a folder here, in which a run works.

A run appends to files, renames folders and takes locks; a bucket has none of these. So a run works
on this machine's disk, and a thread copies what it leaves there into the bucket: each file in one
piece under its own name, then `mirror.json`, which says what belongs together. A machine that is
lost loses what came after the last copy.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from caprl_jax.atomic_files import write_json
from caprl_jax.errors import UserError
from caprl_jax.json_files import cut, read_record

log = logging.getLogger("caprl_jax.harness.buckets.mirror")

EVERY_SECS = 60.0
SAY_SECS = 30.0
INDEX = "mirror.json"  # in the bucket
STATE = ".mirror.json"  # here: the index that was read or written last
CHECKPOINTS = "checkpoints"
_PIECE = 1 << 24  # bytes that are copied at once

# What a file is known by: bytes, and the time of its last change in nanoseconds.
Stamp = tuple[int, int]


@contextlib.contextmanager
def named(address: epath.Path) -> Iterator[None]:
  """Around what is done to a bucket: its errors are of many types, and name no place."""
  try:
    yield
  except UserError:
    raise
  except ImportError as error:
    raise UserError(
      f"{address}: {error} To read and write buckets, install what fsspec needs for them "
      "(gs: pip install gcsfs, s3: pip install s3fs), or mount the bucket and name a folder in it"
    ) from error
  except FileNotFoundError as error:
    raise UserError(f"{address}: no such file or folder in the bucket") from error
  except Exception as error:  # of the client's network and login
    raise UserError(
      f"{address} cannot be read or written ({type(error).__name__}: {cut(error, 300)}); see that "
      "the bucket is there and that this machine is logged in"
    ) from error


def copy_file(source: epath.Path, target: epath.Path) -> None:
  """Copies a file, of which there may be more than the memory holds, from or to a bucket."""
  with source.open("rb") as read, target.open("wb") as written:
    shutil.copyfileobj(read, written, _PIECE)


def one_by_one(names: Sequence[str], what: str) -> Iterator[str]:
  """The names of files, each of which is copied before the next one is asked for; every half a
  minute it is printed how many were. (The log is not open yet when a run's folder is fetched, and
  closed when the last files are copied.)"""
  said = time.monotonic()
  for number, name in enumerate(names, 1):
    yield name
    now = time.monotonic()
    if now - said >= SAY_SECS and number < len(names):
      said = now
      print(f"{what}: {number} of {len(names)} files copied", file=sys.stderr)


def listed(folder: epath.Path, prefix: str = "") -> list[str]:
  """The files in a folder of a bucket and below, relative to it. (Not by `walk`, whose paths lack
  the scheme where fsspec gives them.)"""
  found = []
  for path in folder.iterdir():
    name = f"{prefix}{path.name}"
    found += listed(path, f"{name}/") if path.is_dir() else [name]
  return sorted(found)


@dataclasses.dataclass(frozen=True)
class Index:
  """What belongs together in the bucket. writer: who wrote it; count: the how many-th time; shared:
  checkpoints lie there without being among the files, written by several processes."""

  files: dict[str, Stamp]
  writer: str = ""
  count: int = 0
  shared: bool = False

  @classmethod
  def of(cls, found: Any, place: Any) -> "Index":
    """From JSON. Raises UserError for what is none."""
    try:
      files = {name: (int(size), int(time)) for name, (size, time) in found["files"].items()}
      return cls(files, str(found["writer"]), int(found["count"]), bool(found.get("shared")))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise UserError(
        f"{place} is damaged: delete it, and all files beside it are taken as they are"
      ) from error


class Mirror:
  """`here`, a folder on this machine, and `address`, its copy in a bucket.

  Args:
    only: the stem of the names of what is copied, where others lie beside it: captions for
      captions.jsonl, captions.html, captions_images/.

  shared: checkpoints are not copied, since they are written to the bucket itself (`shared.py`). A
    folder of which that is so stays such a one.
  """

  def __init__(self, address: str, here: pathlib.Path, only: str = ""):
    self.there, self.here, self.only, self.shared = epath.Path(address), here, only, False
    self._pushing = threading.Lock()
    self.index_file = self.there / (f"{only}.{INDEX}" if only else INDEX)
    self.state_file = here / (f".{only}{STATE}" if only else STATE)
    self.writer, self.last = uuid.uuid4().hex, Index({})

  # ---- the bucket -> here ----

  def fetch(self) -> None:
    """Makes `here` what the bucket holds, unless it is what was copied there last, or newer.

    Raises:
      UserError: the bucket cannot be read.
    """
    with named(self.there):
      index = self._index()
      self._settle_checkpoints(index)
      if self.state_file.exists():
        state = Index.of(read_record(self.state_file), self.state_file)
        if index is None or (index.writer, index.count) == (state.writer, state.count):
          self.last = index or Index({})
          return
      self._clear()
      names = [*index.files, *self._records()] if index else self._all()
      if names:
        print(f"copying {len(names)} files from {self.there} to {self.here}", file=sys.stderr)
      for name in one_by_one([*dict.fromkeys(names)], str(self.there)):
        target = self.here / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(self.there / name, epath.Path(target))
        if index and name in index.files:
          changed = index.files[name][1]
          os.utime(target, ns=(changed, changed))  # or it would be copied back
      self.last = index or Index({})
      self._keep_state()

  def _settle_checkpoints(self, index: Index | None) -> None:
    """Finds out where checkpoints lie. Raises UserError where they lie as one process has copied
    them and several are to go on: Orbax takes such for unfinished."""
    if index is not None and index.shared:
      self.shared = True
    elif self.shared:
      names = index.files if index else self._all()
      if any(_of_checkpoints(name) for name in names):
        raise UserError(
          f"{self.there} holds a run of one process, or of a mounted bucket: go on with one "
          "process, or mount the bucket (gcsfuse) and name the folder in it, or begin anew in "
          "another one"
        )

  def _is_its(self, name: str) -> bool:
    """Whether a file or folder with that name is one of those that are copied."""
    rest = name.removeprefix(self.only)
    return not self.only or (name.startswith(self.only) and rest[:1] in ("", ".", "_"))

  def _index(self) -> Index | None:
    try:
      text = self.index_file.read_text()  # asking whether it exists may be answered from a memory
    except FileNotFoundError:
      return None
    try:
      found = json.loads(text)
    except ValueError:
      found = None
    return Index.of(found, self.index_file)

  def _all(self) -> list[str]:
    """What lies in a bucket that no run has written to."""
    try:
      top = [path for path in self.there.iterdir() if self._is_its(path.name)]
    except FileNotFoundError:
      return []
    found = []
    for path in top:
      found += listed(path, f"{path.name}/") if path.is_dir() else [path.name]
    return found

  def _records(self) -> list[str]:
    return [] if self.only else [path.name for path in self.there.glob("record_*.json")]

  def _clear(self) -> None:
    for path in self.here.iterdir() if self.here.exists() else ():
      if self._is_its(path.name) or path == self.state_file:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    self.here.mkdir(parents=True, exist_ok=True)

  def _keep_state(self) -> None:
    write_json(self.state_file, dataclasses.asdict(self.last))

  # ---- here -> the bucket ----

  def push(self) -> None:
    """Copies what has changed since the last time.

    What the bucket holds afterwards is what a kill would leave here: checkpoints come before the
    metrics, which so have no gap, and records, which say that a run is complete, after all others.

    Raises:
      UserError: the bucket cannot be written, or another run has written there.
    """
    with self._pushing, named(self.there):
      found = self._index() or Index({})
      if (found.writer, found.count) != (self.last.writer, self.last.count):
        raise UserError(
          f"another run writes to {self.there}: stop one of them, or give each its own; what this "
          f"one has made is in {self.here}"
        )
      paths = [] if self.only else self.here.glob("record_*.json")
      records = {path.name: path.read_bytes() for path in paths}
      first = {n: s for n, s in self._stamps().items() if _of_checkpoints(n)}
      first = self._copied({} if self.shared else first)
      others = {n: s for n, s in self._stamps().items() if not _of_checkpoints(n)}
      held = first | self._copied({n: s for n, s in others.items() if n not in records})
      if held != self.last.files:
        self.last = Index(held, self.writer, self.last.count + 1, self.shared)
        self.index_file.write_text(json.dumps(dataclasses.asdict(self.last)))
        self._keep_state()
      for name, data in records.items():
        (self.there / name).write_bytes(data)
      for name in found.files.keys() - held.keys():
        (self.there / name).unlink(missing_ok=True)

  def _stamps(self) -> dict[str, Stamp]:
    """The files here that are whole, or grow line by line."""
    found = {}
    for path in sorted(self.here.rglob("*")):
      name = path.relative_to(self.here)
      passing = any(p.startswith(".") or ".orbax-checkpoint-tmp" in p for p in name.parts)
      if passing or not self._is_its(name.parts[0]):
        continue
      with contextlib.suppress(FileNotFoundError):  # it goes on while we look
        if path.is_file():
          stat = path.stat()
          found[name.as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return found

  def _copied(self, stamps: dict[str, Stamp]) -> dict[str, Stamp]:
    """Copies those that the bucket does not hold, and returns all that it then holds of them."""
    held = dict(stamps)
    new = [name for name, stamp in stamps.items() if self.last.files.get(name) != stamp]
    for name in one_by_one(new, str(self.there)):
      try:
        copy_file(epath.Path(self.here / name), self.there / name)
      except FileNotFoundError:  # taken away meanwhile
        del held[name]
    return held


def _of_checkpoints(name: str) -> bool:
  return CHECKPOINTS in name.split("/")


@contextlib.contextmanager
def mirrored(mirrors: list[Mirror]) -> Iterator[None]:
  """While it is entered a thread copies what is new to the buckets; all of it when it is left.

  Raises:
    UserError: as `Mirror.fetch`, and as `Mirror.push` for the last copy, unless another error is on
      its way.
  """
  for mirror in mirrors:
    mirror.fetch()
    if mirror.shared:
      mirror.push()  # before the first checkpoint: the index says whose it is
  ended = threading.Event()

  def work() -> None:
    while not ended.wait(EVERY_SECS):
      for mirror in mirrors:
        try:
          mirror.push()
        except UserError as error:
          log.warning("%s (tried again in %.0f s)", error, EVERY_SECS)

  thread = threading.Thread(target=work, name="mirror", daemon=True)
  if mirrors:
    thread.start()
  try:
    yield
  except BaseException:
    _end(ended, thread)
    push_all(mirrors)
    raise
  _end(ended, thread)
  for mirror in mirrors:
    mirror.push()


def push_all(mirrors: list[Mirror]) -> None:
  """The last copy of a run that has ended badly: what is wrong with it is only printed."""
  for mirror in mirrors:
    try:
      mirror.push()
    except UserError as error:
      print(f"error: {error}", file=sys.stderr)


def _end(ended: threading.Event, thread: threading.Thread) -> None:
  ended.set()
  if thread.is_alive():
    thread.join()
