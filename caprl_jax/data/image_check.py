"""Images -> what each of them is, found by decoding every one once, before a run begins.

The pass runs in threads. What it finds is kept in `row_check.jsonl` in the workdir, by the images'
content, so that the next start of the run decodes nothing and, of files that are as they were,
reads nothing.

Several processes share the work: each decodes its part and tells the others, so that all of them
know the same of every image, whatever a disk did to one of them. Each keeps what it has decoded in
a file of its own (`row_check.1.jsonl`, ...) and reads those of the others, where they see one
folder.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import threading
import time
from collections.abc import Hashable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import __version__ as pillow_version

from caprl_jax.data.rows import ImageSource
from caprl_jax.data.usable_rows import HasImage, ImageFacts, look_at, not_there, source_bytes
from caprl_jax.image_files import open_image, openable_suffixes
from caprl_jax.progress import Bar

log = logging.getLogger("caprl_jax.data.image_check")

FILE = "row_check"
AT_ONCE = 1024  # images of which the results wait to be written
SAY_SECS = 30.0
# A file written so shortly before it was read may be written again at the same time of its clock.
YOUNG_SECS = 2.0
LARGE_PIXELS = 30_000_000


class FactsCache:
  """Facts by the images' sha256, and the sha256 of files by path, size and time, in a file that
  grows.

  A line is ["image", facts] or ["file", stamp, sha256]; the first says which decoder was asked:
  what another one found is forgotten. A line that a kill has torn is cut off.
  """

  def __init__(self, folder: pathlib.Path | None, name: str = "", process: int = 0):
    self._images: dict[str, ImageFacts] = {}
    self._files: dict[str, str] = {}
    self._new: list[list] = []
    self._lock = threading.Lock()
    self.path = None
    if folder is None:
      return
    parts = [FILE, name, str(process) if process else "", "jsonl"]
    self.path = folder / ".".join(filter(None, parts))
    for path in sorted(folder.glob(f"{FILE}*.jsonl")):
      if path != self.path:
        self._read(path)
    self._open()

  def __getitem__(self, stamp: str) -> ImageFacts | None:
    """The facts of a file, None where they are not known."""
    return self._images.get(self._files.get(stamp, ""))

  def of(self, sha256: str) -> ImageFacts | None:
    """The facts of a content, None where they are not known."""
    return self._images.get(sha256)

  def put(self, facts: ImageFacts) -> None:
    """Adds what was decoded. May be called by several threads."""
    with self._lock:
      self._images[facts.sha256] = facts
      self._new.append(["image", dataclasses.asdict(facts)])

  def put_file(self, stamp: str, sha256: str) -> None:
    """Adds a file's content. May be called by several threads."""
    with self._lock:
      if self._files.get(stamp) != sha256:
        self._files[stamp] = sha256
        self._new.append(["file", stamp, sha256])

  def write(self) -> None:
    """A kill after this does not lose what was put."""
    with self._lock:
      new, self._new = self._new, []
    if new and self.path is not None:
      with open(self.path, "ab") as file:
        file.write("".join(json.dumps(item) + "\n" for item in new).encode())

  def _open(self) -> None:
    """Reads this process's own file, and mends or begins it."""
    self.path.parent.mkdir(parents=True, exist_ok=True)
    end = self._read(self.path) if self.path.exists() else 0
    with open(self.path, "ab") as file:
      file.truncate(end)
      if end == 0:
        file.write((json.dumps(_decoder()) + "\n").encode())

  def _read(self, path: pathlib.Path) -> int:
    """Takes what a file holds; returns the byte at which its whole lines end."""
    end = 0
    with open(path, "rb") as file:
      for line in file:
        if not line.endswith(b"\n"):
          break
        try:
          item = json.loads(line)
          if end == 0:
            if item != _decoder():
              return 0
          elif item[0] == "image":
            facts = ImageFacts(**item[1])
            self._images[facts.sha256] = facts
          else:
            _, stamp, sha256 = item
            self._files[stamp] = sha256
        except (ValueError, TypeError, LookupError):
          break
        end += len(line)
    return end


def _decoder() -> dict:
  opens = " ".join(sorted(openable_suffixes()))  # with a plug-in more
  return {"version": 1, "pillow": pillow_version, "opens": opens}


