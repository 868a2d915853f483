"""Questions -> what the judge is shown: which are drawn, in which order their options stand, laid
out as token ids.

Letters as in `types.py`; where "can not answer" is an option, A counts it and it is the last.
"""

import dataclasses
from typing import Any, Literal, Self, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.masked import NEGATIVE
from caprl_jax.types import Answers, Array, JudgePrompt, Questions

Scores = TypeVar("Scores", Array, np.ndarray)

MARGIN_READINGS = ("option_pmi", "letter_argmax")  # those that compare scores with each other
# Of a judge that sees the image.
IMAGE_READINGS = ("letter_prob", "letter_argmax", "letter_sample", "generate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
  """What the judge is shown and how its answer is read.

  reading: `option_pmi`, the mean log-probability of an option's tokens after the question, minus
    the same after a caption that says nothing (Holtzman et al., arXiv 2104.08315): for small and
    base models. Or, after a prompt that lists the options: the next-token distribution over their
    letters, as `letter_argmax`, `letter_prob` (the credit is the gold letter's probability) or
    `letter_sample` at `temperature`; or `generate`, what CapRL's released code does: up to
    `max_tokens` sampled tokens, of which the first of the letters A to I is the answer.
  prompt: `plain`, our own; `official`, CapRL's (ChatML), to the byte with abstain `last`, otherwise
    with one more line break after the options; `official_video`, CapRL++'s wording for videos
    without its indentation.
  abstain: "can not answer" as one more option, `last` or `permuted` with the others; an answer that
    chooses it is neither right nor misled.
  abstain_letter: the letter of a `last` one: the `next` letter, or always `F`, as the released
    shuffle has it.
  shuffle: a new random order of the options for every presentation.
  permutations: orders over which the log-probabilities of `letter_argmax` and `letter_prob` are
    averaged, each rotated by one place, so that an option visits different letters.
  draws: presentations per caption, drawn from its image's questions; 0: each question once.
  replacement: a question may be drawn more than once for one caption.
  independent: every caption has its own draws and orders, not those of its group (a noisier
    baseline, as released).
  temperature: of `letter_sample` and `generate`.
  max_tokens: longest answer of `generate`.
  margin: an answer must beat the runner-up by more than this, or the judge abstains (in nats; mode
    `calibrate` finds it).
  blind: ask an empty caption too, for the metric `judge/blind`; it costs one caption more per
    group.
  chunk_tokens: tokens whose logits exist at once.
  microbatches: pieces into which the captions are cut, judged one after the other, to save memory;
    there are more where captions differ in length, since each piece takes the time of its longest.
  sees_image: the judge is a vision-language model, which scores each caption beside its image in
    place of answering questions (the paper's Table 3 compares with such judges): `letter_prob`
    takes the expected score, `letter_argmax` the likeliest, `letter_sample` a draw; with `generate`
    it writes several scores as JSON, as CapRL++'s judge of videos does. The reward's term
    `accuracy` is the score, from 0 for the worst to 1 for the best, which alone counts as right in
    `judge/accuracy`.
  """

  reading: Literal["option_pmi", "letter_argmax", "letter_prob", "letter_sample", "generate"] = (
    "option_pmi"
  )
  prompt: Literal["plain", "official", "official_video"] = "plain"
  abstain: Literal["none", "last", "permuted"] = "none"
  abstain_letter: Literal["next", "F"] = "next"
  shuffle: bool = True
  permutations: int = 1
  draws: int = 0
  replacement: bool = True
  independent: bool = False
  temperature: float = 0.6
  max_tokens: int = 10
  margin: float = 1e-3
  blind: bool = True
  chunk_tokens: int = 1024
  microbatches: int = 1
  sees_image: bool = False

  def __post_init__(self):
    if self.sees_image and (
      self.reading not in IMAGE_READINGS
      or (self.prompt, self.abstain, self.permutations, self.draws) != ("plain", "none", 1, 0)
    ):
      raise ValueError(
        f"sees_image: the judge gives each caption one score: set reading to one of "
        f"{IMAGE_READINGS}, prompt = 'plain', abstain = 'none', permutations = 1 and draws = 0, "
        f"not {self.reading!r}, {self.prompt!r}, {self.abstain!r}, {self.permutations} and "
        f"{self.draws}"
      )
    if self.temperature <= 0 or self.margin < 0:
      raise ValueError(
        f"temperature = {self.temperature} must be > 0 and margin = {self.margin} >= 0"
      )
    if self.permutations < 1 or self.draws < 0 or self.max_tokens < 1:
      raise ValueError(
        f"permutations = {self.permutations} and max_tokens = {self.max_tokens} "
        f"must be at least 1, draws = {self.draws} at least 0"
      )
    if self.microbatches < 1 or self.chunk_tokens < 1:
      raise ValueError(
        f"microbatches = {self.microbatches} and chunk_tokens = {self.chunk_tokens} must be at "
        "least 1"
      )
    if self.permutations > 1 and (
      self.reading not in ("letter_argmax", "letter_prob") or not self.shuffle
    ):
      raise ValueError(
        f"permutations = {self.permutations} averages log-probabilities of letters "
        "over shuffled orders: it needs reading letter_argmax or letter_prob and "
        f"shuffle, not {self.reading!r} and {self.shuffle}"
      )
    if self.reading == "option_pmi" and (self.prompt != "plain" or self.abstain != "none"):
      raise ValueError(
        "reading 'option_pmi' shows no list of options: it goes with prompt 'plain' "
        f"and abstain 'none' (it abstains by `margin`), not {self.prompt!r} and "
        f"{self.abstain!r}"
      )
    if self.reading not in MARGIN_READINGS and self.margin > 1e-3:
      raise ValueError(
        f"margin = {self.margin} has no meaning for reading {self.reading!r}, only "
        f"for {MARGIN_READINGS}; leave it out, and let the judge abstain by abstain "
        "= 'last'"
      )
    if self.abstain == "permuted" and (not self.shuffle or self.abstain_letter == "F"):
      raise ValueError(
        "abstain 'permuted' goes with shuffle and abstain_letter 'next', not "
        f"{self.shuffle} and {self.abstain_letter!r}; use abstain 'last'"
      )

  def each_once(self, microbatches: int = 1) -> Self:
    """The same judge, asked each question once about each caption and about no empty one: draws and
    blind answers are a matter of training. microbatches: as the field."""
    return dataclasses.replace(
      self, draws=0, independent=False, blind=False, microbatches=microbatches
    )


def best_and_lead(score_A: Scores) -> tuple[Scores, Scores]:
  """The best option, and by how much it leads over the runner-up; of numpy and jax arrays.

  Args:
    score_A: [..., options], two at least; `NEGATIVE` for those that do not exist.

  Returns:
    Index of the best (the first of equals) int [...], and its lead in the scores' unit, [...].
  """
  best: Any = score_A.argmax(-1)
  is_best_A = np.arange(score_A.shape[-1]) == best[..., None]
  runner_up = (score_A + is_best_A * NEGATIVE).max(-1)
  return best, score_A.max(-1) - runner_up


def answer_by_margin(best: Scores, lead: Scores, margin: float) -> Scores:
  """The judge's answer where scores are compared: the best option, or -1, which is to abstain, if
  it does not lead by more than `margin` (a lead that is not a number never does)."""
  return (lead > margin) * (best + 1) - 1


def draw_questions(key: Array, valid_BK: Array, cfg: JudgeConfig) -> tuple[Array, Array]:
  """Which questions are presented: int32 indices [B, draws] and whether each exists. The key is
  consumed.
  """
  B, K = valid_BK.shape
  if not cfg.draws:
    return jnp.broadcast_to(jnp.arange(K), (B, K)), valid_BK
  count_B1 = valid_BK.sum(1, keepdims=True)
  first_BK = jnp.argsort(~valid_BK, axis=1, stable=True)  # the existing ones, in order
  if cfg.replacement:
    share = jax.random.uniform(key, (B, cfg.draws))
    place = jnp.minimum((share * count_B1).astype(jnp.int32), jnp.maximum(count_B1 - 1, 0))
    return jnp.take_along_axis(first_BK, place, axis=1), jnp.broadcast_to(count_B1 > 0, place.shape)
  order_BK = jnp.argsort(jax.random.uniform(key, (B, K)) + jnp.where(valid_BK, 0.0, 2.0), axis=1)
  place = jnp.arange(cfg.draws)
  index = order_BK[:, jnp.minimum(place, K - 1)]
  return index, jnp.broadcast_to(place, index.shape) < count_B1


def take_questions(questions: Questions, index_BK: Array) -> Questions:
  """The tables of given questions of each image."""

  def take(x_BK: Array) -> Array:
    index = index_BK.reshape(*index_BK.shape, *[1] * (x_BK.ndim - 2))
    return jnp.take_along_axis(x_BK, index, axis=1)

  return jax.tree.map(take, questions)


def present_options(questions: Questions, cfg: JudgeConfig) -> Array:
  """Which options exist, "can not answer" included, bool [B, K, A]."""
  present_BKA = questions.option_valid_BKAO.any(-1)
  if cfg.abstain == "none":
    return present_BKA
  return jnp.concatenate([present_BKA, jnp.ones((*present_BKA.shape[:2], 1), bool)], axis=-1)


def draw_orders(key: Array, present_BKA: Array, cfg: JudgeConfig) -> Array:
  """For each question the order in which its options are shown, int32 [B, K, A]; absent ones come
  last, "can not answer" after the others where it is not permuted."""
  B, K, A = present_BKA.shape
  rank = (
    jax.random.uniform(key, present_BKA.shape)
    if cfg.shuffle
    else jnp.broadcast_to(jnp.arange(A) / A, present_BKA.shape)
  )
  if cfg.abstain == "last":
    rank = jnp.where(jnp.arange(A) == A - 1, 1.5, rank)
  return jnp.argsort(rank + jnp.where(present_BKA, 0.0, 2.0), axis=-1)


@flax.struct.dataclass
class Presentations:
  """What is asked about each caption, where the host asks: K counts presentations."""

  question_BGK: Array  # int32 index of the question among its image's
  asked_BGK: Array  # bool, the presentation exists
  order_BGKA: Array  # int32 option in each slot, "can not answer" included; absent ones come last


def presentations(questions: Questions, group: int, key: Array, cfg: JudgeConfig) -> Presentations:
  """Draws for G captions per image what a judge on the device would draw with the same key, which
  is consumed."""
  B = questions.valid_BK.shape[0]
  if cfg.independent and group > 1:  # every caption is an image of its own
    wide = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), questions)
    alone = presentations(wide, 1, key, cfg)
    return jax.tree.map(lambda x: x.reshape(B, group, *x.shape[2:]), alone)
  draw_key, order_key, _ = jax.random.split(key, 3)
  index_BK, drawn_BK = draw_questions(draw_key, questions.valid_BK, cfg)
  presented = take_questions(questions, index_BK) if cfg.draws else questions
  order_BKA = draw_orders(order_key, present_options(presented, cfg), cfg)
  drawn = Presentations(index_BK, drawn_BK, order_BKA)
  return jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (B, group, *x.shape[1:])), drawn)


