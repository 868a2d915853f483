"""Numbered rows in shards on disk: kept as they finish, whole after any kill, shared by hosts that
see one folder.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import IO, Any, Generic, TypeVar

from tqdm import tqdm

from caprl_jax.errors import UserError
from caprl_jax.json_files import cut, read_record
from caprl_jax.progress import duration, ends_at, going_on

log = logging.getLogger("caprl_jax.harness.row_shards")

Source = TypeVar("Source")  # an input row
Worker = TypeVar("Worker")

SETTINGS = "settings.json"
POLL_SECS, SAY_SECS = 2.0, 30.0
RECENT_SECS = 300.0  # whose rate tells when the work ends
STILL_SECS = (
  1800.0  # more than loading a model and compiling take: a host that keeps no row is gone
)


@dataclasses.dataclass(frozen=True)
class RowResult(Generic[Source]):
  """What became of one input row. number, source: the input row and its number. row: the output
  row. about: what only statistics need (bucket, secs, reason).
  """

  number: int
  source: Source
  row: dict[str, Any]
  about: dict[str, Any]


def manifest(settings: dict[str, Any], names: Sequence[str], shard_rows: int) -> dict[str, Any]:
  """What has to be the same when a job goes on: the settings that rows depend on, the input's
  names, the cut.
  """
  digest = hashlib.sha256()
  for name in names:
    digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
  return settings | {
    "images": len(names),
    "names_sha256": digest.hexdigest(),
    "shard_rows": shard_rows,
  }


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
  """The entries in which two manifests differ, with both values; empty where they agree."""
  keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
  return "; ".join(f"{key} was {then.get(key)!r} and is {now.get(key)!r}" for key in keys)


class ShardedJob(Generic[Source]):
  """The folder of a job's shards. `rows` are its input, of which `manifest` tells.

  Shard s has rows s * shard_rows and on; host h of `hosts` does the shards with s % hosts == h.
  `00012-of-00500.jsonl` is whole, with `.partial` at its end it is in work: one line [number, row,
  about] per row as it finishes, in any order; the input row is found again by its number.

  Raises ValueError, at `open`, for a folder that is left from a job with another manifest.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    rows: Sequence[Source],
    manifest: dict[str, Any],
    *,
    host: int,
    hosts: int,
  ):
    self.folder, self.rows, self.manifest = folder, rows, manifest
    self.host, self.hosts = host, hosts
    self.count = len(rows)
    self.shards = -(-self.count // manifest["shard_rows"])
    self.mine = range(host, self.shards, hosts)

  def open(self) -> None:
    """Makes the folder, or checks that the one that is there is of this job."""
    self.folder.mkdir(parents=True, exist_ok=True)
    path = self.folder / SETTINGS
    if not path.exists():
      _write_once(path, json.dumps(self.manifest, indent=1))
    found = read_record(path)
    if not isinstance(found, dict):
      raise ValueError(f"{path}: not what a job writes; delete the folder to begin again")
    if found != self.manifest:
      raise ValueError(
        f"{self.folder} is left from a job with other settings: "
        f"{cut(differences(found, self.manifest), 600)}. Run it with those, delete the folder "
        "to begin again, or name another output"
      )

  def numbers(self, shard: int) -> range:
    rows = self.manifest["shard_rows"]
    return range(shard * rows, min((shard + 1) * rows, self.count))

  def path(self, shard: int) -> pathlib.Path:
    return self.folder / f"{shard:05d}-of-{self.shards:05d}.jsonl"

  def count_done(self, shard: int) -> int:
    """Rows kept of a shard in work."""
    partial = self.path(shard).with_name(self.path(shard).name + ".partial")
    return partial.read_bytes().count(b"\n") if partial.exists() else 0

  def _kept_bytes(self, shard: int) -> int:
    try:
      return self.path(shard).with_name(self.path(shard).name + ".partial").stat().st_size
    except FileNotFoundError:
      return 0

  def missing(self) -> list[int]:
    """Shards, of all hosts, that are not whole."""
    names = set(os.listdir(self.folder))
    return [shard for shard in range(self.shards) if self.path(shard).name not in names]

  def run(
    self,
    open_worker: Callable[[], AbstractContextManager[Worker]],
    work: Callable[[Worker, list[tuple[int, Source]]], Iterator[list[RowResult[Source]]]],
    *,
    what: str,
    unit: str = "image",
  ) -> None:
    """Does what is left of this host's shards, and keeps each row as it is finished.

    Args:
      open_worker: the context in which it works (a model); opened only where something is left.
      work: (that worker, numbered rows) -> their results, batch by batch, in any order.
      what: names the work on the bar and in the log.
      unit: what a row is.
    """
    left = [shard for shard in self.missing() if shard in self.mine]
    total = sum(len(self.numbers(shard)) for shard in self.mine)
    before = total - sum(len(self.numbers(shard)) - self.count_done(shard) for shard in left)
    if before:
      log.info("%s: going on after %d of %d %ss", what, before, total, unit)
    if not left:
      return
    bar = tqdm(total=total, initial=before, desc=what, unit=unit, disable=None)
    rate = _Rate(what, unit, before, total)
    with bar, contextlib.ExitStack() as first, open_worker() as worker:
      first.enter_context(going_on(f"{what}: the first ones are on their way"))
      for shard in left:
        with Shard(self, shard) as kept:
          for found in work(worker, kept.left()):
            first.close()
            kept.put(found)
            bar.set_postfix_str(rate.add(len(found)), refresh=False)
            bar.update(len(found))
    rate.end()

  def wait(self, whole: Callable[[int], bool] | None = None) -> None:
    """Returns when all shards of all hosts are whole; says twice a minute whose are not.

    Args:
      whole: what else has to hold of a shard that its name says is whole.

    Raises:
      UserError: for half an hour no row was added to any of them.
    """
    said, moved, before = -SAY_SECS, time.monotonic(), None
    left = lambda: [s for s in range(self.shards) if not whole(s)] if whole else []
    while missing := self.missing() or left():
      now, kept = time.monotonic(), [self._kept_bytes(shard) for shard in missing]
      late = sorted({shard % self.hosts for shard in missing})
      of = f"of host{'s' if len(late) > 1 else ''} {', '.join(map(str, late))}"
      if kept != before:
        moved, before = now, kept
      if now - moved > STILL_SECS:
        raise UserError(
          f"{len(missing)} of {self.shards} shards are missing, {of}, and no row was added to them "
          f"for {STILL_SECS / 60:.0f} minutes: see whether these hosts are alive, and start the "
          "same command again on them and here, which goes on"
        )
      if now - said >= SAY_SECS:
        said = now
        log.info("waiting for %d of %d shards, %s", len(missing), self.shards, of)
      time.sleep(POLL_SECS)

  def wait_until_removed(self) -> None:
    """Returns when the host that writes the output has done so."""
    with going_on("waiting for host 0 to write the output"):
      while self.folder.exists():
        time.sleep(POLL_SECS)

  def read(self) -> Iterator[RowResult[Source]]:
    """All rows in order, with one shard in memory at a time. Every shard must be whole."""
    for shard in range(self.shards):
      found: dict[int, RowResult[Source]] = {}
      for line in self.path(shard).read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError, TypeError, IndexError):  # a damaged one is missing
          item = parse_row(line, self.rows)
          found[item.number] = item
      if found.keys() != set(self.numbers(shard)):
        raise ValueError(
          f"{self.path(shard)} has {len(found)} rows, not the "
          f"{len(self.numbers(shard))} of its shard; delete this file and run the same command, "
          "which makes it again (in mode caption, caption.repair=True makes only what is missing)"
        )
      yield from (found[number] for number in self.numbers(shard))

  @contextlib.contextmanager
  def lock(self, what: str) -> Iterator[None]:
    """Held while the output is written. Raises ValueError while another process holds it."""
    with open(self.folder / f"{what}.lock", "a") as file:
      _lock(file, self.folder)
      yield

  def remove(self) -> None:
    """Takes the folder away: at once for whoever looks, so that a kill leaves no half of it."""
    self.sweep()
    os.rename(self.folder, self._gone)
    self.sweep()

  def sweep(self) -> None:
    """Takes away what a kill within `remove` has left."""
    shutil.rmtree(self._gone, ignore_errors=True)

  @property
  def _gone(self) -> pathlib.Path:
    return self.folder.with_name(self.folder.name + ".done")


