"""What a run can go on without: its samples, its report."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator

log = logging.getLogger("caprl_jax.harness.extras")
_failed: set[tuple[str, pathlib.Path]] = set()


@contextlib.contextmanager
def extra(what: str, path: pathlib.Path) -> Iterator[None]:
  """Around the writing of `path`: an error there is a warning in the log and the run goes on.

  The warning comes once for each `what` and folder. A run of days must not end, and several
  processes must not wait for one that has ended, because a picture cannot be read.
  """
  try:
    yield
  except Exception as error:  # whatever it is: nothing that training needs is missing
    if (what, path.parent) in _failed:
      return
    _failed.add((what, path.parent))
    log.warning(
      "the run goes on without %s: %s was not written (%s: %s); mend that, or free the disk, and "
      "later ones will be (said once)",
      what,
      path,
      type(error).__name__,
      error,
      exc_info=log.isEnabledFor(logging.DEBUG),
    )
