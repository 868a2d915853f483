"""One piece of what queries attend to, who sees it, and how both are cut into blocks.

Which keys a query sees is data, as two numbers per query and one per key: those whose `code_RS` is
from its `low_NL` to its `high_NL`. A prefix's row is read by the F = N / R branches that share it,
and is never tiled.

Letters: N branches, R rows of the piece, F = N / R, L queries, S keys, J key heads, M query heads
to each, h head width; the heads' axes stand in front of the tokens'. L and S are whole blocks.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
LANES = 128  # blocks are multiples of it
UNSEEN = int(np.iinfo(np.int32).min)  # the code of a key that nobody sees
LOWEST, HIGHEST = UNSEEN + 1, int(np.iinfo(np.int32).max)


@flax.struct.dataclass
class Piece:
  """Keys and values, and who sees them."""

  key_RJSh: Array
  value_RJSh: Array
  code_RS: Array  # int32; `UNSEEN`, or from `LOWEST` on
  low_NL: Array  # int32
  high_NL: Array  # int32; below `low_NL` for a query that sees nothing

  @property
  def branches(self) -> int:
    """F, which share a row."""
    return self.low_NL.shape[0] // self.code_RS.shape[0]

  def bounds(self) -> Array:
    """The queries' numbers, int32 [N, 2, L]."""
    return jnp.stack([self.low_NL, self.high_NL], axis=1)

  def meet(self, queries: int, keys: int) -> Array:
    """For blocks of so many: whether any query of the one may see a key of the other, bool [N,
    blocks of queries, blocks of keys]."""
    (N, L), (R, S) = self.low_NL.shape, self.code_RS.shape
    low = self.low_NL.reshape(N, L // queries, -1).min(-1)[..., None]
    high = self.high_NL.reshape(N, L // queries, -1).max(-1)[..., None]
    code = self.code_RS.reshape(R, S // keys, -1)
    most = jnp.repeat(code.max(-1), self.branches, axis=0)[:, None]
    least = jnp.where(code == UNSEEN, HIGHEST, code).min(-1)
    return (most >= low) & (jnp.repeat(least, self.branches, axis=0)[:, None] <= high)

  def seen_keys(self, queries: int, keys: int) -> tuple[Array, Array]:
    """The first and the last block of keys that each block of queries sees, int32 [N * blocks];
    the last is -1 where it sees none."""
    return _range(self.meet(queries, keys))

  def seeing_queries(self, queries: int, keys: int) -> tuple[Array, Array]:
    """The first and the last block of queries that sees each block of keys, int32 [N * blocks]."""
    return _range(jnp.swapaxes(self.meet(queries, keys), 1, 2))


def _range(meet_NXY: Array) -> tuple[Array, Array]:
  """The first and the last Y where it holds, int32 [N * X]; (0, -1) where it holds nowhere."""
  first = jnp.argmax(meet_NXY, axis=-1)
  last = meet_NXY.shape[-1] - 1 - jnp.argmax(meet_NXY[..., ::-1], axis=-1)
  last = jnp.where(meet_NXY.any(-1), last, -1)
  return first.reshape(-1).astype(jnp.int32), last.reshape(-1).astype(jnp.int32)


def even_block(length: int, most: int) -> int:
  """The size of blocks of at most `most`, a multiple of 128, that leaves the least over."""
  blocks = -(-length // most)
  return -(-length // (blocks * LANES)) * LANES


def product(x: Array, y: Array, over_x: int, over_y: int) -> Array:
  """A matrix product over one axis of each, float32."""
  # one pass of a matrix unit multiplies bfloat16 numbers, or tf32
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    x,
    y,
    (((over_x,), (over_y,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )
