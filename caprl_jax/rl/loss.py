"""Log-probabilities, advantages -> (sum, count, metrics). The caller divides once, so microbatches
add up.
"""

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.masked import masked_max, masked_mean, masked_min, masked_sum
from caprl_jax.rl.gradients import LossSum, TokenNumbers
from caprl_jax.types import Array


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The policy-gradient loss, its aggregation, and what is added to it.

  surrogate: with r = exp(logp - old logp) per token, `clip`: -min(r A, clip(r, 1 - clip_low, 1 +
    clip_high) A), Schulman et al., arXiv 1707.06347; `gspo`: the same with one r per caption, the
    geometric mean of its tokens' (2507.18071); `cispo`: -clip(r) A logp with clip(r) a constant
    (2506.13585), without a lower bound where clip_low = 1; `reinforce`: -A logp, no ratio at all:
    CapRL's released recipe.
  clip_low, clip_high: bounds of the ratio below and above 1; high > low is DAPO's clip-higher
    (2503.14476).
  dual_clip: c > 1 bounds `clip` by -c A where A < 0 (Ye et al., 1912.09729); None: no such bound.
  aggregation: `token_mean` over all tokens of the batch; `sequence_mean`: mean over captions of
    the mean over their tokens (the original GRPO; CapRL++'s seq-mean-token-mean); `set_token_mean`:
    mean over sets of `set_captions` captions of the mean over the set's tokens, which is what
    OpenRLHF, and so the released CapRL-3B, makes of a token mean with micro-batches of 4: the
    longer the captions beside it, the less a token weighs; `constant`: sum over the largest number
    of tokens that there could be (Dr. GRPO, 2503.20783).
  set_captions: captions per set of `set_token_mean`: one each of so many neighbouring images of an
    optimizer step, where it has so many.
  kl: weight of KL(policy || reference); 0 needs no reference (CapRL's released recipe).
  kl_estimator: k1, k2, k3 (http://joschu.net/blog/kl-approx.html); `k3_clamped`, verl's
    low_var_kl; `k3_k2`, the value of k3 with the gradient of k2, which is the true one on samples
    of the policy itself; `full`, exact, over the whole vocabulary.
  kl_in: the `loss`, or the `reward`, summed over a caption's tokens.
  entropy: weight of the mean entropy, which is maximised.
  importance: weights exp(logp of the update's own forward pass - logp of the sampler) for what
    the two differ by, `truncate`d at importance_cap or `mask`ed above it. `none`: the old
    log-probabilities are the sampler's.
  importance_level: one weight per `token`, or one for the whole `sequence`.
  importance_cap: the largest weight.
  mask_truncated: captions that were cut at the limit stay in the baseline and out of the loss.
  """

  surrogate: Literal["clip", "gspo", "cispo", "reinforce"] = "clip"
  clip_low: float = 0.2
  clip_high: float = 0.2
  dual_clip: float | None = None
  aggregation: Literal["token_mean", "sequence_mean", "set_token_mean", "constant"] = "token_mean"
  set_captions: int = 4
  kl: float = 0.0
  kl_estimator: Literal["k1", "k2", "k3", "k3_clamped", "k3_k2", "full"] = "k3"
  kl_in: Literal["loss", "reward"] = "loss"
  entropy: float = 0.0
  importance: Literal["none", "truncate", "mask"] = "none"
  importance_level: Literal["token", "sequence"] = "token"
  importance_cap: float = 2.0
  mask_truncated: bool = False

  def __post_init__(self):
    top = self.clip_low == 1 and self.surrogate != "cispo"
    if not 0 <= self.clip_low <= 1 or top or self.clip_high < 0 or self.kl < 0:
      raise ValueError(
        f"clip_low = {self.clip_low} must be in [0, 1) (cispo: [0, 1]), clip_high = "
        f"{self.clip_high} and kl = {self.kl} >= 0"
      )
    if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
      raise ValueError(
        f"dual_clip = {self.dual_clip} must be above 1 + clip_high = {1 + self.clip_high}"
      )
    if self.dual_clip is not None and self.surrogate not in ("clip", "gspo"):
      raise ValueError(
        f"dual_clip = {self.dual_clip} is for surrogate 'clip' or 'gspo', not {self.surrogate!r}"
      )
    if self.set_captions < 1:
      raise ValueError(f"set_captions = {self.set_captions} must be at least 1")
    if self.importance_cap <= 0:
      raise ValueError(f"importance_cap = {self.importance_cap} must be positive")
    if self.kl_in == "reward" and self.kl_estimator in ("full", "k3_k2"):
      raise ValueError(
        "kl_in 'reward' takes a sampled estimate, k1, k2, k3 or k3_clamped, not "
        f"{self.kl_estimator!r}"
      )

  @property
  def by_token(self) -> bool:
    """Whether a token's loss depends on nothing but the token's own numbers."""
    of_sequence = self.importance != "none" and self.importance_level == "sequence"
    return self.surrogate != "gspo" and not of_sequence and not self.kl_is_exact

  @property
  def has_kl(self) -> bool:
    """Whether there is a KL term, and so a reference."""
    return self.kl > 0

  @property
  def kl_is_exact(self) -> bool:
    """Whether the KL term is over the whole vocabulary, from both models' hidden states."""
    return self.has_kl and self.kl_estimator == "full"

  @property
  def kl_is_sampled(self) -> bool:
    """Whether the KL term is estimated from the reference's log-probabilities of the captions."""
    return self.has_kl and self.kl_estimator != "full"


@flax.struct.dataclass
class LossInputs:
  """What the loss reads beside the policy's own log-probabilities and entropies."""

  sampled_logp_BGT: Array  # what the sampler recorded
  advantage_BG: Array
  counts_BGT: Array  # bool, tokens of scored captions up to their end token
  # of the update's own forward pass before the first of several optimizer steps; None: of this pass
  # where importance weights are on, else the sampler's
  old_logp_BGT: Array | None = None
  reference_logp_BGT: Array | None = None
  # the exact KL of each token's distribution, in place of an estimate from the reference's
  exact_kl_BGT: Array | None = None
  # of `set_tokens`, where these captions are but a piece of those that the sets are made of
  set_tokens_BG: Array | None = None

  def of_tokens(self, cfg: LossConfig) -> tuple["LossInputs", Array]:
    """The same with every number per token [B, G, T], and what each token weighs in the sum."""
    weight_BGT = token_weights(self.counts_BGT, cfg, self.set_tokens_BG)
    advantage_BGT = jnp.broadcast_to(self.advantage_BG[..., None], self.counts_BGT.shape)
    return dataclasses.replace(self, advantage_BG=advantage_BGT, set_tokens_BG=None), weight_BGT


def kl_estimate(logp: Array, reference_logp: Array, estimator: str) -> Array:
  """KL(policy || reference) a token from samples of the policy; see `LossConfig`."""
  d = reference_logp - logp
  k2 = 0.5 * d**2
  if estimator == "k1":
    return -d
  if estimator == "k2":
    return k2
  if estimator == "k3":
    return jnp.exp(d) - d - 1
  if estimator == "k3_clamped":
    d = jnp.clip(d, -20.0, 20.0)
    return jnp.clip(jnp.exp(d) - d - 1, -10.0, 10.0)
  k3 = jnp.exp(d) - d - 1
  return k2 + jax.lax.stop_gradient(k3 - k2)


def loss_count(counts_BGT: Array, cfg: LossConfig, set_tokens_BG: Array | None = None) -> Array:
  """What the summed loss is divided by: counted tokens, captions or sets that have one, or all the
  tokens that could be. Of a piece of the sets' captions: their part of the sets.
  """
  if cfg.aggregation == "constant":
    return jnp.asarray(counts_BGT.size)
  if cfg.aggregation == "set_token_mean":
    return (token_weights(counts_BGT, cfg, set_tokens_BG) * counts_BGT).sum()
  return counts_BGT.sum() if cfg.aggregation == "token_mean" else counts_BGT.any(-1).sum()


def token_weights(counts_BGT: Array, cfg: LossConfig, set_tokens_BG: Array | None = None) -> Array:
  """What each token's loss is multiplied by before all are summed, float32 [B, G, T]."""
  tokens_BG = counts_BGT.sum(-1)
  if cfg.aggregation == "set_token_mean":
    tokens_BG = set_tokens(counts_BGT, cfg) if set_tokens_BG is None else set_tokens_BG
  elif cfg.aggregation != "sequence_mean":
    tokens_BG = jnp.ones_like(tokens_BG)
  weight_BG = 1.0 / jnp.maximum(tokens_BG, 1)
  return jnp.broadcast_to(weight_BG[..., None], counts_BGT.shape)


def set_tokens(counts_BGT: Array, cfg: LossConfig) -> Array:
  """Counted tokens of the set that each caption is in, int32 [B, G]. A set has one caption each of
  `set_captions` neighbouring images (where there are so many), as a shuffled replay buffer would
  mix them."""
  tokens_BG = counts_BGT.sum(-1)
  assert tokens_BG.size % cfg.set_captions == 0, (tokens_BG.shape, cfg.set_captions)
  tokens_SC = tokens_BG.T.reshape(-1, cfg.set_captions)
  of_set_SC = jnp.broadcast_to(tokens_SC.sum(-1, keepdims=True), tokens_SC.shape)
  return of_set_SC.reshape(tokens_BG.T.shape).T


def importance_ratio(
  old_logp_BGT: Array, sampled_logp_BGT: Array, counts_BGT: Array, cfg: LossConfig
) -> Array:
  """exp(old - sampled), float32 [B, G, T] or [B, G, 1]; no gradient."""
  log_ratio = jnp.where(counts_BGT, old_logp_BGT - sampled_logp_BGT, 0.0)
  if cfg.importance_level == "sequence":
    log_ratio = log_ratio.sum(-1, keepdims=True)
  return jax.lax.stop_gradient(jnp.exp(log_ratio))


def importance_weights(
  old_logp_BGT: Array, sampled_logp_BGT: Array, counts_BGT: Array, cfg: LossConfig
) -> Array:
  """`importance_ratio`, truncated or masked."""
  weight = importance_ratio(old_logp_BGT, sampled_logp_BGT, counts_BGT, cfg)
  capped = (
    jnp.minimum(weight, cfg.importance_cap)
    if cfg.importance == "truncate"
    else jnp.where(weight > cfg.importance_cap, 0.0, weight)
  )
  return jax.lax.stop_gradient(capped)


@flax.struct.dataclass
class Surrogate:
  """The surrogate loss per token, float32 [B, G, T] each."""

  loss_BGT: Array
  ratio_BGT: Array
  cut_BGT: Array  # bool, clipping took the gradient away


def surrogate_loss(
  logp_BGT: Array,
  log_ratio_BGT: Array,
  advantage_BG: Array,
  counts_BGT: Array,
  cfg: LossConfig,
) -> Surrogate:
  """The policy-gradient loss per token, by `cfg.surrogate`; formulas in `LossConfig`."""
  advantage = advantage_BG[..., None]
  if cfg.surrogate == "gspo":
    log_ratio_BGT = jnp.broadcast_to(
      masked_mean(log_ratio_BGT, counts_BGT, axis=-1, keepdims=True), counts_BGT.shape
    )
  ratio = jnp.exp(log_ratio_BGT)
  clipped = jnp.clip(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high)
  if cfg.surrogate == "reinforce":
    return Surrogate(-advantage * logp_BGT, ratio, jnp.zeros(ratio.shape, bool))
  if cfg.surrogate == "cispo":
    loss = -jax.lax.stop_gradient(clipped) * advantage * logp_BGT
    return Surrogate(loss, ratio, clipped != ratio)
  gain = jnp.minimum(ratio * advantage, clipped * advantage)
  cut = clipped * advantage < ratio * advantage
  if cfg.dual_clip is not None:
    floor = cfg.dual_clip * advantage
    cut |= (advantage < 0) & (gain < floor)
    gain = jnp.where(advantage < 0, jnp.maximum(gain, floor), gain)
  return Surrogate(-gain, ratio, cut)


def policy_loss(logp_BGT: Array, entropy_BGT: Array, given: LossInputs, cfg: LossConfig) -> LossSum:
  """The loss summed over what counts, with statistics over the counted tokens.

  Tokens that do not count may hold anything, nan and infinities too: they have no part in the loss
  and no gradient.
  """
  loss_BGT, numbers = _token_losses(logp_BGT, entropy_BGT, given, cfg)
  counts_BGT = given.counts_BGT
  sets = (counts_BGT, cfg, given.set_tokens_BG)
  total = masked_sum(loss_BGT * token_weights(*sets), counts_BGT)
  return LossSum(total, loss_count(*sets), numbers)


def token_loss(
  logp_MX: Array, entropy_M: Array, given: tuple[LossInputs, Array], cfg: LossConfig
) -> Array:
  """What each token adds to `policy_loss`'s total [M, X], from what `LossInputs.of_tokens` says of
  it, where `cfg.by_token`: a `models.head.TokenLoss`."""
  inputs, weight_MX = given
  # Tokens as captions of one token.
  tokens = jax.tree.map(lambda x: x[..., None], inputs)
  tokens = dataclasses.replace(tokens, advantage_BG=inputs.advantage_BG)
  logp_MX1 = logp_MX[..., None]
  entropy_MX1 = jnp.broadcast_to(entropy_M[:, None, None], logp_MX1.shape)
  loss_MX1, _ = _token_losses(logp_MX1, entropy_MX1, tokens, cfg)
  return jnp.where(inputs.counts_BGT, loss_MX1[..., 0] * weight_MX, 0.0)


def _token_losses(
  logp_BGT: Array, entropy_BGT: Array, given: LossInputs, cfg: LossConfig
) -> tuple[Array, TokenNumbers]:
  """Each token's loss, which may be anything where it does not count; and statistics."""
  counts_BGT = given.counts_BGT

  def quiet(x: Array) -> Array:  # before exp: inf times a zero mask would be nan
    return jnp.where(counts_BGT, x, 0.0)

  logp, sampled = quiet(logp_BGT), quiet(given.sampled_logp_BGT)
  own = jax.lax.stop_gradient(logp) if given.old_logp_BGT is None else quiet(given.old_logp_BGT)
  old = sampled if cfg.importance == "none" else own
  surrogate = surrogate_loss(logp, logp - old, given.advantage_BG, counts_BGT, cfg)
  loss_BGT, ratio = surrogate.loss_BGT, surrogate.ratio_BGT
  off_BGT = jnp.abs(own - sampled)
  sums = {
    "entropy": masked_sum(entropy_BGT, counts_BGT),
    "clip_fraction": masked_sum(surrogate.cut_BGT, counts_BGT),
    "logp_difference": masked_sum(off_BGT, counts_BGT),
    "ratio": masked_sum(ratio, counts_BGT),
  }
  maxima = {
    "ratio": masked_max(ratio, counts_BGT),
    "logp_difference": masked_max(off_BGT, counts_BGT),
  }
  if cfg.importance != "none":
    whole = importance_ratio(own, sampled, counts_BGT, cfg)
    whole_BGT = jnp.broadcast_to(whole, counts_BGT.shape)
    weight = importance_weights(own, sampled, counts_BGT, cfg)
    loss_BGT *= weight
    sums["importance"] = masked_sum(jnp.broadcast_to(weight, counts_BGT.shape), counts_BGT)
    sums["importance_cut"] = masked_sum(whole_BGT > cfg.importance_cap, counts_BGT)
    maxima["importance"] = masked_max(whole_BGT, counts_BGT)
  kl_BGT = given.exact_kl_BGT
  if kl_BGT is None and given.reference_logp_BGT is not None:
    kl_BGT = kl_estimate(logp, quiet(given.reference_logp_BGT), cfg.kl_estimator)
  if kl_BGT is not None:
    if cfg.kl_in == "loss":
      loss_BGT += cfg.kl * kl_BGT
    sums["kl"] = masked_sum(kl_BGT, counts_BGT)
  if cfg.entropy:
    loss_BGT -= cfg.entropy * entropy_BGT
  return loss_BGT, TokenNumbers(
    tokens=counts_BGT.sum().astype(jnp.float32),
    sums=sums,
    maxima=maxima,
    minima={"ratio": masked_min(ratio, counts_BGT)},
  )
