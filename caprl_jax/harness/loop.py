"""Step, state, batches -> trained state: dispatches step n, then reads the numbers of step n -
1.
"""

import collections
import logging
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from caprl_jax import sharding
from caprl_jax.errors import of_runtime
from caprl_jax.harness.checkpoints import Checkpoints
from caprl_jax.harness.metrics import MetricsWriter, Progress
from caprl_jax.harness.process import peers
from caprl_jax.harness.process.signals import Deferred
from caprl_jax.harness.trackers import Tracker
from caprl_jax.harness.watch import Heartbeat, StoppedByRuleError, Watch
from caprl_jax.progress import saying_first
from caprl_jax.types import TrainState

log = logging.getLogger("caprl_jax.harness.loop")


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
  """What ends the loop early, while it is entered. One process: signals raise at once, but for a
  step that has the state, which ends first.

  Several must stop after the same step, or their checkpoint is none. Before each step they agree,
  while the devices are at the one before: a signal or an error of one raises in all of them there.
  """

  def __init__(self):
    self.deferred, self.peers = Deferred(), peers.current()

  def __enter__(self) -> "Interrupts":
    self._entered = self.peers.deferred() if self.peers else self.deferred
    self._entered.__enter__()
    return self

  def __exit__(self, *failure) -> None:
    self._entered.__exit__(*failure)

  def check(self) -> None:
    """Called before each step, and after the last one."""
    if self.peers:
      self.peers.agree()

  def can_save(self, error: BaseException, state: TrainState) -> bool:
    """Whether there is a state to write (a step that fails has it used up), and all processes are
    here to do it."""
    if of_runtime(error) or any(x.is_deleted() for x in jax.tree.leaves(state)):
      return False
    return self.peers is None or self.peers.failed(error)


class StepReports:
  """Steps whose numbers were not read yet, and where these go: metrics.jsonl, progress bar,
  trackers, `on_samples`; only on the main process."""

  def __init__(
    self,
    workdir: pathlib.Path,
    start: int,
    steps: int,
    what: str,
    reward_name: str,
    on_samples: Callable[[int, Any, Any], None] | None,
    trackers: Sequence[Tracker],
    watch: Watch | None,
  ):
    self.watch, self.heart = watch or Watch((), ()), Heartbeat()
    self.main = jax.process_index() == 0
    self.reward_name, self.on_samples, self.trackers = reward_name, on_samples, trackers
    self.pending, self.extra = collections.deque(), {}
    self.before = time.perf_counter()
    if self.main:
      self.writer, self.progress = MetricsWriter(workdir), Progress(steps, start, what)
      self.writer.truncate_after(start)

  def add(self, step: int, metrics: dict, batch: Any, samples: Any, data_secs: float) -> None:
    """A step that was dispatched, and how long it had to wait for its batch."""
    self.pending.append((step, metrics, batch, samples))
    self.extra[step] = {"time/data_secs": data_secs}

  def read(self, most_pending: int = 0) -> None:
    """Reads the oldest steps, and waits for them, until `most_pending` are left.

    Raises FloatingPointError where loss or gradient were not finite; that step stays pending. And
    where a rule says that the run is to stop.
    """
    while len(self.pending) > most_pending:
      step, metrics, batch, samples = self.pending[0]
      numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
      # a kind that the batch does not ask about has none
      numbers = {
        name: value
        for name, value in numbers.items()
        if not (name.startswith("judge/accuracy/") and math.isnan(value))
      }
      now = time.perf_counter()
      numbers["time/step_secs"], self.before = now - self.before, now
      numbers |= self.extra.pop(step, {})
      if numbers.get("update/nonfinite"):
        raise FloatingPointError(
          f"step {step}: loss {numbers['update/loss']} or gradient norm "
          f"{numbers['update/grad_norm']} is not finite; such an update changes no parameters, "
          f"and the checkpoint of step {self.pending[-1][0]} holds finite ones. Lower "
          "optimizer.learning_rate or look at the batch's rows in samples/"
        )
      self.pending.popleft()
      self.heart.beat()
      if self.main:
        self._write(step, numbers, batch, samples)
      self.watch.see(step, numbers)

  def _write(self, step: int, numbers: dict[str, float], batch: Any, samples: Any) -> None:
    self.writer.write(step, numbers)
    for tracker in self.trackers:
      tracker.write(step, numbers)
    self.progress.update(numbers.get(self.reward_name))
    if self.on_samples:
      self.on_samples(step, batch, samples)

  def evaluate(
    self, step: int, state: TrainState, evaluate: Callable[[int, TrainState], dict[str, float]]
  ) -> None:
    """Evaluates after a step; the figures join its numbers, the seconds are no step's."""
    jax.block_until_ready(self.pending[-1][1])
    self.heart.pause()
    began = time.perf_counter()
    self.extra.setdefault(step, {}).update(evaluate(step, state))
    self.before += time.perf_counter() - began

  def close(self) -> None:
    self.heart.close()
    if self.main:
      self.progress.close()
      self.writer.close()


