"""Answers, captions -> reward of each caption, its terms, and which captions could be scored at
all.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax.numpy as jnp

from caprl_jax.masked import masked_mean
from caprl_jax.rl.caption_form import length_reward, repetition, timestamp_reward
from caprl_jax.types import (
  Answers,
  Array,
  Captions,
  OwnReward,
  Questions,
  Scored,
  Vocabulary,
)

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
  custom: a function of your own as one more term, "FILE.py:FUNCTION". One with a parameter
    `completions` is of texts, as TRL's are, and runs on the host between the step's programs; one
    whose parameters are arrays' names (`RewardArrays`) becomes part of the step. With it, training
    needs no judge: then the rows need no questions.
  custom_weight: of that term; 0 only shows it among the metrics.
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
  custom: str | None = None
  custom_weight: float = 1.0

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
    weights = {
      name: -getattr(self, name) if name in PENALTIES else getattr(self, name)
      for name in ("accuracy", "misled", "length", "repetition", "timestamps", "truncated")
    }
    return weights | {"custom": self.custom_weight if self.custom else 0.0}

  @property
  def is_accuracy(self) -> bool:
    """Whether the reward is a judge's accuracy and nothing else."""
    return all(weight == (name == "accuracy") for name, weight in self.weights().items())

  def without_judge(self) -> "RewardConfig":
    """The same where nobody answers questions: the term `accuracy` weighs nothing. Raises
    ValueError where nothing is left, or `misled` has a weight."""
    if self.misled:
      raise ValueError(
        f"reward.misled = {self.misled} counts a judge's answers, and none is named; set it to 0.0,"
        " or judge.source"
      )
    if not any(weight for name, weight in self.weights().items() if name != "accuracy"):
      raise ValueError(
        "without a judge reward.accuracy counts for nothing, and every other weight of the reward "
        "is 0: give reward.custom_weight or another term one"
      )
    return dataclasses.replace(self, accuracy=0.0)


@flax.struct.dataclass
class RewardArrays:
  """What a reward function of arrays may ask for: each by a parameter of its name. T tokens of a
  caption, K presentations of questions to it."""

  tokens_BGT: Array  # int32, the captioner's ids; pad after the end token
  valid_BGT: Array  # bool, True up to and including the end token
  ended_BG: Array  # bool, False where the caption was cut at T
  length_BG: Array  # int32, tokens of text, the end token not counted
  accuracy_BG: Array  # float32, the term `accuracy`
  misled_BG: Array  # float32, the term `misled`
  correct_BGK: Array  # bool
  credit_BGK: Array  # float32, what `accuracy` is the mean of
  misled_BGK: Array  # float32, what `misled` is the mean of
  choice_BGK: Array  # int32, the option that was chosen; -1: the judge abstained
  asked_BGK: Array  # bool, the presentation exists
  answered_BGK: Array  # bool, it exists and the judge could be read
  kind_BGK: Array  # int32, the question's kind, an index into the sorted kinds of the dataset

  @classmethod
  def of(cls, captions: Captions, answers: Answers, questions: Questions) -> "RewardArrays":
    """Of a step's captions and the judge's answers."""
    kind_BGK = jnp.broadcast_to(
      questions.kind_BK[:, None], (*answers.asked_BGK.shape[:2], questions.kind_BK.shape[1])
    )
    return cls(
      tokens_BGT=captions.tokens_BGT,
      valid_BGT=captions.valid_BGT,
      ended_BG=captions.ended_BG,
      length_BG=captions.valid_BGT.sum(-1) - captions.ended_BG,
      accuracy_BG=masked_mean(answers.credit_BGK, answers.asked_BGK, axis=-1),
      misled_BG=masked_mean(answers.misled_BGK, answers.asked_BGK, axis=-1),
      correct_BGK=answers.correct_BGK,
      credit_BGK=answers.credit_BGK,
      misled_BGK=answers.misled_BGK,
      choice_BGK=answers.choice_BGK,
      asked_BGK=answers.asked_BGK,
      answered_BGK=answers.valid_BGK,
      kind_BGK=jnp.take_along_axis(kind_BGK, answers.question_BGK, axis=-1),
    )


# Of these, what there is without a judge.
UNJUDGED = ("tokens_BGT", "valid_BGT", "ended_BG", "length_BG")
# What the step is given for `RewardConfig.custom`, where that is a function of arrays.
ArrayReward = Callable[[RewardArrays], OwnReward]


def own_reward(
  custom: ArrayReward | None, captions: Captions, answers: Answers, questions: Questions
) -> OwnReward | None:
  """The user's reward of each caption; None without a function."""
  return custom(RewardArrays.of(captions, answers, questions)) if custom else None


def caption_terms(
  answers: Answers,
  captions: Captions,
  vocabulary: Vocabulary,
  cfg: RewardConfig,
  own: OwnReward | None = None,
) -> dict[str, Array]:
  """The terms that have a weight (the user's own and, with a judge, accuracy and misled in any
  case) by name, [B, G] each."""
  terms = {}
  if answers.judged:
    terms["accuracy"] = masked_mean(answers.credit_BGK, answers.asked_BGK, axis=-1)
    terms["misled"] = masked_mean(answers.misled_BGK, answers.asked_BGK, axis=-1)
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
  if own is not None:
    terms["custom"] = own.reward_BG
  return terms


def score_captions(
  answers: Answers,
  captions: Captions,
  vocabulary: Vocabulary,
  cfg: RewardConfig,
  own: OwnReward | None = None,
) -> Scored:
  """The reward of each caption: the weighted sum of its terms.

  A caption is unscored when there is a judge and its image has no question, when the judge was not
  finite on one of them (or its endpoint failed), or when `own`, what the user's function gave, is
  none or not finite. Reward and terms are 0 there and must be read by nobody.
  """
  asked_BGK = answers.asked_BGK
  scored_BG = (answers.valid_BGK | ~asked_BGK).all(-1)
  if answers.judged:
    scored_BG = asked_BGK.any(-1) & scored_BG
  if own is not None:
    scored_BG = scored_BG & own.valid_BG & jnp.isfinite(own.reward_BG)
  terms = {
    name: jnp.where(scored_BG, value, 0.0).astype(jnp.float32)
    for name, value in caption_terms(answers, captions, vocabulary, cfg, own).items()
  }
  weights = tuple((name, weight) for name, weight in cfg.weights().items() if weight)
  reward_BG = sum((weight * terms[name] for name, weight in weights), jnp.float32(0))
  return Scored(reward_BG, scored_BG, terms, weights)
