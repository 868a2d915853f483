"""The log: to the terminal, and to files that survive what a mounted bucket may lose."""

import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Iterator

from tqdm import auto as tqdm


class _Terminal(logging.Handler):
  """Writes lines to stderr above a progress bar instead of through it."""

  def emit(self, record: logging.LogRecord) -> None:
    tqdm.tqdm.write(self.format(record), file=sys.stderr)


class _Formatter(logging.Formatter):
  def format(self, record: logging.LogRecord) -> str:
    line = super().format(record)
    if record.levelno < logging.WARNING:
      return line
    time, _, rest = line.partition(" ")
    return f"{time} {record.levelname.lower()}: {rest}"


@contextlib.contextmanager
def logging_to(workdir: pathlib.Path, process: int, *, terminal: bool = True) -> Iterator[None]:
  """Our lines from INFO on and everybody's warnings go to stderr; to a file, our DEBUG too.

  Of several processes the first speaks; the others' stderr has warnings only.

  Args:
    process: this one's number.
    terminal: False for a program that has handlers of its own.
  """
  name = "log.txt" if process == 0 else f"log.{process}.txt"
  # Names of files may hold what no UTF-8 has a form for.
  file = logging.FileHandler(workdir / name, encoding="utf-8", errors="backslashreplace")
  file.setFormatter(_Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
  handlers: list[logging.Handler] = [file]
  if terminal:
    handlers.append(_Terminal(logging.INFO if process == 0 else logging.WARNING))
    handlers[-1].setFormatter(_Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  ours = logging.getLogger("caprl_jax")
  level = ours.level
  ours.setLevel(logging.DEBUG if terminal else logging.INFO)
  for handler in handlers:
    logging.root.addHandler(handler)
  try:
    yield
  finally:
    ours.setLevel(level)
    for handler in handlers:
      logging.root.removeHandler(handler)
    file.close()


def settle_log_files() -> None:
  """Closes the files of the log; the next line opens them again.

  A bucket that is mounted as a folder (gcsfuse) keeps what was written when a file is closed, and
  may lose all of it with the machine before.
  """
  for handler in logging.root.handlers:
    if not isinstance(handler, logging.FileHandler) or handler.mode != "a":
      continue  # somebody else's, who would begin it anew
    handler.acquire()
    try:
      if handler.stream is not None:
        handler.flush()
        os.fsync(handler.stream.fileno())
        handler.stream.close()
        handler.stream = None
    finally:
      handler.release()
