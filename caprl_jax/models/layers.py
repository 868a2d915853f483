"""Layers that every model shares: linear maps with logical axes and LoRA, norms, MLPs, rotary
positions.

Letters: L tokens, D width, h head width. Logical axis names are resolved to mesh axes in
`sharding.py`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.models.quantized import codes as quantized
from caprl_jax.models.quantized.codes import BaseWeights

Array = jax.Array

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def to_levels(x: Array, axis: int) -> tuple[Array, Array]:
  """Numbers in int8, as 255 levels of the largest of them along `axis`, and the size of a level,
  float32 with 1 in the place of that axis."""
  wide = x.astype(jnp.float32)
  scale = jnp.maximum(jnp.abs(wide).max(axis=axis, keepdims=True), 1e-30) / 127
  return jnp.round(wide / scale).astype(jnp.int8), scale


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters (Hu et al., arXiv 2106.09685): y += x A B * alpha / rank, on the linear
  maps named in `targets`.

  rank: columns of A, rows of B.
  alpha: what the adapters add is multiplied by alpha / rank.
  targets: names of the decoder's linear maps that get adapters.
  base_weights: what the decoder's matrices are rounded to, since they are not trained: `nf4` or
    `int4`, a quarter of bfloat16's memory, or `int8`, half of it. None: they stay as `param_dtype`
    says. Tower, embeddings and norms stay in any case. What is exported is merged with the weights
    as the checkpoint has them.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...] = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
  )
  base_weights: BaseWeights | None = None

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


class Linear(nn.Module):
  """x @ kernel + bias. The kernel [in, out] carries the logical axes `axes`.

  A kernel may be there as codes and scales (`to_int8`, `quantized/codes.py`), widened on use.
  Each device computes its own rows of the batch: left alone, the compiler may rather multiply parts
  of every row with its part of a split kernel, and add up activations over devices.
  """

  features: int
  axes: tuple[str, str]
  use_bias: bool
  init_std: float
  dtype: jnp.dtype
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (x.shape[-1], self.features)
    x = sharding.over_batch(x.astype(self.dtype), 0)
    y = self._product(x, shape)
    if self.lora is not None and self.name in self.lora.targets:
      # A starts random and B at zero, so that the model starts as it was.
      a = self.param(
        "lora_a",
        nn.with_logical_partitioning(
          nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), (self.axes[0], None)
        ),
        (shape[0], self.lora.rank),
      )
      b = self.param(
        "lora_b",
        nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, self.axes[1])),
        (self.lora.rank, shape[1]),
      )
      y = y + (x @ a.astype(self.dtype)) @ b.astype(self.dtype) * jnp.asarray(
        self.lora.scale, self.dtype
      )
    if self.use_bias:
      bias = self.param(
        "bias",
        nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:]),
        (self.features,),
      )
      y = y + bias.astype(self.dtype)
    return sharding.over_batch(y, 0)

  def _product(self, x: Array, shape: tuple[int, int]) -> Array:
    if self.has_variable("params", "kernel_scale"):
      scale = self.get_variable("params", "kernel_scale")
      stored = {kind: f"kernel_{kind}" for kind in quantized.FOUR_BITS} | {"int8": "kernel"}
      kind = next(kind for kind, name in stored.items() if self.has_variable("params", name))
      return quantized.product(
        x, self.get_variable("params", stored[kind]), scale, kind, self.dtype
      )
    init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), self.axes)
    return x @ self.param("kernel", init, shape).astype(self.dtype)


def linear(
  features: int,
  axes: tuple[str, str],
  name: str,
  *,
  use_bias: bool,
  init_std: float,
  dtype,
  lora: LoraConfig | None = None,
) -> Linear:
  """A `Linear`; call inside a compact method."""
  return Linear(features, axes, use_bias, init_std, dtype, lora, name=name)


@jax.jit
def round_kernel(kernel: Array) -> tuple[Array, Array]:
  """int8 [..., in, out], and a scale float32 [..., out]: each column is rounded to 255 levels of
  its largest weight, and `Linear` multiplies the scale back after the product."""
  values, scale = to_levels(kernel, -2)
  return values, scale[..., 0, :]


def to_int8(params: dict[str, Any]) -> dict[str, Any]:
  """Every `kernel` [..., in, out] as int8 with a `kernel_scale` float32 [..., out]; the rest as it
  is.
  """
  out = {}
  for name, value in params.items():
    if isinstance(value, dict):
      out[name] = to_int8(value)
    elif name == "kernel":
      out["kernel"], out["kernel_scale"] = round_kernel(value)
    else:
      out[name] = value
  return out


def int8_shardings(shardings: dict[str, Any]) -> dict[str, Any]:
  """Where parameters lie once `to_int8` has rounded them: as before, and scales as the columns."""
  out = {}
  for name, value in shardings.items():
    out[name] = int8_shardings(value) if isinstance(value, dict) else value
    if name == "kernel":
      out["kernel_scale"] = sharding.of_columns(value)
  return out


class RMSNorm(nn.Module):
  """x / rms(x) * weight: the mean square in float32, the weight applied in x's dtype (as
  transformers does).
  """

  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    weight = self.param(
      "scale", nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)), (x.shape[-1],)
    )
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
    return weight.astype(x.dtype) * wide.astype(x.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / std * scale + bias, in float32, given back in x's dtype."""

  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    ones, zeros = (
      nn.with_logical_partitioning(init(), ("norm",))
      for init in (nn.initializers.ones_init, nn.initializers.zeros_init)
    )
    scale = self.param("scale", ones, (x.shape[-1],))
    bias = self.param("bias", zeros, (x.shape[-1],))
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
    return (wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class GatedMLP(nn.Module):
  """down(act(gate(x)) * up(x)), [..., D] -> [..., D]."""

  intermediate_size: int
  activation: str
  use_bias: bool
  init_std: float
  dtype: jnp.dtype
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    options = dict(use_bias=self.use_bias, init_std=self.init_std, dtype=self.dtype, lora=self.lora)
    gate = linear(self.intermediate_size, ("embed", "mlp"), "gate_proj", **options)(x)
    up = linear(self.intermediate_size, ("embed", "mlp"), "up_proj", **options)(x)
    down = linear(x.shape[-1], ("mlp", "embed"), "down_proj", **options)
    return down(ACTIVATIONS[self.activation](gate) * up)


class MLP(nn.Module):
  """second(act(first(x))), [..., D] -> [..., features]; `names` are the two maps'."""

  hidden_size: int
  features: int
  activation: str
  names: tuple[str, str]
  axes: tuple[str, str]  # logical axes of input and output
  init_std: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    options = dict(use_bias=True, init_std=self.init_std, dtype=self.dtype)
    x = linear(self.hidden_size, (self.axes[0], "mlp"), self.names[0], **options)(x)
    return linear(self.features, ("mlp", self.axes[1]), self.names[1], **options)(
      ACTIVATIONS[self.activation](x)
    )


class PatchEmbed(nn.Module):
  """uint8 pixels -> normalised -> linear: patches [B, S, E] -> [B, S, features].

  `frames` > 0: the checkpoint's kernel is a 3-D convolution over that many frames; a still image is
  its frame repeated, so it is a product with the kernel summed over time.
  """

  features: int
  in_channels: int
  patch_size: int
  frames: int
  use_bias: bool
  mean: tuple[float, ...]
  std: tuple[float, ...]
  init_std: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, patches_BSE: Array) -> Array:
    time = (self.frames,) if self.frames else ()
    shape = (self.features, self.in_channels, *time, self.patch_size, self.patch_size)
    kernel = self.param(
      "proj",
      nn.with_logical_partitioning(
        nn.initializers.normal(self.init_std), ("vision_embed", *(None,) * (len(shape) - 1))
      ),
      shape,
    )
    B, S, E = patches_BSE.shape
    assert E == self.in_channels * self.patch_size**2, (patches_BSE.shape, shape)
    pixels = patches_BSE.reshape(B, S, self.in_channels, -1).astype(jnp.float32) / 255.0
    mean, std = (jnp.asarray(x, jnp.float32)[:, None] for x in (self.mean, self.std))
    pixels = ((pixels - mean) / std).reshape(B, S, E).astype(self.dtype)
    kernel = kernel.astype(self.dtype)
    out = pixels @ (kernel.sum(2) if self.frames else kernel).reshape(self.features, E).T
    if self.use_bias:
      bias = self.param(
        "proj_bias",
        nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",)),
        (self.features,),
      )
      out = out + bias.astype(self.dtype)
    return out


