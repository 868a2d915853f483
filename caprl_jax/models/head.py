"""Hidden states -> log-probabilities of given tokens, in chunks: [tokens, vocabulary] never exists whole.

Letters: M tokens, D width, V vocabulary, X targets a token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from caprl_jax.masked import NEGATIVE

Array = jax.Array


def scaled_logits(hidden_MD: Array, head_VD: Array, allowed_V: Array | None, temperature: float) -> Array:
  """float32 logits [M, V] over `temperature`; what is not allowed is at `NEGATIVE`."""
  logits = jnp.einsum("md,vd->mv", hidden_MD.astype(jnp.float32), head_VD.astype(jnp.float32)) / temperature
  return logits if allowed_V is None else jnp.where(allowed_V, logits, NEGATIVE)


def _in_chunks(function: Callable, arrays: tuple[Array, ...], chunk_tokens: int) -> Any:
  """function(*arrays), applied to `chunk_tokens` rows at a time, each chunk recomputed in the backward pass."""
  M = arrays[0].shape[0]
  if M <= chunk_tokens:
    return jax.checkpoint(function)(*arrays)
  chunks = -(-M // chunk_tokens)
  split = lambda x: jnp.pad(x, ((0, chunks * chunk_tokens - M), (0, 0))).reshape(chunks, chunk_tokens, -1)
  out = jax.lax.map(lambda x: jax.checkpoint(function)(*x), tuple(map(split, arrays)))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:M], out)


def token_logprobs(hidden_MD: Array, head_VD: Array, target_MX: Array, *, allowed_V: Array | None = None,
                   temperature: float = 1.0, chunk_tokens: int = 1024) -> tuple[Array, Array]:
  """Log-probabilities of target tokens and the entropy of the distribution they come from.

  Each chunk's logits are recomputed in the backward pass.

  Args:
    hidden_MD: hidden state that predicts the target.
    head_VD: unembedding.
    target_MX: int token ids; must be allowed.
    allowed_V: bool; the distribution is over these tokens only.
    temperature: divides the logits.
    chunk_tokens: tokens whose logits exist at once.

  Returns:
    float32 [M, X] and [M], the entropy in nats.
  """
  def chunk(hidden, target):
    logits = scaled_logits(hidden, head_VD, allowed_V, temperature)
    norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logp = logits - norm
    return jnp.take_along_axis(logits, target, axis=1) - norm, -jnp.sum(jnp.exp(logp) * logp, axis=-1)

  return _in_chunks(chunk, (hidden_MD, target_MX), chunk_tokens)


def token_kl(hidden_MD: Array, head_VD: Array, other_MD: Array, other_head_VD: Array, *, allowed_V: Array | None = None,
             temperature: float = 1.0, chunk_tokens: int = 1024) -> Array:
  """KL(p || q) of whole distributions, float32 [M] in nats: p from `hidden` and `head`, q from the others. Chunked and
  recomputed in the backward pass as in `token_logprobs`."""
  def chunk(hidden, other):
    logp = jax.nn.log_softmax(scaled_logits(hidden, head_VD, allowed_V, temperature), axis=-1)
    logq = jax.nn.log_softmax(scaled_logits(other, other_head_VD, allowed_V, temperature), axis=-1)
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)

  return _in_chunks(chunk, (hidden_MD, other_MD), chunk_tokens)
