"""Scored captions -> the groups that are learned from."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.rl.advantages import AdvantageConfig, flat_groups, group_advantages
from caprl_jax.rl.rollout import RolloutConfig
from caprl_jax.types import Array, Batch, Captions, Scored


@flax.struct.dataclass
class Rollout:
  """What the loss reads of a rollout, all split by image."""

  batch: Batch
  captions: Captions
  scored_BG: Array  # bool
  advantage_BG: Array  # float32
  reference_logp_BGT: Array | None = None  # float32, where a KL term samples it
  # float32, of the update's own forward pass before the first of several optimizer steps
  old_logp_BGT: Array | None = None
  # int32, tokens that count in the set of each caption, where the loss is a mean over sets
  set_tokens_BG: Array | None = None


@flax.struct.dataclass
class Groups:
  """The images that are learned from, each with its group of captions.

  With `rollout.oversample` these are fewer than were captioned: b images in place of B.
  """

  batch: Batch
  captions: Captions
  scored: Scored
  flat_B: Array  # bool, of all images captioned: the group carries no signal
  image_b: Array | None = None  # int32, which of the B images these are; None: all
  reference_logp_BGT: Array | None = None  # float32, where a KL term samples it

  def rollout(self, advantage_BG: Array) -> Rollout:
    """These groups with their advantages, as the update takes them."""
    return Rollout(
      self.batch, self.captions, self.scored.scored_BG, advantage_BG, self.reference_logp_BGT
    )

  def of_all_images(self, advantage_BG: Array) -> Array:
    """[b, G] -> [B, G]: 0 for images that are not learned from."""
    if self.image_b is None:
      return advantage_BG
    everywhere = jnp.zeros((self.flat_B.shape[0], *advantage_BG.shape[1:]))
    return everywhere.at[self.image_b].set(advantage_BG)


def groups_without_signal(scored: Scored, cfg: AdvantageConfig) -> Array:
  """bool [B]: no caption of the group would get an advantage. With `gdpo` a group teaches where any
  of the reward's terms differs."""
  if cfg.estimator != "gdpo":
    return flat_groups(scored.reward_BG, scored.scored_BG)
  flat = [flat_groups(scored.terms[name], scored.scored_BG) for name, _ in scored.weights]
  return jnp.stack(flat).all(0)


def select_groups(
  scored: Scored,
  captions: Captions,
  batch: Batch,
  *,
  rollout: RolloutConfig,
  advantage: AdvantageConfig,
) -> Groups:
  """All groups, or with `rollout.oversample` those that carry a signal first (DAPO's dynamic
  sampling, arXiv 2503.14476, in a fixed shape), in the order of the batch."""
  flat_B = groups_without_signal(scored, advantage)
  # The judge's part, which the update does not read.
  batch = dataclasses.replace(batch, sight=None, questions=None, question_BK=None)
  if rollout.oversample == 1:
    return Groups(batch, captions, scored, flat_B)
  image_b = jnp.argsort(flat_B, stable=True)[: flat_B.shape[0] // rollout.oversample]
  taken = jax.tree.map(lambda x: x[image_b], (batch, captions, scored))
  batch, captions, scored = sharding.split_over_batch(taken)
  return Groups(batch, captions, scored, flat_B, image_b)


def advantages(groups: Groups, cfg: AdvantageConfig) -> Array:
  """The advantage of each caption relative to its group, float32 [b, G]; see `group_advantages`."""
  scored = groups.scored
  return group_advantages(
    scored.reward_BG,
    scored.scored_BG,
    cfg,
    terms=[(weight, scored.terms[name]) for name, weight in scored.weights],
    tokens_BG=groups.captions.valid_BGT.sum(-1),
  )
