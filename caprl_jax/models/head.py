"""Hidden states -> log-probabilities of given tokens, in chunks: [tokens, vocabulary] never exists
whole.

Letters: M tokens, D width, V vocabulary, X targets per token.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.struct
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

  rows: tokens of a chunk on each device; None: all are one chunk, whose probabilities are kept for
    the backward pass rather than made again.
  shards: parts of the batch that the tokens lie in, one after the other.
  """

  temperature: float
  entropy: EntropyKind
  rows: int | None
  shards: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _scores(
  hidden_MD: Array,
  head_VD: Array,
  target_MX: Array,
  wanted_M: Array,
  allowed_V: Array | None,
  how: _Scoring,
) -> tuple[Array, Array]:
  """Log-probabilities of the targets [M, X], and the entropies [M], from one pass over logits.

  With a backward pass of its own, which makes the gradient of the logits in one pass too, where
  autodiff would scatter into an array of their size.
  """
  return _run(hidden_MD, head_VD, target_MX, wanted_M, allowed_V, how)[0]


def _working_head(head_VD: Array, dtype: Any) -> Array:
  """The unembedding as chunks read it: in their dtype, and gathered once for all of them."""
  return sharding.gathered_head(head_VD.astype(dtype))


def _run(hidden_MD, head_VD, target_MX, wanted_M, allowed_V, how):
  """Scores as of `_scores`, and what is kept of them for the backward pass."""
  head = _working_head(head_VD, hidden_MD.dtype)

  def score(hidden, target) -> tuple[tuple[Array, Array, Array], Any]:
    logits = scaled_logits(hidden, head, allowed_V, how.temperature)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp(logits - top)
    mass = weight.sum(-1, keepdims=True)
    norm = top + jnp.log(mass)
    entropy = jnp.zeros(len(logits))
    if how.entropy != "none":
      entropy = norm[:, 0] - (weight * logits).sum(-1) / mass[:, 0]
    logp = jnp.take_along_axis(logits, target, axis=1) - norm
    return (logp, norm, entropy), (weight, mass, logits)

  if how.rows is None:
    (logp, norm, entropy), (weight, mass, logits) = score(hidden_MD, target_MX)
    return (logp, entropy), (
      norm,
      entropy,
      (weight, mass, logits if how.entropy == "differentiable" else None),
    )

  def chunk(x: tuple[Array, ...]) -> tuple[Array, Array, Array]:
    hidden, target, wanted = x
    return _where_any(wanted, lambda hidden, target: score(hidden, target)[0], hidden, target)

  pieces = sharding.split_chunks((hidden_MD, target_MX, wanted_M), how.rows, how.shards)
  logp, norm, entropy = sharding.join_chunks(jax.lax.map(chunk, pieces), len(hidden_MD), how.shards)
  return (logp, entropy), (norm, entropy, None)


@flax.struct.dataclass
class _Kept:
  """What the backward pass needs. `head_moves`: whether the unembedding has a gradient."""

  given: tuple
  made: tuple
  head_moves: bool = flax.struct.field(pytree_node=False)


def _forward(hidden_MD, head_VD, target_MX, wanted_M, allowed_V, how):
  moves = bool(head_VD.perturbed)
  allowed_V = None if allowed_V is None else allowed_V.value
  given = (hidden_MD.value, head_VD.value, target_MX.value, wanted_M.value, allowed_V)
  out, made = _run(*given, how)
  return out, _Kept(given, made, moves)