def _next_batch(iterator: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any, float]:
  """A batch on the host, the same on the devices, and the seconds that both took."""
  began = time.perf_counter()
  batch = next(iterator)
  on_device = sharding.put_batch(batch, mesh)
  return batch, on_device, time.perf_counter() - began


def run_loop(
  step_fn: Callable[[TrainState, Any], tuple[TrainState, dict, Any]],
  state: TrainState,
  iterator: Any,
  *,
  steps: int,
  mesh: jax.sharding.Mesh,
  checkpoints: Checkpoints,
  config: dict,
  workdir: pathlib.Path,
  what: str,
  reward_name: str,
  on_samples: Callable[[int, Any, Any], None] | None = None,
  evaluate: Callable[[int, TrainState], dict[str, float]] | None = None,
  evaluate_every: int = 0,
  trackers: Sequence[Tracker] = (),
  watch: Watch | None = None,
) -> TrainState:
  """Runs `step_fn(state, batch) -> (state, metrics, samples)` up to step `steps`.

  Args:
    state: donated to the first step. Its `step` says where to begin.
    iterator: yields this process's share of a batch as numpy; has `get_state`, the same in every
      process.
    on_samples: called as (step, this process's share of the batch, samples) after each step, on the
      main process.
    evaluate: called as (step, state) after every `evaluate_every`-th step, in all processes; its
      numbers join the step's.
    trackers: get every number that metrics.jsonl gets.
    watch: its rules warn, or end the run.

  Raises:
    FloatingPointError: loss or gradient not finite; that update changed no parameters, and they are
    saved first. Or a rule of `watch` says so.
    KeyboardInterrupt: passed on after a checkpoint of the last finished step; as is every other
    error that leaves a state to save. In several processes all raise after the same step.
  """
  start = int(state.step)
  reports = StepReports(
    workdir, start, steps, what, reward_name, on_samples, trackers, watch or Watch((), ())
  )
  position = iterator.get_state()  # after the batch of the last step
  save = lambda force=False: checkpoints.save(state, position, config, force=force)
  step_fn = saying_first(step_fn, f"{what}: compiling the step")
  with CompileCounter() as compiles, Interrupts() as interrupts:
    try:
      for step in range(start + 1, steps + 1):
        # The copy to the devices runs beside step n - 1, whose numbers are read below.
        batch, on_device, data_secs = _next_batch(iterator, mesh)
        interrupts.check()
        with interrupts.deferred.held():  # the step has the state, which a checkpoint would want
          state, metrics, samples = step_fn(state, on_device)
          position = iterator.get_state()
          reports.add(step, metrics, batch, samples, data_secs)
        interrupts.deferred.release()
        reports.read(most_pending=1)  # step n - 1, while the devices work on step n
        if step == start + 1:
          jax.block_until_ready(metrics)
          after_first = compiles.count
        # evaluation and Orbax, which cuts what has copies, have programs of their own
        known = compiles.count
        if evaluate and evaluate_every and step % evaluate_every == 0:
          reports.evaluate(step, state, evaluate)
        if step % checkpoints.cfg.every_steps == 0:
          reports.read()  # first: a kill after the checkpoint must leave no gap in metrics.jsonl
          save()
        after_first += compiles.count - known
      reports.read()
      interrupts.check()
      if start < steps:
        log.info("%s: %d compilations after the first step", what, compiles.count - after_first)
    except BaseException as error:
      if interrupts.can_save(error, state):
        _keep(error, save, reports)
      raise
    finally:
      reports.close()
    save(force=True)
  return state


def _keep(error: BaseException, save: Callable[[bool], None], reports: StepReports) -> None:
  """Saves what an error leaves, with the numbers of its last step. Where that fails too, the first
  error is what is told."""
  try:
    save(True)
    if not isinstance(error, FloatingPointError) or isinstance(error, StoppedByRuleError):
      reports.read()
  except Exception as another:
    log.warning("the last steps could not be saved: %s", another)
    log.debug("after %r", error, exc_info=True)
