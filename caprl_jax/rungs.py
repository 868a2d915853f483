"""Work for the length at hand inside one jit of fixed shapes: rows of like lengths are put into one
piece of a batch (`like_sizes`), so that no piece has to be as long as the longest row; a program at
several sizes ("rungs") runs at the smallest that holds what there is (`on_rung`); and a piece of
which nothing is wanted does not run (`where_any`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from caprl_jax import sharding

Array = jax.Array


def on_rung(
  function: Callable[[int, Any], Any], sizes: Sequence[int], need: Array, argument: Any
) -> Any:
  """function(size, argument) with the smallest size that is at least the largest of `need`; every
  size must give results of the same shapes."""
  if len(sizes) == 1:
    return function(sizes[0], argument)
  rung = sum((need.max() > size).astype(jnp.int32) for size in sizes[:-1])
  branches = [lambda argument, size=size: function(size, argument) for size in sizes]
  return jax.lax.switch(rung, branches, argument)


def where_any(wanted: Array, function: Callable[..., Any], *arguments: Any) -> Any:
  """function(*arguments), or zeros where nothing of it is wanted."""
  shapes = jax.eval_shape(function, *arguments)

  def nothing(*_: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  return jax.lax.cond(wanted.any(), function, nothing, *arguments)


def like_sizes(size_B: Array, pieces: int) -> Array:
  """The order of rows in which `sharding.microbatches` puts those of like sizes into one piece.

  Each device's rows are sorted among themselves, so that none moves to another device.

  Returns:
    int32 [B], places in the batch; their own where nothing can be sorted.
  """
  B, shards = len(size_B), sharding.batch_shards()
  if pieces == 1 or B % (shards * pieces):
    return jnp.arange(B)
  places = jnp.argsort(size_B.reshape(shards, -1), axis=1) + jnp.arange(shards)[:, None] * (
    B // shards
  )
  # Piece j takes every pieces-th row from the j-th on.
  return jnp.swapaxes(places.reshape(shards, pieces, -1), 1, 2).reshape(-1)


def reorder(tree: Any, order_B: Array) -> Any:
  """The rows in another order, in which each device keeps its own (`like_sizes`)."""
  shards = sharding.batch_shards()
  if len(order_B) % shards:
    return jax.tree.map(lambda x: x[order_B], tree)
  place_HB = order_B.reshape(shards, -1) % (len(order_B) // shards)

  def one(x: Array) -> Array:
    shares = x.reshape(shards, -1, *x.shape[1:])
    return jax.vmap(lambda x, i: x[i])(shares, place_HB).reshape(x.shape)

  return sharding.split_over_batch(jax.tree.map(one, tree))


def back(order_B: Array) -> Array:
  """The order that undoes one."""
  return jnp.argsort(order_B)
