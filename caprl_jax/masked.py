"""Masked reductions. No other module divides by the sum of a mask."""

import jax
import jax.numpy as jnp

Array = jax.Array

# Finite stand-in for minus infinity inside softmaxes: inf - inf would be nan in the gradient.
NEGATIVE = -1e30


def masked_sum(x: Array, mask: Array, axis=None, keepdims: bool = False) -> Array:
  """Sum of x where mask holds, in float32. What is masked may be nan or inf; its gradient is
  zero.
  """
  return jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0), axis=axis, keepdims=keepdims)


def masked_mean(x: Array, mask: Array, axis=None, keepdims: bool = False) -> Array:
  """Mean of x where mask holds, in float32; 0 where nothing holds."""
  mask = jnp.broadcast_to(mask, x.shape)
  count = jnp.sum(mask, axis=axis, keepdims=keepdims)
  return masked_sum(x, mask, axis, keepdims) / jnp.maximum(count, 1)


def masked_std(x: Array, mask: Array, axis=None, keepdims: bool = False, ddof: int = 0) -> Array:
  """Standard deviation of x where mask holds, in float32; 0 where `ddof` or fewer elements hold."""
  mask = jnp.broadcast_to(mask, x.shape)
  mean = masked_mean(x, mask, axis, keepdims=True)
  count = jnp.sum(mask, axis=axis, keepdims=keepdims)
  square = masked_sum((x - mean) ** 2, mask, axis, keepdims)
  return jnp.sqrt(square / jnp.maximum(count - ddof, 1))


def masked_max(x: Array, mask: Array, axis=None) -> Array:
  """Maximum of x where mask holds; `NEGATIVE` where nothing holds."""
  return jnp.max(jnp.where(mask, x, NEGATIVE), axis=axis)


def masked_min(x: Array, mask: Array, axis=None) -> Array:
  """Minimum of x where mask holds; `-NEGATIVE` where nothing holds."""
  return jnp.min(jnp.where(mask, x, -NEGATIVE), axis=axis)
