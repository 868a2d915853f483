"""Settings -> everything a CapRL run needs: mesh, policy, judge, curated questions, batchers. Used
by train and evaluate."""

import dataclasses
import itertools
import logging
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.data.batches import ImagePrompt, QABatcher, image_shape
from caprl_jax.data.judge_questions import QuestionShape, QuestionTokenizer, question_shape
from caprl_jax.data.readers.qa_sources import Part, read_parts, read_qa_rows
from caprl_jax.data.rows import QARow, kinds
from caprl_jax.harness.question_filter import filter_questions, fixed_subset
from caprl_jax.harness.sections import GateSection
from caprl_jax.harness.settings import Settings
from caprl_jax.hub.load import Loaded, relate_vocabularies
from caprl_jax.inference.judge import Ask, HostJudge, open_judge
from caprl_jax.inference.retokenise import Translator
from caprl_jax.models.trainable import split_params, trainable_filter
from caprl_jax.rl.caption_form import stamp_table
from caprl_jax.types import Frozen, Params, Vocabulary

log = logging.getLogger("caprl_jax.harness.setup")


@dataclasses.dataclass(frozen=True)
class Run:
  """What train and evaluate work with. Rows hold curated questions only; batchers make device
  batches of them.
  """

  settings: Settings
  mesh: jax.sharding.Mesh
  policy: Loaded
  judge: Loaded
  frozen: Frozen
  host_judge: HostJudge
  kinds: tuple[str, ...]
  train_rows: list[QARow]
  # rows and weight of each of their sources, in order
  mixture: tuple[tuple[int, float | None], ...]
  eval_rows: list[QARow]
  train: QABatcher
  eval: QABatcher
  counts: dict[str, float]
  translator: Translator | None = None  # where captioner and judge have different vocabularies


@dataclasses.dataclass(frozen=True)
class Data:
  """The rows of both splits, with the questions that are kept. train: (the source, its rows)."""

  train: list[tuple[Part, list[QARow]]]
  eval: list[QARow]

  @property
  def train_rows(self) -> list[QARow]:
    """Of all sources, one after the other."""
    return [row for _, rows in self.train for row in rows]

  @property
  def mixture(self) -> tuple[tuple[int, float | None], ...]:
    """Rows and weight of each source of `train_rows`."""
    return tuple((len(rows), part.weight) for part, rows in self.train)


def set_up(settings: Settings, training: bool = True) -> Run:
  """Loads both models, reads and curates the data, tokenises the questions. Call under
  `jax.set_mesh`.

  training: False leaves out what only training needs: `data.train` and the reference.
  """
  mesh = jax.sharding.get_mesh()
  sharding.check_batch_size(settings.data.batch_size, mesh, "data.batch_size")
  sharding.check_batch_size(settings.evaluate.batch_size, mesh, "evaluate.batch_size")
  data = _read_data(settings, training)
  policy = settings.policy.load(mesh)
  names = tuple(kinds([*data.train_rows, *data.eval]))
  host_judge = open_judge(
    settings.judge,
    kinds=names,
    mesh=mesh,
    seed=settings.seed,
    compare=asks_to_compare([*data.eval, *data.train_rows], settings.gate),
  )
  judge = host_judge.judge
  log.info(
    "captioner %.1fM parameters, judge %.1fM, %d + %d images",
    _millions(policy.params),
    _millions(judge.params),
    len(data.train_rows),
    len(data.eval),
  )
  data, filtered = _filter(data, host_judge, settings)
  train, held_out, shape = _batchers(data, host_judge, policy, settings)
  vocabulary, translator = _relate(policy, judge, settings)
  counts: dict[str, float] = {
    "train_rows": len(data.train_rows),
    "eval_rows": len(data.eval),
    **filtered,
  }
  if host_judge.int8_differs is not None:
    counts["int8_differs"] = host_judge.int8_differs
  return Run(
    settings=settings,
    mesh=mesh,
    policy=policy,
    judge=judge,
    frozen=_frozen(
      settings, policy, judge, host_judge.tokenize, shape, vocabulary, training=training
    ),
    host_judge=host_judge,
    kinds=names,
    train_rows=data.train_rows,
    mixture=data.mixture,
    eval_rows=data.eval,
    train=train,
    eval=held_out,
    counts=counts,
    translator=translator,
  )


def _read_data(settings: Settings, training: bool) -> Data:
  """Both splits as they are; the training split is empty where nothing is trained."""
  data, seed = settings.data, settings.seed
  parts = read_parts(data.train, seed, data.max_train_rows, data.bad_rows) if training else []
  return Data(parts, read_qa_rows(data.eval, seed, data.max_eval_rows, data.bad_rows))


