"""Log-probabilities, advantages -> (sum, count, metrics). The caller divides once, so microbatches add up."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from caprl_jax.masked import masked_max, masked_mean, masked_min, masked_sum
from caprl_jax.types import Array


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The clipped surrogate and its aggregation.

  clip_low, clip_high: the ratio is clipped to [1 - low, 1 + high]; high > low is DAPO's clip-higher (2503.14476).
  aggregation: `token_mean` over all tokens of the batch, or `sequence_mean`: mean over captions of the mean over
    their tokens (the original GRPO; CapRL++'s seq-mean-token-mean).
  kl: weight of the k3 estimate of KL(policy || reference); 0 needs no reference (CapRL's released recipe).
  """
  clip_low: float = 0.2
  clip_high: float = 0.2
  aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
  kl: float = 0.0

  def __post_init__(self):
    if not 0 <= self.clip_low < 1 or self.clip_high < 0 or self.kl < 0:
      raise ValueError(f"clip_low = {self.clip_low} must be in [0, 1), clip_high = {self.clip_high} and "
                       f"kl = {self.kl} >= 0")


def k3_kl(logp: Array, reference_logp: Array) -> Array:
  """exp(d) - d - 1 with d = log(reference / policy): unbiased and never negative
  (Schulman, http://joschu.net/blog/kl-approx.html)."""
  d = reference_logp - logp
  return jnp.exp(d) - d - 1


def loss_count(counts_BGT: Array, cfg: LossConfig) -> Array:
  """What the summed loss is divided by: counted tokens, or captions that have one."""
  return counts_BGT.sum() if cfg.aggregation == "token_mean" else counts_BGT.any(-1).sum()


def policy_loss(logp_BGT: Array, old_logp_BGT: Array, reference_logp_BGT: Array | None, entropy_BGT: Array,
                advantage_BG: Array, counts_BGT: Array, cfg: LossConfig):
  """-min(r A, clip(r) A) + kl * k3, with r = exp(logp - old_logp), summed (Schulman et al., arXiv 1707.06347).

  Args:
    counts_BGT: bool, tokens of scored captions up to their end token.

  Returns:
    The summed loss, the count to divide it by, and metrics: `sum/...` over counted tokens, `max/...`, `min/...`.
  """
  advantage = advantage_BG[..., None]
  # What does not count is set to a ratio of 1 before exp: inf times a zero mask would be nan.
  log_ratio = jnp.where(counts_BGT, logp_BGT - old_logp_BGT, 0.0)
  ratio = jnp.exp(log_ratio)
  clipped = jnp.clip(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high)
  loss_BGT = -jnp.minimum(ratio * advantage, clipped * advantage)
  metrics = {
      "sum/entropy": masked_sum(entropy_BGT, counts_BGT),
      "sum/clip_fraction": masked_sum(clipped * advantage < ratio * advantage, counts_BGT),
      "sum/logp_difference": masked_sum(jnp.abs(log_ratio), counts_BGT),
      "max/ratio": masked_max(ratio, counts_BGT), "min/ratio": masked_min(ratio, counts_BGT),
  }
  if reference_logp_BGT is not None:
    kl_BGT = k3_kl(*(jnp.where(counts_BGT, x, 0.0) for x in (logp_BGT, reference_logp_BGT)))
    loss_BGT += cfg.kl * kl_BGT
    metrics["sum/kl"] = masked_sum(kl_BGT, counts_BGT)
  if cfg.aggregation == "token_mean":
    total = masked_sum(loss_BGT, counts_BGT)
  else:
    total = masked_mean(loss_BGT, counts_BGT, axis=-1).sum()
  return total, loss_count(counts_BGT, cfg), metrics
