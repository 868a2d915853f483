"""Queries, one piece's keys and values -> softmax attention over the piece and its log-sum-exp, and
the gradients, block by block in Pallas kernels for TPUs: no scores are written to memory. Blocks of
keys that no query of a block sees are not loaded.

The backward pass takes the log-sum-exp and the sum of out * slope of the whole softmax, of which
the piece may be a part, so pieces are differentiated apart from one another (as in ring attention,
Liu et al., arXiv 2310.01889). Scores and sums are float32; products take the inputs' dtype and
accumulate in float32.

Letters as in `piece.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from caprl_jax.masked import NEGATIVE
from caprl_jax.models.kernels.piece import LANES, Piece, even_block, product

Array = jax.Array
KEY_BLOCK = 512  # keys, at most
QUERY_BLOCK = 512  # queries, at most
# Queries times heads that share keys times their width in a block, at most, where that leaves 128
# queries; more of them, and the float32 kernels do not fit the 16 MiB that one may have.
QUERY_NUMBERS = 1 << 18


def query_block(length: int, heads: int, width: int) -> int:
  """Queries of a block, where `heads` query heads share a key head: a multiple of 128."""
  most = QUERY_NUMBERS // (heads * max(width, LANES))
  return even_block(length, min(QUERY_BLOCK, max(most // LANES, 1) * LANES))


def key_block(slots: int) -> int:
  """Keys of a block: a multiple of 128."""
  return even_block(slots, KEY_BLOCK)


def attend(
  q_NJMLh: Array, piece: Piece, dtype: Any, interpret: bool = False
) -> tuple[Array, Array]:
  """Softmax attention over a piece, `dtype` [N, J, M, L, h], and the log-sum-exp of the scores,
  float32 [N, J, M, L]; zero and `NEGATIVE` for a query that sees nothing.

  `interpret`: run the kernel by XLA's operations, for tests on other devices.
  """
  shape, tile = q_NJMLh.shape, _Tile.of(q_NJMLh, piece)
  M, bq, bk, h = tile.heads, tile.queries, tile.keys, shape[-1]
  queries, keys = tile.queries_by_keys()
  return pl.pallas_call(
    functools.partial(_attend_kernel, scale=h**-0.5),
    out_shape=(
      jax.ShapeDtypeStruct(shape, dtype),
      jax.ShapeDtypeStruct(shape[:-1], jnp.float32),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(*shape[:2], tile.query_blocks, tile.key_blocks),
      in_specs=[queries.heads(h), keys.head(h), keys.head(h), queries.codes(2), keys.codes(1)],
      out_specs=(queries.heads(h), queries.numbers()),
      scratch_shapes=[
        pltpu.VMEM((2, bq, LANES), jnp.int32),
        pltpu.VMEM((M, bq, LANES), jnp.float32),
        pltpu.VMEM((M, bq, LANES), jnp.float32),
        pltpu.VMEM((M, bq, h), jnp.float32),
      ],
    ),
    compiler_params=_ONE_AFTER_ANOTHER,
    interpret=interpret,
  )(
    *piece.seen_keys(bq, bk),
    q_NJMLh,
    piece.key_RJSh,
    piece.value_RJSh,
    piece.bounds(),
    piece.code_RS[:, None],
  )


def gradients(
  q_NJMLh: Array,
  piece: Piece,
  lse_NJML: Array,
  slope_NJMLh: Array,
  dot_NJML: Array,
  interpret: bool = False,
) -> tuple[Array, Array, Array]:
  """The piece's share of the queries' gradient, float32, and those of its keys and values.

  Args:
    lse_NJML: float32, the log-sum-exp of the scores of all pieces.
    slope_NJMLh: the gradient of the attention's output, in the queries' dtype.
    dot_NJML: float32, the sum over h of the output times `slope_NJMLh`.
  """
  shape, tile = q_NJMLh.shape, _Tile.of(q_NJMLh, piece)
  M, bq, bk, h = tile.heads, tile.queries, tile.keys, shape[-1]
  given = (q_NJMLh, piece.key_RJSh, piece.value_RJSh, piece.bounds(), piece.code_RS[:, None])
  given += (lse_NJML, slope_NJMLh, dot_NJML)

  def specs(queries: "_Blocks", keys: "_Blocks") -> list:
    heads, number = queries.heads(h), queries.numbers()
    of_keys = [keys.head(h), keys.head(h), queries.codes(2), keys.codes(1)]
    return [heads, *of_keys, number, heads, number]

  queries, keys = tile.queries_by_keys()
  d_query = pl.pallas_call(
    functools.partial(_query_gradient_kernel, scale=h**-0.5),
    out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(*shape[:2], tile.query_blocks, tile.key_blocks),
      in_specs=specs(queries, keys),
      out_specs=queries.heads(h),
      scratch_shapes=[
        pltpu.VMEM((2, bq, LANES), jnp.int32),
        pltpu.VMEM((M, bq, LANES), jnp.float32),
        pltpu.VMEM((M, bq, LANES), jnp.float32),
      ],
    ),
    compiler_params=_ONE_AFTER_ANOTHER,
    interpret=interpret,
  )(*piece.seen_keys(bq, bk), *given)
  queries, keys = tile.keys_by_queries()
  d_key, d_value = pl.pallas_call(
    functools.partial(_key_gradient_kernel, scale=h**-0.5, blocks=tile.query_blocks),
    out_shape=(
      jax.ShapeDtypeStruct(piece.key_RJSh.shape, piece.key_RJSh.dtype),
      jax.ShapeDtypeStruct(piece.value_RJSh.shape, piece.value_RJSh.dtype),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(*piece.key_RJSh.shape[:2], tile.key_blocks, tile.branches * tile.query_blocks),
      in_specs=specs(queries, keys),
      out_specs=(keys.head(h), keys.head(h)),
      scratch_shapes=[
        pltpu.VMEM((bk, LANES), jnp.int32),
        pltpu.VMEM((bk, h), jnp.float32),
        pltpu.VMEM((bk, h), jnp.float32),
      ],
    ),
    compiler_params=_ONE_AFTER_ANOTHER,
    interpret=interpret,
  )(*piece.seeing_queries(bq, bk), *given)
  return d_query, d_key, d_value


# the blocks that a sum is over come one after the other
_ONE_AFTER_ANOTHER = pltpu.CompilerParams(
  dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
)


# ---- kernels: one block of queries and one of keys, of one key head ----


def _attend_kernel(
  first, last, q, key, value, bounds, code, out, lse, columns, top, mass, total, *, scale: float
):
  """Sums over the blocks of keys, the grid's last axis, as flash attention does."""
  block = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
  number = first[block] + pl.program_id(3)

  @pl.when(pl.program_id(3) == 0)
  def _():
    top[...], mass[...] = jnp.full(top.shape, NEGATIVE, top.dtype), jnp.zeros_like(mass)
    total[...] = jnp.zeros_like(total)
    _to_columns(bounds, columns)

  @pl.when(number <= last[block])
  def _():
    seen = (code[...] >= columns[0][:, :1]) & (code[...] <= columns[1][:, :1])

    @pl.loop(0, q.shape[0])
    def _(m):
      score = jnp.where(seen, product(q[m], key[...], 1, 1) * scale, NEGATIVE)
      old = top[m][:, :1]
      new = jnp.maximum(old, score.max(axis=1, keepdims=True))
      weight = jnp.where(seen, jnp.exp(score - new), 0.0)
      fade = jnp.exp(old - new)
      whole = fade * mass[m][:, :1] + weight.sum(axis=1, keepdims=True)
      top[m] = jnp.broadcast_to(new, top.shape[1:])
      mass[m] = jnp.broadcast_to(whole, mass.shape[1:])
      total[m] = fade * total[m] + product(weight.astype(value.dtype), value[...], 1, 0)

  @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
  def _():
    @pl.loop(0, q.shape[0])
    def _(m):
      whole = jnp.where(mass[m] == 0, 1.0, mass[m])
      out[m] = (total[m] / whole[:, :1]).astype(out.dtype)
      number = jnp.where(mass[m] == 0, NEGATIVE, top[m] + jnp.log(whole))
      lse[pl.ds(m, 1), :] = number.T[:1]


