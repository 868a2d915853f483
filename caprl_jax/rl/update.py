"""Captions, advantages -> new state: microbatched gradients of the loss, one or several optimizer
steps.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from caprl_jax import rungs
from caprl_jax.masked import masked_sum
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.head import token_kl
from caprl_jax.models.policy import Policy
from caprl_jax.models.trainable import merge_params
from caprl_jax.rl.gradients import LossSum, MeanLoss, guarded_step, mean_gradient
from caprl_jax.rl.groups import Groups, Rollout
from caprl_jax.rl.loss import (
  LossConfig,
  LossInputs,
  kl_estimate,
  policy_loss,
  set_tokens,
  token_loss,
)
from caprl_jax.rl.rollout import (
  CaptionStates,
  caption_logprobs,
  caption_states,
  group_slots,
  states_logprobs,
  states_loss,
)
from caprl_jax.sharding import join_microbatches, microbatches
from caprl_jax.types import Array, Batch, Captions, Frozen, Params, TrainState


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
  """The loss, and how a rollout is learned from.

  loss: the policy-gradient loss.
  minibatches: optimizer steps per pass over the rollout, each on its own part of the images.
  epochs: passes over the rollout. More than one step in all makes the ratio move away from 1.
  microbatches: pieces of whole groups into which each minibatch is cut, to save memory; the
    gradient is the same. Groups of like lengths share a piece, which takes the time of its longest
    group.
  chunk_tokens: tokens whose logits exist at once on a device, at most. Their gradient is made while
    they are there; where a token's loss depends on others (`gspo`, importance weights of a
    `sequence`, the `full` KL), they are made again in the backward pass.
  """

  loss: LossConfig = LossConfig()
  minibatches: int = 1
  epochs: int = 1
  microbatches: int = 1
  chunk_tokens: int = 1024

  @property
  def steps(self) -> int:
    """Optimizer steps per rollout."""
    return self.minibatches * self.epochs


@dataclasses.dataclass(frozen=True)
class Learner:
  """What an update is made with: the model, the optimizer and the settings."""

  policy: Policy
  tx: optax.GradientTransformation
  cfg: UpdateConfig
  temperature: float = 1.0  # of the sampler: the loss is about the distribution it drew from
  schedule: Callable[[Array], Array] | None = None  # of the learning rate, for its metric


@flax.struct.dataclass
class UpdateNumbers:
  """Figures of one optimizer step, in a form in which those of several can be joined."""

  nonfinite: Array  # float32, 1 where the step changed nothing
  means: dict[str, Array]
  maxima: dict[str, Array]
  minima: dict[str, Array]

  def over_steps(self) -> "UpdateNumbers":
    """Of steps along the first axis: means of means, extremes of extremes."""
    return UpdateNumbers(
      self.nonfinite.max(),
      jax.tree.map(jnp.mean, self.means),
      jax.tree.map(jnp.max, self.maxima),
      jax.tree.map(jnp.min, self.minima),
    )

  def named(self) -> dict[str, Array]:
    """The same under the names of metrics: `ratio`, `ratio_max`, `ratio_min`, `nonfinite`."""
    return {
      "nonfinite": self.nonfinite,
      **self.means,
      **{f"{name}_max": value for name, value in self.maxima.items()},
      **{f"{name}_min": value for name, value in self.minima.items()},
    }


def check_microbatches(batch_size: int, group_size: int, cfg: UpdateConfig) -> None:
  """Raises ValueError where the parts of a rollout would not be whole groups of the same number of
  images, or their captions no whole sets (`set_token_mean`).
  """
  if cfg.epochs < 1:
    raise ValueError(f"config.policy_update.epochs = {cfg.epochs} must be at least 1")
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
        f"config.policy_update.{name} = {value} does not divide {of} images; use one of {fitting}"
      )
  captions = batch_size // cfg.minibatches * group_size
  if cfg.loss.aggregation == "set_token_mean" and captions % cfg.loss.set_captions:
    raise ValueError(
      f"config.policy_update.loss.set_captions = {cfg.loss.set_captions} does not divide the "
      f"{captions} captions of an optimizer step; change data.batch_size or "
      "policy_update.minibatches, or use aggregation 'token_mean'"
    )


def logprobs_in_pieces(
  learner: Learner, params: Params, frozen: Frozen, batch: Batch, captions: Captions
) -> Array:
  """Log-probabilities of captions under given parameters, float32 [B, G, T], without gradient, in
  as many pieces as the update has."""

  def of_piece(piece: tuple[Batch, Captions]) -> Array:
    return caption_logprobs(
      learner.policy,
      params,
      *piece,
      vocabulary=frozen.vocabulary,
      temperature=learner.temperature,
      chunk_tokens=learner.cfg.chunk_tokens,
    )[0]

  count = learner.cfg.minibatches * learner.cfg.microbatches
  if count == 1:
    return jax.lax.stop_gradient(of_piece((batch, captions)))
  order_B = rungs.like_sizes(group_slots(captions), count)
  sorted_ = rungs.reorder((batch, captions), order_B)
  pieces = jax.lax.map(of_piece, microbatches(sorted_, count))
  logp_BGT = rungs.reorder(join_microbatches(pieces), rungs.back(order_B))
  return jax.lax.stop_gradient(logp_BGT)


def penalise_kl(learner: Learner, frozen: Frozen, groups: Groups) -> Groups:
  """The groups with what a sampled KL term needs: the reference's log-probabilities; and where the
  penalty is part of the reward, with the reward less `kl` times the caption's KL."""
  loss, captions, scored = learner.cfg.loss, groups.captions, groups.scored
  if not loss.kl_is_sampled:
    return groups
  reference = merge_params(frozen.reference, frozen.base)
  logp_BGT = logprobs_in_pieces(learner, reference, frozen, groups.batch, captions)
  if loss.kl_in == "reward":
    kl_BGT = kl_estimate(captions.logp_BGT, logp_BGT, loss.kl_estimator)
    penalty_BG = masked_sum(kl_BGT, captions.valid_BGT, axis=-1)
    scored = dataclasses.replace(
      scored,
      reward_BG=scored.reward_BG - loss.kl * penalty_BG,
      terms={**scored.terms, "kl": penalty_BG},
      weights=(*scored.weights, ("kl", -loss.kl)),
    )
  return dataclasses.replace(groups, scored=scored, reference_logp_BGT=logp_BGT)


