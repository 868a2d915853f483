"""The shared-prefix primitive: new tokens attend to prefixes whose rows a fan-out of branches
shares.

A batch of N sequences is a set of branches. Each prefix has R rows with N = R * F: rows of a prefix
are in the order of their branches (branch n reads row n // F), and are never tiled. Rollout, judge
and loss are all this one primitive:

  rollout  [image + prompt: B rows] [own caption so far: N rows] + the new token
  loss     [image + prompt: B rows] + the caption's tokens
  judge    [instruction: 1 row] [caption: N rows] + each question's tokens (N * K branches)

Attention over the pieces is computed piece by piece and merged by log-sum-exp (as flash attention
merges its blocks; Dao et al., arXiv 2205.14135), so each piece can have its own kernel.

Where a model's `attention` names kernels and queries are many, the pieces are attended to by
kernels that write no scores to memory (`kernels/`); else, and where there are few, by XLA.

Letters: N branches, R prefix rows, F = N / R, L new tokens, E slots in front of them in their row,
S slots of a prefix or of a row, H query heads, J key heads, M = H / J, h head width.
"""

from typing import Literal, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.masked import NEGATIVE
from caprl_jax.models.kernels import merged
from caprl_jax.models.kernels.piece import UNSEEN
from caprl_jax.models.layers import to_levels

Array = jax.Array
AttentionKind = Literal["xla"] | merged.KernelKind
QUERY_CHUNK = 512
KEY_CHUNK = 256  # of keys of which many queries see none
SEGMENT = 1 << 16  # slots of a row, at most, in the kernels' numbers, and twice the segments
KERNEL_QUERIES = 128  # per branch, at least: kernels take so many at a time


@flax.struct.dataclass
class Rounded:
  """Keys or values in int8, with a scale for each token and head. What is done to keys and values
  along their layers, rows, slots and heads is done to both arrays alike, by `jax.tree.map`."""

  values: Array  # int8 [..., J, h]
  scale: Array  # float32 [..., J, 1]

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @classmethod
  def of(cls, x: Array) -> "Rounded":
    return cls(*to_levels(x, -1))


KeysOrValues: TypeAlias = Array | Rounded


@flax.struct.dataclass
class Prefix:
  """Keys and values that tokens left behind, for all layers; `layer()` drops the first axis."""

  key_YRSJh: KeysOrValues  # Y layers; keys are already rotated
  value_YRSJh: KeysOrValues
  valid_RS: Array  # bool


@flax.struct.dataclass
class EarlierTokens:
  """The slots that stand in front of new tokens in the same rows, where a row is run block by
  block: unlike those of a `Prefix`, only tokens of the same segment see them."""

  key_YNEJh: Array
  value_YNEJh: Array
  valid_NE: Array  # bool
  segment_NE: Array  # int


def empty_cache(prefix: Prefix, rows: int, slots: int) -> Prefix:
  """A Prefix of the same model with `rows` rows and `slots` empty slots."""

  def zeros(x: Array) -> Array:
    return jnp.zeros((x.shape[0], rows, slots, *x.shape[3:]), x.dtype)

  keys_values = jax.tree.map(zeros, (prefix.key_YRSJh, prefix.value_YRSJh))
  return Prefix(*keys_values, jnp.zeros((rows, slots), bool))


def grown(cache: Prefix, slots: int) -> Prefix:
  """The cache with empty slots behind its own."""

  def longer(x: Array, axis: int = 2) -> Array:
    return jnp.pad(x, [(0, slots - x.shape[axis] if a == axis else 0) for a in range(x.ndim)])

  keys_values = jax.tree.map(longer, (cache.key_YRSJh, cache.value_YRSJh))
  return Prefix(*keys_values, longer(cache.valid_RS, 1))


@flax.struct.dataclass
class Part:
  """Attention over one piece before it is normalised."""

  out_NLHh: Array  # float32, sum of exp(score - top) * value
  top_NLH: Array  # float32, the largest score (no gradient)
  mass_NLH: Array  # float32, sum of exp(score - top)