def _query_gradient_kernel(
  first, last, q, key, value, bounds, code, lse, slope, dot, out, columns, lses, dots, *, scale
):
  """The gradient of a block of queries, summed over the blocks of keys, the grid's last axis."""
  block = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
  number = first[block] + pl.program_id(3)

  @pl.when(pl.program_id(3) == 0)
  def _():
    out[...] = jnp.zeros_like(out)
    _to_columns(bounds, columns)
    _to_columns(lse, lses)
    _to_columns(dot, dots)

  @pl.when(number <= last[block])
  def _():
    seen = (code[...] >= columns[0][:, :1]) & (code[...] <= columns[1][:, :1])

    @pl.loop(0, q.shape[0])
    def _(m):
      score = product(q[m], key[...], 1, 1) * scale
      weight = jnp.where(seen, jnp.exp(score - lses[m][:, :1]), 0.0)
      d_score = weight * (product(slope[m], value[...], 1, 1) - dots[m][:, :1]) * scale
      out[m] += product(d_score.astype(key.dtype), key[...], 1, 0)


def _key_gradient_kernel(
  first,
  last,
  q,
  key,
  value,
  bounds,
  code,
  lse,
  slope,
  dot,
  d_key,
  d_value,
  column,
  sum_key,
  sum_value,
  *,
  scale: float,
  blocks: int,
):
  """The gradients of a block of keys and values, summed over the blocks of queries of all branches
  that read them, the grid's last axis. Scores are transposed, [keys, queries]."""
  step, branches = pl.program_id(3), pl.num_programs(3) // blocks
  branch = pl.program_id(0) * branches + step // blocks
  block = branch * pl.num_programs(2) + pl.program_id(2)
  number = first[block] + step % blocks

  @pl.when(step == 0)
  def _():
    sum_key[...], sum_value[...] = jnp.zeros_like(sum_key), jnp.zeros_like(sum_value)
    column[...] = _column(code[...])

  @pl.when(number <= last[block])
  def _():
    seen = (column[:, :1] >= bounds[:1, :]) & (column[:, :1] <= bounds[1:, :])

    @pl.loop(0, q.shape[0])
    def _(m):
      score = product(key[...], q[m], 1, 1) * scale
      weight = jnp.where(seen, jnp.exp(score - lse[pl.ds(m, 1), :]), 0.0)
      sum_value[...] += product(weight.astype(slope.dtype), slope[m], 1, 0)
      d_weight = product(value[...], slope[m], 1, 1)
      d_score = weight * (d_weight - dot[pl.ds(m, 1), :]) * scale
      sum_key[...] += product(d_score.astype(q.dtype), q[m], 1, 0)

  @pl.when(step == pl.num_programs(3) - 1)
  def _():
    d_key[...] = sum_key[...].astype(d_key.dtype)
    d_value[...] = sum_value[...].astype(d_value.dtype)


