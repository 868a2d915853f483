"""A judge that sees the image: its prompt as token ids, cut at the image and at the caption, and
what it wrote as answers."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from caprl_jax import released_texts
from caprl_jax.data.rows import QARow, Question
from caprl_jax.hub.load import Loaded
from caprl_jax.hub.vocabulary import own_vocabulary
from caprl_jax.json_files import cut, shown
from caprl_jax.rl.judge_protocol import JudgeConfig
from caprl_jax.scoring.captions.judge_scores import (
  OUR_WEIGHTS,
  RELEASED_WEIGHTS,
  read_weights,
  weighted_score,
)
from caprl_jax.types import Answers, JudgePrompt, Vocabulary

log = logging.getLogger("caprl_jax.inference.image_judge")

CAPTION = "{caption}"  # where the caption goes
# Our words: the prompts of the paper's figures 16 and 17 have an overall score from 1 to 5, too.
SCORE_PROMPT = """\
You see an image and a caption that was written about it. Judge how well the caption describes the \
image: whether all that it says is true, and whether it says all that matters.

Caption:
{caption}

Give it one overall score from 1 (useless) to 5 (excellent)."""
SCORE_ANSWER = "Overall score: "
SCORES = ("1", "2", "3", "4", "5")
# Ours, too, for a judge that writes; {names} are those of `judge.score_weights`.
WRITTEN_PROMPT = """\
You see an image and a caption that was written about it. Judge how well the caption describes the \
image.

Caption:
{caption}

