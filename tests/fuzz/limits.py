"""Inputs -> outcomes: each is tried in a child process, within limits of time and memory.

A child takes many inputs in a row; what kills it (a crash in C, or no answer) is the outcome of
the input that it was at, and a new one goes on with the next.
"""

import collections
import dataclasses
import json
import logging
import os
import pathlib
import pickle
import re
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fuzz import kinds
from fuzz.cases import Case

READ, REFUSED = GOOD = "read", "refused"
CPU_SECS = 5.0  # of an input, and a second more for each
BYTES_A_SEC = 2_000_000  # of its files: some changes repeat a file's lines hundreds of times
WALL_SECS = 60.0  # of an input; other processes may have the processor
MEMORY_BYTES = 2 << 30  # beyond what the child has when it begins
MESSAGE_CHARACTERS = 1500
BATCH = 50
TERMINAL = os.dup(2)  # a child's own stderr is silenced


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How an input ended: READ, REFUSED, or what is wrong. signature: which faults are the same."""

  case: Case
  status: str
  message: str = ""
  signature: str = ""

  @property
  def good(self) -> bool:
    return self.status in GOOD


class OutOfTimeError(BaseException):
  """No `except Exception` of the readers may catch it."""


def base_files(names: Sequence[str]) -> dict[str, Any]:
  """The good files of some kinds, made in a child: this process must stay fit to be forked."""

  def make(write):
    write({name: kinds.base_files(name) for name in names})

  [found] = _in_child(make)
  return found


def run(cases: Sequence[Case], jobs: int = 1) -> Iterator[Outcome]:
  """The outcomes, in the order in which they come."""
  waiting = collections.deque(cases[i : i + BATCH] for i in range(0, len(cases), BATCH))
  running: list[_Child] = []
  try:
    while waiting or running:
      while waiting and len(running) < jobs:
        running.append(_Child(waiting.popleft()))
      select.select([child.pipe for child in running], [], [], 1.0)
      for child in list(running):
        yield from child.outcomes()
        if child.ended:
          running.remove(child)
          if child.left:
            waiting.appendleft(child.left)
  finally:
    for child in running:
      child.kill()


def _in_child(body: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
  """What `body` writes in a child process, as it comes."""
  read, write = os.pipe()
  pid = os.fork()
  if pid == 0:
    os.close(read)
    code = 1
    try:
      with os.fdopen(write, "wb") as file:
        body(lambda value: (pickle.dump(value, file), file.flush()))
      code = 0
    except BaseException:  # noqa: BLE001  whatever it is, the parent must not go on in here
      traceback.print_exc()
    finally:
      os._exit(code)
  os.close(write)
  with os.fdopen(read, "rb") as file:
    while True:
      try:
        yield pickle.load(file)
      except EOFError:
        break
  os.waitpid(pid, 0)


class _Child:
  """A process that works through a batch."""

  def __init__(self, batch: Sequence[Case]):
    self.batch, self.at, self.since, self.ended = list(batch), -1, time.monotonic(), False
    self.folder = tempfile.mkdtemp(prefix="fuzz_")
    self.pipe, write = os.pipe()
    self.pid = os.fork()
    if self.pid == 0:
      os.close(self.pipe)
      _work(self.batch, pathlib.Path(self.folder), write)
    os.close(write)
    self.buffer = b""

  @property
  def left(self) -> list[Case]:
    return self.batch[self.at + 1 :]

  def outcomes(self) -> Iterator[Outcome]:
    """What has come since; at the child's end, what it died of."""
    while select.select([self.pipe], [], [], 0)[0]:
      data = os.read(self.pipe, 1 << 16)
      if not data:
        yield from self._end()
        return
      self.buffer += data
      *lines, self.buffer = self.buffer.split(b"\n")
      for line in lines:
        self.since = time.monotonic()
        said = json.loads(line)
        self.at = said["at"]
        if "status" in said:
          yield Outcome(self.batch[self.at], said["status"], said["message"], said["signature"])
        self.busy = "status" not in said
    if time.monotonic() - self.since > WALL_SECS:
      os.kill(self.pid, signal.SIGKILL)

  busy = False

  def _end(self) -> Iterator[Outcome]:
    _, status = os.waitpid(self.pid, 0)
    self.ended = True
    os.close(self.pipe)
    shutil.rmtree(self.folder, ignore_errors=True)
    if not self.busy:
      if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"the child that tries {self.batch[0].kind} cannot begin")
      self.at = len(self.batch)
      return
    number = -os.waitstatus_to_exitcode(status)
    name = signal.Signals(number).name if number > 0 else f"exit {-number}"
    what = "no answer" if name == "SIGKILL" else f"crash ({name})"
    yield Outcome(self.batch[self.at], what, "", what)

  def kill(self) -> None:
    if self.ended:
      return
    os.kill(self.pid, signal.SIGKILL)
    os.waitpid(self.pid, 0)
    shutil.rmtree(self.folder, ignore_errors=True)


