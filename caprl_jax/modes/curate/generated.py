"""A model's text of questions -> `rows.Question`.

CapRL's second curation step: a vision-language model writes five multiple-choice questions an
image, this module reads them. What cannot be read with certainty is a `Failure` with its reason,
never a guess and never silently lost.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Sequence

from caprl_jax.data.readers.caprl_json import question_of
from caprl_jax.data.rows import Question, folded
from caprl_jax.modes.curate.question_blocks import (
  LETTERS,
  Block,
  is_question_like,
  read_blocks,
  unbold,
)

_CHOSEN = re.compile(
  rf"(?:option\s+|选项\s*)?[(（\[]?([{LETTERS}])(?:[)）\].:：、．]+\s*|\s+[-–—]\s+|\s*$)(.*)",
  re.IGNORECASE,
)
_WRAPPED = re.compile(rf"([{LETTERS}])\s*[(（](.+)[)）]")
_ABSTAIN = re.compile(r"can\s?not answer\b", re.IGNORECASE)
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W{_CJK}_]+")


@dataclasses.dataclass(frozen=True)
class Failure:
  """A piece of a model's text that looked like a question and could not be read as one."""

  text: str
  reason: str


def parse_generated(text: str, repeats: bool = False) -> tuple[list[Question], list[Failure]]:
  """Reads the questions of a model's reply, in their order.

  Understood besides the layout that `prompts.GENERATION_SYSTEM` asks for: any of the headers
  `#### 1.`, `1.`, `Q1:`, `Question 1:`, `问题1：` or none, the question on its line or below;
  options `A)`, `A.`, `(A)`, `a)`, with bullets or bold; options in a row where their letters leave
  no doubt; answers by
  letter, by letter and text, or by the text of exactly one option (`Answer:`, `Correct answer:`,
  `The answer is`, `答案：`). Text before, between and after the questions is ignored, as are
  reasoning in `<think>` and separators. Options "Can not answer ..." are left out, as in
  `caprl_json`.

  Every block with a question's number, options or answer becomes either a question or a failure:
  for lack of options or answer (a reply cut off), an answer whose letter and text disagree, letters
  that do not run A, B, C, equal options, a question that repeats an earlier one, and whatever
  `rows.check_question` refuses. A text without any such block is one failure.
  """
  said = text.rpartition("</think>")[2]
  if said.lstrip().startswith("<think>"):
    return [], [
      Failure(text, "the reply ends inside its reasoning (<think>); allow it more tokens")
    ]
  blocks = read_blocks(said.splitlines())
  numbered = any(block.header == "numbered" for block in blocks)
  questions, failures = [], []
  for block in blocks:
    if not is_question_like(block, numbered):
      continue
    try:
      question = _read(block, numbered)
      if not repeats:
        _check_new(question, questions)
      questions.append(question)
    except ValueError as error:
      failures.append(Failure("\n".join(block.lines).strip(), str(error)))
  if not questions and not failures:
    failures = [
      Failure(text, "there is no question in the reply" if said.strip() else "the reply is empty")
    ]
  return questions, failures


def format_questions(questions: Sequence[Question]) -> str:
  """Questions in the layout that `prompts.GENERATION_SYSTEM` asks for; `kind` and `provenance` have
  no place in it.

  Raises:
    ValueError: a question that `parse_generated` would not read back the same from this layout.
  """
  parts = []
  for number, question in enumerate(questions, 1):
    if len(question.options) > len(LETTERS):
      raise ValueError(
        f"question {question.stem!r} has {len(question.options)} options; letters "
        f"go to {LETTERS[-1]}"
      )
    options = "".join(
      f"   - {letter}) {option}\n" for letter, option in zip(LETTERS, question.options)
    )
    answer = f"{LETTERS[question.gold]}) {question.options[question.gold]}"
    parts.append(f"#### {number}. **{question.stem}**\n{options}**Answer:** {answer}\n------\n")
    read, failures = parse_generated(parts[-1])
    if failures or [_content(q) for q in read] != [_content(question)]:
      reason = failures[0].reason if failures else f"it reads as {read}"
      raise ValueError(
        f"question {question.stem!r} cannot be written in this layout ({reason}); reword it"
      )
  return "".join(parts)


