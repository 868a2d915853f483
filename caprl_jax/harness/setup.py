"""Settings -> everything a CapRL run needs: mesh, policy, judge, curated questions, batchers. Used
by train and evaluate."""

import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.batches import ImagePrompt, QABatcher
from caprl_jax.data.image_check import ImageCheck
from caprl_jax.data.judge_questions import QuestionShape, question_shape
from caprl_jax.data.rows import QARow, kinds
from caprl_jax.data.shapes.buckets import Shapes
from caprl_jax.data.usable_rows import Check, ImageFacts, RowError, shape_of, shapes_of
from caprl_jax.harness.process.device_memory import hold
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.run_record import RunRecord
from caprl_jax.harness.rewards.function import CustomReward, load_custom_reward
from caprl_jax.harness.sections import GateSection, without_penalty
from caprl_jax.harness.settings import Settings, check_training_batch
from caprl_jax.harness.training.chosen_rows import Data, choose_questions, usable_data, was_begun
from caprl_jax.harness.training.made_of import bind_models, bind_reward
from caprl_jax.harness.training.row_digests import row_digests
from caprl_jax.hub.load import Loaded, relate_vocabularies
from caprl_jax.inference.endpoint_judge import EndpointJudge
from caprl_jax.inference.judge import Ask, HostJudge
from caprl_jax.inference.retokenise import Translator
from caprl_jax.inference.run_judge import RunJudge
from caprl_jax.models.quantized.codes import parameter_count
from caprl_jax.models.trainable import split_params, trainable_filter
from caprl_jax.rl.caption_form import stamp_table
from caprl_jax.types import Frozen, Params, Vocabulary

log = logging.getLogger("caprl_jax.harness.setup")


@dataclasses.dataclass(frozen=True)
class Run:
  """What train and evaluate work with. Rows hold curated questions only; batchers make device
  batches of them. digests: of the training rows (`row_digests`). shapes: of their images.
  """

  settings: Settings
  mesh: jax.sharding.Mesh
  policy: Loaded
  judge: Loaded | None  # None where it is behind an endpoint, or there is none
  frozen: Frozen
  # None where nobody answers questions: the judge sees the images, or there is none
  host_judge: HostJudge | EndpointJudge | None
  kinds: tuple[str, ...]
  train_rows: list[QARow]
  # rows and weight of each of their sources, in order
  mixture: tuple[tuple[int, float | None], ...]
  eval_rows: list[QARow]
  train: QABatcher
  eval: QABatcher
  counts: dict[str, float]
  bad: BadRowList  # what could not be used, and what is done with what fails later
  digests: Sequence[str] = ()
  shapes: Sequence[Shapes] = ()
  translator: Translator | None = None  # where captioner and judge have different vocabularies
  custom: CustomReward | None = None  # the user's reward function

  @property
  def endpoint(self) -> EndpointJudge | None:
    """The judge where it is behind an endpoint."""
    return self.host_judge if isinstance(self.host_judge, EndpointJudge) else None

  @property
  def judged(self) -> bool:
    """Whether there is a judge."""
    return self.settings.judge.named

  @property
  def several_programs(self) -> bool:
    """Whether the host stands between rollout and update."""
    of_texts = self.custom is not None and self.custom.of_texts
    written = self.settings.judge.writes_scores
    return bool(self.translator or self.endpoint) or of_texts or written


def set_up(
  settings: Settings,
  training: bool = True,
  workdir: pathlib.Path | None = None,
  record: RunRecord | None = None,
) -> Run:
  """Reads and checks the data, loads both models, curates, tokenises the questions. Call under
  `jax.set_mesh`.

  Args:
    training: False leaves out what only training needs: `data.train` and the reference.
    workdir: where the list of bad rows goes, and what was found about images is kept.
    record: of the run in `workdir`, which is compared with its checkpoints and held-out rows, and
      gets them; with it, questions that were chosen before are taken again.

  Raises:
    ValueError: rows that cannot be used and are to be refused; none that is left; a model that
    cannot be loaded, or is not that of the record; values that do not go together.
  """
  mesh = jax.sharding.get_mesh()
  check_training_batch(settings, mesh)
  sharding.check_batch_size(settings.evaluate.batch_size, mesh, "evaluate.batch_size")
  settings.judge.check_score_prompt()
  custom = _custom_reward(settings)
  if settings.judge.endpoint is not None or (custom is not None and custom.of_texts):
    sharding.check_images_apart(mesh, "a judge's endpoint or a reward function of texts")
  data, images, bad = usable_data(settings, training, workdir)
  if record is not None:
    bind_models(record, settings, goes_on=was_begun(workdir))
    bind_reward(record, custom)
  policy = without_penalty(settings.policy.load(mesh))
  names = tuple(kinds([*data.train_rows, *data.eval])) if settings.judge.named else ()
  asker = RunJudge.open(
    settings.judge,
    kinds=names,
    mesh=mesh,
    seed=settings.seed,
    compare=asks_to_compare([*data.eval, *data.train_rows], settings.gate),
    first=from_first,
  )
  judge = asker.loaded
  asked = f"{_millions(judge.params):.1f}M" if judge else settings.judge.name
  said = "captioner %.1fM parameters, judge %s, %d + %d images"
  log.info(said, _millions(policy.params), asked, len(data.train_rows), len(data.eval))
  if asker.host:
    data = data.checked(bad, images, _askable(asker, settings))
    bad.settle()
  data, filtered = choose_questions(data, images, asker.host, settings, record, workdir)
  train, held_out, shape = _batchers(data, images, asker, policy, settings)
  vocabulary, translator = _relate(policy, judge, settings)
  counts: dict[str, float] = {**data.counts(), **filtered}
  if asker.host and asker.host.int8_differs is not None:
    counts["int8_differs"] = asker.host.int8_differs
  return Run(
    settings=settings,
    mesh=mesh,
    policy=policy,
    judge=judge,
    frozen=_frozen(settings, policy, asker, shape, vocabulary, training=training),
    host_judge=asker.host,
    kinds=names,
    train_rows=data.train_rows,
    mixture=data.mixture,
    eval_rows=data.eval,
    train=train,
    eval=held_out,
    counts=counts,
    bad=bad,
    digests=row_digests(data.train_rows, images(data.train_rows)),
    shapes=_shapes(train, images),
    translator=translator,
    custom=custom,
  )