def no_answers(shape: tuple[int, ...], questions: Questions) -> Answers:
  """What nobody answers: K is 0. shape: images and captions of each. questions: without any."""

  def empty(dtype: Any) -> Array:
    return jnp.zeros((*shape, 0), dtype)

  return Answers(
    choice_BGK=empty(jnp.int32),
    correct_BGK=empty(bool),
    credit_BGK=empty(jnp.float32),
    misled_BGK=empty(jnp.float32),
    asked_BGK=empty(bool),
    valid_BGK=empty(bool),
    question_BGK=empty(jnp.int32),
    score_BGKA=jnp.zeros((*shape, 0, questions.prior_BKA.shape[-1]), jnp.float32),
  )


def _rotated(order_BKA: Array, present_BKA: Array, cfg: JudgeConfig) -> Array:
  """`cfg.permutations` orders of each question, [B, K * permutations, A], each rotated by one place
  against the one before."""
  B, K, A = order_BKA.shape
  fixed = 1 if cfg.abstain == "last" else 0
  count = jnp.maximum(present_BKA.sum(-1, keepdims=True) - fixed, 1)
  slot = jnp.arange(A)
  turns = [
    jnp.take_along_axis(order_BKA, jnp.where(slot < count, (slot + p) % count, slot), axis=-1)
    for p in range(cfg.permutations)
  ]
  return jnp.stack(turns, axis=2).reshape(B, K * cfg.permutations, A)


