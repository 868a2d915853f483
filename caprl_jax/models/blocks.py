"""Long rows of tokens, block by block, in one program of fixed shapes: as many blocks are run as
the fullest row needs, so that time follows the tokens and not the length of the rows.

A block sees the keys and values of those in front of it, so the result is that of the whole row in
one pass. The backward pass takes the blocks from last to first and makes each one again, the
gradient of its keys and values being what the later blocks left: it needs the keys and values of a
row, and the activations of one block alone (of one layer alone, where the model has `remat`).

Letters: N rows, R slots of a row, E slots in front of a block that it can see, D width.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.models.attention import EarlierTokens, Prefix, empty_cache

Array = jax.Array
# (params, block, prefixes, reach, earlier) -> hidden states, keys and values of the block
Extend = Callable[[Any, "Row", tuple[Prefix, ...], int, EarlierTokens | None], tuple[Array, Prefix]]


@flax.struct.dataclass
class Row:
  """Tokens that stand one after the other in rows; those that are not valid are seen by nobody."""

  tokens_NR: Array  # int32
  position_NR: Array  # int32
  valid_NR: Array  # bool
  segment_NR: Array  # int32; a token sees those of its own segment


def running(model: nn.Module) -> Extend:
  """What runs one block of a model that has `Decoder`'s method `extend`: (its parameters, block,
  prefixes, reach, earlier) -> hidden states [N, L, D], and the block's keys and values."""

  def extend(
    params: Any, row: Row, prefixes: tuple[Prefix, ...], reach: int, earlier: EarlierTokens | None
  ) -> tuple[Array, Prefix]:
    where = (row.tokens_NR, row.position_NR, row.valid_NR, prefixes, row.segment_NR, reach, earlier)
    out: Any = model.apply({"params": params}, *where, method="extend")
    return out

  return extend


def extend_in_blocks(
  extend: Extend, params: Any, row: Row, prefixes: tuple[Prefix, ...], reach: int, size: int
) -> Array:
  """Hidden states of rows after their prefixes [N, R, D], in blocks of `size` slots;
  differentiable in parameters and prefixes. Zero behind the last block that holds a valid token.

  Args:
    extend: runs one block.
    reach: slots between the first and the last token of any segment, at most.
  """
  R = row.tokens_NR.shape[1]
  if R <= size:
    return extend(params, row, prefixes, reach, None)[0]
  slots = -(-R // size) * size
  row = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, slots - R))), row)
  cut = _Cut(size, reach, min(reach, slots - size))
  return _hidden(extend, cut, params, prefixes, row)[:, :R]


def prefix_in_blocks(
  extend: Extend, params: Any, row: Row, prefixes: tuple[Prefix, ...], size: int
) -> Prefix:
  """The keys and values that rows leave behind their prefixes, in blocks of `size` slots; each row
  is one segment. Without gradient. Zero behind the last block that holds a valid token."""
  N, R = row.tokens_NR.shape
  if R <= size:
    return extend(params, row, prefixes, R, None)[1]
  slots = -(-R // size) * size
  row = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, slots - R))), row)
  cut = _Cut(size, slots, 0)

  def step(number: Array, cache: Prefix) -> Prefix:
    _, own = extend(params, cut.block(row, number), (*prefixes, cache), slots, None)
    at, write = number * size, jax.lax.dynamic_update_slice_in_dim
    return Prefix(
      write(cache.key_YRSJh, own.key_YRSJh, at, axis=2),
      write(cache.value_YRSJh, own.value_YRSJh, at, axis=2),
      write(cache.valid_RS, own.valid_RS, at, axis=1),
    )

  empty = empty_cache(prefixes[-1], N, slots)
  keys_values = sharding.over_batch((empty.key_YRSJh, empty.value_YRSJh), 1)
  cache = Prefix(*keys_values, sharding.over_batch(empty.valid_RS, 0))
  return jax.lax.fori_loop(0, cut.blocks(row), step, cache)


@dataclasses.dataclass(frozen=True)
class _Cut:
  """How rows are cut: blocks of `size` slots, which see `earlier` slots in front of them."""

  size: int
  reach: int
  earlier: int

  def blocks(self, row: Row) -> Array:
    """Blocks up to the last valid token of any row, int32."""
    slots = row.valid_NR.shape[1]
    last = jnp.where(row.valid_NR.any(0), jnp.arange(slots) + 1, 0).max()
    return -(-last // self.size)

  def block(self, tree: Any, number: Array) -> Any:
    """A block of arrays [N, R, ...]."""
    begin = number * self.size
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, self.size, 1), tree)

  def in_front(self, cache: Array, number: Array) -> Array:
    """What stands in front of a block, of an array [Y, N, E + R, ...]."""
    return jax.lax.dynamic_slice_in_dim(cache, number * self.size, self.earlier, axis=2)

  def see(self, row: Row, number: Array, key: Array, value: Array) -> EarlierTokens:
    """The slots in front of a block, given their keys and values."""

    def masks(x_NR: Array) -> Array:
      padded = jnp.pad(x_NR, ((0, 0), (self.earlier, 0)))
      return jax.lax.dynamic_slice_in_dim(padded, number * self.size, self.earlier, axis=1)

    return EarlierTokens(key, value, masks(row.valid_NR), masks(row.segment_NR))


