"""The state of training: moments in the host's memory are the same numbers, in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax import sharding
from caprl_jax.harness.loop import CompileCounter
from caprl_jax.harness.training.state import make_state
from caprl_jax.rl.gradients import guarded_step
from caprl_jax.rl.optimizer import OptimizerConfig, build_optimizer


def kinds(tree):
  """Where arrays lie that are no counts."""
  return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_moments_in_the_hosts_memory_change_no_number(name):
  tx, _ = build_optimizer(OptimizerConfig(name=name, learning_rate=0.1), 10)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  whole = sharding.replicated(mesh)

  def params():
    drawn = jax.random.normal(jax.random.key(0), (6, 8))
    return jax.device_put({"a": {"kernel": drawn}, "norm": jnp.ones(6)}, whole)

  def step(state, loss, gradient):
    stepped = guarded_step(tx, loss, gradient, state.params, state.opt_state)
    return state.replace(params=stepped.params, opt_state=stepped.opt_state), stepped.nonfinite

  found = {}
  with jax.set_mesh(mesh):
    for memory in ("device", "host"):
      state = make_state(params(), tx, jax.tree.map(lambda _: whole, params()), 0, mesh, memory)
      run = jax.jit(
        step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None)
      )
      for number in range(4):
        old = state
        gradient = jax.tree.map(lambda x: jnp.sin(x + number), params())
        loss = jnp.float32(np.nan if number == 2 else 1.0)  # the third changes nothing
        with CompileCounter() as compiles:
          state, nonfinite = run(state, loss, gradient)
        assert float(nonfinite) == (number == 2)
        assert number == 0 or compiles.count == 0
        assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.opt_state)) if x.ndim)
      assert kinds(state.params) == {"device"}
      # Adafactor's vectors stay; so small a matrix has none.
      assert kinds(state.opt_state) <= {"device" if memory == "device" else "pinned_host", "device"}
      assert memory == "device" or "pinned_host" in kinds(state.opt_state)
      found[memory] = jax.tree.map(np.asarray, (state.params, state.opt_state))
  for a, b in zip(*map(jax.tree.leaves, found.values()), strict=True):
    np.testing.assert_array_equal(a, b)