class Shard:
  """A shard in work, of one process: `done` are the numbers of its rows so far. A context
  manager.
  """

  def __init__(self, parts: ShardedJob, shard: int):
    self.path, self.numbers, self.rows = parts.path(shard), parts.numbers(shard), parts.rows
    self.partial = self.path.with_name(self.path.name + ".partial")
    self.done: set[int] = set()
    self.file: IO[bytes]  # open inside `with` only

  def __enter__(self) -> "Shard":
    self.file = open(self.partial, "a+b")
    _lock(self.file, self.partial)
    if self.path.exists():  # another process has just made it whole
      self.done.update(self.numbers)
      self.partial.unlink(missing_ok=True)
      return self
    self.file.seek(0)
    end = 0
    for line in self.file:
      try:
        item = parse_row(line, self.rows)
        assert line.endswith(b"\n") and item.number in self.numbers
      except (ValueError, TypeError, IndexError, AssertionError):
        break  # a kill tears the last line; a crash of the machine may leave worse behind it
      self.done.add(item.number)
      end += len(line)
    self.file.truncate(end)
    return self

  def left(self) -> list[tuple[int, Any]]:
    """The shard's numbered rows that are not done."""
    return [(number, self.rows[number]) for number in self.numbers if number not in self.done]

  def put(self, items: Iterable[RowResult]) -> None:
    """Keeps rows: a kill after this does not lose them."""
    for item in items:
      assert item.number in self.numbers and item.number not in self.done, item.number
      self.done.add(item.number)
      self.file.write(json.dumps([item.number, item.row, item.about]).encode() + b"\n")
    self.file.flush()

  def __exit__(self, *failure) -> None:
    if failure[0] is None and len(self.done) == len(self.numbers) and not self.path.exists():
      os.fsync(self.file.fileno())  # before the name says that it is whole
      os.rename(self.partial, self.path)
    self.file.close()


