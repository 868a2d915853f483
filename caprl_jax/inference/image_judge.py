"""A judge that sees the image -> its prompt as token ids, cut at the image and at the caption."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from caprl_jax.data.rows import QARow, Question
from caprl_jax.hub.load import Loaded
from caprl_jax.json_files import shown
from caprl_jax.types import JudgePrompt

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
KIND = "score"


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
    before, after = judge.prompt_texts(text)
    between, _, rest = after.partition(CAPTION)
    if after.count(CAPTION) != 1 or CAPTION in before:
      raise ValueError(
        f"the judge's chat template writes {shown(after, 300)} for an image and judge.score_prompt;"
        f" {CAPTION} must stand in it once, after the image"
      )
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


def step_prompt(tail_L: Any, score_A: Any) -> JudgePrompt:
  """What the step reads of the prompt, but for the images' part of it: what follows a caption, and
  the scores."""
  nothing = np.zeros(0, np.int32)
  return JudgePrompt(
    head_L=nothing,
    label_AL=np.zeros((0, 0), np.int32),
    label_valid_AL=np.zeros((0, 0), bool),
    tail_L=tail_L,
    letter_A=score_A,
    abstain_L=nothing,
  )


def with_score(row: QARow, scores: Sequence[str]) -> QARow:
  """The row with one question in place of its own: what a caption of it is worth. The best score is
  the right answer."""
  question = Question("How good is the caption?", tuple(scores), len(scores) - 1, KIND)
  return dataclasses.replace(row, questions=(question,))
