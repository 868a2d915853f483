"""A caption and a question as typed -> what the judge answers, in one of a few fixed shapes."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.data.judge_questions import QuestionShape, pad_questions
from caprl_jax.data.rows import Question, check_question
from caprl_jax.hub.load import Loaded
from caprl_jax.inference.endpoint_judge import EndpointJudge
from caprl_jax.inference.judge import JudgeSection, question_tokenizer
from caprl_jax.rl.judge import Judge, JudgeIds, answer_questions
from caprl_jax.rl.judge_protocol import answer_by_margin, best_and_lead

# What a question may have, and what it is padded to: the first of these that holds it.
OPTIONS, STEM_TOKENS, OPTION_TOKENS = (4, 8), (32, 128), (1, 4, 16)
FIRST_CAPTION_TOKENS = 32  # captions are padded to this, doubled until it holds them
REMEMBERED = 10_000  # answers


def read_question(stem: str, lines: str) -> tuple[Question, int | None]:
  """What was typed -> a question, and which option is marked as right: the one that begins with a
  star, if any.

  Raises ValueError for what cannot be asked.
  """
  options = [line.strip() for line in lines.splitlines() if line.strip()]
  marked = [i for i, option in enumerate(options) if option.startswith("*") and option.strip("* ")]
  if len(marked) > 1:
    raise ValueError("two options are marked as right; leave the star at one of them")
  options = [option.lstrip("* ") if i in marked else option for i, option in enumerate(options)]
  question = Question(stem.strip(), tuple(options), marked[0] if marked else 0)
  check_question(question, "this question")
  return question, marked[0] if marked else None


@dataclasses.dataclass(frozen=True)
class JudgedQuestion:
  """choice: the option answered, -1 for none. shares: of each option, 1 in sum with `abstain`, that
  of "can not answer" (None where it is no option). scores: what was compared; None where the judge
  writes its answer."""

  choice: int
  shares: tuple[float, ...]
  scores: tuple[float, ...] | None
  abstain: float | None = None


class TextJudge:
  """A judge asked in words, one caption and question at a time; it remembers its answers."""

  def __init__(
    self, judge: Loaded, cfg: JudgeSection, mesh: jax.sharding.Mesh, caption_tokens: int, seed: int
  ):
    self.cfg = cfg.each_once()
    self.tokenize = question_tokenizer(judge, cfg, [""])
    doubled = itertools.takewhile(
      lambda n: n < caption_tokens, (FIRST_CAPTION_TOKENS << i for i in itertools.count())
    )
    self.caption_sizes = (*doubled, caption_tokens)
    self.key = jax.random.key(seed)
    self._model, self._params, self._mesh = judge.model, judge.params, mesh
    self._written = judge.model.cfg.vocab_size if cfg.reading == "generate" else None
    self._known: dict[tuple, tuple[np.ndarray, int]] = {}
    self.answer = jax.jit(functools.partial(answer_questions, cfg=self.cfg))

  def __call__(self, caption: str, question: Question) -> JudgedQuestion:
    """Raises ValueError for a caption or question that is too long."""
    scores, choice = self._ask(caption, question)
    count = len(question.options)
    if self.cfg.reading == "option_pmi":
      scores = scores[:count] - self._ask(self.tokenize.template.baseline, question)[0][:count]
      choice = int(answer_by_margin(*best_and_lead(scores), self.cfg.margin))
    if self.cfg.reading == "generate":
      return JudgedQuestion(choice, tuple(float(i == choice) for i in range(count)), None)
    present = (
      np.concatenate([scores[:count], scores[-1:]])
      if self.cfg.abstain != "none"
      else scores[:count]
    )
    shares = np.exp(present - present.max())
    shares = (shares / shares.sum()).tolist()
    abstain = shares.pop() if self.cfg.abstain != "none" else None
    return JudgedQuestion(choice, tuple(shares), tuple(scores[:count].tolist()), abstain)

  def _ask(self, caption: str, question: Question) -> tuple[np.ndarray, int]:
    """Scores without prior, of options in the dataset's order, and the choice."""
    known = (caption, question.stem, question.options)
    if known not in self._known:
      if len(self._known) >= REMEMBERED:
        self._known.clear()
      self._known[known] = self._run(caption, question)
    return self._known[known]

  def _run(self, caption: str, question: Question) -> tuple[np.ndarray, int]:
    tokenized = self.tokenize(question)
    ids = self.tokenize.caption_ids(caption)
    T = _size(self.caption_sizes, len(ids), "the caption has {} tokens")
    shape = QuestionShape(
      _size(OPTIONS, len(tokenized.options), "the question has {} options"),
      _size(STEM_TOKENS, len(tokenized.stem), "the question has {} tokens"),
      _size(OPTION_TOKENS, max(map(len, tokenized.options)), "an option has {} tokens"),
    )
    caption_1T = np.zeros((1, 1, T), np.int32)
    caption_1T[0, 0, : len(ids)] = ids
    questions = jax.tree.map(lambda x: jnp.asarray(x)[None], pad_questions([tokenized], 1, shape))
    prompt = self.tokenize.prompt(
      shape.options if self.cfg.reading != "option_pmi" else 2, self._written
    )
    with jax.set_mesh(self._mesh):
      keep = jnp.arange(T)[None, None] < len(ids)
      out = jax.device_get(
        self.answer(
          Judge(self._model, self._params, prompt),
          JudgeIds(jnp.asarray(caption_1T), keep),
          questions,
          key=self.key,
        )
      )
    if not out.valid_BGK.all():
      raise ValueError(
        "the judge gave numbers that are not finite; check judge.source and its dtype"
      )
    return out.score_BGKA[0, 0, 0].astype(np.float64), int(out.choice_BGK[0, 0, 0])


class ServedJudge:
  """As `TextJudge`, of a judge behind an endpoint."""

  def __init__(self, host: EndpointJudge, cfg: JudgeSection):
    self.host, self.cfg = host, cfg

  def __call__(self, caption: str, question: Question) -> JudgedQuestion:
    """Raises ValueError where the server gives no answer."""
    if len(self.host.known) >= REMEMBERED:
      self.host.known.clear()
    (choice,) = self.host.choices([(caption, question)], "").tolist()
    if self.host.forget_failures():
      raise ValueError("the judge's server gave no answer (the log says why); ask again")
    shares = tuple(float(i == choice) for i in range(len(question.options)))
    return JudgedQuestion(choice, shares, None)


def _size(sizes: Sequence[int], need: int, what: str) -> int:
  if need > sizes[-1]:
    raise ValueError(f"{what.format(need)}, and at most {sizes[-1]} are read here")
  return next(size for size in sizes if size >= need)
