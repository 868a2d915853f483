"""Layers that every model shares: linear maps with logical axes, RMSNorm, gated MLP, rotary positions.

Letters: L tokens, D width, h head width. Logical axis names are resolved to mesh axes in `sharding.py`.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def linear(features: int, axes: tuple[str, str], name: str, *, use_bias: bool, init_std: float, dtype) -> nn.Dense:
  """A Dense layer whose kernel [in, out] carries the logical axes `axes`. Call inside a compact method."""
  return nn.Dense(
      features, use_bias=use_bias, name=name, dtype=dtype,
      kernel_init=nn.with_logical_partitioning(nn.initializers.normal(init_std), axes),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]))


class RMSNorm(nn.Module):
  """x / rms(x) * weight: the mean square in float32, the weight applied in x's dtype (as transformers does)."""
  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    weight = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)),
                        (x.shape[-1],))
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
    return weight.astype(x.dtype) * wide.astype(x.dtype)


class GatedMLP(nn.Module):
  """down(act(gate(x)) * up(x)), [..., D] -> [..., D]."""
  intermediate_size: int
  activation: str
  use_bias: bool
  init_std: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    options = dict(use_bias=self.use_bias, init_std=self.init_std, dtype=self.dtype)
    gate = linear(self.intermediate_size, ("embed", "mlp"), "gate_proj", **options)(x)
    up = linear(self.intermediate_size, ("embed", "mlp"), "up_proj", **options)(x)
    down = linear(x.shape[-1], ("mlp", "embed"), "down_proj", **options)
    return down(ACTIVATIONS[self.activation](gate) * up)


def rotary_tables(position: Array, head_dim: int, theta: float,
                  sections: Sequence[int] | None = None) -> tuple[Array, Array]:
  """Cosines and sines of rotary positions, float32 [N, L, h] each.

  `position` is [N, L]; with `sections` it is [N, 3, L] (time, height, width) and consecutive blocks of
  frequencies take their position from one of the three in turn (M-RoPE; Qwen2-VL, arXiv 2409.12191).
  """
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = position.astype(jnp.float32)[..., None] * frequency
  if sections is not None:
    assert position.ndim == 3 and sum(sections) == head_dim // 2, (position.shape, sections)
    stops = [sum(sections[:i + 1]) for i in range(len(sections) - 1)]
    angle = jnp.concatenate([block[:, i % 3] for i, block in enumerate(jnp.split(angle, stops, axis=-1))], axis=-1)
  angle = jnp.concatenate([angle, angle], axis=-1)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_NLHh: Array, cos_NLh: Array, sin_NLh: Array) -> Array:
  """Applies rotary positions to queries or keys, pairing element i with i + h/2, in the tables' dtype."""
  first, second = jnp.split(x_NLHh, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  rotated = x_NLHh * cos_NLh[:, :, None, :] + turned * sin_NLh[:, :, None, :]
  return rotated.astype(x_NLHh.dtype)