def _custom_reward(settings: Settings) -> CustomReward | None:
  """The user's reward function, checked; what it is said to be. Raises UserError as
  `load_custom_reward` and `CustomReward.check_shapes`."""
  reward, judge, rollout = settings.step.reward, settings.judge, settings.step.rollout
  if reward.custom is None:
    return None
  custom = load_custom_reward(reward.custom)
  if custom.of_texts:
    log.info(
      "reward.custom = %s is a function of texts: a step is several programs, between which the "
      "host calls it",
      custom.spec,
    )
    return custom
  if not judge.named:
    custom.check_unjudged()
  custom.check_shapes(
    images=settings.data.batch_size * rollout.oversample,
    captions=rollout.group_size,
    tokens=rollout.sampling.max_tokens,
    questions=(judge.draws or settings.data.questions) if judge.named else 0,
  )
  log.info("reward.custom = %s is a function of arrays: a part of the step's program", custom.spec)
  return custom


def _askable(asker: RunJudge, settings: Settings) -> Check:
  """A check that the judge's prompt has a letter for every option. Raises ValueError where it has
  none for two: then the settings are wrong, and no row is."""
  written = _written(asker.loaded, settings)
  asker.check_options(2, written)

  def check(row: QARow, _: ImageFacts) -> None:
    if settings.judge.reading == "option_pmi":  # reads options by their texts
      return
    for question in row.questions:
      try:
        asker.check_options(len(question.options), written)
      except ValueError as error:
        raise RowError(f"row {row.name!r}: {error}", "too many options") from error

  return check


def _written(judge: Loaded | None, settings: Settings) -> int | None:
  """Rows of the embedding of a judge that writes letters; None where it is read, or not here."""
  if judge is None or settings.judge.sees_image or settings.judge.reading != "generate":
    return None
  return judge.model.cfg.vocab_size


def _batchers(
  data: Data, images: ImageCheck, asker: RunJudge, policy: Loaded, settings: Settings
) -> tuple[QABatcher, QABatcher, QuestionShape]:
  """Of the training and the held-out split; both make batches of one shape, which is the run's."""
  splits = (data.train_rows, data.eval)
  rows = [*itertools.chain(*splits)]
  asker.learn(q for row in rows for q in row.questions)
  asked = lambda row: row.questions if settings.judge.named else ()
  tokenized = [[[asker.tokens(q) for q in asked(row)] for row in split] for split in splits]
  shape = question_shape([q for split in tokenized for questions in split for q in questions])
  cfg = policy.model.cfg
  pieces = policy.prompt_pieces(settings.policy.instruction)
  prompt = ImagePrompt(cfg, pieces, shape_of(images(rows), cfg.vision.pixels))
  sight = None
  if asker.score:
    assert asker.loaded is not None, "only an endpoint has no model here"
    seeing = asker.loaded.model.cfg
    sight = ImagePrompt(seeing, asker.score.image, shape_of(images(rows), seeing.vision.pixels))
  train, held_out = (
    QABatcher(split, tokens, prompt, settings.data.questions, shape, sight)
    for split, tokens in zip(splits, tokenized, strict=True)
  )
  return train, held_out, shape


def _shapes(batcher: QABatcher, images: ImageCheck) -> list[Shapes]:
  """Of the rows' images, for each model that sees them."""
  pixels = [one.cfg.vision.pixels for one in (batcher.prompt, batcher.sight) if one]
  return shapes_of(batcher.rows, images(batcher.rows), pixels)


def _relate(
  policy: Loaded, judge: Loaded | None, settings: Settings
) -> tuple[Vocabulary, Translator | None]:
  """The captioner's ids in the judge's vocabulary; a translator where no table relates the two. A
  judge behind an endpoint reads texts, and where there is none nobody reads ids."""
  if judge is None:
    size = policy.model.cfg.text.vocab_size
    return relate_vocabularies(policy.tokenizer, policy.tokenizer, size)[0], None
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
  limit = settings.step.rollout.sampling.max_tokens
  return vocabulary, Translator(policy.tokenizer, judge.tokenizer, limit)


def _frozen(
  settings: Settings,
  policy: Loaded,
  asker: RunJudge,
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
  hold("captioner", jax.tree.leaves(trained))
  hold("captioner's part that is not trained", jax.tree.leaves(base))
  judge = asker.loaded.params if asker.loaded else None
  hold("judge", jax.tree.leaves(judge))
  # The reference starts as a copy: the state's own parameters are donated to the step.
  with_reference = training and settings.step.update.loss.has_kl
  reference = jax.tree.map(jnp.copy, trained) if with_reference else None
  hold("reference", jax.tree.leaves(reference))
  stamps = None
  if settings.step.reward.timestamps:
    stamps = stamp_table(policy.tokenizer.texts(policy.model.cfg.text.vocab_size))
  options = shape.options if settings.judge.reading != "option_pmi" else 2
  vocabulary = dataclasses.replace(vocabulary, stamp_VX=stamps)
  return Frozen(
    judge=judge,
    prompt=put(asker.prompt(options, _written(asker.loaded, settings))),
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
  return parameter_count(params) / 1e6
