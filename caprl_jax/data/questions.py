"""Questions as text -> the judge's token ids: prompt pieces, padded tables, which K questions an image is asked.

The prompt is cut where the device splices it. Every seam is a newline or a place where byte-level BPE never
merges, so that the pieces' ids are those of the joined string (tested seam by seam), unless a caption begins with two white
spaces.
"""

from collections.abc import Sequence
import dataclasses
import string

import numpy as np

from caprl_jax.data.rows import Question
from caprl_jax.models.tokenizer import Tokenizer
from caprl_jax.types import JudgePrompt, Questions


@dataclasses.dataclass(frozen=True)
class JudgeTemplate:
  """The judge's prompt: head, caption, stem; for the letter readings then label + option + line_end a slot, tail."""
  head: str = "Caption:\n"
  stem: str = "\nQuestion: {question}\nAnswer:"
  option: str = " {option}"
  label: str = "- {letter})"
  line_end: str = "\n"
  tail: str = "The answer is"
  letter: str = " {letter}"
  baseline: str = "An image."  # the caption that says nothing, for option_pmi


PMI_TEMPLATE = JudgeTemplate()
LETTER_TEMPLATE = JudgeTemplate(
    head="Answer the multiple-choice question strictly based on the caption.\n\nCaption:\n",
    stem="\nQuestion: {question}\n")


def template_for(reading: str) -> JudgeTemplate:
  """The default template of a reading."""
  return PMI_TEMPLATE if reading == "option_pmi" else LETTER_TEMPLATE


@dataclasses.dataclass(frozen=True)
class TokenizedQuestion:
  """One question as judge token ids."""
  stem: tuple[int, ...]
  options: tuple[tuple[int, ...], ...]
  gold: int
  kind: int
  prior: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class QuestionShape:
  """Padded sizes that hold every question of a run: options A, stem tokens Q, option tokens O."""
  options: int
  stem_tokens: int
  option_tokens: int


class QuestionTokenizer:
  """Text of questions -> ids, with one judge's tokenizer and template."""

  def __init__(self, tokenizer: Tokenizer, template: JudgeTemplate, kinds: Sequence[str]):
    self.tokenizer, self.template, self.kinds = tokenizer, template, list(kinds)

  def __call__(self, question: Question, prior: Sequence[float] | None = None) -> TokenizedQuestion:
    """Tokenises a question; chat tokens written in it stay plain text."""
    encode = self.tokenizer.encode_plain
    return TokenizedQuestion(
        stem=tuple(encode(self.template.stem.format(question=question.stem))),
        options=tuple(tuple(encode(self.template.option.format(option=o))) for o in question.options),
        gold=question.gold, kind=self.kinds.index(question.kind),
        prior=tuple(prior or [0.0] * len(question.options)))

  def prompt(self, options: int) -> JudgePrompt:
    """The pieces around caption and question, for up to `options` options."""
    encode = lambda text: np.asarray(self.tokenizer.encode(text), np.int32)
    letters = string.ascii_uppercase[:options]
    labels = [encode(self.template.label.format(letter=letter)) for letter in letters]
    letter_ids = [encode(self.template.letter.format(letter=letter)) for letter in letters]
    if any(len(ids) != 1 for ids in letter_ids):
      raise ValueError(f"the judge's tokenizer does not write each of {self.template.letter!r} for {letters} as one "
                       "token; use judge.reading = 'option_pmi'")
    width = max(map(len, labels))
    return JudgePrompt(
        head_L=encode(self.template.head), label_AL=np.stack([_pad(ids, width) for ids in labels]),
        label_valid_AL=np.stack([np.arange(width) < len(ids) for ids in labels]),
        line_end_L=encode(self.template.line_end), tail_L=encode(self.template.tail),
        letter_A=np.concatenate(letter_ids))

  def caption_ids(self, caption: str) -> list[int]:
    """A caption written as text, as the judge sees one that the policy wrote."""
    return self.tokenizer.encode_plain(caption)


def question_shape(questions: Sequence[TokenizedQuestion]) -> QuestionShape:
  """The smallest shape that holds all of them (two options at least)."""
  return QuestionShape(max(2, *(len(q.options) for q in questions)), max(len(q.stem) for q in questions),
                       max(len(o) for q in questions for o in q.options))


def pick_questions(questions: Sequence[TokenizedQuestion], count: int, rng: np.random.Generator) -> list:
  """Up to `count` questions without replacement, taking turns between kinds so that each is asked about."""
  turns: dict[int, list] = {}
  for i in rng.permutation(len(questions)):
    turns.setdefault(questions[i].kind, []).append(questions[i])
  order = [(turn, place, q) for place, group in enumerate(turns.values()) for turn, q in enumerate(group)]
  return [q for _, _, q in sorted(order, key=lambda item: item[:2])[:count]]


def _pad(ids: Sequence[int], length: int) -> np.ndarray:
  return np.pad(np.asarray(ids, np.int32), (0, length - len(ids)))


def pad_questions(questions: Sequence[TokenizedQuestion], count: int, shape: QuestionShape) -> Questions:
  """One image's questions as arrays [K, ...] (no batch axis), K = count; missing ones are invalid."""
  A, Q, O = shape.options, shape.stem_tokens, shape.option_tokens
  out = Questions(
      stem_BKQ=np.zeros((count, Q), np.int32), stem_valid_BKQ=np.zeros((count, Q), bool),
      option_BKAO=np.zeros((count, A, O), np.int32), option_valid_BKAO=np.zeros((count, A, O), bool),
      gold_BK=np.zeros(count, np.int32), valid_BK=np.zeros(count, bool), kind_BK=np.zeros(count, np.int32),
      prior_BKA=np.zeros((count, A), np.float32))
  for k, question in enumerate(questions):
    out.stem_BKQ[k], out.stem_valid_BKQ[k] = _pad(question.stem, Q), np.arange(Q) < len(question.stem)
    for a, option in enumerate(question.options):
      out.option_BKAO[k, a], out.option_valid_BKAO[k, a] = _pad(option, O), np.arange(O) < len(option)
    out.prior_BKA[k, :len(question.prior)] = question.prior
    out.gold_BK[k], out.kind_BK[k], out.valid_BK[k] = question.gold, question.kind, True
  return out