@flax.struct.dataclass
class _Kept:
  """What the backward pass needs. `moving`: which leaves of parameters and prefixes have a
  gradient."""

  given: Any  # parameters and prefixes
  row: Row
  key_YNSJh: Array  # S = E + R, from the E empty slots in front of the first block on
  value_YNSJh: Array
  moving: tuple[bool, ...] = flax.struct.field(pytree_node=False)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _hidden(
  extend: Extend, cut: _Cut, params: Any, prefixes: tuple[Prefix, ...], row: Row
) -> Array:
  return _run(extend, cut, params, prefixes, row)[0]


def _run(
  extend: Extend, cut: _Cut, params: Any, prefixes: tuple[Prefix, ...], row: Row
) -> tuple[Array, Array, Array]:
  """Hidden states [N, R, D], and keys and values as `_Kept` has them."""
  N, slots = row.tokens_NR.shape

  def run(number: Array, key: Array, value: Array) -> tuple[Array, Prefix]:
    earlier = cut.see(row, number, cut.in_front(key, number), cut.in_front(value, number))
    return extend(params, cut.block(row, number), prefixes, cut.reach, earlier)

  model = prefixes[-1].key_YRSJh
  empty = jnp.zeros((model.shape[0], N, cut.earlier + slots, *model.shape[3:]), model.dtype)
  hidden = jax.eval_shape(run, jnp.int32(0), empty, empty)[0]
  begin = sharding.over_batch((jnp.zeros((N, slots, hidden.shape[-1]), hidden.dtype)), 0)
  cache = sharding.over_batch((empty, empty), 1)

  def step(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    hidden_NRD, key, value = carry
    new, own = run(number, key, value)
    at = number * cut.size
    write = jax.lax.dynamic_update_slice_in_dim
    return (
      write(hidden_NRD, new, at, axis=1),
      write(key, own.key_YRSJh, cut.earlier + at, axis=2),
      write(value, own.value_YRSJh, cut.earlier + at, axis=2),
    )

  return jax.lax.fori_loop(0, cut.blocks(row), step, (begin, *cache))


def _forward(extend: Extend, cut: _Cut, params: Any, prefixes: Any, row: Any):
  def value(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.value, tree)

  moving = tuple(bool(x.perturbed) for x in jax.tree.leaves((params, prefixes)))
  params, prefixes, row = value(params), value(prefixes), value(row)
  hidden_NRD, key, values = _run(extend, cut, params, prefixes, row)
  return hidden_NRD, _Kept((params, prefixes), row, key, values, moving)


def _backward(extend: Extend, cut: _Cut, kept: _Kept, slope_NRD: Any):
  leaves, tree = jax.tree.flatten(kept.given)
  if isinstance(slope_NRD, jax.custom_derivatives.SymbolicZero):
    slope_NRD = jnp.zeros(slope_NRD.shape, slope_NRD.dtype)

  def run(moved: list, front: tuple[Array, Array], number: Array):
    moved = iter(moved)
    params, prefixes = jax.tree.unflatten(
      tree, [next(moved) if moves else x for x, moves in zip(leaves, kept.moving)]
    )
    earlier = cut.see(kept.row, number, *front)
    block = cut.block(kept.row, number)
    hidden, own = extend(params, block, prefixes, cut.reach, earlier)
    return hidden, (own.key_YRSJh, own.value_YRSJh)

  moved = [x for x, moves in zip(leaves, kept.moving) if moves]
  keys_values = (kept.key_YNSJh, kept.value_YNSJh)
  # Sums in float32: of parameters and prefixes, and of the keys and values that are seen by blocks
  # that were taken already, from the E slots in front of the block at hand to its end.
  sums = [jnp.zeros(x.shape, jnp.float32) for x in moved]
  Y, N, _, J, h = kept.key_YNSJh.shape
  window = jnp.zeros((Y, N, cut.earlier + cut.size, J, h), jnp.float32)
  begin = (cut.blocks(kept.row) - 1, sums, sharding.over_batch((window, window), 1))

  def step(carry):
    number, sums, window = carry
    front = tuple(cut.in_front(x, number) for x in keys_values)
    _, pull = jax.vjp(partial(run, number=number), moved, front)
    own = tuple(w[:, :, cut.earlier :].astype(x.dtype) for w, x in zip(window, keys_values))
    grads, d_front = pull((cut.block(slope_NRD, number), own))
    sums = [a + g.astype(jnp.float32) for a, g in zip(sums, grads)]
    # The block before has its own slots where this one sees the last of those in front of it.
    window = tuple(
      jnp.pad(w[:, :, : cut.earlier] + d, [(0, 0), (0, 0), (cut.size, 0), (0, 0), (0, 0)])
      for w, d in zip(window, d_front)
    )
    return number - 1, sums, window

  _, sums, _ = jax.lax.while_loop(lambda carry: carry[0] >= 0, step, begin)
  done = iter(x.astype(like.dtype) for x, like in zip(sums, moved))
  d_params, d_prefixes = jax.tree.unflatten(
    tree, [next(done) if moves else None for moves in kept.moving]
  )
  return d_params, d_prefixes, None


_hidden.defvjp(_forward, _backward, symbolic_zeros=True)
