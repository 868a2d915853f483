"""The files that the log goes to -> the same, with all that was said on the disk."""

import logging
import os


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
