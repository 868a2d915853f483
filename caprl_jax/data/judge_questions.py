"""Questions as text -> the judge's token ids: prompt pieces, padded tables, which K questions an
image is asked.

The prompt is cut where the device splices it, at places where byte-level BPE does not merge, so
that the pieces' ids are those of the joined string (tested seam by seam). Where a line break
belongs, to the piece before it (Qwen's pre-tokenizer joins it to punctuation) or to the spaces
after it (GPT-2's), the tokenizer is asked.
"""

import dataclasses
import string
from collections.abc import Sequence

import numpy as np

from caprl_jax.data.judge_prompts import JudgeTemplate
from caprl_jax.data.rows import Question
from caprl_jax.hub.tokenizer import Tokenizer
from caprl_jax.types import JudgePrompt, Questions, Vocabulary


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
  """Text of questions -> ids, with one judge's tokenizer and template.

  abstain, abstain_letter: as `judge_protocol.JudgeConfig` has them.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    template: JudgeTemplate,
    kinds: Sequence[str],
    abstain: str = "none",
    abstain_letter: str = "next",
  ):
    self.tokenizer, self.template, self.kinds = tokenizer, template, list(kinds)
    self.abstain, self.abstain_letter = abstain, abstain_letter
    self._prompts: dict[tuple[int, int | None], JudgePrompt] = {}
    tail = template.tail
    if abstain != "last" and template.label and not tail.startswith("\n"):
      tail = "\n" + tail  # the official prompt ends its last line otherwise, but knows only `last`
    same = lambda left, right: (
      tokenizer.encode(left + right) == tokenizer.encode(left) + tokenizer.encode(right)
    )
    label = template.label.format(letter="B")
    # A line break goes to the piece before it where that changes nothing, or else to the piece
    # after it.
    self.break_before = (
      label.startswith("\n") and same("a.\n", label[1:]) and same("a\n", label[1:])
    )
    move = self.break_before
    self._label = template.label[1:] if move else template.label
    self._stem = template.stem + ("\n" if move else "")
    self._option = template.option + ("\n" if move else "")
    self._tail = tail[1:] if move and tail.startswith("\n") else tail
    self._abstain = (self._option if tail.startswith("\n") else template.option).format(
      option=template.abstain
    )

  def __call__(self, question: Question, prior: Sequence[float] | None = None) -> TokenizedQuestion:
    """Tokenises a question; chat tokens written in it stay plain text."""
    encode = self.tokenizer.encode_plain
    # Outer spaces belong to the template; line breaks inside an option would look like the next
    # one.
    option = lambda text: self._option.format(option=" ".join(text.split()))
    return TokenizedQuestion(
      stem=tuple(encode(self._stem.format(question=question.stem.strip()))),
      options=tuple(tuple(encode(option(o))) for o in question.options),
      gold=question.gold,
      kind=self.kinds.index(question.kind),
      prior=tuple(prior or [0.0] * len(question.options)),
    )

  def prompt(self, options: int, rows: int | None = None) -> JudgePrompt:
    """The pieces around caption and question, made once for the same arguments.

    Args:
      options: the most that a question has, "can not answer" not counted.
      rows: of the judge's embedding, for the reading `generate`, which writes tokens; None for the
        others.

    Raises:
      ValueError: the tokenizer writes a letter as several tokens, or lacks the template's chat
      tokens.
    """
    if (options, rows) not in self._prompts:
      self._prompts[options, rows] = self._make_prompt(options, rows)
    return self._prompts[options, rows]

  def _make_prompt(self, options: int, rows: int | None) -> JudgePrompt:
    template, tokenizer = self.template, self.tokenizer
    for token in template.specials:
      if tokenizer.backend.token_to_id(token) not in tokenizer.special_ids:
        raise ValueError(
          f"the judge's prompt {template.name!r} is a chat in ChatML, but the "
          f"judge's tokenizer has no token {token!r}; use judge.prompt = 'plain'"
        )
    if template.label and options + (self.abstain != "none") > len(string.ascii_uppercase):
      raise ValueError(
        f"a question has {options} options, more than there are letters; use judge.reading = "
        "'option_pmi' or drop such questions"
      )
    encode = lambda text: np.asarray(tokenizer.encode(text), np.int32)
    # one more for "can not answer", which may be F
    letters = string.ascii_uppercase[: max(options + 1, 6)]
    labels = [encode(self._label.format(letter=letter)) for letter in letters]
    letter_ids = [encode(template.letter.format(letter=letter)) for letter in letters]
    needed = 6 if self.abstain_letter == "F" else options + (self.abstain != "none")
    if any(len(ids) != 1 for ids in letter_ids[:needed]) and template.label:
      raise ValueError(
        f"the judge's tokenizer does not write each of {template.letter!r} for "
        f"{letters[:needed]} as one token; use judge.reading = 'option_pmi'"
      )
    if rows is not None and options + (self.abstain != "none") > 9:
      raise ValueError(
        f"reading 'generate' knows the letters A to I, but a question has {options} "
        "options; use another judge.reading or drop such questions"
      )
    width = max(map(len, labels))
    head, spaced, space = template.head, None, None
    if head.endswith(" "):
      head, spaced, space = head[:-1], self._spaced(), encode(" ")
      if len(space) != 1:
        raise ValueError(
          "the judge's tokenizer does not write a space as one token; use judge.prompt = 'plain'"
        )
    return JudgePrompt(
      head_L=encode(head),
      label_AL=np.stack([_pad(ids, width) for ids in labels]),
      label_valid_AL=np.stack([np.arange(width) < len(ids) for ids in labels]),
      tail_L=encode(self._tail),
      letter_A=np.stack([ids[0] for ids in letter_ids]),
      abstain_L=np.asarray(
        tokenizer.encode_plain(self._abstain) if self.abstain != "none" else [], np.int32
      ),
      spaced_V=spaced,
      space=None if space is None else space[0],
      **({} if rows is None else self._writing(rows)),
    )

  def _spaced(self) -> np.ndarray:
    """For each id the id of the same text after a space, where that is one token; -1 elsewhere.
    int32 [V].
    """
    vocabulary = self.tokenizer.backend.get_vocab()
    spaced = np.full(self.tokenizer.vocab_size, -1, np.int32)
    # Words that have their space already would have two; runs of nothing but white space grow by
    # one.
    ids = [
      i
      for token, i in vocabulary.items()
      if i not in self.tokenizer.special_ids
      and (not token.startswith("\u0120") or not token.strip("\u0120\u010a\u0109\u010d"))
    ]
    texts = [" " + self.tokenizer.decode([i]) for i in ids]
    for i, text, encoding in zip(
      ids, texts, self.tokenizer.backend.encode_batch(texts, add_special_tokens=False), strict=True
    ):
      if len(encoding.ids) == 1 and "\ufffd" not in text:
        spaced[i] = encoding.ids[0]
    return spaced

  def _writing(self, rows: int) -> dict:
    """What the reading `generate` needs: which tokens may be written, and the first of A to I in
    each one's text.
    """
    text = np.zeros(rows, bool)
    letter = np.full(rows, -1, np.int32)
    for token, i in self.tokenizer.backend.get_vocab().items():
      text[i] = True
      if i not in self.tokenizer.special_ids:  # byte-level BPE spells ASCII letters as themselves
        letter[i] = next((ord(c) - ord("A") for c in token if "A" <= c <= "I"), -1)
    ends = self.tokenizer.end_ids
    if not ends:
      raise ValueError(
        "the judge's tokenizer has no end token; use another judge.reading than 'generate'"
      )
    return {
      "letter_V": letter,
      "words": Vocabulary(text, np.zeros(0, np.int32), tuple(ends), ends[-1]),
    }

  def caption_ids(self, caption: str) -> list[int]:
    """A caption written as text, as the judge sees one that the policy wrote."""
    return self.tokenizer.encode_plain(caption)


def question_shape(questions: Sequence[TokenizedQuestion]) -> QuestionShape:
  """The smallest shape that holds all of them (two options at least), none included."""
  return QuestionShape(
    max((2, *(len(q.options) for q in questions))),
    max((len(q.stem) for q in questions), default=0),
    max((len(o) for q in questions for o in q.options), default=0),
  )


def pick_questions(
  questions: Sequence[TokenizedQuestion], count: int, rng: np.random.Generator
) -> list[int]:
  """The indices of up to `count` questions, without replacement, taking turns between kinds so that
  each is asked about.
  """
  turns: dict[int, list[int]] = {}
  for i in rng.permutation(len(questions)).tolist():
    turns.setdefault(questions[i].kind, []).append(i)
  order = [
    (turn, place, i) for place, group in enumerate(turns.values()) for turn, i in enumerate(group)
  ]
  return [i for _, _, i in sorted(order)[:count]]


def _pad(ids: Sequence[int], length: int) -> np.ndarray:
  return np.pad(np.asarray(ids, np.int32), (0, length - len(ids)))


def pad_questions(
  questions: Sequence[TokenizedQuestion], count: int, shape: QuestionShape
) -> Questions:
  """One image's questions as arrays [K, ...] (no batch axis), K = count; missing ones are
  invalid.
  """
  A, Q, O = shape.options, shape.stem_tokens, shape.option_tokens
  out = Questions(
    stem_BKQ=np.zeros((count, Q), np.int32),
    stem_valid_BKQ=np.zeros((count, Q), bool),
    option_BKAO=np.zeros((count, A, O), np.int32),
    option_valid_BKAO=np.zeros((count, A, O), bool),
    gold_BK=np.zeros(count, np.int32),
    valid_BK=np.zeros(count, bool),
    kind_BK=np.zeros(count, np.int32),
    prior_BKA=np.zeros((count, A), np.float32),
  )
  for k, question in enumerate(questions):
    out.stem_BKQ[k], out.stem_valid_BKQ[k] = (
      _pad(question.stem, Q),
      np.arange(Q) < len(question.stem),
    )
    for a, option in enumerate(question.options):
      out.option_BKAO[k, a], out.option_valid_BKAO[k, a] = (
        _pad(option, O),
        np.arange(O) < len(option),
      )
    out.prior_BKA[k, : len(question.prior)] = question.prior
    out.gold_BK[k], out.kind_BK[k], out.valid_BK[k] = question.gold, question.kind, True
  return out