def _backward(how, kept, cotangents):
  hidden_MD, head_VD, target_MX, wanted_M, allowed_V = kept.given
  norm, entropy, made = kept.made
  head = _working_head(head_VD, hidden_MD.dtype)
  d_logp_MX, d_entropy_M = map(_instantiated, cotangents)

  def slopes(hidden, target, norm, entropy, d_logp, d_entropy, made=None) -> tuple[Array, Any]:
    """Gradients of hidden states, and of the unembedding in float32 (None where it has none)."""
    if made is None:
      logits = scaled_logits(hidden, head, allowed_V, how.temperature)
      share = jnp.exp(logits - norm)
    else:
      weight, mass, logits = made
      share = weight / mass
    slope = -d_logp.sum(-1, keepdims=True)
    if how.entropy == "differentiable":
      slope = slope - d_entropy[:, None] * (logits - norm + entropy[:, None])
    d_logits = share * slope
    for x in range(target.shape[1]):
      hit = jnp.arange(share.shape[1]) == target[:, x : x + 1]
      d_logits = d_logits + jnp.where(hit, d_logp[:, x : x + 1], 0.0)
    if allowed_V is not None:
      d_logits = jnp.where(allowed_V, d_logits, 0.0)
    d_logits = (d_logits / how.temperature).astype(hidden.dtype)

    def product(letters: str, other: Array) -> Array:
      return jnp.einsum(letters, d_logits, other, preferred_element_type=jnp.float32)

    d_head = product("mv,md->vd", hidden) if kept.head_moves else None
    return product("mv,vd->md", head).astype(hidden.dtype), d_head

  arrays = (hidden_MD, target_MX, norm, entropy, d_logp_MX, d_entropy_M)
  if how.rows is None:
    d_hidden, d_head = slopes(*arrays, made)
  else:

    def chunk(d_head: Any, x: tuple[Array, ...]) -> tuple[Any, Array]:
      wanted, *arrays = x

      def work(d_head: Any) -> tuple[Any, Array]:
        d_hidden, new = slopes(*arrays)
        return jax.tree.map(jnp.add, d_head, new), d_hidden

      return jax.lax.cond(
        wanted.any(), work, lambda d_head: (d_head, jnp.zeros_like(arrays[0])), d_head
      )

    pieces = sharding.split_chunks((wanted_M, *arrays), how.rows, how.shards)
    nothing = jnp.zeros(head_VD.shape, jnp.float32) if kept.head_moves else None
    d_head, chunks = jax.lax.scan(chunk, nothing, pieces)
    d_hidden = sharding.join_chunks(chunks, len(hidden_MD), how.shards)
  return d_hidden, None if d_head is None else d_head.astype(head_VD.dtype), None, None, None


_scores.defvjp(_forward, _backward, symbolic_zeros=True)


def _instantiated(x: Any) -> Array:
  """An array in the place of a symbolic zero."""
  zero = isinstance(x, jax.custom_derivatives.SymbolicZero)
  return jnp.zeros(x.shape, x.dtype) if zero else x


def _where_any(wanted: Array, function: Callable, *arrays: Array) -> Any:
  """function(*arrays), or zeros where nothing is wanted of them."""
  shapes = jax.eval_shape(function, *arrays)

  def nothing(*_: Array) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  return jax.lax.cond(wanted.any(), function, nothing, *arrays)


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
  wanted_M: Array | None = None,
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
    wanted_M: bool; chunks of which nothing is wanted are left out, with zeros in their place.
    allowed_V: bool; the distribution is over these tokens only.
    temperature: divides the logits.
    chunk_tokens: tokens whose logits exist at once on a device.
    entropy: `none` leaves it out, at 0; `figure` has no gradient.

  Returns:
    float32 [M, X] and [M], the entropy in nats.
  """
  M, shards = hidden_MD.shape[0], sharding.batch_shards()
  shards = 1 if M % shards else shards
  rows = None if M // shards <= chunk_tokens else chunk_tokens
  if wanted_M is None:
    wanted_M = jnp.ones(M, bool)
  arrays = (hidden_MD, target_MX, wanted_M)
  hidden_MD, target_MX, wanted_M = sharding.split_over_batch(arrays) if shards > 1 else arrays
  how = _Scoring(temperature, entropy, rows, shards)
  return _scores(hidden_MD, head_VD, target_MX, wanted_M, allowed_V, how)


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
