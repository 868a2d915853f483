"""What the stages of a step made -> its metrics, named `stage/name`, scalars on the device."""

import flax.struct
import jax.numpy as jnp

from caprl_jax.masked import masked_mean, masked_std
from caprl_jax.rl.groups import Groups
from caprl_jax.rl.update import UpdateNumbers
from caprl_jax.types import Answers, Array, Batch, Captions, Samples, Scored


@flax.struct.dataclass
class Stages:
  """What each stage of a step made."""

  captions: Captions
  answers: Answers
  scored: Scored  # of all images, before a KL penalty
  groups: Groups  # those learned from
  advantage_BG: Array  # theirs
  update: UpdateNumbers

  def samples(self) -> Samples:
    """What people read of a step, for all its images."""
    return Samples(
      self.captions,
      self.answers,
      self.scored.reward_BG,
      self.scored.scored_BG,
      self.groups.of_all_images(self.advantage_BG),
    )


def step_metrics(stages: Stages, batch: Batch, kinds: tuple[str, ...]) -> dict[str, Array]:
  """All metrics of a step, stage by stage. `kinds`: names of the questions' kinds."""
  return {
    **batch_metrics(batch),
    **rollout_metrics(stages.captions),
    **judge_metrics(stages.answers, batch.questions.kind_BK, kinds),
    **reward_metrics(stages.scored),
    **advantage_metrics(stages.scored, stages.groups, stages.advantage_BG),
    **update_metrics(stages.update),
  }


def batch_metrics(batch: Batch) -> dict[str, Array]:
  """Image tokens that each image of the batch is padded to (which tells its bucket of shapes), and
  the share of them that is padding."""
  I = batch.images.unit_BI.shape[1]
  text = batch.prompts.valid_BP.shape[1] - I
  tokens_B = batch.prompts.valid_BP.sum(-1) - text
  return {"data/image_tokens": jnp.float32(I), "data/padding": 1.0 - tokens_B.mean() / I}


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
  the share of questions on which the judge abstained, the share that it answered wrong, and what an
  empty caption earns. Nothing without a judge."""
  if not answers.judged:
    return {}
  valid = answers.valid_BGK
  metrics = {
    "judge/accuracy": masked_mean(answers.correct_BGK, valid),
    "judge/abstained": masked_mean(answers.choice_BGK < 0, valid),
    "judge/misled": masked_mean((answers.choice_BGK >= 0) & ~answers.correct_BGK, valid),
  }
  if answers.blind is not None:
    metrics["judge/blind"] = masked_mean(answers.blind.credit_BGK, answers.blind.valid_BGK)
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


def reward_metrics(scored: Scored) -> dict[str, Array]:
  """Reward and its terms over scored captions, its spread within groups, and the share of captions
  that could not be scored."""
  reward_BG, scored_BG = scored.reward_BG, scored.scored_BG
  return {
    "reward/mean": masked_mean(reward_BG, scored_BG),
    "reward/group_std": masked_std(reward_BG, scored_BG, axis=1).mean(),
    "reward/unscored": 1.0 - scored_BG.mean(),
    **{f"reward/{name}": masked_mean(value, scored_BG) for name, value in scored.terms.items()},
  }


def advantage_metrics(scored: Scored, groups: Groups, advantage_BG: Array) -> dict[str, Array]:
  """The mean size of advantages, and the shares of groups that are flat (captioned, and learned
  from) or have fewer than two scored captions."""
  metrics = {
    "advantage/abs": jnp.abs(advantage_BG).mean(),
    "advantage/flat_groups": groups.flat_B.mean(),
    "advantage/excluded_groups": (scored.scored_BG.sum(1) < 2).mean(),
  }
  if groups.image_b is not None:
    metrics["advantage/flat_groups_used"] = groups.flat_B[groups.image_b].mean()
  return metrics


def update_metrics(update: UpdateNumbers) -> dict[str, Array]:
  """Loss, gradient norms, learning rate and the ratio's statistics."""
  return {f"update/{name}": value for name, value in update.named().items()}
