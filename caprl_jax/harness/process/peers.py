"""The processes of one run -> one decision: go on, or stop together, with one message and code.

A step is one program on all devices: where one process does not start it, the others wait for ever.
So the processes agree before each step, on the host, through the store of jax's coordination
service, while the devices are at the step before: that costs the devices nothing. What cannot wait
for the next step, a process that ends elsewhere, is seen by a thread of each process, which ends
it; one that dies, by jax (`deaths.py`).
"""

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from caprl_jax.errors import INTERRUPTED, RUN_AGAIN, code_of, of_runtime
from caprl_jax.harness.process import deaths, signals
from caprl_jax.json_files import cut

log = logging.getLogger("caprl_jax.harness.process.peers")

HEARTBEAT_SECS = 30  # without a sign of life for as long a process is dead
POLL_SECS = 1.0
SAVE_SECS = 600.0  # for processes that stop together, to write what they have
UNWIND_SECS = 20.0  # for a process that was told to stop, until it is ended
JOIN_SECS = 30.0  # for the others to come to where they agree
_PLACE = "caprl_jax"
_DAY_MS = 24 * 3600 * 1000


@dataclasses.dataclass(frozen=True)
class Stop:
  """Why a run of several processes ends: the process that wants it, the exit code and its words."""

  process: int
  code: int
  message: str

  @property
  def is_notice(self) -> bool:
    return self.code in (RUN_AGAIN, INTERRUPTED)


class PeerStopped(KeyboardInterrupt):
  """Another process of this run stops, and so does this one, with that one's code. What saves on
  Ctrl-C saves now, too."""

  def __init__(self, stop: Stop, message: str):
    super().__init__(message)
    self.stop, self.exit_code = stop, stop.code


_current: "Peers | None" = None


def join(known: Mapping[str, int]) -> int:
  """Joins the processes of this run, and returns this one's number. Comes before anything that uses
  a device.

  Args:
    known: what jax.distributed does not find by itself.
  """
  global _current
  import jax  # not above: --help does not wait for it
  from jax._src import distributed

  arguments: dict[str, Any] = dict(known)
  jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECS)
  state = distributed.global_state  # jax has no public name for the client; Orbax takes the same
  if state.num_processes > 1:
    _current = Peers(state.client, state.process_id, state.num_processes)
    deaths.on_abort(_current.who_died, state.coordinator_address)
  return state.process_id


def current() -> "Peers | None":
  """The other processes of this run; None where there are none."""
  return _current


def check() -> None:
  """Between the parts of work that all processes do in the same order: raises in all of them, or in
  none, where one has been asked to stop. Does nothing in one process, where signals raise at
  once."""
  if _current:
    _current.agree()


def _text(stop: Stop) -> str:
  return json.dumps(dataclasses.asdict(stop))


def _stop(text: str) -> Stop:
  return Stop(**json.loads(text))