def _column(row_1X: Array) -> Array:
  """Numbers along lanes -> along sublanes, the same in every lane, [X, 128]."""
  return jnp.broadcast_to(row_1X, (LANES, row_1X.shape[1])).T


def _to_columns(rows, columns) -> None:
  """Each row of [m, X] as a column, [m, X, 128]."""

  @pl.loop(0, rows.shape[0])
  def _(m):
    columns[m] = _column(rows[pl.ds(m, 1), :])


# ---- which block is where ----


class _Blocks:
  """The blocks of arrays that a step of the grid reads and writes. `at`: grid indices and the two
  prefetched arrays -> (row, head, block)."""

  def __init__(self, size: int, heads: int, at: Callable[..., tuple[Any, Any, Any]]):
    self.size, self._heads, self._at = size, heads, at

  def heads(self, h: int) -> pl.BlockSpec:
    """Of [N, J, M, L, h]."""
    M = self._heads
    return self._spec((None, None, M, self.size, h), lambda row, head, i: (row, head, 0, i, 0))

  def numbers(self) -> pl.BlockSpec:
    """Of [N, J, M, L]."""
    M = self._heads
    return self._spec((None, None, M, self.size), lambda row, head, i: (row, head, 0, i))

  def head(self, h: int) -> pl.BlockSpec:
    """Of [R, J, S, h]."""
    return self._spec((None, None, self.size, h), lambda row, head, i: (row, head, i, 0))

  def codes(self, count: int) -> pl.BlockSpec:
    """Of [N, count, L] or [R, count, S]."""
    return self._spec((None, count, self.size), lambda row, _, i: (row, 0, i))

  def _spec(self, shape: tuple, index: Callable[..., tuple]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *grid: index(*self._at(*grid)))


@dataclasses.dataclass(frozen=True)
class _Tile:
  """How queries and a piece are cut into blocks, and which block each step of a grid is at."""

  heads: int  # M
  branches: int  # F
  queries: int  # of a block
  keys: int  # of a block
  query_blocks: int
  key_blocks: int

  @classmethod
  def of(cls, q_NJMLh: Array, piece: Piece) -> "_Tile":
    N, J, M, L, h = q_NJMLh.shape
    R, _, S, _ = piece.key_RJSh.shape
    assert N % R == 0 and piece.key_RJSh.shape == (R, J, S, h), (
      q_NJMLh.shape,
      piece.key_RJSh.shape,
    )
    bq, bk = query_block(L, M, h), key_block(S)
    assert L % bq == 0 and S % bk == 0, (L, bq, S, bk)
    return cls(M, piece.branches, bq, bk, L // bq, S // bk)

  def queries_by_keys(self) -> tuple[_Blocks, _Blocks]:
    """Of the grid (branch, head, block of queries, number among the blocks of keys it sees)."""

    def query(n, j, i, _, *ranges):
      del ranges
      return n, j, i

    def key(n, j, i, t, first, last):
      at = n * self.query_blocks + i
      return jax.lax.div(n, self.branches), j, _clip(first[at] + t, last[at])

    return _Blocks(self.queries, self.heads, query), _Blocks(self.keys, self.heads, key)

  def keys_by_queries(self) -> tuple[_Blocks, _Blocks]:
    """Of the grid (row, head, block of keys, branch of the row and number among the blocks of
    queries that see it)."""

    def query(r, j, i, t, first, last):
      n = r * self.branches + jax.lax.div(t, self.query_blocks)
      at = n * self.key_blocks + i
      return n, j, _clip(first[at] + jax.lax.rem(t, self.query_blocks), last[at])

    def key(r, j, i, t, *ranges):
      del t, ranges
      return r, j, i

    return _Blocks(self.queries, self.heads, query), _Blocks(self.keys, self.heads, key)


def _clip(number: Any, last: Any) -> Any:
  """A block that exists: what comes after the last one is not read, and not loaded again."""
  return jnp.maximum(jnp.minimum(number, last), 0)
