"""The optimizer and the state of training: made anew, described, and read from a checkpoint."""

import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from caprl_jax import sharding
from caprl_jax.harness.checkpoints import Checkpoints
from caprl_jax.harness.settings import Settings
from caprl_jax.harness.setup import Run
from caprl_jax.hub.load import Loaded
from caprl_jax.models.trainable import merge_params, split_params, trainable_filter
from caprl_jax.rl.optimizer import build_optimizer
from caprl_jax.types import Params, TrainState

log = logging.getLogger("caprl_jax.harness.training.state")


def rollout_images(settings: Settings) -> int:
  """Images that a step captions."""
  return settings.data.batch_size * settings.step.rollout.oversample


def make_optimizer(settings: Settings) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer of a run; its schedule counts optimizer steps, of which a rollout may take
  several.
  """
  return build_optimizer(settings.optimizer, settings.train.steps * settings.step.update.steps)


def policy_shardings(made: Run):
  """Shardings of the parameters that are trained."""
  kind = made.settings.policy.trainable
  return split_params(made.policy.shardings, trainable_filter(kind, made.policy.model.cfg.family))[
    0
  ]


def make_state(
  params: Params, tx: optax.GradientTransformation, shardings, seed: int, mesh
) -> TrainState:
  """The state before the first step. It owns `params`, and is donated to the step with them."""
  opt_state = jax.jit(
    tx.init, out_shardings=sharding.optimizer_shardings(tx, params, shardings, mesh)
  )(params)
  put = lambda x: jax.device_put(x, sharding.replicated(mesh))
  return TrainState(put(jnp.int32(0)), params, opt_state, put(jax.random.key(seed)))


def abstract_state(params: Params, tx: optax.GradientTransformation, shardings, mesh) -> TrainState:
  """Shapes and shardings of the state, for restoring one without having another in memory."""
  with_sharding = lambda tree, places: jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places
  )
  params = with_sharding(params, shardings)
  opt_state = with_sharding(
    jax.eval_shape(tx.init, params), sharding.optimizer_shardings(tx, params, shardings, mesh)
  )
  whole = sharding.replicated(mesh)

  def scalar(x: Any) -> Any:  # a struct, which stands for an array
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

  return TrainState(
    scalar(jnp.int32(0)), params, opt_state, scalar(jax.random.key_data(jax.random.key(0)))
  )


def newest_captioner(
  workdir: pathlib.Path, settings: Settings, mesh: jax.sharding.Mesh
) -> tuple[Loaded, Params]:
  """The captioner that a run began with, and all of its parameters after the run's newest
  checkpoint. Raises ValueError where there is no checkpoint."""
  checkpoints = Checkpoints(workdir, settings.checkpoint)
  if checkpoints.latest_step() is None:
    raise ValueError(f"{workdir} has no checkpoint to read a captioner from; was it deleted?")
  loaded = settings.policy.load(mesh)
  kind = trainable_filter(settings.policy.trainable, loaded.model.cfg.family)
  params, base = split_params(loaded.params, kind)
  shardings, _ = split_params(loaded.shardings, kind)
  tx, _ = make_optimizer(settings)
  state, _ = checkpoints.restore(abstract_state(params, tx, shardings, mesh))
  checkpoints.close()
  log.info("parameters after step %d of %s", int(state.step), workdir)
  return loaded, merge_params(state.params, base or None)
