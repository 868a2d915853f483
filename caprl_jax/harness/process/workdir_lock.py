"""A workdir, or a file that a mode writes -> the right to write it, which one run has at a time."""

import contextlib
import datetime
import fcntl
import logging
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import IO

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

    def take() -> None:
      works = held.enter_context(_lock(workdir / LOCK, workdir, "use another --workdir"))
      if works:
        sweep(workdir)

    from_first(take)
    yield


@contextlib.contextmanager
def only_writer(*outputs: pathlib.Path) -> Iterator[None]:
  """As `only_run`, for modes that write files or folders of their own names, beside which others
  may write: holds each of them while it is entered. The lock, a hidden file beside the output, goes
  when it ends.

  Raises:
    UserError: another run writes one of them; with that run's machine, process and start.
  """
  with contextlib.ExitStack() as held:

    def take() -> None:
      for path in dict.fromkeys(output.expanduser().absolute() for output in outputs):
        remedy = "name another output or --workdir"
        held.enter_context(_lock(path.with_name(f".{path.name}{LOCK}"), path, remedy, passing=True))

    from_first(take)
    yield


@contextlib.contextmanager
def _lock(
  path: pathlib.Path, what: pathlib.Path, remedy: str, *, passing: bool = False
) -> Iterator[bool]:
  """Holds a lock file; gives whether locks work there. passing: takes the file away in the end."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with _locked_file(path, what, remedy) as (file, works):
    file.truncate(0)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
    file.flush()
    try:
      yield works
    finally:
      if passing:
        path.unlink(missing_ok=True)  # while it is held: nobody else's then
    file.truncate(0)


@contextlib.contextmanager
def _locked_file(
  path: pathlib.Path, what: pathlib.Path, remedy: str
) -> Iterator[tuple[IO[str], bool]]:
  """The lock file, open, and whether locks work there."""
  while True:
    with open(path, "a+", encoding="utf-8") as file:
      works = False
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        works = True
      except BlockingIOError as error:
        file.seek(0)
        raise UserError(
          f"{what} is in use by {file.read().strip() or 'another run'}; wait for it to end, stop "
          f"it, or {remedy}"
        ) from error
      except OSError as error:
        log.warning("%s: locks do not work here (%s); see that no other run writes", what, error)
      if not works or _is_at(path, file):
        yield file, works
        return
    # the one that held it has just taken the file away: the lock is on a file without a name


def _is_at(path: pathlib.Path, file: IO[str]) -> bool:
  with contextlib.suppress(FileNotFoundError):
    return os.path.samestat(path.stat(), os.fstat(file.fileno()))
  return False
