"""What ended a run -> whose matter it is (the user's, the machine's, ours), and the exit code."""

import errno
import re
import types

# 71, 74 and 75 are those of sysexits.h: system, input or output, temporary failure.
OK, FAILED, BAD_INPUT, NOT_FINITE, INTERRUPTED = 0, 1, 2, 3, 130
MEMORY_FULL, DISK_FULL, RUN_AGAIN = 71, 74, 75

# Libraries to which only our code speaks: what these refuse is our mistake, or a machine's. Others
# read what users bring: files, images, tokenizers, names of models.
_BELOW = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "chex", "grain", "etils")
_BELOW += ("numpy",)  # where Python raises it; its C has no frame of its own

# How the runtime's messages begin, which come as any type of exception: "UNKNOWN: Gloo all-reduce
# failed".
_STATUS = re.compile(
  r"(CANCELLED|UNKNOWN|INVALID_ARGUMENT|DEADLINE_EXCEEDED|NOT_FOUND|ALREADY_EXISTS|"
  r"PERMISSION_DENIED|RESOURCE_EXHAUSTED|FAILED_PRECONDITION|ABORTED|OUT_OF_RANGE|UNIMPLEMENTED|"
  r"INTERNAL|UNAVAILABLE|DATA_LOSS|UNAUTHENTICATED): "
)


class UserError(ValueError):
  """Something that a person can mend: a value, a file, a setting. Its message says which, where and
  how. A plain ValueError of this package's own code means the same; this one says so wherever it is
  raised."""


def is_users(error: Exception) -> bool:
  """Whether an error is about what a person gave: a UserError, a file that cannot be read or
  written, or a ValueError that was not raised inside jax or what is built on it."""
  if isinstance(error, UserError):
    return True
  if not isinstance(error, (ValueError, OSError)) or of_runtime(error):
    return False
  return (
    isinstance(error, OSError) or _innermost(error.__traceback__).partition(".")[0] not in _BELOW
  )


def of_runtime(error: BaseException) -> bool:
  """Whether it is the runtime's own: a device's, or that of the network between processes."""
  return bool(_STATUS.match(str(error))) or "Gloo" in str(error)


def code_of(error: BaseException) -> int:
  """The exit code. A file that cannot be read or written is bad input, unless it is the disk or the
  memory that is full or broken. An error may know its code: `exit_code`."""
  known = getattr(error, "exit_code", None)
  if isinstance(known, int):
    return known
  if isinstance(error, KeyboardInterrupt):
    return RUN_AGAIN if error.args else INTERRUPTED  # `signals.Preempted` names its signal
  if isinstance(error, FloatingPointError):
    return NOT_FINITE
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
    return MEMORY_FULL
  if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
    return DISK_FULL
  return BAD_INPUT if isinstance(error, Exception) and is_users(error) else FAILED


def _innermost(traceback: types.TracebackType | None) -> str:
  """The name of the module that raised; empty for an exception that was never raised."""
  if traceback is None:
    return ""
  while traceback.tb_next:
    traceback = traceback.tb_next
  return traceback.tb_frame.f_globals.get("__name__") or ""
