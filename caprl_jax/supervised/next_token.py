"""Packed rows -> new state: next-token prediction of what the assistant wrote."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.head import negative_log_likelihood, token_loss
from caprl_jax.models.policy import Policy
from caprl_jax.models.trainable import merge_params
from caprl_jax.rl.gradients import LossSum, TokenNumbers, guarded_step, mean_gradient
from caprl_jax.types import Array, Packed, Params, TrainState


def packed_loss(
  policy: Policy, params: Params, batch: Packed, chunk_tokens: int = 1024
) -> tuple[Array, Array]:
  """Sum of -log p over the tokens to be predicted, and their number."""
  hidden_BLD: Any = policy.apply(
    {"params": params}, batch.flat_images(), batch.prompts, batch.segment_BL, method="packed"
  )
  # An example's first token is never wanted, so none is predicted from another example.
  target_BL, wanted_BL = batch.prompts.tokens_BP[:, 1:], batch.wanted_BL[:, 1:]
  total, _, _ = token_loss(
    hidden_BLD[:, :-1].reshape(-1, hidden_BLD.shape[-1]),
    head_matrix(policy.cfg.text, params["language_model"]),
    target_BL.reshape(-1, 1),
    wanted_BL.reshape(-1, 1),
    negative_log_likelihood,
    wanted_M=wanted_BL.reshape(-1),
    chunk_tokens=chunk_tokens,
  )
  return total, wanted_BL.sum()


def pretrain_step(
  state: TrainState,
  base: Params,
  batch: Packed,
  *,
  policy: Policy,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  microbatches: int,
  chunk_tokens: int,
) -> tuple[TrainState, dict[str, Array], None]:
  """One step of next-token prediction, mean over the wanted tokens of the whole batch.

  Args:
    base: the parameters that are not trained.
    microbatches: pieces of the batch, to save memory; the gradient is the same.

  Returns:
    The new state, metrics, and no samples.
  """

  def loss(params: Params, piece: Packed) -> LossSum:
    total, count = packed_loss(policy, merge_params(params, base), piece, chunk_tokens)
    return LossSum(total, count, TokenNumbers(count.astype(jnp.float32)))

  mean = mean_gradient(loss, state.params, batch, microbatches)
  stepped = guarded_step(tx, mean.value, mean.grads, state.params, state.opt_state)
  metrics = {
    "update/loss": mean.value,
    "update/grad_norm": stepped.grad_norm,
    "update/nonfinite": stepped.nonfinite,
    "update/learning_rate": schedule(state.step),
    "pack/fill": batch.prompts.valid_BP.mean(dtype=jnp.float32),
    "pack/examples": batch.segment_BL.max(1).sum().astype(jnp.float32),
    "pack/wanted": mean.count.astype(jnp.float32),
  }
  state = dataclasses.replace(
    state, step=state.step + 1, params=stepped.params, opt_state=stepped.opt_state
  )
  return state, metrics, None
