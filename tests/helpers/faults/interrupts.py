"""Ctrl-C at a place of the loop that a test names."""

import contextlib
from collections.abc import Iterator

import pytest

from caprl_jax.harness import loop


@contextlib.contextmanager
def interrupted_before(batch: int) -> Iterator[None]:
  """What is entered must be ended by a Ctrl-C that comes before that batch, from 1 on."""
  take, taken = loop._next_batch, 0

  def interrupted(*arguments):
    nonlocal taken
    taken += 1
    if taken == batch:
      raise KeyboardInterrupt
    return take(*arguments)

  with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(loop, "_next_batch", interrupted)
    yield
