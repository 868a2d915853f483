"""CaptionQA's questions (arXiv 2511.21025) -> their options as its authors show them; a written
answer -> its score.

All of it as in `qa.py` of bronyayang/CaptionQA (commit f729489) and with its quirks, so that
figures can stand beside published ones: it finds "no" in "north", and reads "a dog" as the letter
A.
"""

import random
import re
import string
from collections.abc import Sequence
from typing import NamedTuple

CANNOT_ANSWER = "Cannot answer from the caption"
# "Cannot answer" earns this over guessing among the options (section 3.4 of the paper).
CREDIT = 0.05
# The answering model's system turn.
SYSTEM = (
  "You are given a caption describing an image, and a question about the image. Answer with a "
  "SINGLE LETTER (A, B, C, ...), no explanation."
)

_AUXILIARIES = (
  *("is ", "are ", "was ", "were ", "do ", "does ", "did ", "have ", "has ", "had ", "can "),
  *("could ", "will ", "would ", "should ", "shall ", "may ", "might ", "must "),
)


class ShownOptions(NamedTuple):
  """Options in the order in which they are shown, the place of the right one, and that of "cannot
  answer"; None where it is not among them."""

  texts: tuple[str, ...]
  gold: int
  cannot: int | None


def is_yes_no(question: str, choices: Sequence[str]) -> bool:
  """Whether a question gets no option "cannot answer": some choice has "yes" in it and some "no",
  or it begins with an auxiliary verb."""
  folded = [choice.strip().lower() for choice in choices]
  if any("yes" in choice for choice in folded) and any("no" in choice for choice in folded):
    return True
  return question.strip().lower().startswith(_AUXILIARIES)


def gold_of(choices: Sequence[str], answer: str) -> int | None:
  """The first choice that is the answer but for outer spaces; None where none is, and the question
  is not asked."""
  same = [i for i, choice in enumerate(choices) if choice.strip() == answer.strip()]
  return same[0] if same else None


def shown_options(
  question: str, choices: Sequence[str], gold: int, rng: random.Random
) -> ShownOptions:
  """The choices, with "cannot answer" where it is offered, in an order that `rng` draws. The
  authors begin with `random.Random(0)` and draw for one question after the other."""
  every = [*choices] if is_yes_no(question, choices) else [*choices, CANNOT_ANSWER]
  order = list(range(len(every)))
  rng.shuffle(order)
  cannot = order.index(len(choices)) if len(every) > len(choices) else None
  return ShownOptions(tuple(every[i] for i in order), order.index(gold), cannot)


def question_text(question: str, options: Sequence[str]) -> str:
  """What follows the caption in the answering model's turn."""
  listed = "\n".join(f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, options))
  return f"Question:\n{question}\n\nOptions:\n{listed}\n\nAnswer:"


def chosen_option(answer: str, options: int) -> int | None:
  """The place of the option that a written answer names, among so many; None for none.

  Read is what stands behind the first "</think>", then behind the first "Answer: ", then behind the
  first line break: a letter that is a word, in capitals or not; else a number that is one.
  """
  for mark in ("</think>", "Answer: ", "\n"):
    answer = answer.split(mark, 1)[1] if mark in answer else answer
  letter = re.search(r"\b([A-Z])\b", answer.upper())
  if letter and string.ascii_uppercase.index(letter[1]) < options:
    return string.ascii_uppercase.index(letter[1])
  number = re.search(r"\b([1-9][0-9]?)\b", answer)
  return int(number[1]) - 1 if number and int(number[1]) <= options else None


def captionqa_score(chosen: int | None, shown: ShownOptions) -> float:
  """1 for the right option, 1 / choices + 0.05 for "cannot answer" where it was offered, else 0."""
  if chosen is None:
    return 0.0
  if chosen == shown.cannot:
    return 1 / (len(shown.texts) - 1) + CREDIT
  return float(chosen == shown.gold)
