"""Packed rows -> new state: next-token prediction of what the assistant wrote."""

import jax
import jax.numpy as jnp
import optax

from caprl_jax import sharding
from caprl_jax.masked import masked_sum
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.head import token_logprobs
from caprl_jax.models.policy import Policy
from caprl_jax.models.trainable import merge_params
from caprl_jax.types import Array, Packed, Params, TrainState


def packed_loss(
  policy: Policy, params: Params, batch: Packed, chunk_tokens: int = 1024
) -> tuple[Array, Array]:
  """Sum of -log p over the tokens to be predicted, and their number."""
  hidden_BLD = policy.apply(
    {"params": params}, batch.flat_images(), batch.prompts, batch.segment_BL, method="packed"
  )
  # An example's first token is never wanted, so none is predicted from another example.
  target_BL, wanted_BL = batch.prompts.tokens_BP[:, 1:], batch.wanted_BL[:, 1:]
  logp, _ = token_logprobs(
    hidden_BLD[:, :-1].reshape(-1, hidden_BLD.shape[-1]),
    head_matrix(policy.cfg.text, params["language_model"]),
    target_BL.reshape(-1, 1),
    chunk_tokens=chunk_tokens,
  )
  return -masked_sum(logp.reshape(target_BL.shape), wanted_BL), wanted_BL.sum()


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
):
  """One step of next-token prediction, mean over the wanted tokens of the whole batch. `base`: the
  parameters that are not trained. Returns (state, metrics, None)."""

  def loss(params, piece):
    return packed_loss(policy, merge_params(params, base), piece, chunk_tokens)

  def add(carry, piece):
    (total, count), grads = jax.value_and_grad(loss, has_aux=True)(state.params, piece)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (total, count, grads)), None

  zero = (
    jnp.float32(0),
    jnp.int32(0),
    jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params),
  )
  if microbatches == 1:
    (total, count, grads), _ = add(zero, batch)
  else:
    (total, count, grads), _ = jax.lax.scan(add, zero, sharding.microbatches(batch, microbatches))
  divisor = jnp.maximum(count, 1)
  value, grads = (
    total / divisor,
    jax.tree.map(lambda g, p: (g / divisor).astype(p.dtype), grads, state.params),
  )
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(value) & jnp.isfinite(norm)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
  metrics = {
    "update/loss": value,
    "update/grad_norm": norm,
    "update/nonfinite": 1.0 - finite,
    "update/learning_rate": schedule(state.step),
    "pack/fill": batch.prompts.valid_BP.mean(dtype=jnp.float32),
    "pack/examples": batch.segment_BL.max(1).sum().astype(jnp.float32),
    "pack/wanted": count.astype(jnp.float32),
  }
  state = state.replace(
    step=state.step + 1,
    params=keep(optax.apply_updates(state.params, updates), state.params),
    opt_state=keep(opt_state, state.opt_state),
  )
  return state, metrics, None
