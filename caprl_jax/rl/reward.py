"""Answers, captions -> reward of each caption, its terms, and which captions could be scored at
all.
"""

import dataclasses

import jax.numpy as jnp

from caprl_jax.masked import masked_mean
from caprl_jax.rl.caption_form import length_reward, repetition, timestamp_reward
from caprl_jax.types import Answers, Array, Captions, Scored, Vocabulary

PENALTIES = ("misled", "repetition", "truncated")  # these are subtracted


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """Weights of the reward's terms, each between 0 and 1. Accuracy is CapRL's only term (arXiv
  2509.22647, section 3).

  accuracy: share of questions answered right.
  misled: minus the share answered wrong, not counting those on which the judge abstains: what
    tells a false statement from silence. It needs a judge that can abstain: `judge.abstain`, or a
    calibrated `judge.margin`.
  length: CapRL++'s: 1 up to `length_full_tokens`, 0 from `length_zero_tokens`, linear between.
  length_full_tokens: up to here the term `length` is 1.
  length_zero_tokens: from here on the term `length` is 0.
  repetition: minus the share of n-grams of `repetition_ngram` tokens that an earlier one repeats.
  repetition_ngram: tokens of the n-grams that the term `repetition` counts.
  timestamps: CapRL++'s format of [mm:ss] stamps, for captions of videos.
  truncated: minus 1 for a caption that was cut at the limit.
  """

  accuracy: float = 1.0
  misled: float = 0.0
  length: float = 0.0
  length_full_tokens: int = 2048
  length_zero_tokens: int = 3072
  repetition: float = 0.0
  repetition_ngram: int = 4
  timestamps: float = 0.0
  truncated: float = 0.0

  def __post_init__(self):
    negative = {
      name: weight
      for name, weight in self.weights().items()
      if weight * (-1) ** (name in PENALTIES) < 0
    }
    if negative:
      raise ValueError(
        f"weights of a reward's terms are at least 0; {', '.join(PENALTIES)} are "
        "subtracted. Got "
        f"{ {name: abs(weight) * -1 for name, weight in negative.items()} }"
      )
    if not any(self.weights().values()):
      raise ValueError(
        "every weight of the reward is 0: nothing would be learned; CapRL has accuracy = 1.0"
      )
    if not 0 < self.length_full_tokens < self.length_zero_tokens or self.repetition_ngram < 1:
      raise ValueError(
        f"length_full_tokens = {self.length_full_tokens} must be below "
        f"length_zero_tokens = {self.length_zero_tokens}, and repetition_ngram = "
        f"{self.repetition_ngram} at least 1"
      )

  def weights(self) -> dict[str, float]:
    """Signed weights by term."""
    return {
      name: -getattr(self, name) if name in PENALTIES else getattr(self, name)
      for name in ("accuracy", "misled", "length", "repetition", "timestamps", "truncated")
    }


def caption_terms(
  answers: Answers, captions: Captions, vocabulary: Vocabulary, cfg: RewardConfig
) -> dict[str, Array]:
  """The terms that have a weight (accuracy and misled in any case) by name, [B, G] each."""
  terms = {
    "accuracy": masked_mean(answers.credit_BGK, answers.asked_BGK, axis=-1),
    "misled": masked_mean(answers.misled_BGK, answers.asked_BGK, axis=-1),
  }
  if cfg.length:
    length_BG = captions.valid_BGT.sum(-1) - captions.ended_BG  # the end token is no text
    terms["length"] = length_reward(length_BG, cfg.length_full_tokens, cfg.length_zero_tokens)
  if cfg.repetition:
    terms["repetition"] = repetition(captions.tokens_BGT, captions.valid_BGT, cfg.repetition_ngram)
  if cfg.timestamps:
    assert vocabulary.stamp_VX is not None, "reward.timestamps needs a vocabulary with stamp_VX"
    terms["timestamps"] = timestamp_reward(
      captions.tokens_BGT, captions.valid_BGT, vocabulary.stamp_VX
    )
  if cfg.truncated:
    terms["truncated"] = 1.0 - captions.ended_BG
  return terms


def score_captions(
  answers: Answers, captions: Captions, vocabulary: Vocabulary, cfg: RewardConfig
) -> Scored:
  """The reward of each caption: the weighted sum of its terms.

  A caption is unscored when its image has no question, or when the judge was not finite on one of
  them. Reward and terms are 0 there and must be read by nobody.
  """
  asked_BGK = answers.asked_BGK
  scored_BG = asked_BGK.any(-1) & (answers.valid_BGK | ~asked_BGK).all(-1)
  terms = {
    name: jnp.where(scored_BG, value, 0.0).astype(jnp.float32)
    for name, value in caption_terms(answers, captions, vocabulary, cfg).items()
  }
  weights = tuple((name, weight) for name, weight in cfg.weights().items() if weight)
  reward_BG = sum((weight * terms[name] for name, weight in weights), jnp.float32(0))
  return Scored(reward_BG, scored_BG, terms, weights)
