"""Hidden states -> log-probabilities of given tokens, or a loss of them and its gradient: in
chunks, so that [tokens, vocabulary] never exists whole.

Letters: M tokens, D width, V vocabulary, X targets per token.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax import rungs, sharding
from caprl_jax.masked import NEGATIVE, masked_sum

Array = jax.Array
EntropyKind = Literal["none", "figure", "differentiable"]
# (log-probabilities [m, X], entropies [m], what is given of these tokens) -> their losses [m, X]
TokenLoss = Callable[[Array, Array, Any], Array]
# What fills the last chunk up is computed for nothing, but each chunk adds its gradient of the
# whole unembedding to the others': a chunk needs more tokens where that is large.
MOST_CHUNKS, SMALLEST_CHUNK, SMALL_CHUNK, LARGE_HEAD = 24, 512, 192, 2**25


def chunk_rows(tokens: int, chunk_tokens: int, head_size: int) -> int:
  """Tokens that a device takes at once, of those that it has; not all of them are wanted.

  Args:
    chunk_tokens: the most.
    head_size: numbers of the unembedding.
  """
  if head_size <= LARGE_HEAD:
    return min(tokens, chunk_tokens, SMALL_CHUNK)
  return min(tokens, chunk_tokens, max(-(-tokens // MOST_CHUNKS), SMALLEST_CHUNK))


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
  """

  temperature: float
  entropy: EntropyKind
  rows: int
  shards: int

  @classmethod
  def of(cls, hidden_MD, head_VD, wanted_M, chunk_tokens: int, **settings: Any) -> "_Scoring":
    tokens, shards = len(hidden_MD), sharding.batch_shards()
    shards = 1 if tokens % shards else shards
    own = tokens // shards
    rows = chunk_rows(own, chunk_tokens, head_VD.size)
    return cls(rows=min(own, chunk_tokens) if wanted_M is None else rows, shards=shards, **settings)

  def chunks(self, tokens: int) -> int:
    return -(-tokens // self.shards // self.rows)

  def own(self, hidden_MD: Array, target_MX: Array, wanted_M: Array | None, given: Any) -> Any:
    """The same, of which a device computes the rows that lie on it; unsaid, all are wanted."""
    if wanted_M is None:
      wanted_M = jnp.ones(len(hidden_MD), bool)
    arrays = (hidden_MD, target_MX, wanted_M, given)
    return sharding.split_over_batch(arrays) if self.shards > 1 else arrays

  def order(self, wanted_M: Array) -> "_Order":
    return _Order.wanted_first(wanted_M, self.rows, self.shards)


class _Measured(NamedTuple):
  """Of some tokens: what is asked for, and what their logits' gradient is made from."""

  logp_MX: Array
  entropy_M: Array
  logits_MV: Array
  weight_MV: Array  # probabilities times `mass`
  mass_M1: Array
  norm_M1: Array  # log of the sum of exp(logits)


def _measured(
  hidden_MD: Array, head_VD: Array, target_MX: Array, allowed_V: Array | None, how: _Scoring
) -> _Measured:
  logits = scaled_logits(hidden_MD, head_VD, allowed_V, how.temperature)
  top = jnp.max(logits, axis=-1, keepdims=True)
  weight = jnp.exp(logits - top)
  mass = weight.sum(-1, keepdims=True)
  norm = top + jnp.log(mass)
  entropy = jnp.zeros(len(logits))
  if how.entropy != "none":
    entropy = norm[:, 0] - (weight * logits).sum(-1) / mass[:, 0]
  logp = jnp.take_along_axis(logits, target_MX, axis=1) - norm
  return _Measured(logp, entropy, logits, weight, mass, norm)


def _slopes(
  made: _Measured, d_logp_MX: Array, d_entropy_M: Array, target_MX: Array, allowed_V, how: _Scoring
) -> Array:
  """The gradient of the logits before the temperature [M, V], in one pass, where autodiff would
  scatter into an array of their size."""
  share = made.weight_MV / made.mass_M1
  slope = -d_logp_MX.sum(-1, keepdims=True)
  if how.entropy == "differentiable":
    slope -= d_entropy_M[:, None] * (made.logits_MV - made.norm_M1 + made.entropy_M[:, None])
  d_logits = share * slope
  for x in range(target_MX.shape[1]):
    hit = jnp.arange(share.shape[1]) == target_MX[:, x : x + 1]
    d_logits += jnp.where(hit, d_logp_MX[:, x : x + 1], 0.0)
  if allowed_V is not None:
    d_logits = jnp.where(allowed_V, d_logits, 0.0)
  return d_logits / how.temperature


def _pulled(
  d_logits_MV: Array, hidden_MD: Array, head_VD: Array, head_moves: bool
) -> tuple[Array | None, Array]:
  """Gradients of the unembedding in float32 (None where it has none), and of hidden states."""
  d_logits_MV = d_logits_MV.astype(hidden_MD.dtype)

  def product(letters: str, other: Array) -> Array:
    return jnp.einsum(letters, d_logits_MV, other, preferred_element_type=jnp.float32)

  d_head = product("mv,md->vd", hidden_MD) if head_moves else None
  return d_head, product("mv,vd->md", head_VD).astype(hidden_MD.dtype)


def _working_head(head_VD: Array, dtype: Any) -> Array:
  """The unembedding as chunks read it: in their dtype, and gathered once for all of them."""
  return sharding.gathered_head(head_VD.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _scores(
  hidden_MD: Array,
  head_VD: Array,
  target_MX: Array,
  wanted_M: Array,
  allowed_V: Array | None,
  how: _Scoring,
) -> tuple[Array, Array]:
  """Log-probabilities of the targets [M, X], and the entropies [M], from one pass over logits."""
  head = _working_head(head_VD, hidden_MD.dtype)

  def score(hidden: Array, target: Array) -> tuple[None, tuple[Array, Array]]:
    made = _measured(hidden, head, target, allowed_V, how)
    return None, (made.logp_MX, made.entropy_M)

  return _in_pieces(score, wanted_M, (hidden_MD, target_MX), how)[1]


def _in_pieces(work: Callable, wanted_M: Array, arrays: tuple, how: _Scoring) -> tuple[Any, Any]:
  """work(*arrays) -> (sums over the tokens, numbers of each token), a chunk of tokens at a time;
  chunks of which nothing is wanted add nothing, and their numbers are zero."""
  if how.chunks(len(wanted_M)) == 1:
    return work(*arrays)

  def zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)

  order = how.order(wanted_M)
  pieces = order.chunks((wanted_M, arrays))
  shapes = jax.eval_shape(work, *jax.tree.map(lambda x: x[0], pieces[1]))

  def chunk(sums: Any, piece: tuple[Array, tuple]) -> tuple[Any, Any]:
    wanted, arrays = piece

    def added(sums: Any) -> tuple[Any, Any]:
      new, numbers = work(*arrays)
      return jax.tree.map(jnp.add, sums, new), numbers

    return jax.lax.cond(wanted.any(), added, lambda sums: (sums, zeros(shapes[1])), sums)

  sums, numbers = jax.lax.scan(chunk, zeros(shapes[0]), pieces)
  return sums, order.joined(numbers)


@flax.struct.dataclass
class _Given:
  """What `_scores` was given. `head_moves`: whether the unembedding has a gradient."""

  arrays: tuple
  head_moves: bool = flax.struct.field(pytree_node=False)


def _forward(hidden_MD, head_VD, target_MX, wanted_M, allowed_V, how):
  given = _values((hidden_MD, head_VD, target_MX, wanted_M, allowed_V))
  return _scores(*given, how), _Given(given, bool(head_VD.perturbed))


def _backward(how, given, cotangents):
  hidden_MD, head_VD, target_MX, wanted_M, allowed_V = given.arrays
  head = _working_head(head_VD, hidden_MD.dtype)
  d_logp_MX, d_entropy_M = map(_instantiated, cotangents)

  def again(hidden, target, d_logp, d_entropy) -> tuple[Array | None, Array]:
    made = _measured(hidden, head, target, allowed_V, how)
    d_logits = _slopes(made, d_logp, d_entropy, target, allowed_V, how)
    return _pulled(d_logits, hidden, head, given.head_moves)

  arrays = (hidden_MD, target_MX, d_logp_MX, d_entropy_M)
  d_head, d_hidden = _in_pieces(again, wanted_M, arrays, how)
  return d_hidden, None if d_head is None else d_head.astype(head_VD.dtype), None, None, None


_scores.defvjp(_forward, _backward, symbolic_zeros=True)


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


def _values(tree: Any) -> Any:
  """What a forward rule that is told of symbolic zeros was given."""
  primal = jax.custom_derivatives.CustomVJPPrimal
  return jax.tree.map(lambda x: x.value, tree, is_leaf=lambda x: isinstance(x, primal))


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

  Logits are made again in the backward pass; where the loss is known beforehand, `token_loss` needs
  them once.

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
  settings = dict(temperature=temperature, entropy=entropy)
  how = _Scoring.of(hidden_MD, head_VD, wanted_M, chunk_tokens, **settings)
  hidden_MD, target_MX, wanted_M, _ = how.own(hidden_MD, target_MX, wanted_M, None)
  return _scores(hidden_MD, head_VD, target_MX, wanted_M, allowed_V, how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _losses(
  hidden_MD: Array,
  head_VD: Array,
  target_MX: Array,
  wanted_M: Array,
  allowed_V: Array | None,
  given: Any,
  loss: TokenLoss,
  how: _Scoring,
) -> tuple[Array, Array, Array]:
  """The summed loss, log-probabilities [M, X] and entropies [M]."""
  logp, entropy = _scores(hidden_MD, head_VD, target_MX, wanted_M, allowed_V, how)
  return _summed(loss, wanted_M)(logp, entropy, given), logp, entropy


def _summed(loss: TokenLoss, wanted_M: Array) -> Callable[[Array, Array, Any], Array]:
  """The sum of what is wanted: other rows, which may fill a chunk up, hold anything."""
  return lambda *numbers: masked_sum(loss(*numbers), wanted_M[:, None])


def _losses_forward(hidden_MD, head_VD, target_MX, wanted_M, allowed_V, given, loss, how):
  moves = bool(head_VD.perturbed)
  arrays = _values((hidden_MD, head_VD, target_MX, wanted_M, allowed_V, given))
  hidden, head, target, wanted, allowed, given = arrays
  like, head = jnp.zeros((), head.dtype), _working_head(head, hidden.dtype)

  def work(hidden, target, wanted, given) -> tuple[tuple[Array, Any], tuple[Array, Array, Array]]:
    made = _measured(hidden, head, target, allowed, how)
    slope_of = jax.value_and_grad(_summed(loss, wanted), (0, 1))
    total, slopes = slope_of(made.logp_MX, made.entropy_M, given)
    d_logits = _slopes(made, *slopes, target, allowed, how)
    d_head, d_hidden = _pulled(d_logits, hidden, head, moves)
    return (total, d_head), (made.logp_MX, made.entropy_M, d_hidden)

  (total, d_head), numbers = _in_pieces(work, wanted, (hidden, target, wanted, given), how)
  logp, entropy, d_hidden = numbers
  return (total, logp, entropy), (d_hidden, d_head, like)


def _losses_backward(loss, how, kept, cotangents):
  del loss, how
  d_hidden, d_head, like = kept
  slope = _instantiated(cotangents[0])
  d_head = None if d_head is None else (slope * d_head).astype(like.dtype)
  return (slope * d_hidden).astype(d_hidden.dtype), d_head, None, None, None, None


_losses.defvjp(_losses_forward, _losses_backward, symbolic_zeros=True)


def token_loss(
  hidden_MD: Array,
  head_VD: Array,
  target_MX: Array,
  given: Any,
  loss: TokenLoss,
  *,
  wanted_M: Array | None = None,
  allowed_V: Array | None = None,
  temperature: float = 1.0,
  chunk_tokens: int = 1024,
  entropy: EntropyKind = "none",
) -> tuple[Array, Array, Array]:
  """A loss of target tokens, whose gradient is made while their logits are there: these are neither
  kept for a backward pass nor made again in it.

  Args:
    given: a pytree of arrays [M, ...] that the loss reads too, of each token; without gradient.
    loss: of tokens, from their own numbers alone: a chunk of them is given at a time. It may read
      no other array that is being traced.
    others: as of `token_logprobs`.

  Returns:
    The sum over what is wanted, float32, differentiable in hidden states and unembedding;
    log-probabilities [M, X] and entropies [M], without gradient.
  """
  settings = dict(temperature=temperature, entropy=entropy)
  how = _Scoring.of(hidden_MD, head_VD, wanted_M, chunk_tokens, **settings)
  hidden_MD, target_MX, wanted_M, given = how.own(hidden_MD, target_MX, wanted_M, given)
  total, logp, nats = _losses(hidden_MD, head_VD, target_MX, wanted_M, allowed_V, given, loss, how)
  return total, jax.lax.stop_gradient(logp), jax.lax.stop_gradient(nats)


def negative_log_likelihood(logp_MX: Array, entropy_M: Array, counts_MX: Array) -> Array:
  """The `TokenLoss` of supervised training."""
  del entropy_M
  return jnp.where(counts_MX, -logp_MX, 0.0)


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
