"""Batch, key -> captions: each image is encoded and its prompt prefilled once; G captions branch
from there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from caprl_jax.models.attention import Prefix, empty_cache
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.head import token_logprobs
from caprl_jax.models.policy import Policy, last_hidden
from caprl_jax.rl.sampling import SamplingConfig, decode
from caprl_jax.types import Array, Batch, Captions, Params, Vocabulary


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
  """

  group_size: int
  sampling: SamplingConfig
  oversample: int = 1
  end_cut: bool = False

  def __post_init__(self):
    if self.group_size < 1 or self.oversample < 1:
      raise ValueError(
        f"group_size = {self.group_size} and oversample = {self.oversample} must be at least 1"
      )


def _prefill(policy: Policy, params: Params, batch: Batch) -> tuple[Array, Prefix]:
  """Image and prompt, once per image: hidden states [B, P, D] and the prefix that captions branch
  from."""
  out: Any = policy.apply({"params": params}, batch.images, batch.prompts, method="prefill")
  return out


def sample_captions(
  policy: Policy,
  params: Params,
  batch: Batch,
  key: Array,
  vocabulary: Vocabulary,
  cfg: RolloutConfig,
) -> Captions:
  """Writes `group_size` captions for each image of the batch. The key is consumed."""
  B, G, T = batch.row_B.shape[0], cfg.group_size, cfg.sampling.max_tokens
  hidden_BPD, prefix = _prefill(policy, params, batch)
  hidden_ND = jnp.repeat(last_hidden(hidden_BPD, batch.prompts.valid_BP), G, axis=0)

  seen_NV = None
  if cfg.sampling.repetition_penalty != 1:
    V = policy.cfg.text.vocab_size

    def seen_in(tokens_P: Array, valid_P: Array) -> Array:  # padding goes to V, which is dropped
      return jnp.zeros(V, bool).at[jnp.where(valid_P, tokens_P, V)].set(True, mode="drop")

    seen_BV = jax.vmap(seen_in)(batch.prompts.tokens_BP, batch.prompts.valid_BP)
    seen_NV = jnp.repeat(seen_BV, G, axis=0)

  def extend(tokens: Array, position: Array, valid: Array, cache: Prefix) -> tuple[Array, Prefix]:
    out: Any = policy.apply(
      {"params": params}, tokens, position, valid, (prefix, cache), method="extend"
    )
    return out

  end = decode(
    extend,
    head_matrix(policy.cfg.text, params["language_model"]),
    hidden_ND,
    jnp.repeat(batch.prompts.next_position_B, G),
    cache=empty_cache(prefix, B * G, T),
    vocabulary=vocabulary,
    key=key,
    cfg=cfg.sampling,
    seen_NV=seen_NV,
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


def caption_hidden(policy: Policy, params: Params, batch: Batch, captions: Captions) -> Array:
  """The hidden state that predicts each token of given captions, [B * G * T, D]; differentiable.
  Image and prompt run once an image, with gradient; the captions of a group branch from them."""
  B, G, T = captions.tokens_BGT.shape
  hidden_BPD, prefix = _prefill(policy, params, batch)
  first = jnp.repeat(last_hidden(hidden_BPD, batch.prompts.valid_BP)[:, None], G, axis=0)
  tokens_NT = captions.tokens_BGT.reshape(B * G, T)
  hidden_NTD = first
  if T > 1:
    position = jnp.repeat(batch.prompts.next_position_B, G)[:, None] + jnp.arange(T - 1)
    rest: Any = policy.apply(
      {"params": params},
      tokens_NT[:, :-1],
      position,
      captions.valid_BGT.reshape(B * G, T)[:, :-1],
      (prefix,),
      method="extend",
    )[0]
    hidden_NTD = jnp.concatenate([first, rest], axis=1)
  return hidden_NTD.reshape(B * G * T, -1)


def caption_logprobs(
  policy: Policy,
  params: Params,
  batch: Batch,
  captions: Captions,
  vocabulary: Vocabulary,
  temperature: float,
  chunk_tokens: int = 1024,
) -> tuple[Array, Array]:
  """Log-probabilities of given captions, and entropies, float32 [B, G, T] each; differentiable.

  Under the same parameters this is what `sample_captions` recorded, to rounding. Padding holds
  numbers that nobody may read.
  """
  hidden_MD = caption_hidden(policy, params, batch, captions)
  return hidden_logprobs(policy, params, hidden_MD, captions, vocabulary, temperature, chunk_tokens)


def hidden_logprobs(
  policy: Policy,
  params: Params,
  hidden_MD: Array,
  captions: Captions,
  vocabulary: Vocabulary,
  temperature: float,
  chunk_tokens: int = 1024,
) -> tuple[Array, Array]:
  """`caption_logprobs` from `caption_hidden`."""
  shape = captions.tokens_BGT.shape
  # A pad token may be forbidden: score any allowed one in its place, nobody reads it.
  target = jnp.where(captions.valid_BGT, captions.tokens_BGT, vocabulary.end_ids[0]).reshape(-1, 1)
  logp, entropy = token_logprobs(
    hidden_MD,
    head_matrix(policy.cfg.text, params["language_model"]),
    target,
    allowed_V=vocabulary.allowed_V,
    temperature=temperature or 1.0,
    chunk_tokens=chunk_tokens,
  )
  return logp.reshape(shape), entropy.reshape(shape)
