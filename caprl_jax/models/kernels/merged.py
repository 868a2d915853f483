"""Attention over several pieces by kernels, with one gradient around the merge.

Pieces are merged by their log-sum-exps. The gradient of each then needs two numbers per query, the
log-sum-exp of all and the sum of out * slope, and nothing of the others. There
are kernels for TPUs and for GPUs; those for TPUs can be interpreted elsewhere, for tests.

On a mesh each device runs the kernels on its own rows and heads (`sharding.on_each_device`): the
compiler cannot split a kernel by itself.

Letters as in `piece.py`; H = J * M query heads.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.models.kernels import gpu, tpu
from caprl_jax.models.kernels.piece import HIGHEST, LOWEST, UNSEEN, Piece

Array = jax.Array
KernelKind = Literal["tpu", "gpu", "interpreted"]
# How arrays lie on a mesh: rows and heads are split, by one rule for all of them.
_BY_HEAD = ("rows", "heads", None, None)
_PIECE = Piece(_BY_HEAD, _BY_HEAD, ("rows", None), ("rows", None), ("rows", None))
_QUERIES, _NUMBERS = (*_BY_HEAD, None), _BY_HEAD


class _Kernels(NamedTuple):
  """As of `tpu.py`."""

  attend: Callable[..., tuple[Array, Array]]
  gradients: Callable[..., tuple[Array, Array, Array]]


_KERNELS = {
  "tpu": _Kernels(tpu.attend, tpu.gradients),
  "gpu": _Kernels(gpu.attend, gpu.gradients),
  "interpreted": _Kernels(
    functools.partial(tpu.attend, interpret=True), functools.partial(tpu.gradients, interpret=True)
  ),
}


@flax.struct.dataclass
class Seen:
  """One piece, and who sees it: keys whose `code_RS` is from a query's `low_NL` to its `high_NL`
  (`piece.py`)."""

  key_RSJh: Array
  value_RSJh: Array
  code_RS: Array  # int32
  low_NL: Array  # int32
  high_NL: Array  # int32


def attend(q_NLHh: Array, pieces: Sequence[Seen], kind: KernelKind) -> Array:
  """Softmax attention of queries over all pieces together [N, L, H, h], in the queries' dtype; zero
  for a query that sees nothing. Rows of a piece divide N, its heads divide H."""
  N, L, H, h = q_NLHh.shape
  rows, heads = sharding.even_parts(N, H)
  pieces = [_split_evenly(piece, rows, heads) for piece in pieces]
  J = pieces[0].key_RSJh.shape[2]
  block = tpu.query_block(L, H // J, h)
  q = _pad(q_NLHh, 1, block).reshape(N, -1, J, H // J, h)
  out = _merged(kind, jnp.moveaxis(q, 1, 3), tuple(_blocks(piece, block) for piece in pieces))
  return jnp.moveaxis(out, 3, 1).reshape(N, -1, H, h)[:, :L]


def _split_evenly(piece: Seen, rows: int, heads: int) -> Seen:
  """Rows and heads that each of so many parts of a mesh has its own of: those that several parts
  share stand there once for each of them. They take no more memory where they are split."""
  R, _, J, _ = piece.key_RSJh.shape
  rows, heads = (parts // math.gcd(parts, count) for parts, count in ((rows, R), (heads, J)))

  def stand(x: Array) -> Array:
    x = x if rows == 1 else jnp.repeat(x, rows, axis=0)
    return x if heads == 1 or x.ndim == 2 else jnp.repeat(x, heads, axis=2)

  return piece.replace(
    key_RSJh=stand(piece.key_RSJh),
    value_RSJh=stand(piece.value_RSJh),
    code_RS=stand(piece.code_RS),
  )


def _blocks(piece: Seen, query_block: int) -> Piece:
  """A piece in whole blocks, its heads in front. What is added is seen by nobody and sees
  nothing."""
  block = tpu.key_block(piece.code_RS.shape[1])
  return Piece(
    jnp.swapaxes(_pad(piece.key_RSJh, 1, block), 1, 2),
    jnp.swapaxes(_pad(piece.value_RSJh, 1, block), 1, 2),
    _pad(piece.code_RS, 1, block, UNSEEN),
    _pad(piece.low_NL, 1, query_block, HIGHEST),
    _pad(piece.high_NL, 1, query_block, LOWEST),
  )


def _pad(x: Array, axis: int, block: int, value: int = 0) -> Array:
  """Whole blocks along an axis."""
  more = -x.shape[axis] % block
  if not more:
    return x
  return jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)], constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merged(kind: KernelKind, q_NJMLh: Array, pieces: tuple[Piece, ...]) -> Array:
  return _run(kind, q_NJMLh, pieces)[0]


def _run(kind: KernelKind, q_NJMLh: Array, pieces: tuple[Piece, ...]) -> tuple[Array, Array]:
  """The attention, and the log-sum-exp of all scores."""

  attend_one = _KERNELS[kind].attend

  def run(q: Array, pieces: tuple[Piece, ...]) -> tuple[Array, Array]:
    if len(pieces) == 1:
      return attend_one(q, pieces[0], q.dtype)
    parts = [attend_one(q, piece, jnp.float32) for piece in pieces]
    lse = functools.reduce(jnp.logaddexp, [lse for _, lse in parts])
    out = sum(out * jnp.exp(own - lse)[..., None] for out, own in parts)
    return out.astype(q.dtype), lse

  lie = (_QUERIES, (_PIECE,) * len(pieces))
  return sharding.on_each_device(run, (q_NJMLh, pieces), lie, (_QUERIES, _NUMBERS))


def _forward(kind: KernelKind, q_NJMLh: Array, pieces: tuple[Piece, ...]):
  out, lse = _run(kind, q_NJMLh, pieces)
  return out, (q_NJMLh, pieces, out, lse)


def _backward(kind: KernelKind, kept: Any, slope_NJMLh: Array):
  q, pieces, out, lse = kept

  def run(q, pieces, out, lse, slope):
    dot = jnp.sum(out.astype(jnp.float32) * slope.astype(jnp.float32), axis=-1)
    parts = [_KERNELS[kind].gradients(q, piece, lse, slope, dot) for piece in pieces]
    d_q = sum(part[0] for part in parts).astype(q.dtype)
    return d_q, tuple((d_key, d_value) for _, d_key, d_value in parts)

  lie = (_QUERIES, (_PIECE,) * len(pieces), _QUERIES, _NUMBERS, _QUERIES)
  made = (_QUERIES, ((_BY_HEAD, _BY_HEAD),) * len(pieces))
  d_q, keys_values = sharding.on_each_device(run, (q, pieces, out, lse, slope_NJMLh), lie, made)
  return d_q, tuple(Piece(*both, None, None, None) for both in keys_values)


_merged.defvjp(_forward, _backward)
