"""Step, state, batches -> trained state: dispatches step n, then reads the numbers of step n -
1.
"""

import collections
import contextlib
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from caprl_jax import sharding
from caprl_jax.errors import of_runtime
from caprl_jax.harness.checkpoints import Checkpoints
from caprl_jax.harness.metrics import MetricsWriter, Progress
from caprl_jax.harness.process import peers
from caprl_jax.harness.process.device_memory import hold
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.log_files import settle_log_files
from caprl_jax.harness.process.signals import Deferred
from caprl_jax.harness.trackers import Tracker
from caprl_jax.harness.training.compile_times import StepPrograms
from caprl_jax.harness.watch import Heartbeat, Watch
from caprl_jax.types import TrainState

log = logging.getLogger("caprl_jax.harness.loop")

Evaluate = Callable[[int, TrainState], dict[str, float]]  # (step, state) -> figures by name
EVALUATED = "eval/"  # begins the names of an evaluation's figures


class CompileCounter:
  """Counts how often XLA compiles while it is entered; a step must not after its first call."""

  def __init__(self):
    self.count = 0

  def _on_event(self, event: str, *_, **__) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      self.count += 1

  def settle(self, metrics: Any, known: int) -> None:
    """After the first step of a shape, whose metrics are waited for: counts on from `known`."""
    jax.block_until_ready(metrics)
    self.count = known

  @contextlib.contextmanager
  def excused(self) -> Iterator[None]:
    """What is compiled meanwhile does not count: evaluation and Orbax, which cuts what has copies,
    have programs of their own."""
    known = self.count
    yield
    self.count = known

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
    skip_nonfinite: int = 0,
  ):
    self.watch, self.heart = watch or Watch((), ()), Heartbeat()
    self.skip_nonfinite, self.nonfinite = skip_nonfinite, 0
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

  def read(self, most_pending: int = 0, stopping: bool = False) -> None:
    """Reads the oldest steps, and waits for them, until `most_pending` are left.

    Args:
      stopping: the run ends already, and only its lines are to be written.

    Raises FloatingPointError where loss or gradient were not finite in more steps than may be
    passed over, and where a rule says that the run is to stop.
    """
    while len(self.pending) > most_pending:
      step, metrics, batch, samples = self.pending[0]
      newest = self.pending[-1][0]
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
      if self.main and step > self.writer.last_step:  # else a signal came before it was taken away
        self._write(step, numbers, batch, samples)
      self.pending.popleft()
      self.heart.beat()
      if stopping:
        continue
      if numbers.get("update/nonfinite"):
        self._pass_over(step, numbers, newest)
      self.watch.see(step, numbers)

  def _pass_over(self, step: int, numbers: dict[str, float], newest: int) -> None:
    """Counts a step that was not finite; raises FloatingPointError where it is one too many."""
    self.nonfinite += 1
    said = (
      f"step {step}: loss {numbers['update/loss']} or gradient norm {numbers['update/grad_norm']} "
      "is not finite; such an update changes no parameters"
    )
    if self.nonfinite <= self.skip_nonfinite:
      log.warning(
        "%s, and the run goes on (%d of %d that train.skip_nonfinite allows)",
        said,
        self.nonfinite,
        self.skip_nonfinite,
      )
      return
    raise FloatingPointError(
      f"{said}, and the checkpoint of step {newest} holds finite ones. Lower "
      "optimizer.learning_rate, look at the batch's rows in samples/, or set train.skip_nonfinite "
      "to go on after a few such steps"
    )

  def _write(self, step: int, numbers: dict[str, float], batch: Any, samples: Any) -> None:
    self.writer.write(step, numbers)
    for tracker in self.trackers:
      tracker.write(step, numbers)
    self.progress.update(numbers.get(self.reward_name))
    if self.on_samples:
      self.on_samples(step, batch, samples)

  def save(self, checkpoints: Checkpoints, *saved: Any, last: bool = False) -> None:
    """Writes a checkpoint, `saved` as `Checkpoints.save` takes it; first all that was written is on
    the disk, also where that is a bucket. The last one is waited for."""
    if self.main:
      self.writer.settle()
    settle_log_files()
    checkpoints.save(*saved, force=True)
    if last:
      checkpoints.wait()

  def evaluate(self, step: int, state: TrainState, evaluate: Evaluate | None) -> None:
    """Evaluates after a step, where that is due; the figures join its numbers, the seconds are no
    step's."""
    if evaluate is None:
      return
    jax.block_until_ready(self.pending[-1][1])
    self.heart.pause()
    began = time.perf_counter()
    self.extra.setdefault(step, {}).update(evaluate(step, state))
    self.before += time.perf_counter() - began

  def evaluate_again(self, step: int, state: TrainState, evaluate: Evaluate | None) -> None:
    """Evaluates the step that this start goes on after, where a signal or an error came before its
    evaluation had ended; the figures join its line."""
    if evaluate is None or not from_first(lambda: self.writer.lacks(step, EVALUATED)):
      return
    log.info("step %d was saved before its evaluation had ended: it is evaluated now", step)
    self.heart.pause()
    figures = evaluate(step, state)
    if self.main:
      self.writer.amend(figures)
      for tracker in self.trackers:
        tracker.write(step, figures)
    self.before = time.perf_counter()

  def close(self) -> None:
    self.heart.close()
    if self.main:
      self.progress.close()
      self.writer.close()