class _Rate:
  """How fast the work goes and when it will end; says so twice a minute."""

  def __init__(self, what: str, unit: str, before: int, total: int):
    self.what, self.unit, self.before, self.total, self.done = what, unit, before, total, 0
    self.started = self.said = time.monotonic()
    # when, and how many were done: the rate is that of the last minutes, without compiling
    self._recent: collections.deque[tuple[float, int]] = collections.deque([(self.started, 0)])

  def add(self, count: int) -> str:
    """So many more are done. Returns when all will be, as a bar shows it."""
    self.done += count
    now = time.monotonic()
    self._recent.append((now, self.done))
    while now - self._recent[0][0] > RECENT_SECS and len(self._recent) > 2:
      self._recent.popleft()
    since, done = self._recent[0]
    rate = (self.done - done) / max(now - since, 1e-9)
    left = (self.total - self.before - self.done) / max(rate, 1e-9)
    end = ends_at(left)
    if now - self.said > SAY_SECS:
      self.said = now
      done = self.before + self.done
      message = "%s: %d of %d %ss, %.1f per second, %s to go, %s"
      log.info(message, self.what, done, self.total, self.unit, rate, duration(left), end)
    return end

  def end(self) -> None:
    secs = time.monotonic() - self.started
    message = "%s: %d %ss in %.1f s, %.1f per second, loading and compiling included"
    log.info(message, self.what, self.done, self.unit, secs, self.done / secs)


def parse_row(line: bytes, rows: Sequence[Source]) -> RowResult[Source]:
  """The result that a shard's line holds. Raises ValueError, TypeError or IndexError for none."""
  number, row, about = json.loads(line)
  return RowResult(number, rows[number], row, about)


def _lock(file, what: pathlib.Path) -> None:
  try:
    # the kernel lets go of it when the process dies
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    raise ValueError(
      f"another process is writing {what}; wait for it, stop it, or give each its own caption.host"
    ) from None
  except OSError as error:
    log.debug("%s: no locks on this file system (%s)", what, error)


def _write_once(path: pathlib.Path, text: str) -> None:
  """Writes a file that several hosts may write at the same time, each the same."""
  # process ids are the same in containers
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
  temporary.write_text(text, "utf-8")
  os.replace(temporary, path)
