"""Answers -> reward of each caption, and which captions could be scored at all."""

import dataclasses

import jax.numpy as jnp

from caprl_jax.masked import masked_mean
from caprl_jax.types import Answers, Array


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """Weights of the reward's terms. Accuracy is CapRL's only term (arXiv 2509.22647, section 3)."""
  accuracy: float = 1.0


def caption_reward(answers: Answers, asked_BK: Array, cfg: RewardConfig) -> tuple[Array, Array, dict[str, Array]]:
  """Mean credit over an image's questions.

  Args:
    asked_BK: bool, the questions that exist.

  Returns:
    reward_BG float32, scored_BG bool, and the terms by name [B, G]. A caption is unscored when its image has no
    question or the judge was not finite on one of them: its reward is 0 here and must be read by nobody.
  """
  asked = jnp.broadcast_to(asked_BK[:, None], answers.valid_BGK.shape)
  scored_BG = asked.any(-1) & (answers.valid_BGK | ~asked).all(-1)
  accuracy_BG = jnp.where(scored_BG, masked_mean(answers.credit_BGK, asked, axis=-1), 0.0)
  return cfg.accuracy * accuracy_BG, scored_BG, {"accuracy": accuracy_BG}
