"""Reward -> advantage, relative to the group. One function an estimator; `group_advantages` picks by name."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from caprl_jax.masked import masked_max, masked_mean, masked_min, masked_std, masked_sum
from caprl_jax.types import Array


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
  """grpo: (R - mean) / (std + epsilon), DeepSeekMath arXiv 2402.03300, std with n - 1 as TRL and OpenRLHF have it;
  dr_grpo: R - mean, arXiv 2503.20783; rloo: R - mean of the others, arXiv 2402.14740, what CapRL's released code
  uses."""
  estimator: Literal["grpo", "rloo", "dr_grpo"] = "grpo"
  epsilon: float = 1e-4


def check_group_size(group_size: int, cfg: AdvantageConfig) -> None:
  """Raises ValueError where a group cannot give a baseline."""
  if group_size < 2:
    raise ValueError(f"rollout.group_size = {group_size} gives no baseline for advantage.estimator = "
                     f"{cfg.estimator!r}: every advantage would be zero. Use 2 or more; CapRL uses 8")


def flat_groups(reward_BG: Array, scored_BG: Array) -> Array:
  """bool [B]: fewer than two scored captions, or all with the same reward (compared exactly)."""
  same = masked_max(reward_BG, scored_BG, axis=1) <= masked_min(reward_BG, scored_BG, axis=1)
  return same | (scored_BG.sum(1) < 2)


def group_advantages(reward_BG: Array, scored_BG: Array, cfg: AdvantageConfig) -> Array:
  """Advantages [B, G], float32. Exactly zero for flat groups and for unscored captions, which also stay out of the
  baseline."""
  if cfg.estimator == "rloo":
    others = jnp.maximum(scored_BG.sum(1, keepdims=True) - 1, 1)
    total = masked_sum(reward_BG, scored_BG, axis=1, keepdims=True)
    advantage = reward_BG - (total - reward_BG) / others
  else:
    advantage = reward_BG - masked_mean(reward_BG, scored_BG, axis=1, keepdims=True)
    if cfg.estimator == "grpo":
      advantage /= masked_std(reward_BG, scored_BG, axis=1, keepdims=True, ddof=1) + cfg.epsilon
  live = scored_BG & ~flat_groups(reward_BG, scored_BG)[:, None]
  return jnp.where(live, advantage, 0.0)