def question_key(question: Question) -> frozenset[str]:
  """The stem's set of words, without case and punctuation; of Chinese, Japanese and Korean the
  characters.
  """
  return frozenset(_tokens(question.stem)) or frozenset([folded(question.stem)])


def drop_similar_questions(
  questions: Sequence[Question], threshold: float
) -> tuple[list[Question], list[Question]]:
  """Of the questions of one image, keeps the first of those that ask nearly the same.

  Similar are two questions whose `question_key`s overlap by at least `threshold`, as shared words
  over all words (Jaccard index: 1 for the same words), unless they differ in a number: "in 2019"
  and "in 2020" are two questions. It compares words, not meanings: at 0.8, "left of" against "right
  of" in a stem of ten words is already taken for similar.

  Returns:
    The questions kept and those dropped, each in order.

  Raises:
    ValueError: a threshold outside (0, 1].
  """
  if not 0 < threshold <= 1:
    raise ValueError(f"threshold {threshold}: a share of common words, above 0 and at most 1")
  kept: list[tuple[Question, frozenset[str]]] = []
  dropped = []
  for question in questions:
    key = question_key(question)
    if any(
      len(key & known) >= threshold * len(key | known)
      and not any(any(map(str.isdigit, word)) for word in key ^ known)
      for _, known in kept
    ):
      dropped.append(question)
    else:
      kept.append((question, key))
  return [question for question, _ in kept], dropped


# Lines -> blocks


# Block -> question


def _read(block: Block, numbered: bool) -> Question:
  """The block's question. Raises ValueError with the reason why there is none."""
  if block.fault:
    raise ValueError(block.fault)
  stem, options = list(block.stem), block.options
  if not options and stem:
    stem[-1], options = _options_in_stem(stem[-1])
  if not options:
    if not block.stem and not block.header:
      raise ValueError("there is an answer without a question")
    raise ValueError(
      "there are no options"
      + ("" if block.answers else " and no answer: it is cut off or no question")
    )
  if not block.header and numbered:
    raise ValueError("it has no number, unlike the other questions: its beginning may be missing")
  texts = _split_options(options)
  if not block.answers:
    raise ValueError("there is no answer: it is missing or the text is cut off")
  letters = {_gold_letter(answer, texts) for answer in block.answers}
  if len(letters) > 1:
    raise ValueError(f"there are {len(block.answers)} answers: {', '.join(block.answers)}")
  choices = [f"{letter}) {option}" for letter, option in texts]
  letter = letters.pop()  # with its text: a letter alone may be another option's text
  answer = next((choice for choice in choices if choice.startswith(f"{letter}) ")), letter)
  return question_of("\n".join(stem).strip(), choices, answer, where="a question of the reply")


def _options_in_stem(line: str) -> tuple[str, list[tuple[str, str, str]]]:
  """'What? A) red B) blue' -> 'What?' and its options, where letters with a parenthesis run from A,
  each once.
  """
  labels = list(re.finditer(rf"(?:(?<=\s)|^)[(（]?([{LETTERS}])[)）]\s*(?=\S)", line))
  letters = "".join(label.group(1) for label in labels)
  if len(letters) < 2 or letters != LETTERS[: len(letters)]:
    return line, []
  ends = [label.start() for label in labels[1:]] + [len(line)]
  return line[: labels[0].start()], [
    (label.group(1), ")", line[label.end() : end].strip(" ,;")) for label, end in zip(labels, ends)
  ]


