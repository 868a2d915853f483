"""Masked reductions against numbers counted by hand; what is masked may be nan or inf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.masked import NEGATIVE, masked_max, masked_mean, masked_min, masked_std, masked_sum

X = jnp.array(
  [[1.0, 2.0, 4.0, jnp.nan], [jnp.inf, -3.0, jnp.nan, -jnp.inf], [jnp.nan, jnp.nan, jnp.inf, 7.0]]
)
MASK = jnp.array([[True, True, True, False], [False, True, False, False], [False] * 4])


def test_values_by_hand():
  np.testing.assert_allclose(masked_sum(X, MASK, axis=1), [7, -3, 0])
  np.testing.assert_allclose(masked_sum(X, MASK), 4)
  np.testing.assert_allclose(masked_mean(X, MASK, axis=1), [7 / 3, -3, 0], rtol=1e-6)
  np.testing.assert_allclose(masked_mean(X, MASK), 1)  # (7 - 3) / 4
  np.testing.assert_allclose(masked_max(X, MASK, axis=1), [4, -3, NEGATIVE])
  np.testing.assert_allclose(masked_min(X, MASK, axis=1), [1, -3, -NEGATIVE])
  assert masked_max(X, MASK) == 4 and masked_min(X, MASK) == -3


@pytest.mark.parametrize("ddof, expected", [(0, (14 / 9) ** 0.5), (1, (7 / 3) ** 0.5)])
def test_std_by_hand(ddof, expected):
  # 1, 2, 4: mean 7/3, squared deviations 16/9 + 1/9 + 25/9 = 14/3
  np.testing.assert_allclose(masked_std(X, MASK, axis=1, ddof=ddof), [expected, 0, 0], rtol=1e-6)


def test_axis_and_keepdims():
  for reduce in (masked_sum, masked_mean, masked_std):
    assert reduce(X, MASK, axis=1, keepdims=True).shape == (3, 1)
    assert reduce(X, MASK, axis=0).shape == (4,)
    assert reduce(X, MASK).shape == ()


def test_a_mask_is_broadcast_in_the_count_too():
  x = jnp.arange(6.0).reshape(2, 3)
  np.testing.assert_allclose(masked_mean(x, jnp.array([True, False, True])), (0 + 2 + 3 + 5) / 4)
  np.testing.assert_allclose(
    masked_std(x, jnp.array([[True], [False]])), np.std([0, 1, 2]), rtol=1e-6
  )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, jnp.bool_])
def test_sums_are_float32(dtype):
  x = jnp.ones(3000, dtype)  # bfloat16 cannot count to 3000
  mask = jnp.ones(3000, bool)
  for reduce, expected in ((masked_sum, 3000), (masked_mean, 1)):
    got = reduce(x, mask)
    assert got.dtype == jnp.float32 and got == expected


@pytest.mark.parametrize("reduce, inside", [(masked_sum, 1.0), (masked_mean, 0.25)])
def test_gradient_is_zero_where_masked(reduce, inside):
  gradient = jax.grad(lambda x: reduce(x, MASK))(X)
  np.testing.assert_array_equal(gradient, np.where(MASK, inside, 0))
