"""Captions, advantages -> new state: microbatched gradients of the loss, one or several optimizer
steps.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax

from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.head import token_kl
from caprl_jax.models.policy import Policy
from caprl_jax.models.trainable import merge_params
from caprl_jax.rl.loss import LossConfig, policy_loss
from caprl_jax.rl.rollout import caption_hidden, caption_logprobs, hidden_logprobs
from caprl_jax.sharding import join_microbatches, microbatches
from caprl_jax.types import Array, Batch, Captions, Frozen, Params, TrainState


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
  """The loss, and how a rollout is learned from.

  loss: the policy-gradient loss.
  minibatches: optimizer steps per pass over the rollout, each on its own part of the images.
  epochs: passes over the rollout. More than one step in all makes the ratio move away from 1.
  microbatches: pieces of whole groups into which each minibatch is cut, to save memory; the
    gradient is the same.
  """

  loss: LossConfig = LossConfig()
  minibatches: int = 1
  epochs: int = 1
  microbatches: int = 1
  chunk_tokens: int = 1024  # tokens whose logits exist at once

  @property
  def steps(self) -> int:
    """Optimizer steps a rollout."""
    return self.minibatches * self.epochs


@dataclasses.dataclass(frozen=True)
class Rollout:
  """What the loss reads of a rollout, all split by image."""

  batch: Batch
  captions: Captions
  scored_BG: Array
  advantage_BG: Array
  reference_logp_BGT: Array | None = None
  old_logp_BGT: Array | None = None


jax.tree_util.register_dataclass(
  Rollout,
  ["batch", "captions", "scored_BG", "advantage_BG", "reference_logp_BGT", "old_logp_BGT"],
  [],
)


def check_microbatches(batch_size: int, cfg: UpdateConfig) -> None:
  """Raises ValueError where the parts of a rollout would not be whole groups of the same number of
  images.
  """
  if cfg.epochs < 1:
    raise ValueError(f"policy_update.epochs = {cfg.epochs} must be at least 1")
  for name, value, total, of in (
    ("minibatches", cfg.minibatches, batch_size, f"data.batch_size = {batch_size}"),
    (
      "microbatches",
      cfg.microbatches,
      batch_size // max(cfg.minibatches, 1),
      f"data.batch_size = {batch_size}"
      if cfg.minibatches == 1
      else f"data.batch_size / policy_update.minibatches = {batch_size // max(cfg.minibatches, 1)}",
    ),
  ):
    if value < 1 or total % value:
      fitting = [m for m in range(1, total + 1) if total % m == 0]
      raise ValueError(
        f"policy_update.{name} = {value} does not divide {of} images; use one of {fitting}"
      )


def _combine(a: dict, b: dict) -> dict:
  """Metrics of two microbatches, by the kind that their names begin with."""
  rule = {"sum": jnp.add, "max": jnp.maximum, "min": jnp.minimum}
  return {name: rule[name.split("/")[0]](a[name], b[name]) for name in a}


def score_captions(
  policy: Policy,
  params: Params,
  frozen: Frozen,
  batch: Batch,
  captions: Captions,
  temperature: float,
  cfg: UpdateConfig,
) -> Array:
  """Log-probabilities under given parameters, without gradient, in as many pieces as the update
  has.
  """

  def some(piece):
    return caption_logprobs(
      policy, params, *piece, frozen.vocabulary, temperature, cfg.chunk_tokens
    )[0]

  count = cfg.minibatches * cfg.microbatches
  if count == 1:
    return jax.lax.stop_gradient(some((batch, captions)))
  pieces = jax.lax.map(some, microbatches((batch, captions), count))
  return jax.lax.stop_gradient(join_microbatches(pieces))


def loss_gradients(
  policy: Policy,
  params: Params,
  frozen: Frozen,
  rollout: Rollout,
  temperature: float,
  cfg: UpdateConfig,
):
  """Gradient of the mean loss over the whole rollout given, whatever the number of microbatches,
  for the trained `params`; the others have none, nor memory for any.

  Returns gradients (float32), loss, and token-mean metrics.
  """

  def microbatch(params, piece: Rollout):
    captions = piece.captions
    everything = merge_params(params, frozen.base)
    hidden = caption_hidden(policy, everything, piece.batch, captions)
    logp, entropy = hidden_logprobs(
      policy, everything, hidden, captions, frozen.vocabulary, temperature, cfg.chunk_tokens
    )
    counts = captions.valid_BGT & piece.scored_BG[..., None]
    if cfg.loss.mask_truncated:
      counts &= captions.ended_BG[..., None]
    full_kl = None
    if cfg.loss.kl > 0 and cfg.loss.kl_estimator == "full":
      reference = jax.lax.stop_gradient(merge_params(frozen.reference, frozen.base))
      other = jax.lax.stop_gradient(caption_hidden(policy, reference, piece.batch, captions))
      head = lambda p: head_matrix(policy.cfg.text, p["language_model"])
      full_kl = token_kl(
        hidden,
        head(everything),
        other,
        head(reference),
        allowed_V=frozen.vocabulary.allowed_V,
        temperature=temperature or 1.0,
        chunk_tokens=cfg.chunk_tokens,
      ).reshape(logp.shape)
    total, count, metrics = policy_loss(
      logp,
      captions.logp_BGT,
      piece.old_logp_BGT,
      piece.reference_logp_BGT,
      entropy,
      piece.advantage_BG,
      counts,
      cfg.loss,
      full_kl,
    )
    return total, (count, {**metrics, "sum/tokens": counts.sum().astype(jnp.float32)})

  gradient = jax.value_and_grad(microbatch, has_aux=True)
  wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
  if cfg.microbatches == 1:
    (total, (count, metrics)), grads = gradient(params, rollout)
    grads = wide(grads)
  else:
    pieces = microbatches(rollout, cfg.microbatches)
    take = lambda i: jax.tree.map(lambda x: x[i], pieces)

    def add(carry, piece):
      (total, (count, metrics)), grads = gradient(params, piece)
      return jax.tree.map(jnp.add, carry[:3], (total, count, wide(grads))) + (
        _combine(carry[3], metrics),
      ), None

    (total, (count, metrics)), grads = gradient(params, take(0))
    rest = jax.tree.map(lambda x: x[1:], pieces)
    (total, count, grads, metrics), _ = jax.lax.scan(
      add, (total, count, wide(grads), metrics), rest
    )
  divisor = jnp.maximum(count, 1)
  tokens = jnp.maximum(metrics.pop("sum/tokens"), 1)
  means = {}
  for name, value in metrics.items():
    kind, short = name.split("/")
    means[short if kind == "sum" else f"{short}_{kind}"] = (
      value / tokens if kind == "sum" else value
    )
  return jax.tree.map(lambda g: g / divisor, grads), total / divisor, means


def part_norms(policy: Policy, grads: Params) -> dict[str, Array]:
  """Norms of the gradient of tower, projector and decoder, those that are trained."""
  squares: dict[str, list] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    name = ".".join(p.key for p in path)
    part = (
      "projector"
      if re.match(policy.cfg.family.projector, name)
      else ("vision" if name.startswith("visual.") else "decoder")
    )
    squares.setdefault(part, []).append(jnp.sum(jnp.square(leaf)))
  return {f"grad_norm_{part}": jnp.sqrt(sum(values)) for part, values in squares.items()}


def optimizer_step(
  policy: Policy,
  tx: optax.GradientTransformation,
  params: Params,
  opt_state,
  frozen: Frozen,
  rollout: Rollout,
  temperature: float,
  cfg: UpdateConfig,
):
  """One step: new parameters, optimizer state, metrics. When loss or gradient is not finite both
  stay as they were and the metric `nonfinite` is 1."""
  grads, loss, metrics = loss_gradients(policy, params, frozen, rollout, temperature, cfg)
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(norm) & jnp.isfinite(loss)
  metrics = {
    "loss": loss,
    "grad_norm": norm,
    **part_norms(policy, grads),
    "nonfinite": 1.0 - finite,
    **metrics,
  }
  grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
  updates, new_opt_state = tx.update(grads, opt_state, params)
  keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
  return keep(optax.apply_updates(params, updates), params), keep(new_opt_state, opt_state), metrics


def update_policy(
  policy: Policy,
  tx: optax.GradientTransformation,
  state: TrainState,
  frozen: Frozen,
  rollout: Rollout,
  temperature: float,
  cfg: UpdateConfig,
) -> tuple[TrainState, dict[str, Array]]:
  """All optimizer steps of a rollout. Metrics are means over them, but for extremes; where one of
  them was not finite (`optimizer_step`), `update/nonfinite` is 1: the loop stops there."""
  if cfg.steps > 1 and cfg.loss.importance != "none":  # else it is this pass's own log-probability
    old = score_captions(
      policy,
      merge_params(state.params, frozen.base),
      frozen,
      rollout.batch,
      rollout.captions,
      temperature,
      cfg,
    )
    rollout = dataclasses.replace(rollout, old_logp_BGT=old)
  step = lambda params, opt_state, part: optimizer_step(
    policy, tx, params, opt_state, frozen, part, temperature, cfg
  )
  if cfg.steps == 1:
    params, opt_state, metrics = step(state.params, state.opt_state, rollout)
  else:
    parts = microbatches(rollout, cfg.minibatches)

    def one(carry, number):
      part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), parts)
      params, opt_state, metrics = step(*carry, part)
      return (params, opt_state), metrics

    numbers = jnp.tile(jnp.arange(cfg.minibatches), cfg.epochs)
    (params, opt_state), metrics = jax.lax.scan(one, (state.params, state.opt_state), numbers)
    reduce = lambda name: (
      jnp.max
      if name.endswith("_max") or name == "nonfinite"
      else (jnp.min if name.endswith("_min") else jnp.mean)
    )
    metrics = {name: reduce(name)(value) for name, value in metrics.items()}
  state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
  return state, {f"update/{name}": value for name, value in metrics.items()}
