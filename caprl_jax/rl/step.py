"""One CapRL step: rollout, judge, advantages, update, all on the device, jitted as one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import optax

from caprl_jax.models.decoder import Decoder
from caprl_jax.models.layers import int8_shardings, to_int8
from caprl_jax.models.policy import Policy
from caprl_jax.models.quantized import codes as quantized
from caprl_jax.models.trainable import merge_params
from caprl_jax.rl.advantages import AdvantageConfig
from caprl_jax.rl.groups import advantages, select_groups
from caprl_jax.rl.image_judge.branches import ImageJudge
from caprl_jax.rl.image_judge.scores import score_with_images
from caprl_jax.rl.image_judge.texts import write_about_captions
from caprl_jax.rl.judge import Judge, JudgeIds, judge_ids
from caprl_jax.rl.judge_protocol import JudgeConfig, no_answers
from caprl_jax.rl.reward import ArrayReward, RewardConfig, own_reward, score_captions
from caprl_jax.rl.rollout import RolloutConfig, sample_captions, see_once
from caprl_jax.rl.step_metrics import Stages, step_metrics
from caprl_jax.rl.update import Learner, UpdateConfig, penalise_kl, update_policy
from caprl_jax.types import (
  Answers,
  Array,
  Batch,
  Captions,
  Frozen,
  OwnReward,
  Samples,
  TrainState,
)


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """The sections of a config that the step reads."""

  rollout: RolloutConfig
  judge: JudgeConfig
  reward: RewardConfig
  advantage: AdvantageConfig
  update: UpdateConfig


@flax.struct.dataclass
class StageKeys:
  """The random keys of a step's stages."""

  rollout: Array
  judge: Array


def stage_keys(key: Array, step: Array) -> StageKeys:
  """The keys of a step. `key` itself is never consumed, so there is no stream to save."""
  key = jax.random.fold_in(key, step)
  return StageKeys(jax.random.fold_in(key, 0), jax.random.fold_in(key, 1))


def train_step(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  captions: Captions | None = None,
  answers: Answers | None = None,
  own: OwnReward | None = None,
  *,
  policy: Policy,
  judge: Decoder | Policy | None,
  tx: optax.GradientTransformation,
  cfg: StepConfig,
  kinds: tuple[str, ...] = (),
  rollout_shardings: Any = None,
  judge_shardings: Any = None,
  schedule: Callable[[Array], Array] | None = None,
  custom: ArrayReward | None = None,
) -> tuple[TrainState, dict[str, Array], Samples]:
  """Caption each image G times, judge the captions, improve the policy.

  Args:
    captions, answers: what rollout and judge made, where they are programs of their own
      (`write_captions`, `ask_judge`); None: they are part of this one.
    own: what the user's reward function of texts gave.
    judge: None where an endpoint gave `answers`, or nobody is asked.
    kinds: names of the questions' kinds, for metrics.
    rollout_shardings: where the policy's parameters lie while captions are written, if elsewhere
      than in the update.
    judge_shardings: where the judge's lie while it is asked, if elsewhere than between steps.
    schedule: of the learning rate, for its metric.
    custom: the user's reward function of arrays.

  Returns:
    The new state, metrics named `stage/name`, and samples for people to read.
  """
  learner = Learner(policy, tx, cfg.update, cfg.rollout.sampling.temperature, schedule)
  batch = see_once(policy, state.params, frozen.base, batch)
  captions = captions or write_captions(state, frozen, batch, policy, cfg, rollout_shardings)
  answers = answers or ask_judge(state, frozen, batch, captions, judge, cfg, judge_shardings)
  own = own or own_reward(custom, captions, answers, batch.questions)
  scored = score_captions(answers, captions, frozen.vocabulary, cfg.reward, own)
  groups = select_groups(scored, captions, batch, rollout=cfg.rollout, advantage=cfg.advantage)
  groups = penalise_kl(learner, frozen, groups)
  advantage_BG = advantages(groups, cfg.advantage)
  new_state, update = update_policy(learner, state, frozen, groups.rollout(advantage_BG))
  stages = Stages(captions, answers, scored, groups, advantage_BG, update)
  return new_state, step_metrics(stages, batch, kinds), stages.samples()


