"""The functions of `tpu.py`, in Pallas kernels that become Triton's: for GPUs.

A program takes one block of queries of one head, or one block of keys, and goes through the blocks
that meet it itself. Letters as in `piece.py`; H = J * M query heads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from caprl_jax.masked import NEGATIVE
from caprl_jax.models.kernels.piece import Piece, product

Array = jax.Array
BLOCK = 64  # queries and keys; divides those of the arrays
_PARAMETERS = triton.CompilerParams(num_warps=4, num_stages=2)


def attend(
  q_NJMLh: Array, piece: Piece, dtype: Any, interpret: bool = False
) -> tuple[Array, Array]:
  """As `tpu.attend`."""
  N, J, M, L, h = q_NJMLh.shape
  wide = _Wide(h)
  q, key, value = map(wide.pad, (q_NJMLh, piece.key_RJSh, piece.value_RJSh))
  by_query = _ByQuery(piece, M, wide.width)
  out, lse = pl.pallas_call(
    functools.partial(_attend_kernel, scale=h**-0.5),
    out_shape=(
      jax.ShapeDtypeStruct((N, J * M, L, wide.width), dtype),
      jax.ShapeDtypeStruct((N, J * M, L), jnp.float32),
    ),
    grid=(N, J * M, L // BLOCK),
    in_specs=[*by_query.specs(), by_query.block],
    out_specs=(by_query.block, by_query.numbers),
    compiler_params=_PARAMETERS,
    interpret=interpret,
  )(*by_query.given(key, value), q.reshape(N, J * M, L, -1))
  return wide.cut(out).reshape(q_NJMLh.shape), lse.reshape(q_NJMLh.shape[:-1])


def gradients(
  q_NJMLh: Array,
  piece: Piece,
  lse_NJML: Array,
  slope_NJMLh: Array,
  dot_NJML: Array,
  interpret: bool = False,
) -> tuple[Array, Array, Array]:
  """As `tpu.gradients`."""
  N, J, M, L, h = q_NJMLh.shape
  R, _, S, _ = piece.key_RJSh.shape
  wide = _Wide(h)
  q, slope, key, value = map(wide.pad, (q_NJMLh, slope_NJMLh, piece.key_RJSh, piece.value_RJSh))
  by_query, by_key = _ByQuery(piece, M, wide.width), _ByKey(piece, M, wide.width)
  d_q = pl.pallas_call(
    functools.partial(_query_gradient_kernel, scale=h**-0.5),
    out_shape=jax.ShapeDtypeStruct((N, J * M, L, wide.width), jnp.float32),
    grid=(N, J * M, L // BLOCK),
    in_specs=[*by_query.specs(), *(by_query.block, by_query.numbers) * 2],
    out_specs=by_query.block,
    compiler_params=_PARAMETERS,
    interpret=interpret,
  )(
    *by_query.given(key, value),
    *(x.reshape(N, J * M, *x.shape[3:]) for x in (q, lse_NJML, slope, dot_NJML)),
  )
  d_key, d_value = pl.pallas_call(
    functools.partial(_key_gradient_kernel, scale=h**-0.5),
    out_shape=tuple(jax.ShapeDtypeStruct(key.shape, key.dtype) for _ in range(2)),
    grid=(R, J, S // BLOCK),
    in_specs=[*by_key.specs(), *(by_key.rows, by_key.numbers) * 2],
    out_specs=(by_key.block, by_key.block),
    compiler_params=_PARAMETERS,
    interpret=interpret,
  )(*by_key.given(key, value), q, lse_NJML, slope, dot_NJML)
  return wide.cut(d_q).reshape(q_NJMLh.shape), wide.cut(d_key), wide.cut(d_value)


# ---- kernels ----


def _attend_kernel(first, last, key, value, bounds, code, q, out, lse, *, scale: float):
  query, number = q[...], pl.program_id(2)

  def step(t, carry):
    total, top, mass = carry
    at = pl.ds(t * BLOCK, BLOCK)
    seen = _seen(bounds[0, :], bounds[1, :], code[at])
    score = jnp.where(seen, product(query, key[at, :], 1, 1) * scale, NEGATIVE)
    new = jnp.maximum(top, score.max(axis=1))
    weight = jnp.where(seen, jnp.exp(score - new[:, None]), 0.0)
    fade, values = jnp.exp(top - new), value[at, :]
    total = total * fade[:, None] + product(weight.astype(values.dtype), values, 1, 0)
    return total, new, mass * fade + weight.sum(axis=1)

  nothing = jnp.zeros(BLOCK, jnp.float32)
  begin = (jnp.zeros(query.shape, jnp.float32), nothing + NEGATIVE, nothing)
  total, top, mass = jax.lax.fori_loop(first[number], last[number] + 1, step, begin)
  whole = jnp.where(mass == 0, 1.0, mass)
  out[...] = (total / whole[:, None]).astype(out.dtype)
  lse[...] = jnp.where(mass == 0, NEGATIVE, top + jnp.log(whole))


def _query_gradient_kernel(
  first, last, key, value, bounds, code, q, lse, slope, dot, d_q, *, scale: float
):
  query, number, slopes = q[...], pl.program_id(2), slope[...]

  def step(t, total):
    at = pl.ds(t * BLOCK, BLOCK)
    keys = key[at, :]
    score = product(query, keys, 1, 1) * scale
    seen = _seen(bounds[0, :], bounds[1, :], code[at])
    weight = jnp.where(seen, jnp.exp(score - lse[...][:, None]), 0.0)
    d_score = weight * (product(slopes, value[at, :], 1, 1) - dot[...][:, None]) * scale
    return total + product(d_score.astype(keys.dtype), keys, 1, 0)

  begin = jnp.zeros(query.shape, jnp.float32)
  d_q[...] = jax.lax.fori_loop(first[number], last[number] + 1, step, begin)


def _key_gradient_kernel(
  first, last, key, value, bounds, code, q, lse, slope, dot, d_key, d_value, *, scale: float
):
  keys, values, number = key[...], value[...], pl.program_id(2)
  branches, heads = q.shape[:2]

  def of_head(f, m, sums):
    def step(t, sums):
      sum_key, sum_value = sums
      at = pl.ds(t * BLOCK, BLOCK)
      queries, slopes = q[f, m, at, :], slope[f, m, at, :]
      seen = _seen(bounds[f, 0, at], bounds[f, 1, at], code[...])
      weight = product(queries, keys, 1, 1) * scale - lse[f, m, at][:, None]
      weight = jnp.where(seen, jnp.exp(weight), 0.0)
      sum_value += product(weight.astype(slopes.dtype), slopes, 0, 0)
      d_score = weight * (product(slopes, values, 1, 1) - dot[f, m, at][:, None]) * scale
      return sum_key + product(d_score.astype(queries.dtype), queries, 0, 0), sum_value

    return jax.lax.fori_loop(first[f, number], last[f, number] + 1, step, sums)

  def of_branch(n, sums):
    return of_head(jax.lax.div(n, heads), jax.lax.rem(n, heads), sums)

  nothing = jnp.zeros(keys.shape, jnp.float32)
  sum_key, sum_value = jax.lax.fori_loop(0, branches * heads, of_branch, (nothing, nothing))
  d_key[...], d_value[...] = sum_key.astype(d_key.dtype), sum_value.astype(d_value.dtype)


def _seen(low_L: Array, high_L: Array, code_S: Array) -> Array:
  """bool [L, S]."""
  return (code_S[None] >= low_L[:, None]) & (code_S[None] <= high_L[:, None])


# ---- which block is where ----


class _Wide:
  """Heads as wide as Triton's blocks can be: powers of two, at least 16."""

  def __init__(self, h: int):
    self._h, self.width = h, max(16, 1 << (h - 1).bit_length())

  def pad(self, x: Array) -> Array:
    """With zeros behind each head."""
    more = self.width - self._h
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x

  def cut(self, x: Array) -> Array:
    """Without them."""
    return x[..., : self._h]


