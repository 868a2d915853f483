"""int8 in the place of floats: weights of a judge or a captioner, half of bfloat16's memory, and a
captioner's cache, half of its. The activations are as they were.

Each output column of a kernel is rounded to 255 levels of its largest weight; `layers.Linear`
multiplies the scale back after the product. Embeddings and norms stay. Of a cache, the keys and the
values of each token and head are rounded in the same way (`attention.Rounded`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax

from caprl_jax.models.layers import to_levels
from caprl_jax.models.policy import Policy
from caprl_jax.types import Params

Int8 = Literal["none", "weights", "cache", "both"]  # what of a captioner is rounded
DECODER = "language_model."  # of a captioner: its tower stays


@jax.jit
def _round(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
  values, scale = to_levels(kernel, -2)
  return values, scale[..., 0, :]


def to_int8(params: Params) -> Params:
  """Every `kernel` [..., in, out] as int8 with a `kernel_scale` float32 [..., out]; the rest as it
  is.
  """
  return _named(params, _round)


def while_read(name: str, value: jax.Array) -> Any:
  """As `each` of `weights.params_from_tensors`: a captioner is rounded as it is read, so that it is
  nowhere whole. `named` then makes parameters of what was read."""
  of_decoder = name.startswith(DECODER) and name.endswith(".kernel")
  return _round(value) if of_decoder else value


def named(params: Params) -> Params:
  """Kernels that `while_read` has rounded, as `to_int8` names them."""
  return _named(params, lambda kernel: kernel if isinstance(kernel, tuple) else None)


def _named(params: Params, pair: Callable[[Any], tuple[jax.Array, jax.Array] | None]) -> Params:
  out = {}
  for name, value in params.items():
    if isinstance(value, dict):
      out[name] = _named(value, pair)
    elif name == "kernel" and (rounded := pair(value)) is not None:
      out["kernel"], out["kernel_scale"] = rounded
    else:
      out[name] = value
  return out


def with_int8_cache(policy: Policy) -> Policy:
  """The captioner whose prefixes and caches are int8. Nothing has a gradient through them."""
  text = dataclasses.replace(policy.cfg.text, int8_cache=True)
  return Policy(dataclasses.replace(policy.cfg, text=text))