def write_captions(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  policy: Policy,
  cfg: StepConfig,
  rollout_shardings: Any = None,
) -> Captions:
  """The rollout: G captions per image by the parameters as they stand, or rounded where
  `cfg.rollout.weights` says so."""
  # In the dtype that is computed in, once: decoding reads all of them for every token.
  dtype = policy.cfg.text.dtype
  params = quantized.cast(merge_params(state.params, frozen.base), dtype)
  if cfg.rollout.weights == "int8":  # before they are gathered, which then sends half
    params["language_model"] = to_int8(params["language_model"])
    if rollout_shardings is not None:
      decoder = int8_shardings(rollout_shardings["language_model"])
      rollout_shardings = {**rollout_shardings, "language_model": decoder}
  if rollout_shardings is not None:
    params = jax.lax.with_sharding_constraint(params, rollout_shardings)
  key = stage_keys(state.key, state.step).rollout
  return sample_captions(policy, params, batch, key, vocabulary=frozen.vocabulary, cfg=cfg.rollout)


def ask_judge(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  captions: Captions,
  judge: Decoder | Policy | None,
  cfg: StepConfig,
  judge_shardings: Any = None,
  *,
  retokenised: JudgeIds | None = None,
) -> Answers:
  """The judge's answers from the captions; none of a batch without questions (K = 0).

  Args:
    judge, judge_shardings: as of `train_step`.
    retokenised: the captions in the judge's ids, where no table relates the vocabularies
      (`inference/retokenise.py`).
  """
  if not batch.questions.valid_BK.shape[1]:
    return no_answers(captions.ended_BG.shape, batch.questions)
  key = stage_keys(state.key, state.step).judge
  ids = JudgeIds.of(captions, frozen.vocabulary) if retokenised is None else retokenised
  model, ids = _judge_of(frozen, judge, ids, judge_shardings)
  if isinstance(model, Judge):
    return judge_ids(model, ids, batch.questions, key, cfg.judge)
  assert batch.sight is not None, "made without the judge's images"
  return score_with_images(model, ids, batch.sight, batch.questions.valid_BK, key, cfg.judge)


def judge_texts(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  captions: Captions,
  judge: Policy,
  cfg: StepConfig,
  judge_shardings: Any = None,
  *,
  retokenised: JudgeIds | None = None,
) -> tuple[Array, Array]:
  """What a judge that sees the image writes about the captions (reading `generate`), as
  `write_about_captions`; arguments as of `ask_judge`."""
  key = stage_keys(state.key, state.step).judge
  ids = JudgeIds.of(captions, frozen.vocabulary) if retokenised is None else retokenised
  model, ids = _judge_of(frozen, judge, ids, judge_shardings)
  assert isinstance(model, ImageJudge) and batch.sight is not None
  return write_about_captions(model, ids, batch.sight, key, cfg.judge)


def _judge_of(
  frozen: Frozen, judge: Decoder | Policy | None, ids: JudgeIds, judge_shardings: Any
) -> tuple[Judge | ImageJudge, JudgeIds]:
  """The judge with its parameters where they lie while it is asked, and the captions for it."""
  assert judge is not None and frozen.prompt is not None, "an endpoint is asked by the host"
  params = frozen.judge
  if judge_shardings is not None:
    # Gathered when the captions are there, not before: what writes them needs the memory.
    params, ids = jax.lax.optimization_barrier((params, ids))
    params = jax.lax.with_sharding_constraint(params, judge_shardings)
  if isinstance(judge, Decoder):
    return Judge(judge, params, frozen.prompt), ids
  return ImageJudge(judge, params, frozen.prompt), ids