def rotary_tables(
  position: Array,
  frequency_h: np.ndarray,
  sections: Sequence[int] | None = None,
  interleaved: bool = False,
) -> tuple[Array, Array]:
  """Cosines and sines of rotary positions, float32 [N, L, h] each; `frequency_h` has h / 2 numbers.

  `position` is [N, L]; with `sections` it is [N, 3, L] (time, height, width) and each frequency
  takes its position from one of the three: consecutive blocks in turn (M-RoPE; Qwen2-VL, arXiv
  2409.12191), or interleaved, height and width at every third frequency up to three times their
  section (Qwen3-VL).
  """
  frequency = jnp.asarray(frequency_h, jnp.float32)
  if sections is None:
    angle = position.astype(jnp.float32)[..., None] * frequency
  else:
    assert position.ndim == 3 and sum(sections) == len(frequency_h), (position.shape, sections)
    if interleaved:
      order = np.arange(len(frequency_h))
      source = np.where(
        (order % 3 > 0) & (order < 3 * np.asarray(sections)[order % 3]), order % 3, 0
      )
    else:
      source = np.repeat(np.arange(len(sections)) % 3, sections)
    angle = jnp.swapaxes(position[:, source], 1, 2).astype(jnp.float32) * frequency
  angle = jnp.concatenate([angle, angle], axis=-1)
  return jnp.cos(angle), jnp.sin(angle)


def axial_tables(
  position_BS2: Array, head_dim: int, theta: float = 10_000.0
) -> tuple[Array, Array]:
  """Rotary cosines and sines [B, S, h]: half of the frequencies turn with the row, half with the
  column.
  """
  frequency = theta ** (-jnp.arange(0, head_dim // 2, 2, dtype=jnp.float32) / (head_dim // 2))
  angle = (position_BS2.astype(jnp.float32)[..., None] * frequency).reshape(
    *position_BS2.shape[:2], -1
  )
  angle = jnp.concatenate([angle, angle], axis=-1)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_NLHh: Array, cos_NLh: Array, sin_NLh: Array) -> Array:
  """Applies rotary positions to queries or keys, pairing element i with i + h/2, in the tables'
  dtype.
  """
  first, second = jnp.split(x_NLHh, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  rotated = x_NLHh * cos_NLh[:, :, None, :] + turned * sin_NLh[:, :, None, :]
  return rotated.astype(x_NLHh.dtype)
