"""Reward -> advantage, relative to the group. One function an estimator; `group_advantages` picks
by name.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp

from caprl_jax.masked import masked_max, masked_mean, masked_min, masked_std, masked_sum
from caprl_jax.types import Array


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
  """A reward -> an advantage, relative to the captions of the same image.

  estimator: `grpo`: (R - mean) / (std + epsilon), DeepSeekMath arXiv 2402.03300, std with n - 1
    as TRL and OpenRLHF have it; `dr_grpo`: R - mean, arXiv 2503.20783; `rloo`: R - mean of the
    others, arXiv 2402.14740, what CapRL's released code uses; `gdpo`: each reward term as grpo
    has it, then the weighted sum (arXiv 2601.05242), so that no term drowns another.
  whiten: what is done to the whole batch afterwards. `captions`: minus the mean over scored
    captions, over their standard deviation (GDPO's last step); flat groups stay at zero.
    `released`: what CapRL's released code does, where every token of a scored caption counts, and
    which moves flat groups too.
  epsilon: added to standard deviations.
  """

  estimator: Literal["grpo", "rloo", "dr_grpo", "gdpo"] = "grpo"
  whiten: Literal["none", "captions", "released"] = "none"
  epsilon: float = 1e-4


def check_group_size(group_size: int, cfg: AdvantageConfig) -> None:
  """Raises ValueError where a group cannot give a baseline."""
  if group_size < 2:
    raise ValueError(
      f"rollout.group_size = {group_size} gives no baseline for advantage.estimator "
      f"= {cfg.estimator!r}: every advantage would be zero. Use 2 or more; CapRL "
      "uses 8"
    )


def flat_groups(reward_BG: Array, scored_BG: Array) -> Array:
  """bool [B]: fewer than two scored captions, or all with the same reward (compared exactly)."""
  same = masked_max(reward_BG, scored_BG, axis=1) <= masked_min(reward_BG, scored_BG, axis=1)
  return same | (scored_BG.sum(1) < 2)


def _live(reward_BG: Array, scored_BG: Array) -> Array:
  """Captions that may have an advantage."""
  return scored_BG & ~flat_groups(reward_BG, scored_BG)[:, None]


def centered(reward_BG: Array, scored_BG: Array) -> Array:
  """R - mean of the group."""
  return reward_BG - masked_mean(reward_BG, scored_BG, axis=1, keepdims=True)


def normalized(reward_BG: Array, scored_BG: Array, epsilon: float) -> Array:
  """(R - mean) / (std + epsilon) of the group."""
  std = masked_std(reward_BG, scored_BG, axis=1, keepdims=True, ddof=1)
  return centered(reward_BG, scored_BG) / (std + epsilon)


def leave_one_out(reward_BG: Array, scored_BG: Array) -> Array:
  """R - mean of the group's other captions."""
  others = jnp.maximum(scored_BG.sum(1, keepdims=True) - 1, 1)
  total = masked_sum(reward_BG, scored_BG, axis=1, keepdims=True)
  return reward_BG - (total - reward_BG) / others


def group_advantages(
  reward_BG: Array,
  scored_BG: Array,
  cfg: AdvantageConfig,
  terms: Sequence[tuple[float, Array]] = (),
  tokens_BG: Array | None = None,
) -> Array:
  """Advantages [B, G], float32. Exactly zero for flat groups (but see `whiten`) and for unscored
  captions, which also stay out of the baseline.

  Args:
    terms: (weight, values [B, G]) of which the reward is the sum, for `gdpo`.
    tokens_BG: tokens of each caption, for `whiten = "released"`.
  """
  if cfg.estimator == "gdpo":
    advantage, live = jnp.zeros(reward_BG.shape), jnp.zeros(scored_BG.shape, bool)
    for weight, value_BG in terms:
      of_term = _live(value_BG, scored_BG)
      advantage += weight * jnp.where(of_term, normalized(value_BG, scored_BG, cfg.epsilon), 0.0)
      live |= of_term
  else:
    live = _live(reward_BG, scored_BG)
    if cfg.estimator == "rloo":
      advantage = leave_one_out(reward_BG, scored_BG)
    elif cfg.estimator == "dr_grpo":
      advantage = centered(reward_BG, scored_BG)
    else:
      advantage = normalized(reward_BG, scored_BG, cfg.epsilon)
  advantage = jnp.where(live, advantage, 0.0)
  if cfg.whiten == "captions":
    std = masked_std(advantage, scored_BG, ddof=1)
    return jnp.where(
      live, (advantage - masked_mean(advantage, scored_BG)) / (std + cfg.epsilon), 0.0
    )
  if cfg.whiten == "released":
    assert tokens_BG is not None, "whiten = 'released' weighs captions by their tokens"
    weight_BG = jnp.where(scored_BG, tokens_BG, 0).astype(jnp.float32)
    count = jnp.maximum(weight_BG.sum(), 1)
    centred = advantage - (weight_BG * advantage).sum() / count
    variance = (weight_BG * centred**2).sum() / count
    return jnp.where(scored_BG, centred / jnp.sqrt(jnp.maximum(variance, 1e-8)), 0.0)
  return advantage
