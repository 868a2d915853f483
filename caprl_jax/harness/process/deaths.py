"""The abort of jax's client where another process is dead -> a message that names it, exit code 75.

jax's client misses dead processes by heartbeats, in C++, and then ends its own process by abort(),
with code 134 and a stack of C++; its callback for that cannot be written in Python. So the signal
of abort() is handled, by a function that C can call.
"""

import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Callable

from caprl_jax.errors import RUN_AGAIN

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_kept: list[object] = []  # C has no share in the life of Python's objects
_LOOK_SECS = 5.0


def on_abort(who_died: Callable[[], str | None], coordinator: str | None) -> None:
  """Says which process is dead and ends this one with `RUN_AGAIN`, where jax would abort it. An
  abort of its own stays one.

  Args:
    who_died: names a process without a sign of life. Called in a thread of C++, so it must not wait
      for a lock.
    coordinator: the address of the first process: where nobody listens, that one is dead.
  """
  libc = ctypes.CDLL(None)
  libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p

  def aborted(number: int) -> None:
    dead = who_died()
    if dead is None and coordinator and not _listens(coordinator):
      dead = f"process 0 (at {coordinator})"
    if dead is None:
      libc.signal(number, int(signal.SIG_DFL))  # abort() goes on when this returns
      return
    message = (
      f"error: {dead} is dead, or cannot be reached (killed, or its machine is gone); run the same "
      "command again, it goes on from the last checkpoint\n"
    )
    os.write(2, message.encode())
    os._exit(RUN_AGAIN)

  handler = _HANDLER(aborted)
  _kept.append(handler)
  libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


def _listens(address: str) -> bool:
  host, _, port = address.rpartition(":")
  with contextlib.suppress(OSError, ValueError):
    socket.create_connection((host.strip("[]"), int(port)), _LOOK_SECS).close()
    return True
  return False
