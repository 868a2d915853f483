"""The loop on steps that cost nothing: numbers, samples, checkpoints, stops and going on."""

import logging
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import counting

from caprl_jax import sharding
from caprl_jax.harness.buckets.shared import saved_steps
from caprl_jax.harness.checkpoints import CheckpointConfig, Checkpoints
from caprl_jax.harness.loop import CompileCounter, run_loop
from caprl_jax.harness.metrics import MetricsWriter, read_metrics
from caprl_jax.harness.process.signals import Preempted, notices
from caprl_jax.harness.training import compile_times
from caprl_jax.types import Images


def run(workdir, steps, step=counting.step, every_steps=100, **more):
  """From the newest checkpoint, if there is one, to step `steps`."""
  checkpoints = Checkpoints(workdir, CheckpointConfig(every_steps))
  try:
    state, iterator = counting.new_state(), counting.batches()
    if checkpoints.latest_step():
      state, position = checkpoints.restore(state)
      iterator.set_state(position)
    return run_loop(
      step,
      state,
      iterator,
      steps=steps,
      mesh=sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]),
      checkpoints=checkpoints,
      config={},
      workdir=workdir,
      what="test",
      reward_name="loss",
      **more,
    )
  finally:
    checkpoints.close()


def rows_of(workdir):
  timed = lambda row: {k: v for k, v in row.items() if not k.startswith("time/")}
  return [timed(row) for row in read_metrics(workdir / "metrics.jsonl")]


def stop_at(number, error):
  """The step, which raises before step `number` is dispatched."""

  def step(state, batch):
    if int(state.step) == number - 1:
      raise error
    return counting.step(state, batch)

  return step


def test_every_step_leaves_numbers_samples_and_due_checkpoints(tmp_path):
  seen, tracked = [], []

  class Tracker:
    def write(self, step, numbers):
      tracked.append((step, numbers["loss"]))

  state = run(
    tmp_path,
    5,
    every_steps=2,
    on_samples=lambda step, batch, samples: seen.append((step, batch["row"], samples)),
    trackers=[Tracker()],
  )
  rows = rows_of(tmp_path)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] == [step for step, _, _ in seen]
  assert int(state.step) == 5 and rows[-1]["loss"] == float(state.params["w"].sum())
  assert tracked == [(row["step"], row["loss"]) for row in rows]
  for row, (_, batch, samples) in zip(rows, seen, strict=True):
    np.testing.assert_array_equal(batch, samples)  # samples stand beside their own batch
    assert row["first"] == batch[0]
  assert saved_steps(tmp_path) == [4, 5]
  times = read_metrics(tmp_path / "metrics.jsonl")[1]
  assert times["time/step_secs"] > 0 and times["time/data_secs"] >= 0


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
  whole = run(tmp_path / "whole", 5)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / "cut", 5, stop_at(4, KeyboardInterrupt()))
  assert saved_steps(tmp_path / "cut") == [3]
  cut = run(tmp_path / "cut", 5)
  np.testing.assert_array_equal(cut.params["w"], whole.params["w"])
  assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_a_step_waits_until_the_state_is_back(tmp_path, sent, interruptible):
  """The step has been given the state's memory, as a step in three programs has for seconds."""

  def step(state, batch):
    made = counting.step(state, batch)
    if int(made[0].step) == 3:
      jax.tree.map(lambda x: x.delete(), state.params)
      signal.raise_signal(sent)
      jax.block_until_ready(made)
    return made

  whole = run(tmp_path / "whole", 5)
  with notices(), pytest.raises(KeyboardInterrupt) as raised:
    run(tmp_path / "cut", 5, step)
  assert isinstance(raised.value, Preempted) == (sent == signal.SIGTERM)
  assert saved_steps(tmp_path / "cut") == [3]
  np.testing.assert_array_equal(run(tmp_path / "cut", 5).params["w"], whole.params["w"])
  assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_a_second_signal_does_not_wait(tmp_path, interruptible):
  def step(state, batch):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    raise AssertionError

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, 5, step)
  assert saved_steps(tmp_path) == [0]  # of the state as it was before the step


