"""A mode with the real loop, checkpoints and batches, and a model that compiles in a moment, and
the program that has it. FAKE_MODE is written to `fake_mode.py` in a folder on the path.

What the variable FAKE_EVENT says happens there: process:place:what, as 1:4:SIGTERM in process 1
before step 4, or 0:after 8:error.
"""

FAKE_MODE = """
import errno, functools, os, signal
import jax, jax.numpy as jnp, numpy as np
from caprl_jax import main, sharding
from caprl_jax.config import schema as configuration
from caprl_jax.harness.checkpoints import CheckpointConfig, Checkpoints
from caprl_jax.data.batches import train_iterator
from caprl_jax.harness.loop import run_loop
from caprl_jax.harness.process import peers
from caprl_jax.types import TrainState

def example(index, rng):
  return dict(row=np.int32(index), noise=rng.normal())

def full(*_, **__):
  raise OSError(errno.ENOSPC, "No space left on device")

def event(place):  # what FAKE_EVENT says of this process there, e.g. 1:4:SIGTERM
  process, where, what = os.environ.get("FAKE_EVENT", "::").split(":")
  if (process, where) != (str(jax.process_index()), str(place)):
    return
  if what == "error":
    raise ValueError("row 7 has no image")
  if what == "full":  # from now on no checkpoint is finished
    os.rename = os.replace = full
    return
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
    total = jax.jit(jnp.sum, out_shardings=everywhere)
    def evaluate(number, state):  # between batches, as mode evaluate
      event(f"evaluation {number}")
      peers.check()
      return {"eval/sum": float(total(state.params))}
    if checkpoints.latest_step():
      state, position = checkpoints.restore(state)
      iterator.set_state(position)
    run_loop(step, state, Batches(iterator, int(state.step)), steps=config.train.steps, mesh=mesh,
             checkpoints=checkpoints, config={}, workdir=workdir, what="fake", reward_name="loss",
             on_samples=lambda step, *_: event(f"after {step}"), evaluate=evaluate,
             evaluate_every=5)
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