def attend_part(
  q_NLHh: Array, key_RSJh: KeysOrValues, value_RSJh: KeysOrValues, mask: Array
) -> Part:
  """Attends to one piece. `mask` is bool [R, S] for a prefix, or [N, L, S] for a piece that has one
  row per branch.

  Scores and the softmax are float32; both products take the inputs' dtype and accumulate in
  float32. int8 keys and values are widened to it, and their scales go to the scores and weights.
  """
  N, L, H, h = q_NLHh.shape
  R, S, J, _ = key_RSJh.shape
  assert N % R == 0 and H % J == 0, (q_NLHh.shape, key_RSJh.shape)
  q = q_NLHh.reshape(R, N // R, L, J, H // J, h)
  (key_RSJh, key_scale), (value_RSJh, value_scale) = (
    _widened(x, q.dtype) for x in (key_RSJh, value_RSJh)
  )
  score = (
    jnp.einsum("rfljmh,rsjh->rfljms", q, key_RSJh, preferred_element_type=jnp.float32) * h**-0.5
  )
  if key_scale is not None:
    score = score * key_scale
  if mask.ndim == 2:
    mask = mask[:, None, None, None, None, :]
  else:
    assert R == N, (q_NLHh.shape, key_RSJh.shape)
    mask = mask[:, None, :, None, None, :]
  score = jnp.where(mask, score, NEGATIVE)
  top = jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True))
  # A row that may see nothing has top = NEGATIVE; the mask keeps its exp(0) out of the mass.
  weight = jnp.where(mask, jnp.exp(score - top), 0.0)
  scaled = weight if value_scale is None else weight * value_scale
  out = jnp.einsum(
    "rfljms,rsjh->rfljmh",
    scaled.astype(value_RSJh.dtype),
    value_RSJh,
    preferred_element_type=jnp.float32,
  )
  return Part(out.reshape(N, L, H, h), top.reshape(N, L, H), weight.sum(-1).reshape(N, L, H))


def _widened(x_RSJh: KeysOrValues, dtype: jnp.dtype) -> tuple[Array, Array | None]:
  """What a product takes, and by what a score or weight [r, f, l, j, m, s] is multiplied."""
  if not isinstance(x_RSJh, Rounded):
    return x_RSJh, None
  scale_RJS = jnp.swapaxes(x_RSJh.scale[..., 0], 1, 2)
  return x_RSJh.values.astype(dtype), scale_RJS[:, None, None, :, None, :]


def attend_seen(
  q_NLHh: Array, key_RSJh: KeysOrValues, value_RSJh: KeysOrValues, mask: Array
) -> Part:
  """`attend_part`, `KEY_CHUNK` keys at a time, and not those that no query sees: so the time
  follows the keys that are there, and the scores of all keys never exist at once. The backward pass
  makes them again.

  Shapes, `mask` and dtypes are those of `attend_part`; one query, or keys of two chunks or fewer,
  are taken in one piece.
  """
  (S, L), chunks = (key_RSJh.shape[1], q_NLHh.shape[1]), -(-key_RSJh.shape[1] // KEY_CHUNK)
  if L == 1 or chunks <= 2:
    return attend_part(q_NLHh, key_RSJh, value_RSJh, mask)

  def cut(x: Array, axis: int) -> Array:
    """[..., S, ...] -> [chunks, ..., KEY_CHUNK, ...]."""
    pad = [(0, chunks * KEY_CHUNK - S if at == axis else 0) for at in range(x.ndim)]
    shape = (*x.shape[:axis], chunks, KEY_CHUNK, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, pad).reshape(shape), axis, 0)

  @jax.checkpoint  # around the choice, or each chunk would keep what it needs of either
  def chunk(so_far: Part, x: tuple[KeysOrValues, KeysOrValues, Array]) -> tuple[Part, None]:
    def look(so_far: Part) -> Part:
      return joined([so_far, attend_part(q_NLHh, *x)])

    return jax.lax.cond(x[-1].any(), look, lambda so_far: so_far, so_far), None

  nothing = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(attend_part, q_NLHh, key_RSJh, value_RSJh, mask),
  )
  nothing = nothing.replace(top_NLH=nothing.top_NLH + NEGATIVE)
  key, value = jax.tree.map(lambda x: cut(x, 1), (key_RSJh, value_RSJh))
  pieces = (key, value, cut(mask, mask.ndim - 1))
  return jax.lax.scan(chunk, nothing, pieces)[0]


