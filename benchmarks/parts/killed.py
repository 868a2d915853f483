"""Work, a kill -> the processes that do the work, of which one kills itself at that moment."""

import dataclasses
import importlib
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
HUNG_SECS = 240.0  # after the end of one process, until the others are taken for hung and killed


@dataclasses.dataclass(frozen=True)
class Kill:
  """kind: "time", `delay` seconds after the start; "checkpoint", `delay` seconds after the
  `number`-th checkpoint was begun; "change", right before the `number`-th change of a file.
  process: which one dies, and counts."""

  kind: str
  number: int = 0
  delay: float = 0.0
  process: int = 0


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a process ended. code: its exit code (negative: the signal). at: the time. told: what its
  watcher has said last, empty where it came to nothing. said: what it has written."""

  code: int
  at: float
  told: dict[str, Any]
  said: str


class Watcher:
  """Counts what a run does, in its own process, and kills it where `kill` says. Of several
  processes each begins when it has joined the others."""

  def __init__(
    self,
    kill: Kill | None,
    workdir: pathlib.Path,
    report: int,
    sent: signal.Signals,
    *,
    alone: bool,
  ):
    """report: file descriptor to which a JSON line goes before the end. sent: the signal."""
    self.sent = sent
    self.kill, self.workdir, self.out = kill, str(workdir), report
    self.changes = self.checkpoints = 0
    self._busy = threading.local()
    self._begun = False
    checkpoints = importlib.import_module("caprl_jax.harness.checkpoints").Checkpoints
    checkpoints.save = self._counted(checkpoints.save)
    sys.addaudithook(self._on_event)
    self.began = time.monotonic()
    if alone:
      self.begin()
    else:
      peers: Any = importlib.import_module("caprl_jax.harness.process.peers")
      peers.join = self._beginning(peers.join)

  def begin(self) -> None:
    self.began, self._begun = time.monotonic(), True
    if self.kill and self.kill.kind == "time":
      self._later(self.kill.delay)

  def die(self, what: str) -> None:
    self.tell(what)
    os.kill(os.getpid(), self.sent)

  def tell(self, what: str) -> None:
    numbers = {"changes": self.changes, "checkpoints": self.checkpoints}
    secs = time.monotonic() - self.began
    os.write(self.out, (json.dumps({"what": what, "secs": secs, **numbers}) + "\n").encode())

  def _beginning(self, join: Callable) -> Callable:
    def joined(*args: Any) -> Any:
      number = join(*args)
      self.begin()
      return number

    return joined

  def _later(self, delay: float) -> None:
    timer = threading.Timer(delay, self.die, ["a moment"])
    timer.daemon = True
    timer.start()

  def _counted(self, save: Callable) -> Callable:
    def counted(checkpoints: Any, state: Any, *args: Any, **more: Any) -> None:
      self.checkpoints += 1
      if self.kill and self.kill.kind == "checkpoint" and self.checkpoints == self.kill.number:
        self._later(self.kill.delay)
      save(checkpoints, state, *args, **more)

    return counted

  def _on_event(self, event: str, args: tuple) -> None:
    if not self._begun or not (event in CHANGES or event == "open"):
      return
    if getattr(self._busy, "now", False):
      return
    self._busy.now = True
    try:
      if event == "open" and not _writes(args):
        return
      if isinstance(args[0], int) or not os.fsdecode(args[0]).startswith(self.workdir):
        return
      self.changes += 1
      if self.kill and self.kill.kind == "change" and self.changes == self.kill.number:
        self.die(event)
    finally:
      self._busy.now = False


def _writes(args: tuple) -> bool:
  _, mode, flags = args
  if isinstance(mode, str):
    return any(letter in mode for letter in "wax+")
  return bool(flags & (os.O_WRONLY | os.O_RDWR))


def run_processes(
  work: Callable[[], int],
  log: pathlib.Path,
  workdir: pathlib.Path,
  *,
  kill: Kill | None = None,
  sent: signal.Signals = signal.SIGKILL,
  processes: int = 1,
  devices: int = 1,
) -> list[Ended]:
  """Runs `work` in so many forked processes, which find each other on loopback, and waits for all.

  Args:
    log: where the first one writes; the others write beside it.
    workdir: whose changes count.
    sent: what the kill sends.
    devices: of each process.
  """
  joining = _joining(processes)
  logs = [
    log,
    *(log.with_name(f"{log.stem}.{number}{log.suffix}") for number in range(1, processes)),
  ]
  began = [path.stat().st_size if path.exists() else 0 for path in logs]
  pids, pipes = [], []
  for number, path in enumerate(logs):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
      os.close(read)
      os.environ.update(joining | ({"JAX_PROCESS_ID": str(number)} if joining else {}))
      os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
      mine = kill if kill and kill.process == number else None
      _be_child(
        work, path, lambda at=write, kill=mine: Watcher(kill, workdir, at, sent, alone=not joining)
      )
    os.close(write)
    pids.append(pid)
    pipes.append(read)
  ends = _await_all(pids)
  found = []
  for (code, at), pipe, path, size in zip(ends, pipes, logs, began, strict=True):
    with os.fdopen(pipe, encoding="utf-8") as told:
      lines = told.read().splitlines()
    said = path.read_bytes()[size:].decode(errors="replace")
    found.append(Ended(code, at, json.loads(lines[0]) if lines else {}, said))
  return found


def _joining(processes: int) -> dict[str, str]:
  """The environment in which so many processes find each other."""
  if processes == 1:
    return {}
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  return {
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": str(processes),
  }


def _be_child(work: Callable[[], int], log: pathlib.Path, watch: Callable[[], Watcher]) -> None:
  """Never returns: a child must not go on as its parent."""
  code = 70
  try:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    watcher = watch()
    code = work()
    watcher.tell("the end")
    if code == 0 and "JAX_NUM_PROCESSES" in os.environ:
      importlib.import_module("jax").distributed.shutdown()  # as at a program's own end
  except BaseException:  # noqa: BLE001  whatever it is
    traceback.print_exc()
  finally:
    sys.stderr.flush()
    os._exit(code)


def _await_all(pids: Sequence[int]) -> list[tuple[int, float]]:
  """Exit code and time of each. What goes on long after another one has died is killed."""
  ends: dict[int, tuple[int, float]] = {}
  while len(ends) < len(pids):
    for pid in pids:
      if pid not in ends:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
          ends[pid] = (os.waitstatus_to_exitcode(status), time.monotonic())
    died = [at for code, at in ends.values() if code]
    if died and time.monotonic() - min(died) > HUNG_SECS:
      for pid in set(pids) - ends.keys():
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.02)
  return [ends[pid] for pid in pids]
