"""One CapRL step: rollout, judge, advantages, update, all on the device, jitted as one."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from caprl_jax import sharding
from caprl_jax.masked import masked_mean, masked_std, masked_sum
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.policy import Policy
from caprl_jax.models.trainable import merge_params
from caprl_jax.rl.advantages import AdvantageConfig, flat_groups, group_advantages
from caprl_jax.rl.judge import judge_captions, judge_ids
from caprl_jax.rl.judge_protocol import JudgeConfig
from caprl_jax.rl.loss import kl_estimate
from caprl_jax.rl.reward import RewardConfig, caption_reward
from caprl_jax.rl.rollout import RolloutConfig, sample_captions
from caprl_jax.rl.update import Rollout, UpdateConfig, score_captions, update_policy
from caprl_jax.types import Answers, Array, Batch, Captions, Frozen, TrainState


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """The sections of a config that the step reads."""

  rollout: RolloutConfig
  judge: JudgeConfig
  reward: RewardConfig
  advantage: AdvantageConfig
  update: UpdateConfig


def stage_keys(key: Array, step: Array) -> tuple[Array, Array]:
  """The rollout's and the judge's keys for a step; `key` itself is never consumed, so there is no
  stream to save.
  """
  key = jax.random.fold_in(key, step)
  return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)


def train_step(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  *,
  policy: Policy,
  judge: Decoder,
  tx: optax.GradientTransformation,
  cfg: StepConfig,
  kinds: tuple[str, ...] = (),
  rollout_shardings=None,
  schedule: Callable[[Array], Array] | None = None,
):
  """Caption each image G times, judge the captions, improve the policy.

  `rollout_shardings`: where the policy's parameters lie while captions are written, if elsewhere
  than in the update.
  `schedule`: of the learning rate, for its metric.

  Returns the new state, metrics named `stage/name`, and samples (captions, answers, reward_BG,
  scored_BG, advantage_BG) for people to read.
  """
  captions = write_captions(
    state, frozen, batch, policy=policy, cfg=cfg, rollout_shardings=rollout_shardings
  )
  answers, blind = ask_judge(state, frozen, batch, captions, judge=judge, cfg=cfg)
  return learn(
    state,
    frozen,
    batch,
    captions,
    answers,
    blind,
    policy=policy,
    tx=tx,
    cfg=cfg,
    kinds=kinds,
    schedule=schedule,
  )


def write_captions(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  *,
  policy: Policy,
  cfg: StepConfig,
  rollout_shardings=None,
) -> Captions:
  """The rollout: G captions an image by the parameters as they stand."""
  rollout_key, _ = stage_keys(state.key, state.step)
  params = merge_params(state.params, frozen.base)
  if rollout_shardings is not None:  # gathered once, in the dtype that is computed in
    params = jax.tree.map(lambda x: x.astype(policy.cfg.text.dtype), params)
    params = jax.lax.with_sharding_constraint(params, rollout_shardings)
  return sample_captions(policy, params, batch, rollout_key, frozen.vocabulary, cfg.rollout)


def ask_judge(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  captions: Captions,
  translated=None,
  *,
  judge: Decoder,
  cfg: StepConfig,
) -> tuple[Answers, Answers | None]:
  """Answers from the captions, and from an empty one (`JudgeConfig.blind`). `translated`: the
  captions in the judge's ids and which of them count, where no table relates the vocabularies
  (`retokenise.py`)."""
  _, judge_key = stage_keys(state.key, state.step)
  asked = (judge, frozen.judge, frozen.prompt)
  if translated is not None:
    return judge_ids(*asked, *translated, batch.questions, judge_key, cfg.judge)
  return judge_captions(*asked, captions, batch.questions, frozen.vocabulary, judge_key, cfg.judge)


def learn(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  captions: Captions,
  answers: Answers,
  blind: Answers | None,
  *,
  policy: Policy,
  tx: optax.GradientTransformation,
  cfg: StepConfig,
  kinds: tuple[str, ...] = (),
  schedule: Callable[[Array], Array] | None = None,
):
  """Rewards, advantages, update; returns as `train_step`."""
  written = captions
  reward_BG, scored_BG, terms = caption_reward(answers, captions, cfg.reward, frozen.stamps_VX)
  weights = {name: weight for name, weight in cfg.reward.weights().items() if weight}
  flat_B = flat_groups(reward_BG, scored_BG)
  if cfg.advantage.estimator == "gdpo":  # a group teaches where any term differs
    flat_B = jnp.stack([flat_groups(terms[name], scored_BG) for name in weights]).all(0)
  metrics = {
    **rollout_metrics(captions),
    **judge_metrics(answers, batch.questions.kind_BK, kinds),
    **reward_metrics(reward_BG, scored_BG, terms, flat_B),
  }
  if blind is not None:
    metrics["judge/blind"] = masked_mean(blind.credit_BGK, blind.valid_BGK)

  # From here on, the images that are learned from.
  used, chosen_B = (batch, captions, reward_BG, scored_BG, terms), None
  if cfg.rollout.oversample > 1:
    chosen_B = jnp.argsort(flat_B, stable=True)[: flat_B.shape[0] // cfg.rollout.oversample]
    used = sharding.split_over_batch(jax.tree.map(lambda x: x[chosen_B], used))
    metrics["advantage/flat_groups_used"] = flat_B[chosen_B].mean()
  batch, captions, used_reward_BG, used_BG, terms = used
  weighted = [(weight, terms[name]) for name, weight in weights.items()]
  temperature, loss, reference = cfg.rollout.sampling.temperature, cfg.update.loss, None
  if loss.kl > 0 and loss.kl_estimator != "full":
    reference = score_captions(
      policy,
      merge_params(frozen.reference, frozen.base),
      frozen,
      batch,
      captions,
      temperature,
      cfg.update,
    )
    if loss.kl_in == "reward":
      kl_BGT = kl_estimate(captions.logp_BGT, reference, loss.kl_estimator)
      penalty_BG = masked_sum(kl_BGT, captions.valid_BGT, axis=-1)
      used_reward_BG -= loss.kl * penalty_BG
      weighted = [*weighted, (-loss.kl, penalty_BG)]
  advantage_BG = group_advantages(
    used_reward_BG, used_BG, cfg.advantage, weighted, captions.valid_BGT.sum(-1)
  )
  rollout = Rollout(batch, captions, used_BG, advantage_BG, reference)
  metrics["advantage/abs"] = jnp.abs(advantage_BG).mean()
  if schedule is not None:
    metrics["update/learning_rate"] = schedule(state.step * cfg.update.steps)
  state, update_metrics = update_policy(policy, tx, state, frozen, rollout, temperature, cfg.update)
  if chosen_B is not None:  # samples are of all images
    advantage_BG = jnp.zeros(reward_BG.shape).at[chosen_B].set(advantage_BG)
  return (
    state,
    {**metrics, **update_metrics},
    (written, answers, reward_BG, scored_BG, advantage_BG),
  )


def rollout_metrics(captions: Captions) -> dict[str, Array]:
  """Caption length in tokens (end token included), all tokens written, and the share of captions
  cut at the limit.
  """
  length_BG = captions.valid_BGT.sum(-1)
  return {
    "rollout/length": length_BG.mean(),
    "rollout/tokens": length_BG.sum(),
    "rollout/truncated": 1.0 - captions.ended_BG.mean(),
  }


def judge_metrics(answers: Answers, kind_BK: Array, kinds: tuple[str, ...]) -> dict[str, Array]:
  """Accuracy over all questions and per kind (NaN for a kind that no question of the batch has),
  the share of questions on which the judge abstained, and the share that it answered wrong."""
  valid = answers.valid_BGK
  metrics = {
    "judge/accuracy": masked_mean(answers.correct_BGK, valid),
    "judge/abstained": masked_mean(answers.choice_BGK < 0, valid),
    "judge/misled": masked_mean((answers.choice_BGK >= 0) & ~answers.correct_BGK, valid),
  }
  kind_BGK = jnp.take_along_axis(
    jnp.broadcast_to(kind_BK[:, None], (*valid.shape[:2], kind_BK.shape[1])),
    answers.question_BGK,
    axis=-1,
  )
  for i, kind in enumerate(kinds):
    of_kind = valid & (kind_BGK == i)
    metrics[f"judge/accuracy/{kind}"] = jnp.where(
      of_kind.any(), masked_mean(answers.correct_BGK, of_kind), jnp.nan
    )
  return metrics


def reward_metrics(
  reward_BG: Array, scored_BG: Array, terms: dict[str, Array], flat_B: Array
) -> dict[str, Array]:
  """Reward and its terms over scored captions, its spread within groups, flat groups and unscored
  captions.
  """
  return {
    "reward/mean": masked_mean(reward_BG, scored_BG),
    "reward/group_std": masked_std(reward_BG, scored_BG, axis=1).mean(),
    "reward/unscored": 1.0 - scored_BG.mean(),
    **{f"reward/{name}": masked_mean(value, scored_BG) for name, value in terms.items()},
    "advantage/flat_groups": flat_B.mean(),
    "advantage/excluded_groups": (scored_BG.sum(1) < 2).mean(),
  }