def joined(parts: list[Part]) -> Part:
  """Several pieces as one, not normalised either: sums are brought to the largest of their tops, as
  flash attention merges its blocks."""
  top = parts[0].top_NLH
  for part in parts[1:]:
    top = jnp.maximum(top, part.top_NLH)
  scale = [jnp.exp(part.top_NLH - top) for part in parts]
  out = sum(part.out_NLHh * s[..., None] for part, s in zip(parts, scale))
  mass = sum(part.mass_NLH * s for part, s in zip(parts, scale))
  return Part(jnp.asarray(out), top, jnp.asarray(mass))


def merge_parts(parts: list[Part]) -> Array:
  """Softmax attention over all pieces together, float32 [N, L, H, h]; zero for a query that may see
  nothing.
  """
  whole = joined(parts)
  return whole.out_NLHh / jnp.where(whole.mass_NLH == 0, 1.0, whole.mass_NLH)[..., None]


def causal_mask(valid_NL: Array, segment_NL: Array | None = None) -> Array:
  """bool [N, L, L]: token i sees valid tokens j <= i; with `segment_NL` (int), those of its own
  segment only.
  """
  L = valid_NL.shape[1]
  order = jnp.arange(L)
  mask_NLL = (order[:, None] >= order[None, :])[None] & valid_NL[:, None, :]
  return (
    mask_NLL
    if segment_NL is None
    else mask_NLL & (segment_NL[:, :, None] == segment_NL[:, None, :])
  )


@flax.struct.dataclass
class OwnTokens:
  """Which of one another new tokens see: valid ones of their own segment that do not come later.

  causal: False: later ones too, as in a vision tower.
  reach: how many slots back a token of the same segment may stand, at most; None: anywhere. Long
    rows of many segments cost as much as their segments do.
  earlier: E, slots of the row in front of the new tokens, whose keys and values are given with
    theirs (`EarlierTokens`).
  """

  valid_NS: Array  # bool, S = E + L
  segment_NS: Array | None = None  # int; None: all tokens of a row are one segment
  causal: bool = flax.struct.field(pytree_node=False, default=True)
  reach: int | None = flax.struct.field(pytree_node=False, default=None)
  earlier: int = flax.struct.field(pytree_node=False, default=0)

  def mask(self) -> Array:
    """bool [N, L, S]."""
    if self.causal:
      return causal_mask(self.valid_NS, self.segment_NS)[:, self.earlier :]
    assert self.segment_NS is None and self.reach is None, "segments are for causal attention"
    N, L = self.valid_NS.shape
    return jnp.broadcast_to(self.valid_NS[:, None], (N, L, L))

  def seen(self, key_NSJh: Array, value_NSJh: Array) -> merged.Seen:
    """What `mask` says, in the kernels' numbers: a segment's keys lie from `SEGMENT` times its
    number on, in order."""
    N, S = self.valid_NS.shape
    segment_NS = jnp.zeros((N, S), jnp.int32) if self.segment_NS is None else self.segment_NS
    low_NS = segment_NS.astype(jnp.int32) * SEGMENT
    high_NS = low_NS + (jnp.arange(S, dtype=jnp.int32) if self.causal else 0)
    code_NS = jnp.where(self.valid_NS, high_NS, UNSEEN)
    new = slice(self.earlier, None)
    return merged.Seen(key_NSJh, value_NSJh, code_NS, low_NS[:, new], high_NS[:, new])