def rollout_loss(learner: Learner, params: Params, frozen: Frozen, rollout: Rollout) -> LossSum:
  """The summed loss of a rollout or a piece of it, differentiable in the trained `params`; the
  others (`frozen.base`) have no gradient, nor memory for any."""
  cfg, captions = learner.cfg, rollout.captions
  everything = merge_params(params, frozen.base)
  states = caption_states(learner.policy, everything, rollout.batch, captions)
  counts_BGT = counted_tokens(rollout, cfg.loss)
  exact_kl_BGT = None
  if cfg.loss.kl_is_exact:
    exact_kl_BGT = _exact_kl(learner, everything, frozen, rollout, states)
  given = LossInputs(
    sampled_logp_BGT=captions.logp_BGT,
    advantage_BG=rollout.advantage_BG,
    counts_BGT=counts_BGT,
    old_logp_BGT=rollout.old_logp_BGT,
    reference_logp_BGT=rollout.reference_logp_BGT,
    exact_kl_BGT=exact_kl_BGT,
    set_tokens_BG=rollout.set_tokens_BG,
  )
  scored = (learner.policy, everything, states, captions)
  settings: dict[str, Any] = dict(
    vocabulary=frozen.vocabulary,
    temperature=learner.temperature,
    chunk_tokens=cfg.chunk_tokens,
    entropy="differentiable" if cfg.loss.entropy else "figure",
  )
  if cfg.loss.by_token:
    loss = functools.partial(token_loss, cfg=cfg.loss)
    inputs = given.of_tokens(cfg.loss)
    total, logp_BGT, entropy_BGT = states_loss(*scored, inputs, loss, **settings)
    return dataclasses.replace(policy_loss(logp_BGT, entropy_BGT, given, cfg.loss), total=total)
  return policy_loss(*states_logprobs(*scored, **settings), given, cfg.loss)


def counted_tokens(rollout: Rollout, cfg: LossConfig) -> Array:
  """Which tokens are learned from, bool [B, G, T]."""
  counts_BGT = rollout.captions.valid_BGT & rollout.scored_BG[..., None]
  return counts_BGT & rollout.captions.ended_BG[..., None] if cfg.mask_truncated else counts_BGT