def _split_options(options: Sequence[tuple[str, str, str]]) -> list[tuple[str, str]]:
  """(letter, text) of every option, from lines that hold one or, where nothing else makes sense,
  several each.

  Raises ValueError for letters that do not run A, B, C in either reading, and where both readings
  make sense.
  """
  apart = []
  for letter, close, text in options:
    labels = list(re.finditer(rf"(?<=\s)[(（]?([{LETTERS}]){re.escape(close)}\s*(?=\S)", text))
    starts = [0] + [label.end() for label in labels]
    ends = [label.start() for label in labels] + [len(text)]
    for name, start, end in zip([letter] + [label.group(1) for label in labels], starts, ends):
      apart.append((name, text[start:end].strip().rstrip(",;") if labels else text.strip()))
  single = [(letter, text.strip()) for letter, _, text in options]
  if not any(map(_runs, (single, apart))):
    found = ", ".join(letter for letter, _ in single)
    raise ValueError(
      f"its options are lettered {found}, which does not run A, B, C: one may be missing"
    )
  if _runs(single) and len(single) > 1 and not (len(apart) > len(single) and _runs(apart)):
    return single
  if _runs(apart) and not (_runs(single) and len(single) > 1):
    return apart
  raise ValueError(f"several options may stand on one line: {single[-1][1]!r}")


def _runs(options: Sequence[tuple[str, str]]) -> bool:
  """Whether letters run A, B, C; options that abstain may skip letters, as the released F without E
  does.
  """
  letters = "".join(letter for letter, text in options if not _ABSTAIN.match(text))
  return letters == LETTERS[: len(letters)]


def _gold_letter(answer: str, options: Sequence[tuple[str, str]]) -> str:
  """The letter that an answer names. Raises ValueError for an answer that may be read in two ways
  or in none.
  """
  answer = unbold(answer.strip().strip("`"))
  texts = [_same(text) for _, text in options]
  by_text = [letter for (letter, _), text in zip(options, texts) if text == _same(answer)]
  chosen = _CHOSEN.fullmatch(answer) or _WRAPPED.fullmatch(answer)
  if not chosen:
    if len(by_text) != 1:
      raise ValueError(f"the answer {answer!r} is neither a letter nor the text of one option")
    return by_text[0]
  letter, said = chosen.group(1).upper(), _same(chosen.group(2))
  if by_text and by_text != [letter]:
    raise ValueError(
      f"the answer {answer!r} is option {letter} by its letter and option {by_text[0]} by its text"
    )
  if letter not in dict(options):
    raise ValueError(
      f"the answer {answer!r} is none of its options {', '.join(name for name, _ in options)}"
    )
  if said:
    # The text may go on ("red, because ...") or be cut off: the longest option it begins with, or
    # what begins with it.
    begun = [
      (len(text), name)
      for (name, _), text in zip(options, texts)
      if said == text or re.match(re.escape(text) + r"(?!\w)", said)
    ]
    cut = [name for (name, _), text in zip(options, texts) if text.startswith(said)]
    named = [max(begun)[1]] if begun else cut
    if named != [letter]:
      raise ValueError(
        f"the answer {answer!r} has the letter of {dict(options)[letter]!r} and another text"
      )
  return letter


def _check_new(question: Question, earlier: Sequence[Question]) -> None:
  """Raises ValueError for a question asked before: the same stem with the same answer or the same
  options.
  """
  for number, other in enumerate(earlier, 1):
    if (_tokens(question.stem) or folded(question.stem)) != (
      _tokens(other.stem) or folded(other.stem)
    ):
      continue
    golds = [_same(q.options[q.gold]) for q in (question, other)]
    if golds[0] == golds[1] or {*map(_same, question.options)} == {*map(_same, other.options)}:
      verb = "repeats" if golds[0] == golds[1] else "contradicts"
      raise ValueError(f"it {verb} question {number} of those read: {other.stem!r}")


def _content(question: Question) -> tuple[str, tuple[str, ...], int]:
  return question.stem, question.options, question.gold


def _tokens(text: str) -> list[str]:
  return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def _same(text: str) -> str:
  """What must be equal for two texts of an option to be the same."""
  return " ".join(unbold(text).strip(" \t\"'“”‘’`").rstrip(".。 ").casefold().split())
