"""A question -> what a captioner's own model is asked: with lettered options, or open."""

import hashlib
import re
import string
from collections.abc import Sequence

import numpy as np

from caprl_jax.data.option_letters import folded
from caprl_jax.data.rows import Question

# the released curation's own, to the byte
INSTRUCTION = "{question}. Answer the question with only the correct letter"
NONE = "None of the above"
PLACE = "{question}"
# LLaVA-1.5's wording, arXiv 2310.03744
LLAVA = PLACE + "\nAnswer the question using a single word or phrase."


def orders(question: Question, permutations: int, seed: int) -> list[list[int]]:
  """Orders of the options: a random one, which depends on the question and the seed only, then that
  one rotated by one place more each time.
  """
  first = _rng(question, seed).permutation(len(question.options)).tolist()
  starts = [n % len(first) for n in range(permutations)]
  return [first[start:] + first[:start] for start in starts]


def shuffled_orders(question: Question, count: int, seed: int) -> list[list[int]]:
  """Orders of the options, each drawn anew, as the released curation shuffles them: the right one
  may visit a letter twice and another never."""
  rng = _rng(question, seed)
  return [rng.permutation(len(question.options)).tolist() for _ in range(count)]


def _rng(question: Question, seed: int) -> np.random.Generator:
  """Depends on the question and the seed only."""
  digest = hashlib.sha256(f"{seed}/{question.stem}/{'/'.join(question.options)}".encode()).digest()
  return np.random.default_rng(int.from_bytes(digest, "big"))


def question_text(question: Question, order: Sequence[int], none_of_above: bool) -> str:
  """The user's text: stem and options in this order, as the released curation writes them.

  none_of_above: adds that option, if it is none of the question's own.
  """
  own = any(folded(option).rstrip(".") == folded(NONE) for option in question.options)
  shown = [question.options[i] for i in order] + [NONE] * (none_of_above and not own)
  lines = [
    question.stem,
    *(f"   - {letter}) {option}" for letter, option in zip(string.ascii_uppercase, shown)),
  ]
  return INSTRUCTION.format(question="\n".join(lines))


def check_open_question(wording: str | None) -> None:
  """Raises ValueError, which names no place, for a wording that has no place for the question's
  stem, or several.
  """
  if wording is not None and wording.count(PLACE) != 1:
    raise ValueError(f"open_question = {wording!r} must have one place {PLACE}, as {LLAVA!r} has")


def speaks_of_options(question: Question) -> bool:
  """Whether a stem is about options that `open_text` does not show, as in "which of these ...?"."""
  return (
    re.search(r"\b(of|among|from) (these|those)\b|\bfollowing\b", question.stem.lower()) is not None
  )


def open_text(wording: str, question: Question) -> str:
  """The user's text, the stem in the place of {question}; options are not shown."""
  return wording.replace(PLACE, question.stem)
