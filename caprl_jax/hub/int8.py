"""int8 in the place of floats: weights of a judge or a captioner, half of bfloat16's memory, and a
captioner's cache, half of its. The activations are as they were.

Kernels are rounded as `layers.to_int8` does it; embeddings and norms stay. Of a cache, the keys and
the values of each token and head are rounded in the same way (`attention.Rounded`).
"""

import dataclasses
from typing import Any, Literal

import jax

from caprl_jax.models.layers import int8_shardings, round_kernel
from caprl_jax.models.policy import Policy
from caprl_jax.types import Params

Int8 = Literal["none", "weights", "cache", "both"]  # what of a captioner is rounded
DECODER = "language_model."  # of a captioner: its tower stays


def while_read(name: str, value: jax.Array) -> Any:
  """As `each` of `weights.params_from_tensors`: a captioner is rounded as it is read, so that it is
  nowhere whole. `named` then makes parameters of what was read."""
  of_decoder = name.startswith(DECODER) and name.endswith(".kernel")
  return round_kernel(value) if of_decoder else value


def rounded_places(shardings: dict[str, Any]) -> dict[str, Any]:
  """Where a captioner's parameters lie once its decoder is rounded."""
  return {**shardings, "language_model": int8_shardings(shardings["language_model"])}


def named(params: Params) -> Params:
  """Kernels that `while_read` has rounded, as `to_int8` names them."""
  out = {}
  for name, value in params.items():
    if isinstance(value, dict):
      out[name] = named(value)
    elif name == "kernel" and isinstance(value, tuple):
      out["kernel"], out["kernel_scale"] = value
    else:
      out[name] = value
  return out


def with_int8_cache(policy: Policy) -> Policy:
  """The captioner whose prefixes and caches are int8. Nothing has a gradient through them."""
  text = dataclasses.replace(policy.cfg.text, int8_cache=True)
  return Policy(dataclasses.replace(policy.cfg, text=text))
