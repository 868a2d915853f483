"""Step, state, batches -> trained state: dispatches step n, then reads the numbers of step n - 1."""

import collections
from collections.abc import Callable, Sequence
import logging
import math
import os
import pathlib
import signal
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from caprl_jax import sharding
from caprl_jax.checkpoint import Checkpoints
from caprl_jax.metrics import MetricsWriter, Progress
from caprl_jax.trackers import Tracker
from caprl_jax.types import TrainState

log = logging.getLogger("caprl_jax.loop")


class CompileCounter:
  """Counts how often XLA compiles while it is entered; a step must not after its first call."""

  def __init__(self):
    self.count = 0

  def _on_event(self, event: str, *_, **__) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      self.count += 1

  def __enter__(self) -> "CompileCounter":
    jax.monitoring.register_event_duration_secs_listener(self._on_event)
    return self

  def __exit__(self, *_) -> None:
    jax.monitoring.unregister_event_duration_listener(self._on_event)


class Interrupts:
  """Ctrl-C while it is entered. One process: KeyboardInterrupt at once, as ever.

  Several must stop after the same step, or their checkpoint is none. SIGINT becomes SIGTERM, which jax takes as a
  notice of preemption and tells all processes; `check` then raises in all of them before the same step.
  """

  def __init__(self):
    self.asked, self.several = False, jax.process_count() > 1

  def __enter__(self) -> "Interrupts":
    if self.several:
      self.previous = signal.signal(signal.SIGINT, self._pass_on)
    return self

  def __exit__(self, *_) -> None:
    if self.several:
      signal.signal(signal.SIGINT, self.previous)

  def _pass_on(self, *_) -> None:
    signal.signal(signal.SIGINT, self.previous)  # a second one ends this process at once
    self.asked = True
    os.kill(os.getpid(), signal.SIGTERM)

  def check(self, step: int) -> None:
    """Called before each step."""
    if self.several and multihost_utils.reached_preemption_sync_point(step):
      raise KeyboardInterrupt


def run_loop(step_fn: Callable, state: TrainState, iterator, *, steps: int, mesh: jax.sharding.Mesh,
             checkpoints: Checkpoints, config: dict, workdir: pathlib.Path, what: str, reward_name: str,
             on_samples: Callable[[int, Any, Any], None] | None = None,
             evaluate: Callable[[int, TrainState], dict[str, float]] | None = None, evaluate_every: int = 0,
             trackers: Sequence[Tracker] = ()) -> TrainState:
  """Runs `step_fn(state, batch) -> (state, metrics, samples)` up to step `steps`.

  Args:
    state: donated to the first step. Its `step` says where to begin.
    iterator: yields this process's share of a batch as numpy; has `get_state`, the same in every process.
    on_samples: called as (step, this process's share of the batch, samples) after each step, on the main process.
    evaluate: called as (step, state) after every `evaluate_every`-th step, in all processes; its numbers join the step's.
    trackers: get every number that metrics.jsonl gets.

  Raises:
    FloatingPointError: loss or gradient not finite; that step changed no parameters, and they are saved first.
    KeyboardInterrupt: passed on after a checkpoint of the last finished step.
  """
  start = int(state.step)
  main = jax.process_index() == 0
  writer = MetricsWriter(workdir) if main else None
  if writer:
    writer.truncate_after(start)
  progress = Progress(steps, start, what) if main else None
  pending, before = collections.deque(), time.perf_counter()  # steps whose numbers were not read yet
  evaluated: dict[int, dict[str, float]] = {}

  def report() -> None:
    """Reads the numbers of the oldest pending step; waits for it."""
    nonlocal before
    step, metrics, batch, samples = pending[0]
    numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
    numbers = {name: value for name, value in numbers.items()  # a kind that the batch does not ask about has none
               if not (name.startswith("judge/accuracy/") and math.isnan(value))}
    now = time.perf_counter()
    numbers["time/step_secs"], before = now - before, now
    numbers |= evaluated.pop(step, {})
    if numbers.get("update/nonfinite"):
      raise FloatingPointError(
          f"step {step}: loss {numbers['update/loss']} or gradient norm {numbers['update/grad_norm']} is not finite; "
          f"such an update changes no parameters, and the checkpoint of step {int(state.step)} holds finite ones. Lower "
          "optimizer.learning_rate or look at the batch's rows in samples/")
    pending.popleft()
    if main:
      writer.write(step, numbers)
      for tracker in trackers:
        tracker.write(step, numbers)
      progress.update(numbers.get(reward_name))
      if on_samples:
        on_samples(step, batch, samples)

  position = iterator.get_state()  # after the batch of the last step
  save = lambda force=False: checkpoints.save(state, position, config, force=force)
  try:
    with CompileCounter() as compiles, Interrupts() as interrupts:
      for step in range(start + 1, steps + 1):
        interrupts.check(step)
        host_batch = next(iterator)
        state, metrics, samples = step_fn(state, sharding.put_batch(host_batch, mesh))
        position = iterator.get_state()
        pending.append((step, metrics, host_batch, samples))
        if len(pending) > 1:
          report()
        if step == start + 1:
          jax.block_until_ready(metrics)
          after_first = compiles.count
        if evaluate and evaluate_every and step % evaluate_every == 0:
          jax.block_until_ready(metrics)  # the step's own seconds are not the evaluation's
          known, began = compiles.count, time.perf_counter()
          evaluated[step] = evaluate(step, state)
          after_first += compiles.count - known
          before += time.perf_counter() - began  # no part of a step's seconds
        if step % checkpoints.cfg.every_steps == 0:
          while pending:  # before the checkpoint: a kill after it must leave no gap in metrics.jsonl
            report()
          known = compiles.count
          save()
          after_first += compiles.count - known  # Orbax cuts what has copies: no program of ours
      while pending:
        report()
      if start < steps:
        extra = compiles.count - after_first
        log.info("%s: %d compilations after the first step", what, extra)
  except (KeyboardInterrupt, FloatingPointError) as error:
    save(force=True)
    while pending and isinstance(error, KeyboardInterrupt):
      report()
    raise
  finally:
    if progress:
      progress.close()
    if writer:
      writer.close()
  save(force=True)
  if interrupts.asked:  # too late for a step to be left
    raise KeyboardInterrupt
  return state