def _exact_kl(
  learner: Learner, params: Params, frozen: Frozen, rollout: Rollout, states: CaptionStates
) -> Array:
  """KL(policy || reference) of each token's whole distribution, float32 [B, G, T]."""

  def head(model: Params) -> Array:
    return head_matrix(learner.policy.cfg.text, model["language_model"])

  reference = jax.lax.stop_gradient(merge_params(frozen.reference, frozen.base))
  others = caption_states(learner.policy, reference, rollout.batch, rollout.captions)
  others = jax.lax.stop_gradient(others)

  def kl(hidden_MD: Array, other_MD: Array, wanted_M: Array | None = None) -> Array:
    return token_kl(
      hidden_MD,
      head(params),
      other_MD,
      head(reference),
      wanted_M=wanted_M,
      allowed_V=frozen.vocabulary.allowed_V,
      temperature=learner.temperature or 1.0,
      chunk_tokens=learner.cfg.chunk_tokens,
    )

  first_B = kl(states.first_BD, others.first_BD)
  if states.rest_BRD is None or others.rest_BRD is None:
    return states.by_caption(first_B, None)
  B, R, D = states.rest_BRD.shape
  wanted_M = states.packed.valid_BR.reshape(-1)
  rest_M = kl(states.rest_BRD.reshape(-1, D), others.rest_BRD.reshape(-1, D), wanted_M)
  return states.by_caption(first_B, rest_M.reshape(B, R))


def loss_gradients(learner: Learner, params: Params, frozen: Frozen, rollout: Rollout) -> MeanLoss:
  """The mean loss over the whole rollout given and its gradient in the trained `params`, whatever
  the number of microbatches.

  Each microbatch computes rows as long as its longest group needs, so groups of like lengths go
  together.
  """
  count = learner.cfg.microbatches

  def of_piece(params: Params, piece: Rollout) -> LossSum:
    return rollout_loss(learner, params, frozen, piece)

  if learner.cfg.loss.aggregation == "set_token_mean":  # its sets are of the whole rollout
    tokens_BG = set_tokens(counted_tokens(rollout, learner.cfg.loss), learner.cfg.loss)
    rollout = dataclasses.replace(rollout, set_tokens_BG=tokens_BG)
  if count > 1:
    order_B = rungs.like_sizes(group_slots(rollout.captions), count)
    rollout = rungs.reorder(rollout, order_B)
  return mean_gradient(of_piece, params, rollout, count)


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
  learner: Learner, params: Params, opt_state: Any, frozen: Frozen, rollout: Rollout
) -> tuple[Params, Any, UpdateNumbers]:
  """One optimizer step: new parameters, new optimizer state, figures. When loss or gradient is not
  finite both stay as they were and `nonfinite` is 1."""
  loss = loss_gradients(learner, params, frozen, rollout)
  stepped = guarded_step(learner.tx, loss.value, loss.grads, params, opt_state)
  means = {
    "loss": loss.value,
    "grad_norm": stepped.grad_norm,
    **part_norms(learner.policy, loss.grads),
    **loss.numbers.means(),
  }
  numbers = UpdateNumbers(stepped.nonfinite, means, loss.numbers.maxima, loss.numbers.minima)
  return stepped.params, stepped.opt_state, numbers


def update_policy(
  learner: Learner, state: TrainState, frozen: Frozen, rollout: Rollout
) -> tuple[TrainState, UpdateNumbers]:
  """All optimizer steps of a rollout.

  The figures are means over the steps, or the largest and smallest of them. Where one of them was
  not finite, `nonfinite` is 1, and the loop stops there.
  """
  cfg = learner.cfg
  if cfg.steps > 1 and cfg.loss.importance != "none":  # else it is this pass's own log-probability
    params = merge_params(state.params, frozen.base)
    old_BGT = logprobs_in_pieces(learner, params, frozen, rollout.batch, rollout.captions)
    rollout = dataclasses.replace(rollout, old_logp_BGT=old_BGT)
  if cfg.steps == 1:
    params, opt_state, numbers = optimizer_step(
      learner, state.params, state.opt_state, frozen, rollout
    )
  else:
    parts = microbatches(rollout, cfg.minibatches)

    def step(carry: tuple[Params, Any], number: Array) -> tuple[tuple[Params, Any], UpdateNumbers]:
      part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), parts)
      params, opt_state, numbers = optimizer_step(learner, *carry, frozen, part)
      return (params, opt_state), numbers

    order = jnp.tile(jnp.arange(cfg.minibatches), cfg.epochs)
    (params, opt_state), numbers = jax.lax.scan(step, (state.params, state.opt_state), order)
    numbers = numbers.over_steps()
  if learner.schedule:  # of the first of the steps
    rate = learner.schedule(state.step * cfg.steps)
    numbers = dataclasses.replace(numbers, means={**numbers.means, "learning_rate": rate})
  return dataclasses.replace(
    state, step=state.step + 1, params=params, opt_state=opt_state
  ), numbers
