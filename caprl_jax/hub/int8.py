"""int8 weights for a judge: half of bfloat16's memory, the activations as they were.

Each output column of a kernel is rounded to 255 levels of its largest weight; `layers.Linear`
multiplies the scale back after the product. Embeddings and norms stay.
"""

import jax
import jax.numpy as jnp

from caprl_jax.types import Params


@jax.jit
def _round(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
  wide = kernel.astype(jnp.float32)
  scale = jnp.maximum(jnp.abs(wide).max(axis=-2, keepdims=True), 1e-30) / 127
  return jnp.round(wide / scale).astype(jnp.int8), scale[..., 0, :].astype(jnp.float32)


def to_int8(params: Params) -> Params:
  """Every `kernel` [..., in, out] as int8 with a `kernel_scale` float32 [..., out]; the rest as it
  is.
  """
  out = {}
  for name, value in params.items():
    if isinstance(value, dict):
      out[name] = to_int8(value)
    elif name == "kernel":
      out["kernel"], out["kernel_scale"] = _round(value)
    else:
      out[name] = value
  return out
