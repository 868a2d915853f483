"""A workdir -> the right to write there, which one run has at a time."""

import contextlib
import datetime
import fcntl
import logging
import os
import pathlib
import socket
from collections.abc import Iterator

from caprl_jax.errors import UserError
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.leftovers import sweep

log = logging.getLogger("caprl_jax.harness.process.workdir_lock")

LOCK = ".lock"


@contextlib.contextmanager
def only_run(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir while it is entered; of several processes of one run the first does, for
  which the others wait.

  The lock is the operating system's and ends with the process, however it ends: no lock of a run
  that was killed has to be removed, but what it left unfinished is swept. On a file system without
  locks there is none, and the log says so.

  Raises:
    UserError: another run holds it; with that run's machine, process and start.
  """
  with contextlib.ExitStack() as held:
    from_first(lambda: held.enter_context(_lock(workdir)))
    yield


@contextlib.contextmanager
def _lock(workdir: pathlib.Path) -> Iterator[None]:
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / LOCK, "a+", encoding="utf-8") as file:
    held = False
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      held = True
    except BlockingIOError as error:
      file.seek(0)
      raise UserError(
        f"{workdir} is in use by {file.read().strip() or 'another run'}; wait for it to end, stop "
        "it, or use another --workdir"
      ) from error
    except OSError as error:
      log.warning("%s: locks do not work here (%s); see that no other run writes", workdir, error)
    file.truncate(0)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
    file.flush()
    if held:
      sweep(workdir)
    yield
    file.truncate(0)
