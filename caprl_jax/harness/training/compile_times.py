"""A function that compiles when it is called first -> the same, which says how long that took."""

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


class StepPrograms:
  """A step `(state, batch, ...)`, of which each shape of batches has a program: the same. The first
  call with each says how long compiling took, as of `timed_first`."""

  def __init__(self, step: Callable[..., Any], what: str):
    self._step, self._what = step, what
    self._programs: dict[tuple, Callable[..., Any]] = {}

  def __len__(self) -> int:
    return len(self._programs)

  def is_new(self, batch: Any) -> bool:
    """Whether no batch of this shape has come yet."""
    return _shapes(batch) not in self._programs

  def __call__(self, state: Any, batch: Any, *more: Any) -> Any:
    key = _shapes(batch)
    if key not in self._programs:
      tokens = _image_tokens(batch) if self._programs else 0
      of = f" for images of up to {tokens} tokens" if tokens else ""
      self._programs[key] = timed_first(self._step, f"{self._what}{of}")
    return self._programs[key](state, batch, *more)


def _shapes(batch: Any) -> tuple:
  return tuple(x.shape for x in jax.tree.leaves(batch))


def _image_tokens(batch: Any) -> int:
  """That the images of a batch have room for; 0 where it has none."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    if getattr(path[-1], "name", "") == "unit_BI":
      return leaf.shape[-1]
  return 0


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
