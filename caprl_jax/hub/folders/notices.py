"""What a checkpoint leaves open, or says twice -> one warning each."""

import functools
import logging

log = logging.getLogger("caprl_jax.hub")


@functools.cache
def warn_once(message: str) -> None:
  """Warns of a thing the first time that it is met in this process; loading asks more than once."""
  log.warning("%s", message)
