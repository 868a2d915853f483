"""Captions, advantages -> new state: microbatched gradients of the loss, one optimizer step."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from caprl_jax.loss import LossConfig, policy_loss
from caprl_jax.models.lora import whole
from caprl_jax.models.policy import Policy
from caprl_jax.rollout import caption_logprobs
from caprl_jax.sharding import microbatches
from caprl_jax.types import Array, Batch, Captions, Frozen, Params, TrainState


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
  """The loss, and into how many microbatches of whole groups the batch is cut."""
  loss: LossConfig = LossConfig()
  microbatches: int = 1
  chunk_tokens: int = 1024  # tokens whose logits exist at once


def check_microbatches(batch_size: int, cfg: UpdateConfig) -> None:
  """Raises ValueError where microbatches would not be whole groups of the same number of images."""
  if cfg.microbatches < 1 or batch_size % cfg.microbatches:
    fitting = [m for m in range(1, batch_size + 1) if batch_size % m == 0]
    raise ValueError(f"update.microbatches = {cfg.microbatches} does not divide data.batch_size = {batch_size} "
                     f"images; use one of {fitting}")


def _combine(a: dict, b: dict) -> dict:
  """Metrics of two microbatches, by the kind that their names begin with."""
  rule = {"sum": jnp.add, "max": jnp.maximum, "min": jnp.minimum}
  return {name: rule[name.split("/")[0]](a[name], b[name]) for name in a}


def loss_gradients(policy: Policy, params: Params, frozen: Frozen, batch: Batch, captions: Captions,
                   scored_BG: Array, advantage_BG: Array, temperature: float, cfg: UpdateConfig):
  """Gradient of the mean loss over the whole batch, whatever the number of microbatches, for the trained `params`;
  the others have none, nor memory for any.

  Returns gradients (float32), loss, and token-mean metrics.
  """
  def microbatch(params, piece):
    batch, captions, scored_BG, advantage_BG = piece
    score = lambda p: caption_logprobs(policy, whole(p, frozen.base), batch, captions, frozen.vocabulary, temperature, cfg.chunk_tokens)
    logp, entropy = score(params)
    reference = None if frozen.reference is None else jax.lax.stop_gradient(score(frozen.reference)[0])
    counts = captions.valid_BGT & scored_BG[..., None]
    total, count, metrics = policy_loss(logp, captions.logp_BGT, reference, entropy, advantage_BG, counts, cfg.loss)
    return total, (count, {**metrics, "sum/tokens": counts.sum().astype(jnp.float32)})

  piece = (batch, captions, scored_BG, advantage_BG)
  gradient = jax.value_and_grad(microbatch, has_aux=True)
  wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
  if cfg.microbatches == 1:
    (total, (count, metrics)), grads = gradient(params, piece)
    grads = wide(grads)
  else:
    pieces = microbatches(piece, cfg.microbatches)
    take = lambda i: jax.tree.map(lambda x: x[i], pieces)

    def add(carry, piece):
      (total, (count, metrics)), grads = gradient(params, piece)
      return jax.tree.map(jnp.add, carry[:3], (total, count, wide(grads))) + (_combine(carry[3], metrics),), None

    (total, (count, metrics)), grads = gradient(params, take(0))
    rest = jax.tree.map(lambda x: x[1:], pieces)
    (total, count, grads, metrics), _ = jax.lax.scan(add, (total, count, wide(grads), metrics), rest)
  divisor = jnp.maximum(count, 1)
  tokens = jnp.maximum(metrics.pop("sum/tokens"), 1)
  means = {}
  for name, value in metrics.items():
    kind, short = name.split("/")
    means[short if kind == "sum" else f"{short}_{kind}"] = value / tokens if kind == "sum" else value
  return jax.tree.map(lambda g: g / divisor, grads), total / divisor, means


def update_policy(policy: Policy, tx: optax.GradientTransformation, state: TrainState, frozen: Frozen, batch: Batch,
                  captions: Captions, scored_BG: Array, advantage_BG: Array, temperature: float,
                  cfg: UpdateConfig) -> tuple[TrainState, dict[str, Array]]:
  """One optimizer step. When loss or gradient is not finite the parameters stay as they were and the metric
  `update/nonfinite` is 1; the loop stops there."""
  grads, loss, metrics = loss_gradients(policy, state.params, frozen, batch, captions, scored_BG, advantage_BG,
                                        temperature, cfg)
  norm = optax.global_norm(grads)
  finite = jnp.isfinite(norm) & jnp.isfinite(loss)
  grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
  state = state.replace(step=state.step + 1, params=keep(params, state.params),
                        opt_state=keep(opt_state, state.opt_state))
  metrics = {"loss": loss, "grad_norm": norm, "nonfinite": 1.0 - finite, **metrics}
  return state, {f"update/{name}": value for name, value in metrics.items()}
