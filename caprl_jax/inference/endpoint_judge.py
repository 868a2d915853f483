"""Captions and questions -> answers of a judge behind an OpenAI-compatible server.

The server writes its answers; the letter in each is read as written answers are elsewhere
(`scoring`). What fails has no answer: its caption is left out, never scored.
"""

import logging
import re
import string
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from caprl_jax.data.judge_prompts import JudgeTemplate, template_for
from caprl_jax.data.judge_questions import TokenizedQuestion
from caprl_jax.data.question_texts import orders
from caprl_jax.data.rows import Question
from caprl_jax.inference.endpoint import Endpoint, JudgeEndpoint, Reply
from caprl_jax.json_files import cut
from caprl_jax.progress import counted
from caprl_jax.rl.judge_protocol import JudgeConfig, Presentations
from caprl_jax.scoring.choices import chosen
from caprl_jax.scoring.extraction import extract_answer
from caprl_jax.types import Answers

log = logging.getLogger("caprl_jax.inference.endpoint_judge")

SHOWN_FAILURES = 20
# Where a server's tokenizer would read a chat's own token in a caption's text.
MARKUP = re.compile(r"<(?=[^\s\d=])|\[(?=/?INST\])")
_NO_OPTION = "\0"  # stands at letters that no option has


class Asked(NamedTuple):
  """A caption, a question, and the option in each slot of its list; len(question.options) stands
  for "can not answer"."""

  caption: str
  question: Question
  order: tuple[int, ...]


class Verdict(NamedTuple):
  """choice: index of the option, in the question's order; -1 where none was chosen. failed: there
  was no answer."""

  choice: int
  failed: bool = False


# What a function gives in the first process, in which alone it is called, in all of them.
FromFirst = Callable[[Callable[[], Any]], Any]


