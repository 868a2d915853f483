"""Minutes, steps -> when the minutes are over, agreed by all processes."""

import time
from collections.abc import Callable

from caprl_jax.harness.process.first import from_first


class WallTime:
  """Says after which steps so many minutes are over since the last time.

  The first process's clock counts. Asking it is a message to all others, for which all wait: it is
  asked at steps that all know, the sooner the less time is left.

  Args:
    minutes: None: never.
  """

  def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic):
    self.secs = None if minutes is None else minutes * 60
    self._clock = clock
    self._began: tuple[int, float] | None = None  # step and time
    self._look = 0  # step at which the clock is asked

  def over(self, step: int) -> bool:
    """Whether the minutes are over. All processes call it after every step."""
    if self.secs is None:
      return False
    if self._began is None:
      self.begin(step)
      return False
    if step < self._look:
      return False
    since, began = self._began
    gone = self._clock() - began
    left, per_step = self.secs - gone, gone / max(step - since, 1)
    # half of the steps that are left: they may become slower
    ahead = max(1, int(left / 2 / max(per_step, 1e-9))) if left > 0 else 0
    ahead = from_first(lambda: ahead)
    self._look = step + ahead
    return ahead == 0

  def begin(self, step: int) -> None:
    """The minutes begin after this step. All processes call it."""
    self._began, self._look = (step, self._clock()), step + 1