def _filter(data: Data, host_judge: HostJudge, settings: Settings) -> tuple[Data, dict[str, int]]:
  """The questions that can teach, and how many were kept and dropped of each kind; those of the
  held-out split are counted under eval/."""
  *train, (held_out, held_out_counts) = filter_questions(
    [
      *((part.source, rows) for part, rows in data.train),
      (settings.data.eval, data.eval),
    ],
    host_judge,
    settings.question_filter,
    settings.seed,
  )
  counts: dict[str, int] = {}
  for _, counted in train:
    for name, number in counted.items():
      counts[name] = counts.get(name, 0) + number
  counts |= {f"eval/{name}": number for name, number in held_out_counts.items()}
  parts = (part for part, _ in data.train)
  kept = [(part, rows) for part, (rows, _) in zip(parts, train, strict=True)]
  if (most := settings.data.questions_per_image) is not None:
    kept = [(part, fixed_subset(rows, most, settings.seed)) for part, rows in kept]
  return Data(kept, held_out), counts


def _batchers(
  data: Data, host_judge: HostJudge, policy: Loaded, settings: Settings
) -> tuple[QABatcher, QABatcher, QuestionShape]:
  """Of the training and the held-out split; both make batches of one shape, which is the run's."""
  splits = (data.train_rows, data.eval)
  rows = [*itertools.chain(*splits)]
  host_judge.priors(q for row in rows for q in row.questions)
  tokenized = [
    [[host_judge.tokenize(q, host_judge.prior_of(q)) for q in row.questions] for row in split]
    for split in splits
  ]
  shape = question_shape([q for split in tokenized for questions in split for q in questions])
  cfg = policy.model.cfg
  pieces = policy.prompt_pieces(settings.policy.instruction)
  prompt = ImagePrompt(cfg, pieces, image_shape(rows, cfg))
  train, held_out = (
    QABatcher(split, tokens, prompt, settings.data.questions, shape)
    for split, tokens in zip(splits, tokenized, strict=True)
  )
  return train, held_out, shape


def _relate(
  policy: Loaded, judge: Loaded, settings: Settings
) -> tuple[Vocabulary, Translator | None]:
  """The captioner's ids in the judge's vocabulary; a translator where no table relates the two.
  Raises ValueError for a translator in several processes."""
  vocabulary, absent = relate_vocabularies(
    policy.tokenizer, judge.tokenizer, policy.model.cfg.text.vocab_size
  )
  if not absent:
    return vocabulary, None
  log.warning(
    "captioner and judge have different vocabularies (%d of the captioner's text "
    "tokens are none of the judge's): captions go through the host as text, between "
    "two programs a step",
    absent,
  )
  if jax.process_count() > 1:
    raise ValueError(
      "captioner and judge have different vocabularies, which works in one "
      "process only; use a captioner and a judge of one family"
    )
  limit = settings.step.rollout.sampling.max_tokens
  return vocabulary, Translator(policy.tokenizer, judge.tokenizer, limit)


def _frozen(
  settings: Settings,
  policy: Loaded,
  judge: Loaded,
  tokenize: QuestionTokenizer,
  shape: QuestionShape,
  vocabulary: Vocabulary,
  *,
  training: bool,
) -> Frozen:
  """What the step reads and does not change."""
  put = lambda tree: jax.device_put(tree, sharding.replicated(jax.sharding.get_mesh()))
  trained, base = policy.params, None
  if settings.policy.trainable != "full":
    kind = trainable_filter(settings.policy.trainable, policy.model.cfg.family)
    trained, base = split_params(policy.params, kind)
    log.info(
      "training %s: %.2fM of %.1fM parameters",
      settings.policy.trainable,
      _millions(trained),
      _millions(policy.params),
    )
  # The reference starts as a copy: the state's own parameters are donated to the step.
  with_reference = training and settings.step.update.loss.has_kl
  reference = jax.tree.map(jnp.copy, trained) if with_reference else None
  stamps = None
  if settings.step.reward.timestamps:
    stamps = stamp_table(policy.tokenizer.texts(policy.model.cfg.text.vocab_size))
  options = shape.options if settings.judge.reading != "option_pmi" else 2
  written = judge.model.cfg.vocab_size if settings.judge.reading == "generate" else None
  vocabulary = dataclasses.replace(vocabulary, stamp_VX=stamps)
  return Frozen(
    judge=judge.params,
    prompt=put(tokenize.prompt(options, written)),
    vocabulary=put(vocabulary),
    reference=reference,
    base=base,
  )


def asks_to_compare(rows: Iterable[QARow], gate: GateSection, most: int = 256) -> list[Ask]:
  """What a judge is asked before and after it is rounded: up to `most` questions, each after a true
  caption (where the facts of `gate.ideal` are known) or none, and after one that says nothing."""
  pairs: list[Ask] = []
  for row in rows:
    if len(pairs) >= most:
      break
    try:
      caption = gate.ideal.format(**(row.facts or {})) if gate.ideal else ""
    except KeyError:
      caption = ""
    pairs += [(caption, q) for q in row.questions]
  return pairs[:most] + [(gate.generic, q) for _, q in pairs[:most]]


def _millions(params: Params) -> float:
  return sum(x.size for x in jax.tree.leaves(params)) / 1e6