class EndpointJudge:
  """A judge behind a server, with the methods of `HostJudge` that modes use. To be asked by one
  thread at a time; its connections close when it is dropped.

  Args:
    cfg: what is shown (prompt, abstain, letters) and in which draws; the reading is `generate`.
    seed: of the order of options where `choices` asks.
    template: other words for the prompt; None: those that `cfg` names.
    first: where several processes ask the same by `choices`, who asks for all of them: the server
      may answer each of them in another way. None: each process asks.
  """

  int8_differs: float | None = None

  def __init__(
    self,
    endpoint: Endpoint,
    cfg: JudgeConfig,
    seed: int,
    template: JudgeTemplate | None = None,
    first: FromFirst | None = None,
  ):
    self.endpoint, self.cfg, self.seed = endpoint, cfg, seed
    self.template = template or template_for(cfg.reading, cfg.prompt)
    self.known: dict[tuple, Verdict] = {}
    self._first = first or _by_itself
    self._failures = 0
    weakref.finalize(self, endpoint.close)

  @classmethod
  def open(
    cls,
    section: JudgeEndpoint,
    cfg: JudgeConfig,
    seed: int,
    template: JudgeTemplate | None = None,
    first: FromFirst | None = None,
  ) -> "EndpointJudge":
    """Connects, and checks that the model is served; arguments as of the class. Raises ValueError
    as `Endpoint` and its `check`."""
    endpoint = Endpoint(section)
    try:
      endpoint.check()
    except ValueError:
      endpoint.close()
      raise
    return cls(endpoint, cfg, seed, template, first)

  def check_options(self, count: int) -> None:
    """Raises ValueError where there are not letters for so many options."""
    if count + (self.cfg.abstain != "none") > len(string.ascii_uppercase):
      raise ValueError(
        f"a question has {count} options, more than there are letters; drop such questions"
      )

  def tokens(self, question: Question, kind: int) -> TokenizedQuestion:
    """A question as batches hold it: of the right shape, since the text is what is sent."""
    count = len(question.options)
    return TokenizedQuestion((0,), ((0,),) * count, question.gold, kind, (0.0,) * count)

  def priors(self, questions: Iterable[Question]) -> None:
    """Nothing: a reading of written answers has no prior."""
    del questions

  def choices(self, asks: Sequence[tuple[str, Question]], what: str = "judging") -> np.ndarray:
    """The option chosen for each (caption, question), int [len(asks)]; -1 for none, also where the
    request failed (`answered`)."""
    return np.array([verdict.choice for verdict in self._verdicts(asks, what)], int)

  def correct(self, asks: Sequence[tuple[str, Question]], what: str = "judging") -> np.ndarray:
    """Whether each (caption, question) is answered right, bool [len(asks)]; False where the request
    failed."""
    return self.choices(asks, what) == np.array([q.gold for _, q in asks], int)

  def answered(self, asks: Sequence[tuple[str, Question]]) -> np.ndarray:
    """Which of them the server answered, bool [len(asks)]; of what was asked before."""
    return np.array([not verdict.failed for verdict in self._verdicts(asks, "")], bool)

  def forget_failures(self) -> int:
    """Makes `choices` ask anew what has failed, and says how much that is."""
    failed = [key for key, verdict in self.known.items() if verdict.failed]
    for key in failed:
      del self.known[key]
    return len(failed)

  def _verdicts(self, asks: Sequence[tuple[str, Question]], what: str) -> list[Verdict]:
    key = lambda caption, q: (caption, q.stem, q.options)
    new = {key(*ask): ask for ask in asks if key(*ask) not in self.known}
    asked = [Asked(caption, q, self._order(q)) for caption, q in new.values()]
    if new:
      found = self._first(lambda: [list(verdict) for verdict in self.ask(asked, what)])
      self.known |= zip(new, (Verdict(*one) for one in found), strict=True)
    return [self.known[key(*ask)] for ask in asks]

  def _order(self, question: Question) -> tuple[int, ...]:
    count, abstains = len(question.options), self.cfg.abstain != "none"
    order = orders(question, 1, self.seed)[0] if self.cfg.shuffle else range(count)
    return (*order, *([count] if abstains else []))

  def ask(self, asked: Sequence[Asked], what: str = "") -> list[Verdict]:
    """Asks all; what is asked twice goes out once.

    Args:
      what: the progress bar's words; none: no bar.

    Raises ValueError where too many requests in a row fail (`Endpoint.ask_all`).
    """
    numbers: dict[Asked, int] = {}
    for one in asked:
      numbers.setdefault(one, len(numbers))
    requests = ((number, "", self._message(one), None) for one, number in numbers.items())
    replies = self.endpoint.ask_all(requests)
    if what:
      replies = counted(replies, what, "answer", len(numbers))
    found = dict(replies)
    verdicts = [self._verdict(one, found[number]) for one, number in numbers.items()]
    return [verdicts[numbers[one]] for one in asked]

  def _letters(self, one: Asked) -> str:
    """The letter of each slot."""
    letters = string.ascii_uppercase[: len(one.order)]
    if self.cfg.abstain == "last" and self.cfg.abstain_letter == "F" and len(letters) < 6:
      letters = letters[:-1] + "F"
    return letters

  def _options(self, one: Asked) -> list[str]:
    """The text of each slot."""
    texts = [*one.question.options, self.template.abstain]
    return [" ".join(texts[i].split()) for i in one.order]

  def _message(self, one: Asked) -> str:
    stem = one.question.stem.strip()
    return self.template.message(as_text(one.caption), stem, self._options(one), self._letters(one))

  def _verdict(self, one: Asked, reply: Reply) -> Verdict:
    if reply.text is None:
      return self._failed(one, reply.error or "no reply")
    by_letter = dict(zip(self._letters(one), self._options(one)))
    last = string.ascii_uppercase.index(max(by_letter))
    shown = [by_letter.get(letter, _NO_OPTION) for letter in string.ascii_uppercase[: last + 1]]
    slot = chosen(extract_answer(reply.text, len(shown), "ours"), shown)
    if slot is None and reply.finish == "length":
      return self._failed(
        one,
        f"the reply was cut before it said an answer ({cut(reply.text, 200)}); raise max_tokens",
      )
    if slot is None or shown[slot] == _NO_OPTION:
      return Verdict(-1)
    option = one.order[list(by_letter).index(string.ascii_uppercase[slot])]
    return Verdict(option if option < len(one.question.options) else -1)

  def _failed(self, one: Asked, reason: str) -> Verdict:
    self._failures += 1
    level = logging.WARNING if self._failures <= SHOWN_FAILURES else logging.DEBUG
    log.log(level, "no answer to %r, which is left out: %s", cut(one.question.stem), reason)
    return Verdict(-1, failed=True)

  def answers(
    self,
    captions: Sequence[Sequence[str]],
    questions: Sequence[Sequence[Question | None]],
    drawn: Presentations,
    *,
    blind: bool,
  ) -> Answers:
    """Answers from captions of a batch, of numpy arrays.

    Args:
      captions: G of each image.
      questions: of each image the question in each place that `drawn` counts.
      drawn: of numpy arrays, for G captions, or G + 1 with `blind`.
      blind: ask an empty caption, too.
    """
    empty = [""] if blind else []
    places = [place for place in np.ndindex(drawn.asked_BGK.shape) if drawn.asked_BGK[place]]
    written = [[*of_image, *empty] for of_image in captions]
    asked = []
    for b, g, k in places:
      question = questions[b][drawn.question_BGK[b, g, k]]
      assert question is not None, (b, g, k)
      count = len(question.options) + (self.cfg.abstain != "none")
      slots = drawn.order_BGKA[b, g, k, :count].tolist()
      absent = drawn.order_BGKA.shape[-1] - 1  # "can not answer" comes after padded options
      order = [
        len(question.options) if self.cfg.abstain != "none" and i == absent else i for i in slots
      ]
      asked.append(Asked(written[b][g], question, tuple(order)))
    verdicts = self.ask(asked)
    choice_BGK = np.full(drawn.asked_BGK.shape, -1, np.int32)
    gold_BGK, valid_BGK = np.zeros_like(choice_BGK), np.zeros(choice_BGK.shape, bool)
    for place, one, verdict in zip(places, asked, verdicts):
      choice_BGK[place], valid_BGK[place] = verdict.choice, not verdict.failed
      gold_BGK[place] = one.question.gold
    correct_BGK = valid_BGK & (choice_BGK == gold_BGK)
    found = Answers(
      choice_BGK=choice_BGK,
      correct_BGK=correct_BGK,
      credit_BGK=correct_BGK.astype(np.float32),
      misled_BGK=(valid_BGK & (choice_BGK >= 0) & ~correct_BGK).astype(np.float32),
      asked_BGK=np.asarray(drawn.asked_BGK),
      valid_BGK=valid_BGK,
      question_BGK=np.asarray(drawn.question_BGK),
      score_BGKA=np.zeros(drawn.order_BGKA.shape, np.float32),
    )
    return found.without_blind() if blind else found


def _by_itself(look: Callable[[], Any]) -> Any:
  return look()


def as_text(caption: str) -> str:
  """A caption in which no server's tokenizer reads a chat's own token."""
  return MARKUP.sub(lambda match: match[0] + " ", caption)