@flax.struct.dataclass
class Sheet:
  """Questions with their options laid out, as the judge is shown them."""

  tokens_BKL: Array
  valid_BKL: Array
  order_BKA: Array  # option in each slot
  letter_BKA: Array  # index of each slot's letter
  used_BKA: Array  # bool, the slot shows an option

  @classmethod
  def of(cls, prompt: JudgePrompt, questions: Questions, key: Array, cfg: JudgeConfig) -> "Sheet":
    """Draws the orders (consumes the key) and lays out stem, labels, options and tail."""
    present_BKA = present_options(questions, cfg)
    order_BKA = draw_orders(key, present_BKA, cfg)
    option, option_valid = questions.option_BKAO, questions.option_valid_BKAO
    if cfg.abstain != "none":
      option, option_valid = _with_abstain(option, option_valid, prompt.abstain_L)
    stem, stem_valid = questions.stem_BKQ, questions.stem_valid_BKQ
    if cfg.permutations > 1:
      order_BKA = _rotated(order_BKA, present_BKA, cfg)
      option, option_valid, stem, stem_valid = (
        jnp.repeat(x, cfg.permutations, axis=1) for x in (option, option_valid, stem, stem_valid)
      )
    B, K, A = order_BKA.shape
    option = jnp.take_along_axis(option, order_BKA[..., None], axis=2)
    option_valid = jnp.take_along_axis(option_valid, order_BKA[..., None], axis=2)
    letter_BKA = jnp.broadcast_to(jnp.arange(A), order_BKA.shape)
    if cfg.abstain == "last" and cfg.abstain_letter == "F":
      letter_BKA = jnp.where(order_BKA == A - 1, jnp.maximum(letter_BKA, 5), letter_BKA)
    label, label_valid = (
      jnp.asarray(prompt.label_AL)[letter_BKA],
      jnp.asarray(prompt.label_valid_AL)[letter_BKA],
    )
    slot = jnp.concatenate([label, option], axis=-1).reshape(B, K, -1)
    used = option_valid.any(-1, keepdims=True)
    slot_valid = jnp.concatenate([label_valid & used, option_valid], axis=-1).reshape(B, K, -1)
    tail = jnp.broadcast_to(prompt.tail_L, (B, K, prompt.tail_L.shape[0]))
    return cls(
      jnp.concatenate([stem, slot, tail], axis=-1),
      jnp.concatenate([stem_valid, slot_valid, jnp.ones_like(tail, bool)], axis=-1),
      order_BKA,
      letter_BKA,
      used[..., 0],
    )


def _with_abstain(option_BKAO, valid_BKAO, abstain_L) -> tuple[Array, Array]:
  """The option tables with "can not answer" as one more."""
  B, K, _, O = option_BKAO.shape
  width = max(O, abstain_L.shape[0])

  def wide(x_BKAO: Array) -> Array:
    return jnp.pad(x_BKAO, ((0, 0), (0, 0), (0, 0), (0, width - O)))

  one = jnp.broadcast_to(
    jnp.pad(jnp.asarray(abstain_L), (0, width - abstain_L.shape[0])), (B, K, 1, width)
  )
  one_valid = jnp.broadcast_to(jnp.arange(width) < abstain_L.shape[0], one.shape)
  return jnp.concatenate([wide(option_BKAO), one], axis=2), jnp.concatenate(
    [wide(valid_BKAO), one_valid], axis=2
  )