class ImageCheck:
  """The pass. Called with rows, it gives each one's facts; what it was given before, from the
  folder or in this run, is not decoded again.

  An image that cannot be read at all (no such file, a disk error) is not remembered: the next start
  tries it again.

  Args:
    folder: where what is found is kept; None keeps nothing.
    name: of who keeps it, where others may be at work in the folder: their files are read and stay
      as they are.
  """

  def __init__(self, folder: pathlib.Path | None, name: str = "", threads: int | None = None):
    self.processes, self.process = jax.process_count(), jax.process_index()
    self.cache = FactsCache(folder, name, self.process)
    self.threads = threads or min(16, os.cpu_count() or 1)
    self._facts: dict[Hashable, ImageFacts] = {}
    self._running: dict[str, concurrent.futures.Future] = {}
    self._lock, self._large = threading.Lock(), threading.Lock()
    self.decoded = 0  # by this process

  def __call__(self, rows: Sequence[HasImage]) -> list[ImageFacts]:
    """The facts of each row's image; of a row without one, those of no image. All processes call it
    with the same rows."""
    sources = {row.image: None for row in rows if row.image is not None}
    left = [source for source in sources if source not in self._facts]
    if left:
      self._facts |= self._look_at_all(left)
    return [ImageFacts() if row.image is None else self._facts[row.image] for row in rows]

  def _look_at_all(self, sources: list[ImageSource]) -> dict[ImageSource, ImageFacts]:
    began, before = time.monotonic(), self.decoded
    mine = range(self.process, len(sources), self.processes)
    found = dict(zip(mine, self._pass([sources[i] for i in mine]), strict=True))
    log.info(
      "checked %d images in %.1f s, of which %d had to be decoded",
      len(mine),
      time.monotonic() - began,
      self.decoded - before,
    )
    facts = _told_to_all(found, len(sources), self.processes)
    return dict(zip(sources, facts, strict=True))

  def _pass(self, sources: list[ImageSource]) -> Iterator[ImageFacts]:
    bar = Bar(len(sources), "checking images", "image", shown=self.process == 0)
    said = time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(self.threads, "checks")
    try:
      # a piece at a time: what is decoded is written, and does not pile up
      for start in range(0, len(sources), AT_ONCE):
        for facts in pool.map(self._one, sources[start : start + AT_ONCE]):
          yield facts
          bar.update()
          if time.monotonic() - said > SAY_SECS:
            self.cache.write()
            said = time.monotonic()
        self.cache.write()
    finally:
      pool.shutdown(cancel_futures=True)
      self.cache.write()
      bar.__exit__()

  def _one(self, source: ImageSource) -> ImageFacts:
    stamp, modified = _stamp(source)
    known = self.cache[stamp] if stamp else None
    if known is not None:
      return known
    try:
      data = source_bytes(source)
    except Exception as error:  # noqa: BLE001  files in all formats, and disks
      return not_there(error)
    facts = self._decoded(data)
    if stamp and time.time() - modified > YOUNG_SECS:
      self.cache.put_file(stamp, facts.sha256)
    return facts

  def _decoded(self, data: bytes) -> ImageFacts:
    """Once per content, whichever threads have it at the same time."""
    digest = hashlib.sha256(data).hexdigest()
    known = self.cache.of(digest)
    if known is not None:
      return known
    with self._lock:
      running = self._running.get(digest)
      if running is None:
        mine = self._running[digest] = concurrent.futures.Future()
    if running is not None:
      return running.result()
    try:
      # One large picture at a time: each takes gigabytes.
      with self._large if _pixels(data) > LARGE_PIXELS else contextlib.nullcontext():
        facts = look_at(data, digest)
      self.cache.put(facts)
      mine.set_result(facts)
    except BaseException as error:
      mine.set_exception(error)
      raise
    with self._lock:
      self.decoded += 1
    return facts


def _pixels(data: bytes) -> int:
  """How many an image has by its header; 0 where that cannot be read."""
  try:
    with open_image(data) as image:
      return image.width * image.height
  except Exception:  # noqa: BLE001  decoders raise anything, and decoding it will tell
    return 0


def _stamp(source: ImageSource) -> tuple[str, float]:
  """What tells whether a file, or the larger file that holds the image, is as it was, and the time
  of its last change in seconds; empty where there is no such file."""
  path = source if isinstance(source, pathlib.Path) else getattr(source, "path", None)
  if not isinstance(path, pathlib.Path):
    return "", 0.0
  try:
    stat = path.stat()
  except OSError:
    return "", 0.0
  place = os.path.abspath(path) if path is source else source.where
  return f"{place}|{stat.st_size}|{stat.st_mtime_ns}", stat.st_mtime


def _told_to_all(found: dict[int, ImageFacts], count: int, processes: int) -> list[ImageFacts]:
  """The facts of all images, of which each process has found its part. Raises ValueError where the
  processes do not read the same rows."""
  if processes == 1:
    return [found[i] for i in range(count)]
  part = {"count": count, "facts": {i: dataclasses.astuple(fact) for i, fact in found.items()}}
  data = np.frombuffer(json.dumps(part).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array([len(data)], np.int32)).ravel()
  padded = np.pad(data, (0, int(lengths.max()) - len(data)))
  every = np.asarray(multihost_utils.process_allgather(padded)).reshape(processes, -1)
  parts = [json.loads(row[:length].tobytes()) for row, length in zip(every, lengths, strict=True)]
  counts = [part["count"] for part in parts]
  if len(set(counts)) > 1:
    raise ValueError(
      f"the processes read different rows: {counts} images; give all of them the same files"
    )
  facts = {int(i): ImageFacts(*fact) for part in parts for i, fact in part["facts"].items()}
  return [facts[i] for i in range(count)]