class Peers:
  """This process among those of its run.

  Args:
    client: of jax's coordination service.
    process, count: this one's number, and how many there are.
  """

  def __init__(self, client: Any, process: int, count: int):
    self.client, self.process, self.count = client, process, count
    self.agreed: Stop | None = None  # all know it, at the same place
    self.told: Stop | None = None  # this process was told, at any place
    self._asked: BaseException | None = None
    self._turn = 0
    self._left = threading.Lock()
    self._closed = threading.Event()
    self._main = threading.get_ident()
    # the others' last signs of life; they have just joined
    self._seen = {n: ("", time.monotonic()) for n in range(count) if n != process}
    self._where = {process: f"{socket.gethostname()}, pid {os.getpid()}"}
    client.key_value_set(f"{_PLACE}/where/{process}", self._where[process], allow_overwrite=True)
    self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
    self._thread.start()

  # ---- together ----

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """While it is entered a signal that asks to stop waits for the next `agree`; a second one does
    not wait."""

    def note(error: BaseException) -> None:
      if self._asked is not None or self.told:
        raise self.told_exception() or error
      self._asked = error

    with signals.noted(note):
      yield

  def agree(self, error: BaseException | None = None, secs: float | None = None) -> None:
    """All processes call it equally often. Where one has an error, or was asked to stop, all raise:
    that one its own error, the others `PeerStopped`.

    Args:
      error: of this process.
      secs: how long to wait for the others; None: they may be busy for long, and who dies is seen.

    Raises:
      RuntimeError: the others did not come.
    """
    mine = error or self._asked
    if self.agreed or self.told:
      raise mine or self.exception()
    self._turn += 1
    place = f"{_PLACE}/turn/{self._turn}"
    if mine is not None:
      self.client.key_value_set(f"{place}/{self.process}", _text(self.stop_of(mine)))
    timeout = _DAY_MS if secs is None else int(secs * 1000)
    self.client.wait_at_barrier(f"{_PLACE}/turn", timeout)
    found = [_stop(text) for _, text in self.client.key_value_dir_get(place)]
    if not found:
      return
    self.agreed = min(found, key=_order)
    if mine is not None and (error is not None or self.agreed.process == self.process):
      raise mine
    raise self.exception()

  def failed(self, error: BaseException) -> bool:
    """Called with an error that this process has met between two `agree`. True where the others
    now know it, and are at the same place: work can be saved together. An error that all have met
    at the same place is one."""
    if self.agreed:
      return True
    if self.told or of_runtime(error):
      return False
    try:
      self.agree(error, JOIN_SECS)
    except BaseException as raised:  # noqa: BLE001  its own, as it should be; or the others did not come
      if raised is not error:
        log.debug("the others did not come: %s", raised)
    return self.agreed is not None

  def stop_of(self, error: BaseException) -> Stop:
    """What this process tells the others of its error."""
    if isinstance(error, PeerStopped):
      return error.stop
    words = str(error) or ("Ctrl-C" if isinstance(error, KeyboardInterrupt) else repr(error))
    if isinstance(error, KeyboardInterrupt):
      words = f"stopped by {words}"
    return Stop(self.process, code_of(error), cut(words, 1000))

  def exception(self) -> PeerStopped:
    """What this process raises where another one stops."""
    stop = self.told or self.agreed
    assert stop is not None
    return PeerStopped(stop, f"{self.name(stop.process)}: {stop.message}")

  def told_exception(self) -> PeerStopped | None:
    """What a signal means: this process was told to stop, where it was."""
    return self.exception() if self.told else None

  def name(self, process: int) -> str:
    """One of the processes, with its host and its process id there."""
    return f"process {process} ({self._where.get(process, 'of an unknown host')})"

  # ---- the end ----

  def cause_of(self, error: BaseException) -> BaseException:
    """The error, or the end of another process where that explains it: a collective fails before
    anyone knows that a process is dead."""
    deadline = time.monotonic() + HEARTBEAT_SECS * 1.5
    while of_runtime(error) and not self.told and time.monotonic() < deadline:
      time.sleep(POLL_SECS / 4)
    return self.exception() if self.told and of_runtime(error) else error

  def leave(self, stop: Stop) -> None:
    """Ends this process with the stop's code, after it has told the others. The first process,
    which has the store, goes last. Not by the usual way: that waits for all processes, and one may
    be dead."""
    with self._left:
      self._closed.set()
      with contextlib.suppress(Exception):  # who keeps the store may be dead
        place = f"{_PLACE}/left/{self.process}"
        self.client.key_value_set(place, _text(stop), allow_overwrite=True)
        self._wait_for_others()
      for stream in (sys.stdout, sys.stderr):
        stream.flush()
      logging.shutdown()
      os._exit(stop.code)

  def _wait_for_others(self) -> None:
    """The first process waits until all have left, the others for the first one: who is gone and
    has not said so is soon taken for dead."""
    deadline = time.monotonic() + self._patience()
    while time.monotonic() < deadline:
      left = self._of_all("left")
      if (0 in left) if self.process else len(left) == self.count:
        break
      time.sleep(POLL_SECS / 4)
    if self.process == 0:
      time.sleep(POLL_SECS)

  def _patience(self) -> float:
    """Seconds that a process may take to unwind: one that stops with the others writes what it
    has."""
    return SAVE_SECS if self.agreed else UNWIND_SECS

  def finish(self) -> None:
    """Called at the end of a run that went well: waits until it has for all processes, of which one
    may still write what the run leaves."""
    self.client.wait_at_barrier(f"{_PLACE}/end", _DAY_MS)
    self._closed.set()
    self._thread.join()

  # ---- the thread ----

  def who_died(self) -> str | None:
    """Where the process ran that has shown no sign of life for long, if there is one."""
    now = time.monotonic()
    silent = {n: now - at for n, (_, at) in self._seen.items()}
    longest = max(silent, key=silent.__getitem__)
    return None if silent[longest] < HEARTBEAT_SECS / 2 else self.name(longest)

  def _watch(self) -> None:
    """Shows a sign of life and looks for the others', and for their ends, once a second."""
    beat = 0
    while not self._closed.wait(POLL_SECS):
      beat += 1
      try:
        self.client.key_value_set(f"{_PLACE}/beat/{self.process}", str(beat), allow_overwrite=True)
        stop = self._look()
      except Exception as error:  # noqa: BLE001  of the store; if who keeps it is dead, jax says so
        log.debug("the others cannot be asked: %s", error)
        continue
      if stop is not None:
        self._told(stop)
        return

  def _look(self) -> Stop | None:
    """What another process that has left says."""
    if len(self._where) < self.count:
      self._where |= self._of_all("where")
    now = time.monotonic()
    for process, beat in self._of_all("beat").items():
      if process in self._seen and self._seen[process][0] != beat:
        self._seen[process] = (beat, now)
    left = [_stop(text) for text in self._of_all("left").values()]
    return min(left, key=_order) if left else None

  def _of_all(self, what: str) -> dict[int, str]:
    found = self.client.key_value_dir_get(f"{_PLACE}/{what}")
    return {int(key.rpartition("/")[2]): text for key, text in found}

  def _told(self, stop: Stop) -> None:
    """Wakes the main thread, which unwinds where it can, and ends this process where it cannot."""
    if self._closed.is_set():
      return
    self.told = stop
    if self.agreed is None and callable(signal.getsignal(signal.SIGTERM)):
      with contextlib.suppress(OSError):  # it may be at its end
        signal.pthread_kill(self._main, signal.SIGTERM)
    if not self._closed.wait(self._patience()):
      log.warning("%s", self.exception())
      self.leave(stop)


def _order(stop: Stop) -> tuple[bool, int]:
  """Errors before notices: those explain these."""
  return stop.is_notice, stop.process
