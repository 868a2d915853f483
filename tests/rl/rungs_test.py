"""The same program at several sizes, and rows of like sizes in one piece."""

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import rungs, sharding


def test_the_smallest_size_that_holds_runs():
  def cut(size, x):
    return jnp.where(jnp.arange(8) < size, x, 0)

  run = jax.jit(lambda need, x: rungs.on_rung(cut, (2, 4, 8), need, x))
  for need, size in ((0, 2), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)):
    got = run(jnp.array([1, need]), jnp.ones(8))
    np.testing.assert_array_equal(got, np.arange(8) < size)


def test_rows_of_like_sizes_share_a_piece():
  size = jnp.array([5, 1, 8, 2, 7, 3])
  order = rungs.like_sizes(size, 3)
  pieces = sharding.microbatches(rungs.reorder(size, order), 3)
  np.testing.assert_array_equal(pieces, [[1, 2], [3, 5], [7, 8]])
  there = rungs.reorder(size, order)
  np.testing.assert_array_equal(rungs.reorder(there, rungs.back(order)), size)


def test_what_cannot_be_sorted_stays():
  np.testing.assert_array_equal(rungs.like_sizes(jnp.array([3, 1, 2]), 1), [0, 1, 2])
  np.testing.assert_array_equal(rungs.like_sizes(jnp.array([3, 1, 2]), 2), [0, 1, 2])