def _work(batch: Sequence[Case], folder: pathlib.Path, pipe: int) -> None:
  """The child's life. It ends without Python's own clean-up, which belongs to the parent."""
  code = 1
  try:
    if not os.environ.get("FUZZ_NOISE"):
      silence = os.open(os.devnull, os.O_WRONLY)
      os.dup2(silence, 1)
      os.dup2(silence, 2)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _out_of_time)
    warm = kinds.good_case(batch[0].kind, BASES[batch[0].kind])
    if (said := _try(warm, folder / "warm"))["status"] not in GOOD:
      raise RuntimeError(f"the good input of {warm.kind} ends so: {said}")
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    for at, case in enumerate(batch):
      _say(pipe, {"at": at})
      _say(pipe, {"at": at} | _try(case, folder / str(at)))
    code = 0
  except BaseException as error:  # noqa: BLE001  whatever it is, the parent must not go on in here
    os.write(TERMINAL, f"{error!r}\n".encode())
  finally:
    os._exit(code)


BASES: dict[str, Any] = {}  # set by who calls `run`


def _say(pipe: int, value: dict) -> None:
  data = json.dumps(value).encode() + b"\n"
  while data:
    data = data[os.write(pipe, data) :]


def _out_of_time(number, frame):
  raise OutOfTimeError


def _try(case: Case, folder: pathlib.Path) -> dict[str, str]:
  folder.mkdir()
  try:
    case.write(folder)
    place = str(folder)
    try:
      signal.setitimer(signal.ITIMER_PROF, CPU_SECS + _size(case) / BYTES_A_SEC)
      try:
        left_out = kinds.KINDS[case.kind].target(folder, case.arguments)
      finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    except BaseException as error:  # noqa: BLE001  all that a reader can raise is what this is about
      return _judged(error, case, place)
    for message in left_out:
      if fault := _fault_of(message, case, place):
        return _said(f"bad row's message {fault}", message)
    return _said(READ, "")
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _size(case: Case) -> int:
  return sum(map(len, case.files.values()))


def _said(status: str, message: str, signature: str = "") -> dict[str, str]:
  message = message if len(message) < 3000 else f"{message[:2900]} ... ({len(message):,})"
  return {"status": status, "message": message, "signature": signature or status}


def _judged(error: BaseException, case: Case, place: str) -> dict[str, str]:
  """Whether an error is one that a user may see: ours, short, and with its place."""
  frames = traceback.extract_tb(error.__traceback__)
  ours = [frame for frame in frames if "/caprl_jax/" in frame.filename]
  last = ours[-1] if ours else frames[-1]
  at = f"{type(error).__name__} at {last.filename.rpartition('/caprl_jax/')[2]}:{last.name}"
  text = str(error)
  if isinstance(error, OutOfTimeError):
    return _said("out of time", at, f"out of time {at}")
  if isinstance(error, MemoryError) or "MemoryError" in text:
    return _said("out of memory", at, f"out of memory {at}")
  if type(error) is not ValueError or not ours or "/caprl_jax/" not in frames[-1].filename:
    return _said("leak", f"{at} line {last.lineno}: {text}", f"leak {at}")
  if fault := _fault_of(text, case, place):
    return _said(f"message {fault}", text, f"{fault} {at}")
  return _said(REFUSED, text)


def _fault_of(message: str, case: Case, folder: str) -> str:
  """What is wrong with a message, if anything is."""
  if len(message) > MESSAGE_CHARACTERS:
    return "too long"
  for line in message.splitlines():
    places = re.findall(rf"{re.escape(folder)}/[\w./-]*\w(?::\d+|, (?:row|item) \d+)?", line)
    if len(places) > len(set(places)):
      return "names a place twice"
    if re.search(r"([\w./ -]{4,}): \1:", line):
      return "repeats itself"
  names = [name.rpartition("/")[2] for name in case.files] + list(case.arguments)
  names += [folder, "--", "config.", "chat template"]
  if not any(name in message for name in names):
    return "names no place"
  return ""
