"""Questions as CapRL's released data writes them -> `rows.Question`."""

from collections.abc import Sequence
import re

from caprl_jax.data.rows import Question, check_question

_LABEL = re.compile(r"^\s*(?:-\s*)?\(?([A-Z])[).:]\s+(\S.*?)\s*$")
_ABSTAIN = re.compile(r"^\s*can\s?not answer\b", re.IGNORECASE)


def parse_question(text: str, answer: str, kind: str = "", where: str = "question") -> Question:
  """A question in one string: a stem of any number of lines, then a line an option ("   - A) red", "B. blue").

  A "can not answer" line is left out: it is the judge's to add. `answer` is the right option's letter.

  Raises:
    ValueError: no option lines, a letter twice, an answer that is no option's letter, or as `rows.check_question`.
  """
  lines = [line for line in text.strip().splitlines() if line.strip()]
  first = len(lines)
  while first and _LABEL.match(lines[first - 1]):
    first -= 1
  # The stem may hold lines that look like options: the options begin with A.
  starts = [i for i in range(first, len(lines)) if _LABEL.match(lines[i]).group(1) == "A"]
  first = starts[0] if starts else first
  return question_of("\n".join(lines[:first]), lines[first:], answer, kind, where)


def question_of(stem: str, choices: Sequence[str], answer: str, kind: str = "", where: str = "question") -> Question:
  """A question with its choices apart, each with its letter ("A) red" or "A. red"). Raises as `parse_question`."""
  found: dict[str, str] = {}
  for choice in choices:
    match = _LABEL.match(choice)
    if not match:
      raise ValueError(f"{where}: {choice!r} of {stem!r} has no letter; write it as 'A) {choice.strip()}'")
    letter, option = match.groups()
    if letter in found:
      raise ValueError(f"{where}: {stem!r} has two options {letter!r}: {found[letter]!r} and {option!r}")
    found[letter] = option
  options = {letter: option for letter, option in found.items() if not _ABSTAIN.match(option)}
  letter = answer.strip().removesuffix(")").removesuffix(".")
  if letter not in options:
    raise ValueError(f"{where}: the answer {answer!r} of {stem!r} is none of its options {sorted(options)}; correct it or "
                     "drop the question")
  question = Question(stem, tuple(options.values()), list(options).index(letter), kind)
  check_question(question, where)
  return question
