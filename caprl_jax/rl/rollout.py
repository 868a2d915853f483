"""Batch, key -> captions, and captions -> their log-probabilities: each image is encoded and its
prompt prefilled once; G captions branch from there.

R: slots of a row in which the captions of a group stand one after the other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.models.attention import Prefix
from caprl_jax.models.blocks import Row, extend_in_blocks, running
from caprl_jax.models.decoder import DecoderConfig, head_matrix
from caprl_jax.models.head import EntropyKind, TokenLoss, token_logprobs, token_loss
from caprl_jax.models.policy import Policy, last_hidden
from caprl_jax.rl.sampling import SamplingConfig, decode
from caprl_jax.types import (
  Array,
  Batch,
  Captions,
  Images,
  Params,
  Prompts,
  SeenImages,
  Vocabulary,
)

# Rows of packed captions are run in MOST_BLOCKS blocks, or in more where each has ENOUGH_TOKENS on
# a device all the same: with fewer it would wait for weights rather than save work. Matrices of up
# to SMALL_MATRIX numbers are not waited for.
MOST_BLOCKS, ENOUGH_TOKENS, SMALL_MATRIX = 16, 2048, 2**20
MOST_PATCHES = 32_768  # that a device encodes at once while captions are written
# Smaller blocks, in slots of a row and in tokens of a device, save less than a further round costs.
SMALLEST_BLOCK, FEWEST_TOKENS = 128, 256


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """How many captions an image gets and how they are sampled.

  group_size: captions per image.
  sampling: how a caption's tokens are drawn.
  oversample: images captioned for each image that is learned from: of these, groups that carry a
    signal come first (DAPO's dynamic sampling, arXiv 2503.14476, in a fixed shape).
    `data.batch_size` counts those learned from.
  end_cut: a caption that reaches the limit gets an end token in the place of its last one, and is
    rewarded and learned from with it, as in the released CapRL-3B (OpenRLHF). For the surrogate
    `reinforce` only: the recorded log-probability stays the drawn token's.
  weights: captions are written by the captioner's weights in `full` (`policy.dtype`), or with those
    of its decoder's layers rounded to `int8` once per step, as `judge.int8` rounds, so that each
    token reads half of them. The recorded log-probabilities are the rounded captioner's, and
    importance weights (`policy_update.loss.importance`) correct the loss for what the two differ
    by: they are on, `truncate` where `importance` is `none`. Evaluations are in full.
  """

  group_size: int
  sampling: SamplingConfig
  oversample: int = 1
  end_cut: bool = False
  weights: Literal["full", "int8"] = "full"

  def __post_init__(self):
    if self.group_size < 1 or self.oversample < 1:
      raise ValueError(
        f"group_size = {self.group_size} and oversample = {self.oversample} must be at least 1"
      )


def _prefill(
  policy: Policy, params: Params, images: Images | SeenImages, prompts: Prompts
) -> tuple[Array, Prefix]:
  """Image and prompt, once per image: hidden states [B, P, D] and the prefix that captions branch
  from."""
  out: Any = policy.apply({"params": params}, images, prompts, method="prefill")
  return out


def _encoded_at_once(images: Images | SeenImages) -> int:
  """Into how many pieces a batch of images is cut, so that a device encodes at most `MOST_PATCHES`
  at a time."""
  if isinstance(images, SeenImages):
    return 1
  slots = images.patches_BSE.shape[1]
  if len(images.patches_BSE) != len(images.unit_BI):
    return 1
  share = len(images.unit_BI) // sharding.batch_shards()
  fitting = (n for n in range(1, share + 1) if share % n == 0 and share * slots <= n * MOST_PATCHES)
  return next(fitting, max(share, 1))


def see_once(policy: Policy, trained: Params, base: Params | None, batch: Batch) -> Batch:
  """The batch with its images' features in the place of the images, where nothing of the tower is
  trained: rollout, reference and update then read what was made once."""
  if base is None or "visual" in trained or isinstance(batch.images, SeenImages):
    return batch
  params = {"visual": base["visual"]}

  def see(images: Images) -> SeenImages:
    out: Any = policy.apply({"params": params}, images, method="see")
    return out

  pieces = _encoded_at_once(batch.images)
  if pieces == 1:
    return dataclasses.replace(batch, images=see(batch.images))
  cut = sharding.microbatches(batch.images, pieces)
  return dataclasses.replace(batch, images=sharding.join_microbatches(jax.lax.map(see, cut)))


def prefill_in_pieces(policy: Policy, params: Params, batch: Batch) -> tuple[Array, Prefix]:
  """As `_prefill`, of so many images at a time that a device encodes at most `MOST_PATCHES`; of the
  hidden states the last one, [B, D]."""

  def run(piece: tuple[Images | SeenImages, Prompts]) -> tuple[Array, Prefix]:
    hidden_BPD, prefix = _prefill(policy, params, *piece)
    return last_hidden(hidden_BPD, piece[1].valid_BP), prefix

  given = (batch.images, batch.prompts)
  count = _encoded_at_once(batch.images)
  if count == 1:
    return run(given)
  hidden_CBD, prefix = jax.lax.map(run, sharding.microbatches(given, count))

  def join(x: Array) -> Array:  # [C, Y, B / C, ...] -> [Y, B, ...]
    return jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1, *x.shape[3:])

  joined = jax.tree.map(join, (prefix.key_YRSJh, prefix.value_YRSJh))
  key, value = sharding.over_batch(joined, 1)
  hidden_BD, valid_RS = sharding.join_microbatches((hidden_CBD, prefix.valid_RS))
  return hidden_BD, Prefix(key, value, valid_RS)


def seen_tokens(tokens_BP: Array, valid_BP: Array, size: int) -> Array:
  """Which of a vocabulary's tokens stand in each prompt, bool [B, V]: what a repetition penalty is
  about."""

  def seen_in(tokens_P: Array, valid_P: Array) -> Array:  # padding goes to V, which is dropped
    return jnp.zeros(size, bool).at[jnp.where(valid_P, tokens_P, size)].set(True, mode="drop")

  return jax.vmap(seen_in)(tokens_BP, valid_BP)


def sample_captions(
  policy: Policy,
  params: Params,
  batch: Batch,
  key: Array,
  vocabulary: Vocabulary,
  cfg: RolloutConfig,
  length_BG: Array | None = None,
) -> Captions:
  """Writes `group_size` captions for each image of the batch. The key is consumed. `length_BG`: for
  measurements, as `length_N` of `decode`."""
  B, G, T = batch.row_B.shape[0], cfg.group_size, cfg.sampling.max_tokens
  hidden_BD, prefix = prefill_in_pieces(policy, params, batch)
  hidden_ND = jnp.repeat(hidden_BD, G, axis=0)

  seen_NV = None
  if cfg.sampling.repetition_penalty != 1:
    prompts = batch.prompts
    seen_BV = seen_tokens(prompts.tokens_BP, prompts.valid_BP, policy.cfg.text.vocab_size)
    seen_NV = jnp.repeat(seen_BV, G, axis=0)

  def extend(
    tokens: Array, position: Array, valid: Array, prefixes: tuple[Prefix, ...]
  ) -> tuple[Array, Prefix]:
    out: Any = policy.apply({"params": params}, tokens, position, valid, prefixes, method="extend")
    return out

  end = decode(
    extend,
    head_matrix(policy.cfg.text, params["language_model"]),
    hidden_ND,
    jnp.repeat(batch.prompts.next_position_B, G),
    prefixes=(prefix,),
    vocabulary=vocabulary,
    key=key,
    cfg=cfg.sampling,
    seen_NV=seen_NV,
    length_N=None if length_BG is None else length_BG.reshape(-1),
  )

  def grouped(x_N: Array) -> Array:
    return x_N.reshape(B, G, *x_N.shape[1:])

  tokens_NT = end.tokens_NT
  if cfg.end_cut:
    last_NT = ~end.done_N[:, None] & (jnp.arange(T) == T - 1)
    tokens_NT = jnp.where(last_NT, vocabulary.end_ids[0], tokens_NT)
  return Captions(
    grouped(tokens_NT), grouped(end.logp_NT), grouped(end.valid_NT), grouped(end.done_N)
  )


@flax.struct.dataclass
class PackedGroups:
  """Captions of a group one after the other in one row of R slots, padding at the end.

  A caption's first token is predicted by the prompt and its last one predicts nothing, so a caption
  of n tokens takes n - 1 slots.
  """

  tokens_BR: Array  # int32, what stands in each slot
  step_BR: Array  # int32, its place in its caption
  caption_BR: Array  # int32, which of the group's captions it belongs to
  valid_BR: Array  # bool
  target_BR: Array  # int32 index into the group's G * T tokens of the one that the slot predicts
  slot_BGT: Array  # int32, the slot that predicts each token but the first

  def by_slot(self, x_BGT: Array) -> Array:
    """Numbers of tokens -> [B, R], each at the slot that predicts it; zero in the padding."""
    B = len(self.target_BR)
    x_BR = jnp.take_along_axis(x_BGT.reshape(B, -1), self.target_BR, axis=1)
    return jnp.where(self.valid_BR, x_BR, jnp.zeros((), x_BR.dtype))


def group_slots(captions: Captions) -> Array:
  """Slots that each image's packed captions take, int32 [B]."""
  return jnp.maximum(captions.valid_BGT.sum(-1) - 1, 0).sum(-1)


def pack_groups(captions: Captions, slots: int) -> PackedGroups:
  """The captions of each image in a row of `slots`, which must hold them (`group_slots`)."""
  B, G, T = captions.tokens_BGT.shape
  length_BG = jnp.maximum(captions.valid_BGT.sum(-1) - 1, 0)
  end_BG = jnp.cumsum(length_BG, axis=1)
  start_BG = end_BG - length_BG
  slot_R = jnp.arange(slots)
  caption_BR = jnp.minimum((slot_R[None, :, None] >= end_BG[:, None]).sum(-1), G - 1)
  step_BR = slot_R - jnp.take_along_axis(start_BG, caption_BR, axis=1)
  valid_BR = slot_R < end_BG[:, -1:]
  place_BR = jnp.where(valid_BR, caption_BR * T + step_BR, 0)
  tokens_BR = jnp.take_along_axis(captions.tokens_BGT.reshape(B, G * T), place_BR, axis=1)
  slot_BGT = jnp.clip(start_BG[..., None] + jnp.arange(T) - 1, 0, slots - 1)
  step_BR = jnp.where(valid_BR, step_BR, 0)
  target_BR = jnp.where(valid_BR, place_BR + 1, 0)
  return PackedGroups(tokens_BR, step_BR, caption_BR, valid_BR, target_BR, slot_BGT)


@jax.custom_vjp
def _by_caption(x_BR: Array, target_BR: Array, slot_BGT: Array, valid_BR: Array) -> Array:
  """Numbers of slots -> [B, G, T], at the tokens that the slots predict. A gather, and so is its
  backward pass, which would be a scatter: no two tokens have the same slot."""
  del target_BR, valid_BR  # for the backward pass
  B, G, T = slot_BGT.shape
  return jnp.take_along_axis(x_BR, slot_BGT.reshape(B, G * T), axis=1).reshape(B, G, T)


def _by_caption_forward(x_BR, target_BR, slot_BGT, valid_BR):
  return _by_caption(x_BR, target_BR, slot_BGT, valid_BR), (target_BR, valid_BR)


def _by_caption_backward(kept, slope_BGT):
  target_BR, valid_BR = kept
  flat = slope_BGT.reshape(slope_BGT.shape[0], -1)
  return jnp.where(valid_BR, jnp.take_along_axis(flat, target_BR, axis=1), 0.0), None, None, None


_by_caption.defvjp(_by_caption_forward, _by_caption_backward)


@flax.struct.dataclass
class CaptionStates:
  """The hidden states that predict the tokens of given captions."""

  first_BD: Array  # the first token of every caption of the group
  rest_BRD: Array | None  # the others, in packed rows; None where captions have one token
  packed: PackedGroups

  def by_caption(self, first_B: Array, rest_BR: Array | None) -> Array:
    """Numbers of hidden states -> [B, G, T]; `first_B` may be [B, G], `rest_BR` flat. Where there
    is no token, it holds a number that nobody may read."""
    B, G, T = self.packed.slot_BGT.shape
    first_BG = jnp.broadcast_to(first_B.reshape(B, -1), (B, G))
    if rest_BR is None:
      return first_BG[..., None]
    packed = self.packed
    rest = _by_caption(rest_BR.reshape(B, -1), packed.target_BR, packed.slot_BGT, packed.valid_BR)
    return jnp.where(jnp.arange(T) == 0, first_BG[..., None], rest)


def block_slots(slots: int, rows: int, cfg: DecoderConfig) -> int:
  """Slots of the blocks in which `rows` rows of packed captions, those of a device, are run."""
  small = cfg.hidden_size * cfg.intermediate_size <= SMALL_MATRIX
  enough = FEWEST_TOKENS if small else ENOUGH_TOKENS
  smallest = max(SMALLEST_BLOCK, FEWEST_TOKENS // rows)
  blocks = min(slots // smallest, max(MOST_BLOCKS, slots * rows // enough))
  return -(-slots // max(blocks, 1))


def caption_states(
  policy: Policy, params: Params, batch: Batch, captions: Captions
) -> CaptionStates:
  """The hidden states that predict given captions; differentiable. Image and prompt run once an
  image, with gradient; the captions of its group follow in one row, none of which sees another, and
  as far as captions go (`models/blocks.py`)."""
  G, T = captions.tokens_BGT.shape[1:]
  hidden_BPD, prefix = _prefill(policy, params, batch.images, batch.prompts)
  first_BD = last_hidden(hidden_BPD, batch.prompts.valid_BP)
  packed = pack_groups(captions, max(G * (T - 1), 1))
  if T == 1:
    return CaptionStates(first_BD, None, packed)

  position_BR = batch.prompts.next_position_B[:, None] + packed.step_BR
  row = Row(packed.tokens_BR, position_BR, packed.valid_BR, packed.caption_BR)
  rows, slots = packed.tokens_BR.shape
  size = block_slots(slots, -(-rows // sharding.batch_shards()), policy.cfg.text)
  rest_BRD = extend_in_blocks(running(policy), params, row, (prefix,), T - 1, size)
  return CaptionStates(first_BD, rest_BRD, packed)


def caption_logprobs(
  policy: Policy,
  params: Params,
  batch: Batch,
  captions: Captions,
  *,
  vocabulary: Vocabulary,
  temperature: float,
  chunk_tokens: int = 1024,
  entropy: EntropyKind = "none",
) -> tuple[Array, Array]:
  """Log-probabilities of given captions, and entropies, float32 [B, G, T] each; differentiable.

  Under the same parameters this is what `sample_captions` recorded, to rounding. Padding holds
  numbers that nobody may read. Arguments as of `caption_states` and `token_logprobs`.
  """
  states = caption_states(policy, params, batch, captions)
  return states_logprobs(
    policy,
    params,
    states,
    captions,
    vocabulary=vocabulary,
    temperature=temperature,
    chunk_tokens=chunk_tokens,
    entropy=entropy,
  )


def states_logprobs(
  policy: Policy,
  params: Params,
  states: CaptionStates,
  captions: Captions,
  *,
  vocabulary: Vocabulary,
  temperature: float,
  chunk_tokens: int = 1024,
  entropy: EntropyKind = "none",
) -> tuple[Array, Array]:
  """`caption_logprobs` from `caption_states`."""

  def score(hidden_MD, target_MX, wanted_M, _) -> tuple[Array, Array]:
    return token_logprobs(
      hidden_MD,
      head_matrix(policy.cfg.text, params["language_model"]),
      target_MX,
      wanted_M=wanted_M,
      allowed_V=vocabulary.allowed_V,
      temperature=temperature or 1.0,
      chunk_tokens=chunk_tokens,
      entropy=entropy,
    )

  (logp_BG, entropy_B), rest = _scored(score, states, captions, vocabulary)
  logp_M, entropy_M = rest or (None, None)
  return states.by_caption(logp_BG, logp_M), states.by_caption(entropy_B, entropy_M)


def states_loss(
  policy: Policy,
  params: Params,
  states: CaptionStates,
  captions: Captions,
  given_BGT: Any,
  loss: TokenLoss,
  *,
  vocabulary: Vocabulary,
  temperature: float = 1.0,
  chunk_tokens: int = 1024,
  entropy: EntropyKind = "none",
) -> tuple[Array, Array, Array]:
  """A loss of given captions' tokens, differentiable; and without gradient their log-probabilities
  and entropies, float32 [B, G, T] each.

  Args:
    given_BGT: arrays [B, G, T] that the loss reads. Tokens that are no part of a caption must have
      none in the loss.
    loss: as of `models.head.token_loss`.
    others: as of `states_logprobs`.
  """

  def score(hidden_MD, target_MX, wanted_M, given_MX) -> tuple[Array, Array, Array]:
    return token_loss(
      hidden_MD,
      head_matrix(policy.cfg.text, params["language_model"]),
      target_MX,
      given_MX,
      loss,
      wanted_M=wanted_M,
      allowed_V=vocabulary.allowed_V,
      temperature=temperature or 1.0,
      chunk_tokens=chunk_tokens,
      entropy=entropy,
    )

  (total, logp_BG, entropy_B), rest = _scored(score, states, captions, vocabulary, given_BGT)
  more, logp_M, entropy_M = rest or (0.0, None, None)
  return total + more, states.by_caption(logp_BG, logp_M), states.by_caption(entropy_B, entropy_M)


def _scored(
  score: Callable[..., Any],
  states: CaptionStates,
  captions: Captions,
  vocabulary: Vocabulary,
  given_BGT: Any = None,
) -> tuple[Any, Any]:
  """score(hidden states [M, D], targets [M, X], which are wanted, what is given of them [M, X]) of
  the captions' first tokens, an image's in one row, and of the others (None where there are
  none)."""
  end = vocabulary.end_ids[0]
  # A pad token may be forbidden: score any allowed one in its place, nobody reads it.
  target_BGT = jnp.where(captions.valid_BGT, captions.tokens_BGT, end)
  given_BG = jax.tree.map(lambda x: x[..., 0], given_BGT)
  first = score(states.first_BD, target_BGT[..., 0], None, given_BG)
  if states.rest_BRD is None:
    return first, None

  def by_slot(x_BGT: Array) -> Array:
    return states.packed.by_slot(x_BGT).reshape(-1, 1)

  valid_M = states.packed.valid_BR.reshape(-1)
  target_M1 = jnp.where(valid_M[:, None], by_slot(target_BGT), end)
  rest_MD = states.rest_BRD.reshape(-1, states.rest_BRD.shape[-1])
  return first, score(rest_MD, target_M1, valid_M, jax.tree.map(by_slot, given_BGT))