Give it a score from 0 (worst) to 1 (best) for each of these: {names}. Write one JSON object with \
these keys and nothing else."""
KIND = "score"
SHOWN_FAILURES = 3  # of a step
SCORE_TOKENS = 16  # that a name and a number take in JSON


def score_text(score_prompt: str | None, written: Sequence[str] | None) -> str:
  """What the judge is asked, with `CAPTION` in it.

  Args:
    score_prompt: `judge.score_prompt`.
    written: names of the scores that it is to write; None where they are read from logits.

  Raises:
    UserError: as `released_texts.read_strings`.
    ValueError: a released program's text has no place for the caption, or several.
  """
  if score_prompt is not None and released_texts.names_program(score_prompt):
    released = released_texts.IMAGE_JUDGE
    text = released_texts.read_strings(released, score_prompt, "judge.score_prompt")
    try:  # a format string: its braces are written twice
      asked = text[released.variable].format(CAPTION)
    except (IndexError, KeyError, ValueError):
      asked = ""
    if asked.count(CAPTION) != 1:
      raise ValueError(
        f"judge.score_prompt = {score_prompt!r}: {released.variable} must have one place {{}}, for "
        "the caption, and no other"
      )
    return asked
  if score_prompt is not None:
    return score_prompt
  if written is None:
    return SCORE_PROMPT
  return WRITTEN_PROMPT.replace("{names}", ", ".join(written))


@dataclasses.dataclass(frozen=True)
class ScorePrompt:
  """image: token ids before and after the image's, up to the caption. prompt: what follows it, and
  the scores, as the step reads them.
  """

  image: tuple[list[int], list[int]]
  prompt: JudgePrompt

  @classmethod
  def of(cls, judge: Loaded, text: str, answer: str, scores: Sequence[str]) -> "ScorePrompt":
    """By the judge's own chat template.

    Args:
      text: the user's, with `CAPTION` in it once.
      answer: how the judge's turn begins, up to the score.

    Raises:
      ValueError: a score that is not one token there; as `Loaded.prompt_pieces`.
    """
    before, between, rest = _cut_prompt(judge, text)
    encode = judge.tokenizer.encode
    written = [encode(rest + answer + score) for score in scores]
    tails, ids = {tuple(one[:-1]) for one in written}, [one[-1] for one in written]
    if len(tails) > 1 or len(set(ids)) < len(ids):
      raise ValueError(
        f"judge.scores = {shown(list(scores))}: the judge's tokenizer does not write each as one "
        f"token of its own after judge.score_answer = {shown(answer)}; change either"
      )
    tail_L, score_A = np.array(tails.pop(), np.int32), np.array(ids, np.int32)
    return cls((encode(before), encode(between)), step_prompt(tail_L, score_A))

  @classmethod
  def of_writer(cls, judge: Loaded, text: str) -> "ScorePrompt":
    """The same of a judge that writes its scores. Raises ValueError for a model that does not know
    how to end a text; as `Loaded.prompt_pieces`."""
    before, between, rest = _cut_prompt(judge, text)
    tokenizer, size = judge.tokenizer, judge.model.cfg.text.vocab_size
    if not tokenizer.end_ids:
      raise ValueError(
        "judge.source: the model's files name no end token: its scores would never stop; add "
        "eos_token_id to its config.json"
      )
    words = own_vocabulary(np.ones(size, bool), tokenizer.end_ids)
    encode = tokenizer.encode
    tail_L = np.array(encode(rest), np.int32)
    return cls((encode(before), encode(between)), step_prompt(tail_L, tail_L[:0], words))


def _cut_prompt(judge: Loaded, text: str) -> tuple[str, str, str]:
  """What the judge's chat template writes before the image, between it and the caption, and after
  the caption. Raises ValueError as `ScorePrompt.of`."""
  before, after = judge.prompt_texts(text)
  between, _, rest = after.partition(CAPTION)
  if after.count(CAPTION) != 1 or CAPTION in before:
    raise ValueError(
      f"the judge's chat template writes {shown(after, 300)} for an image and judge.score_prompt;"
      f" {CAPTION} must stand in it once, after the image"
    )
  return before, between, rest


def step_prompt(tail_L: Any, score_A: Any, words: Vocabulary | None = None) -> JudgePrompt:
  """What the step reads of the prompt, but for the images' part of it: what follows a caption, and
  the scores, or what the judge may write."""
  nothing = np.zeros(0, np.int32)
  return JudgePrompt(
    head_L=nothing,
    label_AL=np.zeros((0, 0), np.int32),
    label_valid_AL=np.zeros((0, 0), bool),
    tail_L=tail_L,
    letter_A=score_A,
    abstain_L=nothing,
    words=words,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageJudgeConfig(JudgeConfig):
  """How a judge that sees the image is asked for scores, and how they are read.

  score_prompt: what a judge with `sees_image` is asked, {caption} where the caption goes; None: our
    words; "official", the prompt of CapRL++'s judge of videos to the byte, which is downloaded from
    the release once, or a .py file: the VL_JUDGE_PROMPT that it assigns.
  score_answer: how its answer begins, up to the score. Not read with `generate`.
  scores: the scores it may give, the worst first, each one token there; with `generate` steps of a
    scale from 0 to 1, of which the nearest counts as chosen.
  score_weights: with `generate`, the scores that it writes and how much each counts, as
    "name=weight,...". None: those of CapRL++'s judge of videos where `score_prompt` is its prompt
    or a program's, else truth and completeness, a half each.
  score_unread: what becomes of a caption for which `generate` did not write all scores: it is
    "left_out", or each missing one counts "zero", as released.
  max_pixels: the largest image that it is shown; None: its checkpoint's own limit.
  """

  score_prompt: str | None = None
  score_answer: str = SCORE_ANSWER
  scores: tuple[str, ...] = SCORES
  score_weights: str | None = None
  score_unread: Literal["left_out", "zero"] = "left_out"
  max_pixels: int | None = None

  def __post_init__(self):
    super().__post_init__()
    if len(self.scores) < 2 or len(set(self.scores)) < len(self.scores) or "" in self.scores:
      raise ValueError(f"scores = {self.scores}: name two or more that differ, the worst first")
    self._check_scores()

  def _check_scores(self) -> None:
    prompt, weights = self.score_prompt, self.weights
    if prompt is not None and not self._asks_as_released and prompt.count(CAPTION) != 1:
      raise ValueError(f"score_prompt = {shown(prompt)} must hold {CAPTION} once")
    if self._asks_as_released and self.sees_image and not self.writes_scores:
      raise ValueError(
        f"score_prompt = {shown(prompt)} asks for a JSON object: set reading = 'generate'"
      )
    if self.writes_scores and self.max_tokens < SCORE_TOKENS * len(weights):
      raise ValueError(
        f"max_tokens = {self.max_tokens}: a judge that writes {len(weights)} scores as JSON needs "
        f"{SCORE_TOKENS * len(weights)} tokens at least; set 256, as released"
      )
    others = sorted(set(weights) - set(read_weights(RELEASED_WEIGHTS, "")))
    if prompt == released_texts.OFFICIAL and others:
      raise ValueError(
        f"score_weights names {', '.join(others)}, for which score_prompt = {prompt!r} does not ask"
      )

  @property
  def _asks_as_released(self) -> bool:
    return self.score_prompt is not None and released_texts.names_program(self.score_prompt)

  @property
  def weights(self) -> dict[str, float]:
    """Name of a score that the judge writes -> its weight. Raises ValueError as `read_weights`."""
    given = RELEASED_WEIGHTS if self._asks_as_released else OUR_WEIGHTS
    return read_weights(
      given if self.score_weights is None else self.score_weights, "score_weights"
    )

  @property
  def writes_scores(self) -> bool:
    """Whether the judge sees the image and writes its scores, which the host reads."""
    return self.sees_image and self.reading == "generate"

  def score_of(self, judge: Loaded) -> ScorePrompt:
    """The prompt of a judge that sees the image. Raises ValueError as `score_text`,
    `ScorePrompt.of` and `ScorePrompt.of_writer`."""
    if self.writes_scores:
      return ScorePrompt.of_writer(judge, self.score_text())
    return ScorePrompt.of(judge, self.score_text(), self.score_answer, self.scores)

  def score_text(self) -> str:
    """What a judge that sees the image is asked. Raises ValueError as `score_text`."""
    return score_text(self.score_prompt, [*self.weights] if self.writes_scores else None)

  def check_score_prompt(self) -> None:
    """Before anything is loaded, since it may have to be downloaded. Raises ValueError as
    `score_text`."""
    if self.sees_image:
      self.score_text()


def with_score(row: QARow, scores: Sequence[str]) -> QARow:
  """The row with one question in place of its own: what a caption of it is worth. The best score is
  the right answer."""
  question = Question("How good is the caption?", tuple(scores), len(scores) - 1, KIND)
  return dataclasses.replace(row, questions=(question,))


def written_answers(
  texts: Sequence[Sequence[str]],
  valid_BK: np.ndarray,
  scores: int,
  weights: Mapping[str, float],
  *,
  unread_is_zero: bool,
  blind: bool,
) -> tuple[Answers, np.ndarray]:
  """Answers, of numpy arrays, from what a judge wrote about captions, and the share of each image's
  texts in which not all scores could be read, [B].

  Args:
    texts: about the captions of each image; with `blind` the last is about an empty one.
    valid_BK: bool, which of an image's questions exist; each is answered by the same score.
    scores: A, steps of a scale from 0 to 1 on which the choice is the nearest.
    weights: as of `weighted_score`.
    unread_is_zero: what cannot be read counts 0; otherwise it is no answer.
  """
  found = [[weighted_score(text, weights) for text in of_image] for of_image in texts]
  score_BG = np.array([[score for score, _ in row] for row in found], np.float32)
  read_BG = np.array([[whole for _, whole in row] for row in found], bool)
  unread = [texts[b][g] for b, g in zip(*np.nonzero(~read_BG))]
  if unread:
    done = "counts 0" if unread_is_zero else "is left out"
    log.warning(
      "%d of %d texts of the judge lack scores, and what they lack %s: %s%s",
      len(unread),
      read_BG.size,
      done,
      "; ".join(cut(repr(text), 120) for text in unread[:SHOWN_FAILURES]),
      ", ..." if len(unread) > SHOWN_FAILURES else "",
    )
  valid_BG = np.ones_like(read_BG) if unread_is_zero else read_BG

  def for_each(x_BG: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x_BG[:, :, None], (*x_BG.shape, valid_BK.shape[1]))

  asked_BGK = np.broadcast_to(valid_BK[:, None], for_each(valid_BG).shape)
  valid_BGK = asked_BGK & for_each(valid_BG)
  nearest_BG = np.rint(score_BG * (scores - 1)).astype(np.int32)
  choice_BGK = np.where(valid_BGK, for_each(nearest_BG), -1)
  credit_BGK = np.where(valid_BGK, for_each(score_BG), 0.0).astype(np.float32)
  answers = Answers(
    choice_BGK=choice_BGK,
    correct_BGK=valid_BGK & (choice_BGK == scores - 1),
    credit_BGK=credit_BGK,
    misled_BGK=np.zeros_like(credit_BGK),
    asked_BGK=asked_BGK,
    valid_BGK=valid_BGK,
    question_BGK=np.broadcast_to(np.arange(valid_BK.shape[1], dtype=np.int32), choice_BGK.shape),
    score_BGKA=np.zeros((*choice_BGK.shape, scores), np.float32),
  )
  unread_B = (~read_BG).mean(1).astype(np.float32)
  return (answers.without_blind() if blind else answers), unread_B
