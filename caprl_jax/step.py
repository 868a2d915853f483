"""One CapRL step: rollout, judge, advantages, update, all on the device, jitted as one."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from caprl_jax.advantages import AdvantageConfig, flat_groups, group_advantages
from caprl_jax.judging import JudgeConfig, judge_captions, judge_ids
from caprl_jax.masked import masked_mean, masked_std
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.lora import whole
from caprl_jax.models.policy import Policy
from caprl_jax.reward import RewardConfig, caption_reward
from caprl_jax.rollout import RolloutConfig, sample_captions
from caprl_jax.types import Answers, Array, Batch, Captions, Frozen, TrainState
from caprl_jax.update import UpdateConfig, update_policy


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """The sections of a config that the step reads."""
  rollout: RolloutConfig
  judge: JudgeConfig
  reward: RewardConfig
  advantage: AdvantageConfig
  update: UpdateConfig


def stage_keys(key: Array, step: Array) -> tuple[Array, Array]:
  """The rollout's and the judge's keys for a step; `key` itself is never consumed, so there is no stream to save."""
  key = jax.random.fold_in(key, step)
  return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)


def train_step(state: TrainState, frozen: Frozen, batch: Batch, *, policy: Policy, judge: Decoder,
               tx: optax.GradientTransformation, cfg: StepConfig, kinds: tuple[str, ...] = (), rollout_shardings=None):
  """Caption each image G times, judge the captions, improve the policy.

  `rollout_shardings`: where the policy's parameters lie while captions are written, if elsewhere than in the update.

  Returns the new state, metrics named `stage/name`, and samples (captions, answers, reward_BG, scored_BG,
  advantage_BG) for people to read.
  """
  _, judge_key = stage_keys(state.key, state.step)
  captions = write_captions(state, frozen, batch, policy=policy, cfg=cfg, rollout_shardings=rollout_shardings)
  answers = judge_captions(judge, frozen.judge, frozen.prompt, captions, batch.questions, frozen.vocabulary,
                           judge_key, cfg.judge)
  return learn(state, frozen, batch, captions, answers, policy=policy, tx=tx, cfg=cfg, kinds=kinds)


def write_captions(state: TrainState, frozen: Frozen, batch: Batch, *, policy: Policy, cfg: StepConfig,
                   rollout_shardings=None) -> Captions:
  """The rollout: G captions an image by the parameters as they stand."""
  rollout_key, _ = stage_keys(state.key, state.step)
  params = whole(state.params, frozen.base)
  if rollout_shardings is not None:  # gathered once, in the dtype that is computed in
    params = jax.tree.map(lambda x: x.astype(policy.cfg.text.dtype), params)
    params = jax.lax.with_sharding_constraint(params, rollout_shardings)
  return sample_captions(policy, params, batch, rollout_key, frozen.vocabulary, cfg.rollout)


def judge_and_learn(state: TrainState, frozen: Frozen, batch: Batch, captions: Captions, judge_id_BGT: Array,
                    keep_BGT: Array, *, policy: Policy, judge: Decoder, tx: optax.GradientTransformation,
                    cfg: StepConfig, kinds: tuple[str, ...] = ()):
  """What follows the rollout, where captions come in the judge's ids (`translate.py`); returns as `train_step`."""
  _, judge_key = stage_keys(state.key, state.step)
  answers = judge_ids(judge, frozen.judge, frozen.prompt, judge_id_BGT, keep_BGT, batch.questions, judge_key, cfg.judge)
  return learn(state, frozen, batch, captions, answers, policy=policy, tx=tx, cfg=cfg, kinds=kinds)


def learn(state: TrainState, frozen: Frozen, batch: Batch, captions: Captions, answers: Answers, *, policy: Policy,
          tx: optax.GradientTransformation, cfg: StepConfig, kinds: tuple[str, ...] = ()):
  """Rewards, advantages, update; returns as `train_step`."""
  reward_BG, scored_BG, terms = caption_reward(answers, batch.questions.valid_BK, cfg.reward)
  advantage_BG = group_advantages(reward_BG, scored_BG, cfg.advantage)
  state, update_metrics = update_policy(policy, tx, state, frozen, batch, captions, scored_BG, advantage_BG,
                                        cfg.rollout.sampling.temperature, cfg.update)
  metrics = {**rollout_metrics(captions), **judge_metrics(answers, batch.questions.kind_BK, kinds),
             **reward_metrics(reward_BG, scored_BG, terms, advantage_BG), **update_metrics}
  return state, metrics, (captions, answers, reward_BG, scored_BG, advantage_BG)


def rollout_metrics(captions: Captions) -> dict[str, Array]:
  """Caption length in tokens (end token included) and the share cut at the limit."""
  return {"rollout/length": captions.valid_BGT.sum(-1).mean(), "rollout/truncated": 1.0 - captions.ended_BG.mean()}


def judge_metrics(answers: Answers, kind_BK: Array, kinds: tuple[str, ...]) -> dict[str, Array]:
  """Accuracy over all questions and per kind (NaN for a kind that no question of the batch has), and the share of
  questions with no or a wrong answer."""
  valid = answers.valid_BGK
  metrics = {"judge/accuracy": masked_mean(answers.correct_BGK, valid),
             "judge/abstained": masked_mean(answers.choice_BGK < 0, valid),
             "judge/misled": masked_mean((answers.choice_BGK >= 0) & ~answers.correct_BGK, valid)}
  for i, kind in enumerate(kinds):
    of_kind = valid & (kind_BK == i)[:, None]
    metrics[f"judge/accuracy/{kind}"] = jnp.where(of_kind.any(), masked_mean(answers.correct_BGK, of_kind), jnp.nan)
  return metrics


def reward_metrics(reward_BG: Array, scored_BG: Array, terms: dict[str, Array], advantage_BG: Array):
  """Reward and its terms over scored captions, its spread within groups, flat groups and unscored captions."""
  return {"reward/mean": masked_mean(reward_BG, scored_BG),
          "reward/group_std": masked_std(reward_BG, scored_BG, axis=1).mean(),
          "reward/unscored": 1.0 - scored_BG.mean(),
          **{f"reward/{name}": masked_mean(value, scored_BG) for name, value in terms.items()},
          "advantage/flat_groups": flat_groups(reward_BG, scored_BG).mean(),
          "advantage/abs": jnp.abs(advantage_BG).mean()}