def test_an_error_saves_the_steps_before_it_and_is_passed_on(tmp_path):
  whole = run(tmp_path / "whole", 5)
  with pytest.raises(RuntimeError, match="broken"):
    run(tmp_path / "cut", 5, stop_at(3, RuntimeError("broken")))
  assert saved_steps(tmp_path / "cut") == [2]
  assert [row["step"] for row in rows_of(tmp_path / "cut")] == [1, 2]
  np.testing.assert_array_equal(run(tmp_path / "cut", 5).params["w"], whole.params["w"])
  assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_an_error_that_leaves_no_state_saves_nothing(tmp_path):
  def used_up(state, batch):
    jax.tree.map(lambda x: x.delete(), state.params)
    raise RuntimeError("broken")

  with pytest.raises(RuntimeError, match="broken"):
    run(tmp_path, 5, used_up)
  with pytest.raises(RuntimeError, match="UNKNOWN: a device"):
    run(tmp_path, 5, stop_at(3, RuntimeError("UNKNOWN: a device is broken")))
  assert saved_steps(tmp_path) == []


def broken_in(*steps):
  """The step, whose loss is not finite in these."""

  def step(state, batch):
    state, metrics, samples = counting.step(state, batch)
    bad = jnp.isin(state.step, jnp.array(steps))
    loss = jnp.where(bad, jnp.nan, 1.0)
    more = {"update/nonfinite": bad * 1.0, "update/loss": loss, "update/grad_norm": loss}
    return state, metrics | more, samples

  return step


def test_numbers_that_are_not_finite_stop_the_run_and_are_written(tmp_path):
  with pytest.raises(FloatingPointError, match="step 2: .*the checkpoint of step 3 holds"):
    run(tmp_path, 5, broken_in(2))
  found = [(row["step"], row["update/loss"]) for row in rows_of(tmp_path)]
  assert found == [(1, 1.0), (2, None), (3, 1.0)] and saved_steps(tmp_path) == [3]
  run(tmp_path, 5)  # the same command goes on, and leaves no gap
  assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_few_of_them_can_be_passed_over(tmp_path, caplog):
  with pytest.raises(FloatingPointError, match="step 4: .*the checkpoint of step 5 holds"):
    run(tmp_path / "stopped", 6, broken_in(2, 3, 4), skip_nonfinite=2)
  assert "step 3: loss nan" in caplog.text and "(2 of 2 that train.skip_nonfinite" in caplog.text
  run(tmp_path / "whole", 6, broken_in(2, 3, 4), skip_nonfinite=3)
  assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")[:5]


def test_a_checkpoint_leaves_metrics_and_log_closed_on_the_disk(tmp_path, monkeypatch):
  """As a bucket needs it, before the checkpoint is begun."""
  log_file = logging.FileHandler(tmp_path / "log.txt")
  opened, seen = [], []
  opening = MetricsWriter._open
  monkeypatch.setattr(MetricsWriter, "_open", lambda self: (opened.append(1), opening(self)))
  saving = Checkpoints.save

  def save(self, state, *args, **more):
    seen.append((int(state.step), len(opened), log_file.stream))
    logging.getLogger("caprl_jax").warning("saved")
    assert log_file.stream is not None  # opened again
    saving(self, state, *args, **more)

  monkeypatch.setattr(Checkpoints, "save", save)
  logging.root.addHandler(log_file)
  try:
    run(tmp_path, 4, every_steps=2)
  finally:
    logging.root.removeHandler(log_file)
    log_file.close()
  assert seen == [(2, 3, None), (4, 4, None), (4, 4, None)]
  assert (tmp_path / "log.txt").read_text().count("saved") == 3


def test_figures_of_an_evaluation_join_the_step_that_they_belong_to(tmp_path):
  def evaluate(step, state):
    assert int(state.step) == step
    return {"eval/step": step}

  run(tmp_path, 5, evaluate=evaluate, evaluate_every=2)
  found = [(row["step"], row.get("eval/step")) for row in rows_of(tmp_path)]
  assert found == [(1, None), (2, 2), (3, None), (4, 4), (5, None)]


