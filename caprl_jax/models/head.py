"""Hidden states -> log-probabilities of given tokens, in chunks: [tokens, vocabulary] never exists
whole.

Letters: M tokens, D width, V vocabulary, X targets per token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.masked import NEGATIVE

Array = jax.Array


def scaled_logits(
  hidden_MD: Array, head_VD: Array, allowed_V: Array | None, temperature: float
) -> Array:
  """float32 logits [M, V] over `temperature`; what is not allowed is at `NEGATIVE`."""
  logits = (
    jnp.einsum("md,vd->mv", hidden_MD.astype(jnp.float32), head_VD.astype(jnp.float32))
    / temperature
  )
  return logits if allowed_V is None else jnp.where(allowed_V, logits, NEGATIVE)


def _in_chunks(
  function: Callable, arrays: tuple[Array, ...], heads: tuple[Array, ...], chunk_tokens: int
) -> Any:
  """function(*arrays, *heads), applied to `chunk_tokens` rows at a time on each device, each chunk
  recomputed in the backward pass."""
  M, shards = arrays[0].shape[0], sharding.batch_shards()
  shards = 1 if M % shards else shards
  heads = tuple(map(sharding.gathered_head, heads))
  function = jax.checkpoint(function)
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
) -> tuple[Array, Array]:
  """Log-probabilities of target tokens and the entropy of the distribution they come from.

  Each chunk's logits are recomputed in the backward pass.

  Args:
    hidden_MD: hidden state that predicts the target.
    head_VD: unembedding.
    target_MX: int token ids; must be allowed.
    allowed_V: bool; the distribution is over these tokens only.
    temperature: divides the logits.
    chunk_tokens: tokens whose logits exist at once on a device.

  Returns:
    float32 [M, X] and [M], the entropy in nats.
  """

  def chunk(hidden, target, head):
    logits = scaled_logits(hidden, head, allowed_V, temperature)
    norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logp = logits - norm
    return jnp.take_along_axis(logits, target, axis=1) - norm, -jnp.sum(
      jnp.exp(logp) * logp, axis=-1
    )

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
  others. Chunked and recomputed in the backward pass as in `token_logprobs`."""

  def chunk(hidden, other, head, other_head):
    logp = jax.nn.log_softmax(scaled_logits(hidden, head, allowed_V, temperature), axis=-1)
    logq = jax.nn.log_softmax(scaled_logits(other, other_head, allowed_V, temperature), axis=-1)
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)

  return _in_chunks(chunk, (hidden_MD, other_MD), (head_VD, other_head_VD), chunk_tokens)
