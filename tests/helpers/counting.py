"""A train state of four numbers, and steps and batches that cost nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.data.batches import train_iterator
from caprl_jax.types import TrainState


def new_state(size: int = 4) -> TrainState:
  """Zeros, at step 0."""
  return TrainState(jnp.int32(0), {"w": jnp.zeros(size)}, (jnp.zeros(size),), jax.random.key(3))


def batches():
  """An endless iterator over 11 rows, four at a time; a batch is {"row": [4], "noise": [4]}."""
  example = lambda index, rng: dict(row=np.int32(index), noise=np.float32(rng.random()))
  return train_iterator(example, 11, 4, 0)


@jax.jit
def step(state: TrainState, batch: dict) -> tuple[TrainState, dict, jax.Array]:
  """Parameters that depend on the rows, the noise and the key of every step before."""
  key, drawn = jax.random.split(state.key)
  moved = batch["row"] * batch["noise"] + jax.random.uniform(drawn, (4,))
  params = {"w": state.params["w"] + moved}
  metrics = {"loss": params["w"].sum(), "first": batch["row"][0]}
  new = state.replace(step=state.step + 1, params=params, opt_state=(moved,), key=key)
  return new, metrics, batch["row"] + 0
