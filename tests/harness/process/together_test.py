"""Two real processes end after the same step, with one message and one code, whatever ends one."""

import json
import time

import numpy as np
import pytest
from helpers.processes import CONFIG, start, wait

from caprl_jax.harness.checkpoints import saved_steps
from caprl_jax.harness.metrics import read_metrics

# A mode with the real loop, checkpoints and batches, and a model that compiles in a moment.
FAKE_MODE = """
import functools, os, signal
import jax, jax.numpy as jnp, numpy as np
from caprl_jax import main, sharding
from caprl_jax.config import schema as configuration
from caprl_jax.harness.checkpoints import CheckpointConfig, Checkpoints
from caprl_jax.data.batches import train_iterator
from caprl_jax.harness.loop import run_loop
from caprl_jax.types import TrainState

def example(index, rng):
  return dict(row=np.int32(index), noise=rng.normal())

def event(place):  # what FAKE_EVENT says of this process there, e.g. 1:4:SIGTERM
  process, where, what = os.environ.get("FAKE_EVENT", "::").split(":")
  if (process, where) != (str(jax.process_index()), str(place)):
    return
  if what == "error":
    raise ValueError("row 7 has no image")
  os.kill(os.getpid(), signal.Signals[what])

class Batches:  # an event may come while that of a step is made
  def __init__(self, iterator, step):
    self.iterator, self.step, self.get_state = iterator, step, iterator.get_state

  def __next__(self):
    self.step += 1
    event(self.step)
    return next(self.iterator)

def run(config, workdir):
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4))
  split, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  places = TrainState(everywhere, split, everywhere, everywhere)
  @functools.partial(jax.jit, out_shardings=(places, everywhere, None), donate_argnums=0)
  def step(state, batch):
    params = state.params * 0.9 + batch["noise"] + batch["row"]
    metrics = {"loss": params.sum(), "first": params[0]}
    return state.replace(step=state.step + 1, params=params), metrics, None
  with jax.set_mesh(mesh):
    state = jax.jit(
      lambda: TrainState(jnp.int32(0), jnp.zeros(8), (), jax.random.key(0)), out_shardings=places
    )()
    checkpoints = Checkpoints(workdir, CheckpointConfig(100_000))
    iterator = train_iterator(example, 11, 8, 0, sharding.batch_share(mesh, 8))
    if checkpoints.latest_step():
      state, position = checkpoints.restore(state)
      iterator.set_state(position)
    run_loop(step, state, Batches(iterator, int(state.step)), steps=config.train.steps, mesh=mesh,
             checkpoints=checkpoints, config={}, workdir=workdir, what="fake", reward_name="loss",
             on_samples=lambda step, *_: event(f"after {step}"))
"""

PROGRAM = """
import sys
from caprl_jax import main
from caprl_jax.config import registry
from caprl_jax.harness.process import peers
peers.HEARTBEAT_SECS = 6  # the test is to be short
registry.MODES["fake"] = registry.Mode("fake_mode", "", "", {})
sys.exit(main.main(sys.argv))
"""
STEPS = 8


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
  """Starts `fake` in a workdir of that name, with an event."""
  folder = tmp_path_factory.mktemp("fake")
  (folder / "fake_mode.py").write_text(FAKE_MODE)
  (folder / "config.py").write_text(
    CONFIG.format(text=json.dumps(dict(mode="fake", train=dict(steps=STEPS))))
  )

  def begin(name, processes, event="::"):
    workdir = folder / name
    started = start(
      folder, workdir, processes, 4 // processes, program=("-c", PROGRAM), FAKE_EVENT=event
    )
    return started, workdir

  return begin


def test_two_processes_end_together_and_go_on_whatever_ends_one(begin):
  """One workdir, taken up again after each end; at last it holds the run of one process that
  nothing stopped. The state is split over both processes."""
  said = wait(*begin("cut", 2, "1:4:error"), 2)
  assert all("row 7 has no image" in text for text in said)
  assert "error: process 1 (" in said[0] and "Traceback" not in said[0] + said[1]
  started, workdir = begin("cut", 2, "1:4:SIGTERM")  # before the first step of a resumed run
  said = wait(started, workdir, 75)
  assert all("stopped by SIGTERM; run the same command again" in text for text in said)
  assert saved_steps(workdir) == [3]
  said = wait(*begin("cut", 2, "0:6:SIGINT"), 130)
  assert all("run the same command to go on" in text for text in said)
  assert saved_steps(workdir) == [3, 5]

  started, _ = begin("cut", 2, "1:7:SIGKILL")
  started[1].wait(100)
  killed = time.monotonic()
  said = wait(started, workdir, 75, -9)
  assert time.monotonic() - killed < 36  # 60, with jax's heartbeat of 30 seconds
  assert "process 1 (" in said[0] and f"pid {started[1].pid}) is dead, or" in said[0]
  assert "run the same command again, it goes on" in said[0]

  said = wait(*begin("cut", 2, "0:7:SIGKILL"), -9, 75)  # the one that has the store
  assert "error: process 0 (at localhost:" in said[1] and ") is dead, or" in said[1]

  wait(*begin("cut", 2, f"0:after {STEPS}:SIGTERM"), 75)  # when no step is left to stop before
  assert saved_steps(workdir) == [5, STEPS]
  started, whole = begin("whole", 1)
  wait(started, whole)
  rows, wanted = (read_metrics(place / "metrics.jsonl") for place in (workdir, whole))
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  for row, want in zip(rows, wanted, strict=True):
    for name in ("loss", "first"):
      np.testing.assert_allclose(row[name], want[name], rtol=1e-5)
