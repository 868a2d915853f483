"""A function whose first call compiles -> the same, which says how long that took."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

from caprl_jax.progress import duration, going_on

log = logging.getLogger("caprl_jax.harness.training.compile_times")

Call = TypeVar("Call", bound=Callable[..., Any])

LEAST_SECS = 2.0  # of what is worth a line


class CompileTimes:
  """Programs that XLA makes while it is entered: how many, how many of them came from the cache of
  compiled programs, and the seconds that all took."""

  def __init__(self):
    self.programs, self.cached, self.secs = 0, 0, 0.0

  def _on_duration(self, event: str, duration_secs: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      self.programs += 1
      self.secs += duration_secs

  def _on_event(self, event: str, **_) -> None:
    if event == "/jax/compilation_cache/cache_hits":
      self.cached += 1

  def __enter__(self) -> "CompileTimes":
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)
    jax.monitoring.register_event_listener(self._on_event)
    return self

  def __exit__(self, *_) -> None:
    jax.monitoring.unregister_event_duration_listener(self._on_duration)
    jax.monitoring.unregister_event_listener(self._on_event)


def timed_first(call: Call, what: str) -> Call:
  """The function. Its first call, which compiles, is `going_on` under the name `what`; then the log
  says how long it took, and how much of that XLA did."""
  calls: list[bool] = []

  def called(*args, **kwargs):
    if calls:
      return call(*args, **kwargs)
    calls.append(True)
    began = time.monotonic()
    with going_on(what), CompileTimes() as times:
      out = call(*args, **kwargs)
    took = time.monotonic() - began
    if took >= LEAST_SECS:
      cached = f", {times.cached} of them from the cache" if times.cached else ""
      programs = f"{times.programs} program{'s' * (times.programs != 1)}"
      spent = duration(times.secs)
      log.info("%s took %s; %s%s, %s in XLA", what, duration(took), programs, cached, spent)
    return out

  return cast(Call, called)
