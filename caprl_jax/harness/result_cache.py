"""Results by key, in a file that grows: what an interrupted evaluation has done is there when it
goes on.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import jax

from caprl_jax.errors import UserError

log = logging.getLogger("caprl_jax.harness.result_cache")

SEEN_SECS, POLL_SECS = 180.0, 0.5  # for a shared folder to show what another process wrote


class ResultCache(Mapping):
  """key -> JSON value, for one kind of work under given settings: other settings have a file of
  their own.

  A line is [key, value]; the first line says the settings. A line that a kill has torn, or a disk
  has spoilt, is passed over with a warning; what stands behind it is not. Several processes may add
  to one file. The processes of one run have a file each, since not all shared folders have locks,
  and read those of the others.

  Args:
    process: this one's number among those of its run.
  """

  def __init__(
    self, folder: pathlib.Path, kind: str, settings: dict[str, Any], process: int | None = None
  ):
    text = json.dumps(settings, sort_keys=True)
    self._stem = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    number = jax.process_index() if process is None else process
    self.path = folder / f"{self._stem}{f'.{number}' if number else ''}.jsonl"
    self._values: dict[str, Any] = {}
    folder.mkdir(parents=True, exist_ok=True)
    self._begin(text)
    self._read_others()

  def await_others(self, keys: Iterable[str]) -> None:
    """Takes over what the other processes of the run have kept, which holds all of `keys`.

    Raises:
      UserError: it does not, for minutes: they do not see one folder.
    """
    wanted, deadline = [*keys], time.monotonic() + SEEN_SECS
    while missing := [key for key in wanted if key not in self]:
      if time.monotonic() > deadline:
        raise UserError(
          f"{self.path.parent}: {len(missing)} results of other processes are not there; all "
          "processes must see one folder: name a shared one"
        )
      self._read_others()
      time.sleep(POLL_SECS if any(key not in self for key in missing) else 0)

  def _read_others(self) -> None:
    for path in sorted(self.path.parent.glob(f"{self._stem}*.jsonl")):
      if path != self.path:
        data = path.read_bytes()
        self._take_all(path, data[: data.rfind(b"\n") + 1].splitlines())  # it may be at work

  def _begin(self, text: str) -> None:
    """Reads this process's file, or makes it, with the settings `text` in its first line."""
    with self._locked() as file:
      file.seek(0)
      lines = file.read().splitlines(keepends=True)
      if len(lines) < 2 and not b"".join(lines).endswith(b"\n"):  # none, or torn by a kill
        file.truncate(0)
        file.write((text + "\n").encode())
    self._take_all(self.path, lines)

  def _take_all(self, path: pathlib.Path, lines: Sequence[bytes]) -> None:
    bad = [number for number, line in enumerate(lines, 1) if number > 1 and not self._take(line)]
    if bad:
      log.warning(
        "%s: %d lines that cannot be read are passed over, the first is line %d; their work is "
        "done again",
        path,
        len(bad),
        bad[0],
      )

  def _take(self, line: bytes) -> bool:
    """Takes over what a line says; False where it cannot be read."""
    try:
      [key, value] = item = json.loads(line)
      if not isinstance(item, list):  # an object of two keys
        return False
      self._values[key] = value
    except (ValueError, TypeError, RecursionError):  # no JSON, or no pair, or a key that is no text
      return False
    return True

  @contextlib.contextmanager
  def _locked(self) -> Iterator[IO[bytes]]:
    """The file, open to read and to add to, while no other process writes."""
    with open(self.path, "a+b") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX)
      except OSError as error:
        log.debug("%s: no locks on this file system (%s)", self.path, error)
      yield file

  def __getitem__(self, key: str) -> Any:
    return self._values[key]

  def __contains__(self, key: object) -> bool:
    return key in self._values

  def __iter__(self) -> Iterator[str]:
    return iter(self._values)

  def __len__(self) -> int:
    return len(self._values)

  def put(self, found: Mapping[str, Any]) -> None:
    """Adds values; a kill after this does not lose them."""
    self._values.update(found)
    lines = "".join(json.dumps([key, value]) + "\n" for key, value in found.items()).encode()
    with self._locked() as file:
      size = file.seek(0, os.SEEK_END)
      if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":  # a kill tore the last line, which must not spoil this one
          lines = b"\n" + lines
      file.write(lines)
