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

from caprl_jax import rungs, sharding
from caprl_jax.masked import NEGATIVE

Array = jax.Array
EntropyKind = Literal["none", "figure", "differentiable"]
# A chunk adds its gradient of the unembedding to the others', so chunks must not be too small; but
# what fills the last one up is computed for nothing.
MOST_CHUNKS, SMALLEST_CHUNK = 16, 512
# Of tokens whose probabilities all fit: a microbatch wants few of the slots that its captions have.
KEPT_CHUNKS, LARGEST_KEPT_CHUNK = 8, 192


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

  rows: tokens of a chunk on each device.
  shards: parts of the batch that the tokens lie in, one after the other.
  keep: probabilities are kept for the backward pass rather than made again.
  """

  temperature: float
  entropy: EntropyKind
  rows: int
  shards: int
  keep: bool

  def chunks(self, tokens: int) -> int:
    return -(-tokens // self.shards // self.rows)


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
    kept = (weight, mass, logits if how.entropy == "differentiable" else None)
    return (logp, norm, entropy), kept if how.keep else None

  if how.chunks(len(hidden_MD)) == 1:
    (logp, norm, entropy), kept = score(hidden_MD, target_MX)
    return (logp, entropy), (norm, entropy, kept)

  def chunk(x: tuple[Array, ...]) -> tuple[tuple[Array, Array, Array], Any]:
    hidden, target, wanted = x
    return rungs.where_any(wanted, score, hidden, target)

  order = _Order.wanted_first(wanted_M, how.rows, how.shards)
  numbers, kept = jax.lax.map(chunk, order.chunks((hidden_MD, target_MX, wanted_M)))
  logp, norm, entropy = order.joined(numbers)
  return (logp, entropy), (norm, entropy, kept)


@flax.struct.dataclass
class _Order:
  """Tokens in chunks, those that are wanted first on each device: so what a chunk costs is paid for
  them, wherever they stand."""

  order_SM: Array  # of each shard, the places of its tokens
  rows: int = flax.struct.field(pytree_node=False)  # of a chunk on each device

  @classmethod
  def wanted_first(cls, wanted_M: Array, rows: int, shards: int) -> "_Order":
    return cls(jnp.argsort(~wanted_M.reshape(shards, -1), axis=1, stable=True), rows)

  def chunks(self, tree: Any) -> Any:
    """Arrays [M, ...] -> [chunks, tokens of a chunk, ...]."""
    ordered = jax.tree.map(lambda x: _taken(x, self.order_SM), tree)
    return sharding.split_chunks(ordered, self.rows, len(self.order_SM))

  def joined(self, tree: Any) -> Any:
    """The inverse of `chunks`."""
    ordered = sharding.join_chunks(tree, self.order_SM.size, len(self.order_SM))
    back_SM = jnp.argsort(self.order_SM, axis=1)
    return jax.tree.map(lambda x: _taken(x, back_SM), ordered)


def _taken(x_M: Array, places_SM: Array) -> Array:
  """An array [M, ...] in another order within each shard."""
  shards = places_SM.shape[0]
  taken = jax.vmap(lambda x, places: x[places])(x_M.reshape(shards, -1, *x_M.shape[1:]), places_SM)
  return taken.reshape(x_M.shape)


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

  def slopes(made, hidden, target, norm, entropy, d_logp, d_entropy) -> tuple[Array, Any]:
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
  if how.chunks(len(hidden_MD)) == 1:
    d_hidden, d_head = slopes(made, *arrays)
  else:

    def chunk(d_head: Any, x: tuple[Array, Any, tuple[Array, ...]]) -> tuple[Any, Array]:
      wanted, made, arrays = x

      def work(d_head: Any) -> tuple[Any, Array]:
        d_hidden, new = slopes(made, *arrays)
        return jax.tree.map(jnp.add, d_head, new), d_hidden

      return jax.lax.cond(
        wanted.any(), work, lambda d_head: (d_head, jnp.zeros_like(arrays[0])), d_head
      )

    order = _Order.wanted_first(wanted_M, how.rows, how.shards)
    nothing = jnp.zeros(head_VD.shape, jnp.float32) if kept.head_moves else None
    pieces = (order.chunks(wanted_M), made, order.chunks(arrays))
    d_head, d_hidden = jax.lax.scan(chunk, nothing, pieces)
    d_hidden = order.joined(d_hidden)
  return d_hidden, None if d_head is None else d_head.astype(head_VD.dtype), None, None, None


_scores.defvjp(_forward, _backward, symbolic_zeros=True)


def _instantiated(x: Any) -> Array:
  """An array in the place of a symbolic zero."""
  zero = isinstance(x, jax.custom_derivatives.SymbolicZero)
  return jnp.zeros(x.shape, x.dtype) if zero else x


def _in_chunks(
  function: Callable,
  arrays: tuple[Array, ...],
  wanted_M: Array | None,
  chunk_tokens: int,
) -> Any:
  """function(*arrays), applied to `chunk_tokens` rows at a time on each device, of those that are
  wanted; made again in the backward pass."""
  M, shards = arrays[0].shape[0], sharding.batch_shards()
  shards = 1 if M % shards else shards
  if wanted_M is None:
    wanted_M = jnp.ones(M, bool)
  if shards > 1:
    arrays, wanted_M = sharding.split_over_batch((arrays, wanted_M))
  if M // shards <= chunk_tokens:
    return jax.checkpoint(function)(*arrays)

  @jax.checkpoint  # around the choice, or each chunk would keep a copy of the heads
  def chunk(x: tuple[Array, tuple[Array, ...]]) -> Any:
    wanted, arrays = x
    return rungs.where_any(wanted, function, *arrays)

  order = _Order.wanted_first(wanted_M, chunk_tokens, shards)
  return order.joined(jax.lax.map(chunk, order.chunks((wanted_M, arrays))))


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

  Where they are not all in one chunk, each chunk's logits are made again in the backward pass.

  Args:
    hidden_MD: hidden state that predicts the target.
    head_VD: unembedding.
    target_MX: int token ids; must be allowed.
    wanted_M: bool; the others cost nothing, up to what fills a chunk, and hold numbers that nobody
      may read.
    allowed_V: bool; the distribution is over these tokens only.
    temperature: divides the logits.
    chunk_tokens: tokens whose logits exist at once on a device, at most.
    entropy: `none` leaves it out, at 0; `figure` has no gradient.

  Returns:
    float32 [M, X] and [M], the entropy in nats.
  """
  M, shards = hidden_MD.shape[0], sharding.batch_shards()
  shards = 1 if M % shards else shards
  own = M // shards
  keep, rows = own <= chunk_tokens, min(own, chunk_tokens)
  if wanted_M is None:
    wanted_M = jnp.ones(M, bool)
  elif keep:
    rows = min(-(-own // KEPT_CHUNKS), LARGEST_KEPT_CHUNK)
  else:
    rows = min(rows, max(-(-own // MOST_CHUNKS), SMALLEST_CHUNK))
  arrays = (hidden_MD, target_MX, wanted_M)
  hidden_MD, target_MX, wanted_M = sharding.split_over_batch(arrays) if shards > 1 else arrays
  how = _Scoring(temperature, entropy, rows, shards, keep)
  return _scores(hidden_MD, head_VD, target_MX, wanted_M, allowed_V, how)


def token_kl(
  hidden_MD: Array,
  head_VD: Array,
  other_MD: Array,
  other_head_VD: Array,
  *,
  wanted_M: Array | None = None,
  allowed_V: Array | None = None,
  temperature: float = 1.0,
  chunk_tokens: int = 1024,
) -> Array:
  """KL(p || q) of whole distributions, float32 [M] in nats: p from `hidden` and `head`, q from the
  others. Chunked as in `token_logprobs`, and made again in the backward pass."""
  head, other_head = map(sharding.gathered_head, (head_VD, other_head_VD))

  def chunk(hidden, other):
    logp = jax.nn.log_softmax(scaled_logits(hidden, head, allowed_V, temperature), axis=-1)
    logq = jax.nn.log_softmax(scaled_logits(other, other_head, allowed_V, temperature), axis=-1)
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)

  return _in_chunks(chunk, (hidden_MD, other_MD), wanted_M, chunk_tokens)