class _ByQuery:
  """Blocks of the grid (branch, query head, block of queries)."""

  def __init__(self, piece: Piece, heads: int, width: int):
    self._piece, self._heads, self._width = piece, heads, width
    self.block = pl.BlockSpec((None, None, BLOCK, width), lambda n, h, i: (n, h, i, 0))
    self.numbers = pl.BlockSpec((None, None, BLOCK), lambda n, h, i: (n, h, i))

  def specs(self) -> list[pl.BlockSpec]:
    """Of what `given` returns."""
    F, M, S = self._piece.branches, self._heads, self._piece.code_RS.shape[1]
    div = jax.lax.div  # Triton has no // of signed numbers
    blocks = self._piece.low_NL.shape[1] // BLOCK
    row = pl.BlockSpec((None, None, S, self._width), lambda n, h, _: (div(n, F), div(h, M), 0, 0))
    return [
      *[pl.BlockSpec((None, blocks), lambda *at: (at[0], 0))] * 2,
      *[row] * 2,
      pl.BlockSpec((None, 2, BLOCK), lambda *at: (at[0], 0, at[2])),
      pl.BlockSpec((None, S), lambda *at: (div(at[0], F), 0)),
    ]

  def given(self, key: Array, value: Array) -> tuple[Array, ...]:
    """Which blocks of keys meet each block of queries, the keys, and who sees them."""
    piece = self._piece
    ranges = (x.reshape(len(piece.low_NL), -1) for x in piece.seen_keys(BLOCK, BLOCK))
    return (*ranges, key, value, piece.bounds(), piece.code_RS)


class _ByKey:
  """Blocks of the grid (row, key head, block of keys), with all queries that may meet them."""

  def __init__(self, piece: Piece, heads: int, width: int):
    F, L = piece.branches, piece.low_NL.shape[1]
    self._piece = piece
    self.block = pl.BlockSpec((None, None, BLOCK, width), lambda r, j, i: (r, j, i, 0))
    self.rows = pl.BlockSpec((F, None, heads, L, width), lambda *at: (at[0], at[1], 0, 0, 0))
    self.numbers = pl.BlockSpec((F, None, heads, L), lambda *at: (at[0], at[1], 0, 0))

  def specs(self) -> list[pl.BlockSpec]:
    """Of what `given` returns."""
    F, L, S = self._piece.branches, self._piece.low_NL.shape[1], self._piece.code_RS.shape[1]
    return [
      *[pl.BlockSpec((F, S // BLOCK), lambda *at: (at[0], 0))] * 2,
      *[self.block] * 2,
      pl.BlockSpec((F, 2, L), lambda *at: (at[0], 0, 0)),
      pl.BlockSpec((None, BLOCK), lambda *at: (at[0], at[2])),
    ]

  def given(self, key: Array, value: Array) -> tuple[Array, ...]:
    """Which blocks of queries meet each block of keys, the keys, and who sees them."""
    piece = self._piece
    ranges = (x.reshape(len(piece.low_NL), -1) for x in piece.seeing_queries(BLOCK, BLOCK))
    return (*ranges, key, value, piece.bounds(), piece.code_RS)
