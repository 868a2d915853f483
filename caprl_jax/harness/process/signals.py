"""Signals that ask a run to stop -> exceptions, at moments when its work can be saved."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Preempted(KeyboardInterrupt):
  """The machine is taken away, or its terminal: the run saves what it has, and asks to be started
  again. A KeyboardInterrupt, so that what saves on Ctrl-C saves now, too."""


@contextlib.contextmanager
def notices(instead: Callable[[], BaseException | None] | None = None) -> Iterator[None]:
  """While it is entered SIGTERM and SIGHUP raise `Preempted` in the main thread, wherever it is.

  A signal that is ignored (SIGHUP under nohup) stays ignored.

  Args:
    instead: what is raised in its place, where that is known.
  """

  def raise_preempted(number: int, _: Any) -> None:
    raise (instead and instead()) or _exception(number)

  with _handlers({signal.SIGTERM: raise_preempted, signal.SIGHUP: raise_preempted}):
    yield


@contextlib.contextmanager
def noted(note: Callable[[BaseException], None]) -> Iterator[None]:
  """While it is entered signals that ask to stop raise nothing: `note` gets what they would."""

  def pass_on(number: int, _: Any) -> None:
    note(_exception(number))

  with _handlers(dict.fromkeys(ASKING, pass_on)):
    yield


def _exception(number: int) -> BaseException:
  return KeyboardInterrupt() if number == signal.SIGINT else Preempted(signal.Signals(number).name)


class Deferred:
  """While it is entered, signals that ask to stop do what they did before, but for the moments
  inside `held`: there they wait for its end. A second one does not wait.

  For work that has given its input away and not handed over its output, as a training step has
  whose state is donated.
  """

  def __init__(self):
    self._holding, self._waiting = False, None

  def __enter__(self) -> "Deferred":
    self._stack = contextlib.ExitStack()
    old: dict[int, Callable[[int, Any], Any]] = {}
    for number in ASKING:
      handler = signal.getsignal(number)
      if callable(handler):
        old[number] = handler

    def pass_on(number: int, frame: Any) -> None:
      if self._holding and self._waiting is None:
        self._waiting = lambda: old[number](number, frame)
        return
      old[number](number, frame)

    self._stack.enter_context(_handlers(dict.fromkeys(old, pass_on)))
    return self

  def __exit__(self, *_) -> None:
    self._stack.close()

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """Signals wait; one that came is passed on by `release`, not by leaving: what the block made
    can be taken over first."""
    self._holding = True
    try:
      yield
    finally:
      self._holding = False

  def release(self) -> None:
    """Does what the signal that came meanwhile asks for."""
    waiting, self._waiting = self._waiting, None
    if waiting:
      waiting()


@contextlib.contextmanager
def _handlers(wanted: dict[int, Any]) -> Iterator[None]:
  """Sets handlers, and the old ones again; not those of signals that are ignored, and none outside
  the main thread, where Python has no signals."""
  old = {}
  if threading.current_thread() is threading.main_thread():
    for number, handler in wanted.items():
      if signal.getsignal(number) is not signal.SIG_IGN:
        old[number] = signal.signal(number, handler)
  try:
    yield
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