def _next_batch(iterator: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any, float]:
  """A batch on the host, the same on the devices, and the seconds that both took. (The copy runs
  beside the step before, whose numbers are read later.)"""
  began = time.perf_counter()
  batch = next(iterator)
  on_device = sharding.put_batch(batch, mesh)
  return batch, on_device, time.perf_counter() - began


def run_loop(
  step_fn: Callable[..., tuple[TrainState, dict, Any]],
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
  evaluate: Evaluate | None = None,
  evaluate_every: int = 0,
  trackers: Sequence[Tracker] = (),
  watch: Watch | None = None,
  skip_nonfinite: int = 0,
  before: Callable[[TrainState, Any], Any] | None = None,
) -> TrainState:
  """Runs `step_fn(state, batch) -> (state, metrics, samples)` up to step `steps`.

  Args:
    state: donated to the first step. Its `step` says where to begin.
    iterator: yields this process's share of a batch as numpy; has `get_state`, the same in every
      process.
    on_samples: called as (step, this process's share of the batch, samples) after each step, on the
      main process.
    evaluate: called as (step, state) after every `evaluate_every`-th step, in all processes; its
      numbers, named `eval/...`, join the step's. Where it did not come to its end, the next start
      calls it first.
    trackers: get every number that metrics.jsonl gets.
    watch: its rules warn, or end the run.
    skip_nonfinite: steps, since this start, that may be not finite before the run ends.
    before: called as (state, batch) before each step, with nothing donated; what it gives is
      `step_fn`'s third argument. A signal ends it at once.

  Raises:
    FloatingPointError: loss or gradient not finite once too often; such an update changes no
    parameters, and they are saved first. Or a rule of `watch` says so.
    KeyboardInterrupt: passed on after a checkpoint of the last finished step; as is every other
    error that leaves a state to save. In several processes all raise after the same step.
  """
  start = int(state.step)
  _note_memory(state)
  reports = StepReports(
    workdir, start, steps, what, reward_name, on_samples, trackers, watch, skip_nonfinite
  )
  position = iterator.get_state()  # after the batch of the last step
  save = lambda last=False: reports.save(checkpoints, state, position, config, last=last)
  programs = StepPrograms(step_fn, f"{what}: compiling the step")
  with CompileCounter() as compiles, Interrupts() as interrupts:
    try:
      reports.evaluate_again(start, state, _due(evaluate, evaluate_every, start))
      for step in range(start + 1, steps + 1):
        batch, on_device, data_secs = _next_batch(iterator, mesh)
        interrupts.check()
        if new := programs.is_new(on_device):
          reports.heart.pause()  # compiling is no step that hangs
        known = compiles.count if len(programs) else 0
        found = [before(state, on_device)] if before else []
        with interrupts.deferred.held():  # the step has the state, which a checkpoint would want
          state, metrics, samples = programs(state, on_device, *found)
          position = iterator.get_state()
          reports.add(step, metrics, batch, samples, data_secs)
        interrupts.deferred.release()
        reports.read(most_pending=1)  # step n - 1, while the devices work on step n
        if new:
          compiles.settle(metrics, known)
        with compiles.excused():
          reports.evaluate(step, state, _due(evaluate, evaluate_every, step))
          _save_if_due(step, checkpoints, reports, save)
      reports.read()
      interrupts.check()
      _say_compiled(what, compiles, len(programs))
    except (Exception, KeyboardInterrupt) as error:
      if interrupts.can_save(error, state):
        _keep(error, save, reports)
      raise
    finally:
      reports.close()
    save(last=True)
  return state


def _say_compiled(what: str, compiles: CompileCounter, shapes: int) -> None:
  if not shapes:
    return
  of = f" of each of {shapes} image shapes" if shapes > 1 else ""
  log.info("%s: %d compilations after the first step%s", what, compiles.count, of)


def _note_memory(state: TrainState) -> None:
  hold("captioner", jax.tree.leaves(state.params))
  hold("optimizer's moments", jax.tree.leaves(state.opt_state))


def _due(evaluate: Evaluate | None, every: int, step: int) -> Evaluate | None:
  """What evaluates after `step`; None where nothing is to."""
  return evaluate if every and step % every == 0 else None


def _save_if_due(
  step: int, checkpoints: Checkpoints, reports: StepReports, save: Callable[[], None]
) -> None:
  if checkpoints.due(step):
    reports.read()  # first: a kill after the checkpoint must leave no gap in metrics.jsonl
    save()


def _keep(error: BaseException, save: Callable[[bool], None], reports: StepReports) -> None:
  """Saves what an error leaves, with the numbers of its last step. Where that fails too, the first
  error is what is told."""
  try:
    try:
      reports.read(stopping=True)  # first: the checkpoint must leave no gap in metrics.jsonl
    finally:
      save(True)
  except Exception as another:
    log.warning("the last steps could not be saved: %s", another)
    log.debug("after %r", error, exc_info=True)