@pytest.mark.parametrize("cut", [2, 4], ids=["in the middle", "at the end"])
def test_an_evaluation_that_was_cut_short_is_made_by_the_next_start(tmp_path, cut):
  """The step is saved all the same: neither its work is lost nor its figures."""
  calls, tracked = [], []

  def figures(step, state):
    calls.append(step)
    return {"eval/sum": float(state.params["w"].sum())}

  def stopped(step, state):
    if step == cut:
      raise Preempted("SIGTERM")
    return figures(step, state)

  class Tracker:
    def write(self, step, numbers):
      if "eval/sum" in numbers:
        tracked.append(step)

  more = dict(evaluate_every=2, trackers=[Tracker()])
  run(tmp_path / "whole", 4, evaluate=figures, **more)
  calls.clear(), tracked.clear()
  with pytest.raises(Preempted):
    run(tmp_path / "cut", 4, evaluate=stopped, **more)
  assert saved_steps(tmp_path / "cut") == [cut]
  with pytest.raises(Preempted):  # the next start as well
    run(tmp_path / "cut", 4, evaluate=stopped, **more)
  run(tmp_path / "cut", 4, evaluate=figures, **more)
  assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
  assert calls == tracked == [2, 4]  # each once
  run(tmp_path / "cut", 4, evaluate=figures, **more)
  assert calls == [2, 4]  # the line has its figures


def test_a_kind_without_questions_has_no_accuracy_in_a_row(tmp_path):
  def step(state, batch):
    state, metrics, samples = counting.step(state, batch)
    share = jnp.where(state.step == 2, 0.5, jnp.nan)
    return state, metrics | {"judge/accuracy/color": share}, samples

  run(tmp_path, 3, step)
  assert [row.get("judge/accuracy/color") for row in rows_of(tmp_path)] == [None, 0.5, None]


def test_compilations_are_counted_while_it_is_entered():
  program = jax.jit(lambda x: x * 3 - 1)
  with CompileCounter() as compiles:
    program(jnp.ones(7))
    first = compiles.count
    program(jnp.ones(7))
    assert compiles.count == first > 0
    program(jnp.ones(8))
    assert compiles.count > first
  last = compiles.count
  program(jnp.ones(9))
  assert compiles.count == last


def test_a_new_shape_of_batches_compiles_once_and_only_then(tmp_path, caplog, monkeypatch):
  caplog.set_level(logging.INFO, "caprl_jax")
  monkeypatch.setattr(compile_times, "LEAST_SECS", 0.0)
  widths = [3, 5, 3, 5, 5, 3]

  class Wide:
    """Batches whose images have room for so many tokens."""

    def __init__(self):
      self.made = 0

    def __next__(self):
      images = Images(*np.zeros((3, 4, 2)), np.zeros((4, widths[self.made]), np.int32))
      self.made += 1
      return {"images": images, **next(counted)}

    def get_state(self):
      return {"made": self.made}

  counted = counting.batches()
  program = jax.jit(
    lambda state, batch: counting.step(state, {k: batch[k] for k in ("row", "noise")})
  )
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(100))
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  settings = dict(mesh=mesh, checkpoints=checkpoints, config={}, workdir=tmp_path)
  state = lambda: jax.device_put(counting.new_state(), sharding.replicated(mesh))  # as it comes out
  loop = lambda step, steps: run_loop(
    step, state(), Wide(), steps=steps, what="test", reward_name="loss", **settings
  )
  loop(program, 6)
  assert "test: 0 compilations after the first step of each of 2 image shapes" in caplog.text
  said = [line for line in caplog.messages if "compiling the step" in line]
  assert len(said) == 2 and "compiling the step took" in said[0]
  assert "compiling the step for images of up to 5 tokens took" in said[1]
  # a program that compiles at a known shape is still found
  changing = lambda state, batch: jax.jit(lambda *x: program(*x))(state, batch)
  loop(changing, 4)
  checkpoints.close()
  assert re.search(r"test: [1-9]\d* compilations after the first step of each of 2", caplog.text)
