"""The optimizer and the state of training: made anew, and described."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from caprl_jax import sharding
from caprl_jax.harness.settings import Settings
from caprl_jax.harness.setup import Run
from caprl_jax.models.trainable import split_params, trainable_filter
from caprl_jax.rl.optimizer import build_optimizer, learning_rate_schedule
from caprl_jax.types import Params, TrainState


def rollout_images(settings: Settings) -> int:
  """Images that a step captions."""
  return settings.data.batch_size * settings.step.rollout.oversample


def make_optimizer(settings: Settings) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer of a run; its schedule counts optimizer steps, of which a rollout may take
  several.
  """
  return build_optimizer(settings.optimizer, settings.train.steps * settings.step.update.steps)


def rate_change(
  settings: Settings, then_steps: int, then_schedule_steps: int | None, step: int
) -> str | None:
  """What becomes of the learning rate where a run goes on with another length; None where it stays
  what it would have been.

  Args:
    then_steps, then_schedule_steps: `train.steps` and `optimizer.schedule_steps` up to now.
    step: the last step that was made.
  """
  per_step, cfg = settings.step.update.steps, settings.optimizer
  old_cfg = dataclasses.replace(cfg, schedule_steps=then_schedule_steps)
  old = learning_rate_schedule(old_cfg, cfg.learning_rate, then_steps * per_step)
  new = learning_rate_schedule(cfg, cfg.learning_rate, settings.train.steps * per_step)
  rates = lambda of: [float(of(count * per_step)) for count in (step, settings.train.steps - 1)]
  was, now = rates(old), rates(new)
  if was == now:
    return None
  before = then_schedule_steps or then_steps * per_step
  after = cfg.schedule_steps or settings.train.steps * per_step
  return (
    f"the learning rate's schedule had {before} optimizer steps and has {after} now: the rate is "
    f"{now[0]:.3g} in step {step + 1} and {now[1]:.3g} in the last one, where it would have been "
    f"{was[0]:.3g} and {was[1]:.3g}; --config.optimizer.schedule_steps={before} keeps the old "
    "schedule"
  )


def policy_shardings(made: Run):
  """Shardings of the parameters that are trained."""
  kind = made.settings.policy.trainable
  return split_params(made.policy.shardings, trainable_filter(kind, made.policy.model.cfg.family))[
    0
  ]


def make_state(
  params: Params,
  tx: optax.GradientTransformation,
  shardings,
  seed: int,
  mesh,
  memory: sharding.MomentMemory = "device",
) -> TrainState:
  """The state before the first step, its moments in that memory. It owns `params`, and is donated
  to the step with them."""
  opt_state = jax.jit(
    tx.init, out_shardings=sharding.optimizer_shardings(tx, params, shardings, mesh, memory)
  )(params)
  put = lambda x: jax.device_put(x, sharding.replicated(mesh))
  return TrainState(put(jnp.int32(0)), params, opt_state, put(jax.random.key(seed)))


def abstract_state(
  params: Params,
  tx: optax.GradientTransformation,
  shardings,
  mesh,
  memory: sharding.MomentMemory = "device",
) -> TrainState:
  """Shapes and shardings of the state, for restoring one without having another in memory."""
  params = _abstract(params, shardings)
  places = sharding.optimizer_shardings(tx, params, shardings, mesh, memory)
  opt_state = _abstract(jax.eval_shape(tx.init, params), places)
  whole = sharding.replicated(mesh)

  def scalar(x: Any) -> Any:  # a struct, which stands for an array
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

  return TrainState(
    scalar(jnp.int32(0)), params, opt_state, scalar(jax.random.key_data(jax.random.key(0)))
  )


def _abstract(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )
