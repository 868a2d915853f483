"""Hidden states -> log-probabilities of given tokens, in chunks: [tokens, vocabulary] never exists
whole.

Letters: M tokens, D width, V vocabulary, X targets per token.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.masked import NEGATIVE

Array = jax.Array
EntropyKind = Literal["none", "figure", "differentiable"]


def scaled_logits(
  hidden_MD: Array, head_VD: Array, allowed_V: Array | None, temperature: float
) -> Array:
  """float32 logits [M, V] over `temperature`; what is not allowed is at `NEGATIVE`.

  The product takes the hidden states' dtype and accumulates in float32.
  """
  logits = jnp.einsum(
    "md,vd->mv",
    hidden_MD,
    head_VD.astype(hidden_MD.dtype),
    preferred_element_type=jnp.float32,
  )
  logits = logits / temperature
  return logits if allowed_V is None else jnp.where(allowed_V, logits, NEGATIVE)


@dataclasses.dataclass(frozen=True)
class _Scoring:
  """How log-probabilities are made; fields as of `token_logprobs`.

  keep: the probabilities are kept for the backward pass, rather than made again.
  """

  temperature: float
  entropy: EntropyKind
  keep: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scores(
  hidden_MD: Array, head_VD: Array, target_MX: Array, allowed_V: Array | None, how: _Scoring
) -> tuple[Array, Array]:
  """Log-probabilities of the targets [M, X], and the entropies [M], from one pass over logits.

  With a backward pass of its own, which makes the gradient of the logits in one pass too, where
  autodiff would scatter into an array of their size.
  """
  return _forward(hidden_MD, head_VD, target_MX, allowed_V, how)[0]


def _forward(hidden_MD, head_VD, target_MX, allowed_V, how):
  logits = scaled_logits(hidden_MD, head_VD, allowed_V, how.temperature)
  top = jnp.max(logits, axis=-1, keepdims=True)
  weight = jnp.exp(logits - top)
  mass = weight.sum(-1, keepdims=True)
  norm = top + jnp.log(mass)
  entropy = jnp.zeros(len(logits))
  if how.entropy != "none":
    entropy = norm[:, 0] - (weight * logits).sum(-1) / mass[:, 0]
  out = jnp.take_along_axis(logits, target_MX, axis=1) - norm, entropy
  made = None
  if how.keep:
    made = weight, mass, logits if how.entropy == "differentiable" else None
  return out, (hidden_MD, head_VD, target_MX, allowed_V, norm, entropy, made)


def _backward(how, kept, cotangents):
  hidden_MD, head_VD, target_MX, allowed_V, norm, entropy, made = kept
  d_logp_MX, d_entropy_M = cotangents
  if made is None:
    logits = scaled_logits(hidden_MD, head_VD, allowed_V, how.temperature)
    share = jnp.exp(logits - norm)
  else:
    weight, mass, logits = made
    share = weight / mass
  slope = -d_logp_MX.sum(-1, keepdims=True)
  if how.entropy == "differentiable":
    slope = slope - d_entropy_M[:, None] * (logits - norm + entropy[:, None])
  d_logits = share * slope
  for x in range(target_MX.shape[1]):
    hit = jnp.arange(share.shape[1]) == target_MX[:, x : x + 1]
    d_logits = d_logits + jnp.where(hit, d_logp_MX[:, x : x + 1], 0.0)
  if allowed_V is not None:
    d_logits = jnp.where(allowed_V, d_logits, 0.0)
  d_logits = (d_logits / how.temperature).astype(hidden_MD.dtype)

  def product(letters: str, other: Array, dtype: Any) -> Array:
    return jnp.einsum(
      letters, d_logits, other.astype(d_logits.dtype), preferred_element_type=jnp.float32
    ).astype(dtype)

  d_hidden = product("mv,vd->md", head_VD, hidden_MD.dtype)
  return d_hidden, product("mv,md->vd", hidden_MD, head_VD.dtype), None, None


_scores.defvjp(_forward, _backward)


def _in_chunks(
  function: Callable, arrays: tuple[Array, ...], heads: tuple[Array, ...], chunk_tokens: int
) -> Any:
  """function(*arrays, *heads), applied to `chunk_tokens` rows at a time on each device."""
  M, shards = arrays[0].shape[0], sharding.batch_shards()
  shards = 1 if M % shards else shards
  heads = tuple(map(sharding.gathered_head, heads))
  if M // shards <= chunk_tokens:
    return function(*(sharding.split_over_batch(arrays) if shards > 1 else arrays), *heads)
  out = jax.lax.map(
    lambda x: function(*x, *heads), sharding.split_chunks(arrays, chunk_tokens, shards)
  )
  return sharding.join_chunks(out, M, shards)


def token_logprobs(
  hidden_MD: Array,
  head_VD: Array,
  target_MX: Array,
  *,
  allowed_V: Array | None = None,
  temperature: float = 1.0,
  chunk_tokens: int = 1024,
  entropy: EntropyKind = "none",
) -> tuple[Array, Array]:
  """Log-probabilities of target tokens and the entropy of the distribution they come from.

  Where there is more than one chunk, each one's logits are made again in the backward pass.

  Args:
    hidden_MD: hidden state that predicts the target.
    head_VD: unembedding.
    target_MX: int token ids; must be allowed.
    allowed_V: bool; the distribution is over these tokens only.
    temperature: divides the logits.
    chunk_tokens: tokens whose logits exist at once on a device.
    entropy: `none` leaves it out, at 0; `figure` has no gradient.

  Returns:
    float32 [M, X] and [M], the entropy in nats.
  """
  shards = sharding.batch_shards()
  M = hidden_MD.shape[0]
  one_chunk = M // (1 if M % shards else shards) <= chunk_tokens
  how = _Scoring(temperature, entropy, keep=one_chunk)

  def chunk(hidden, target, head):
    return _scores(hidden, head, target, allowed_V, how)

  return _in_chunks(chunk, (hidden_MD, target_MX), (head_VD,), chunk_tokens)


def token_kl(
  hidden_MD: Array,
  head_VD: Array,
  other_MD: Array,
  other_head_VD: Array,
  *,
  allowed_V: Array | None = None,
  temperature: float = 1.0,
  chunk_tokens: int = 1024,
) -> Array:
  """KL(p || q) of whole distributions, float32 [M] in nats: p from `hidden` and `head`, q from the
  others. Chunked as in `token_logprobs`, and made again in the backward pass."""

  @jax.checkpoint
  def chunk(hidden, other, head, other_head):
    logp = jax.nn.log_softmax(scaled_logits(hidden, head, allowed_V, temperature), axis=-1)
    logq = jax.nn.log_softmax(scaled_logits(other, other_head, allowed_V, temperature), axis=-1)
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)

  return _in_chunks(chunk, (hidden_MD, other_MD), (head_VD, other_head_VD), chunk_tokens)