def takes_kernel(kind: AttentionKind, queries: int, slots: int) -> bool:
  """Whether `attend` takes a kernel for so many queries per branch, in rows of so many slots:
  decoding and short questions, which wait for their keys rather than for products, do not."""
  return kind != "xla" and queries >= KERNEL_QUERIES and slots < SEGMENT


def attend(
  q_NLHh: Array,
  own: tuple[Array, Array],
  tokens: OwnTokens,
  prefixes: tuple[tuple[KeysOrValues, KeysOrValues, Array], ...] = (),
  kind: AttentionKind = "xla",
) -> Array:
  """Attention of new tokens over prefixes, each (key_RSJh, value_RSJh, valid_RS), and over
  themselves and what stands in front of them in their rows (`own`: keys and values [N, E + L]).

  Long runs of queries are taken in chunks of `QUERY_CHUNK`, whose scores are made again in the
  backward pass: scores of all queries at once would be the largest array in the program. With
  kernels of `kind` they are made block by block and never written.

  Returns [N, L, H, h] in the queries' dtype.
  """
  if kind != "xla" and takes_kernel(kind, q_NLHh.shape[1], tokens.valid_NS.shape[1]):
    everybody = jnp.zeros(q_NLHh.shape[:2], jnp.int32)

    def wide(x: KeysOrValues) -> Array:
      return (x.values * x.scale).astype(q_NLHh.dtype) if isinstance(x, Rounded) else x

    before = [
      merged.Seen(*map(wide, (key, value)), jnp.where(valid, 0, UNSEEN), everybody, everybody)
      for key, value, valid in prefixes
      if key.shape[1]
    ]
    return merged.attend(q_NLHh, [*before, tokens.seen(*own)], kind)

  def some(q_NCHh: Array, own: tuple[Array, Array], mask_NCL: Array) -> Array:
    parts = [attend_seen(q_NCHh, key, value, valid) for key, value, valid in prefixes]
    # Of a long row of segments a token sees its own; without segments it sees half of all at least.
    own_part = attend_part if tokens.segment_NS is None else attend_seen
    parts.append(own_part(q_NCHh, *own, mask_NCL))
    return merge_parts(parts).astype(q_NCHh.dtype)

  N, L, H, h = q_NLHh.shape
  if L <= QUERY_CHUNK or tokens.earlier + L <= 2 * QUERY_CHUNK:
    return some(q_NLHh, own, tokens.mask())
  chunks = -(-L // QUERY_CHUNK)
  length = chunks * QUERY_CHUNK
  segment_NS = tokens.segment_NS
  if segment_NS is None:
    segment_NS = jnp.zeros(tokens.valid_NS.shape, jnp.int32)
  # Keys that a chunk's queries can see: its own and those `reach` slots back.
  E = tokens.earlier
  seen = E + length if tokens.reach is None else min(E + length, QUERY_CHUNK + tokens.reach)

  def padded(x: Array) -> Array:
    return jnp.pad(x, [(0, 0), (0, length - L)] + [(0, 0)] * (x.ndim - 2))

  queries, keys = padded(q_NLHh), (*map(padded, own), padded(tokens.valid_NS), padded(segment_NS))

  def chunk(number: Array) -> Array:
    first = number * QUERY_CHUNK
    begin = jnp.clip(E + first + QUERY_CHUNK - seen, 0, E + length - seen)

    def cut(x: Array, begin: Array, size: int) -> Array:
      return jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1)

    key, value, valid, segment = (cut(x, begin, seen) for x in keys)
    same = cut(keys[-1], E + first, QUERY_CHUNK)[:, :, None] == segment[:, None]
    if tokens.causal:
      same &= begin + jnp.arange(seen) <= E + first + jnp.arange(QUERY_CHUNK)[:, None]
    return some(cut(queries, first, QUERY_CHUNK), (key, value), same & valid[:, None, :])

  out = jax.lax.map(jax.checkpoint(chunk), jnp.arange(chunks))
  return jnp.moveaxis(out, 0, 1).reshape(N, -1, H, h)[:, :L]
