"""Kernels <-> codes of 8 or 4 bits with scales: the base under adapters.

int8: each output column in 255 levels of its largest weight, as `layers.to_int8` has it; `kernel`
int8 [..., in, out] with `kernel_scale` [..., out]. int4 and nf4: 64 inputs of a column, a block,
share a scale, their largest weight; two codes to a byte, `kernel_int4` or `kernel_nf4` uint8
[..., in / 2, out] with `kernel_scale` [..., in / 64, out]. nf4 is the NormalFloat of QLoRA
(Dettmers et al., arXiv 2305.14314): 16 levels at quantiles of a normal distribution, the blocks
those of bitsandbytes.

Whoever reads a tree of parameters knows from these names how a kernel is stored. Only kernels are
rounded: embeddings, norms and biases stay.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.types import Params

BaseWeights = Literal["int8", "int4", "nf4"]

BLOCK = 64
FOUR_BITS = ("nf4", "int4")
# QLoRA's appendix E, as bitsandbytes has it in float32.
NF4 = (
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
)
_PIECE = 2**18  # weights that are rounded at once: their float32 stays in a core's cache


def block_size(inputs: int) -> int:
  """Inputs that share a scale: 64, or fewer where 64 does not divide them. Raises ValueError for an
  odd number, which cannot be stored in pairs."""
  for size in range(BLOCK, 1, -2):
    if inputs % size == 0:
      return size
  raise ValueError(f"a kernel with {inputs} inputs, an odd number, cannot be stored in 4 bits")


def entries(kernel: Any, kind: BaseWeights, scale_dtype: Any) -> dict[str, Any]:
  """What takes a kernel's place in a tree. `kernel`: a struct [..., in, out]; where it has a
  sharding, so have they. Raises ValueError as `block_size`."""
  *front, inputs, outputs = kernel.shape

  def struct(shape: tuple[int, ...], dtype: Any, without: int | None = None) -> Any:
    place = kernel.sharding
    place = None if place is None else sharding.fitted(place, shape, without)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  if kind == "int8":
    return {
      "kernel": struct((*front, inputs, outputs), jnp.int8),
      "kernel_scale": struct((*front, outputs), scale_dtype, without=-2),
    }
  blocks = inputs // block_size(inputs)
  return {
    f"kernel_{kind}": struct((*front, inputs // 2, outputs), jnp.uint8),
    "kernel_scale": struct((*front, blocks, outputs), scale_dtype),
  }


def is_base_kernel(path: str) -> bool:
  """Whether the parameter at a dotted path is rounded under adapters: a matrix of the captioner's
  decoder. The tower, which is small, keeps its precision."""
  return path.startswith("language_model.layers.") and path.endswith(".kernel")


def change_kernels(params: Params, change: Callable[[Any], dict[str, Any]]) -> Params:
  """A captioner's tree with other entries in the place of each of its decoder's kernels."""

  def walk(tree: dict, prefix: str) -> dict:
    out = {}
    for key, value in tree.items():
      if isinstance(value, dict):
        out[key] = walk(value, f"{prefix}{key}.")
      elif is_base_kernel(prefix + key):
        out |= change(value)
      else:
        out[key] = value
    return out

  return walk(params, "")


def quantized_structs(params: Params, kind: BaseWeights | None, scale_dtype: Any) -> Params:
  """A captioner's tree of structs as it is once its decoder's kernels are rounded."""
  if kind is None:
    return params
  return change_kernels(params, lambda kernel: entries(kernel, kind, scale_dtype))


def quantized_places(abstract: Params, places: Any, kind: BaseWeights) -> Any:
  """Shardings of a captioner's parameters once its decoder's kernels are rounded."""
  placed = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, places
  )
  return jax.tree.map(lambda x: x.sharding, quantized_structs(placed, kind, jnp.float32))


# ---- on the host ----


def quantize(
  kernel: np.ndarray, kind: BaseWeights, scale_dtype: Any, block: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """A kernel [in, out] -> its codes and scales, as `entries` has them without leading axes.

  By NumPy, so that codes are the same on every machine.

  Args:
    block: inputs that share a scale, where this is a part of a kernel's blocks; None: it is whole.

  Raises:
    ValueError: it has weights that are not finite; as `block_size`.
  """
  inputs, outputs = kernel.shape
  size = block or (inputs if kind == "int8" else block_size(inputs))
  rows = inputs if kind == "int8" else inputs // 2
  codes = np.empty((rows, outputs), np.int8 if kind == "int8" else np.uint8)
  scales = np.empty((inputs // size, outputs), scale_dtype)
  for block, columns in _pieces(inputs // size, size, outputs):
    first, last = block.start * size, block.stop * size
    wide = np.array(kernel[first:last, columns], np.float32, order="C")
    wide = wide.reshape(-1, size, wide.shape[1])
    scale = np.abs(wide).max(axis=1)
    if not np.isfinite(scale).all():
      raise ValueError("it has weights that are not finite")
    scale = (scale / _LEVELS[kind]).astype(scale_dtype)
    scales[block, columns] = scale
    # A block of zeros is divided by 1.
    scale = np.where(scale == 0, 1, scale).astype(np.float32)[:, None]
    code = _round(wide / scale, kind)
    if kind != "int8":
      code = code[:, : size // 2] | code[:, size // 2 :] << 4
    share = rows // (inputs // size)
    codes[block.start * share : block.stop * share, columns] = code.reshape(-1, code.shape[-1])
  return codes, scales[0] if kind == "int8" else scales


# What the largest weight of a block is, in steps.
_LEVELS = {"int8": 127, "int4": 7, "nf4": 1}


def _round(scaled: np.ndarray, kind: BaseWeights) -> np.ndarray:
  """Weights in units of their scale -> codes, one to a byte."""
  if kind == "int8":
    return np.clip(np.rint(scaled), -127, 127).astype(np.int8)
  if kind == "int4":
    return (np.clip(np.rint(scaled), -7, 7) + 8).astype(np.uint8)
  levels = np.asarray(NF4, np.float32)
  code = np.zeros(scaled.shape, np.uint8)
  for between in (levels[1:] + levels[:-1]) / 2:
    code += scaled > between  # a tie is the lower level's, as in bitsandbytes
  return code


def _pieces(blocks: int, size: int, outputs: int) -> Iterator[tuple[slice, slice]]:
  """Slices of blocks and of columns that cover a kernel, of at most `_PIECE` weights each where a
  block of a column is no more."""
  wide = max(min(outputs, _PIECE // size), 1)
  high = max(_PIECE // (size * wide), 1)
  for block in range(0, blocks, high):
    for column in range(0, outputs, wide):
      yield slice(block, min(block + high, blocks)), slice(column, min(column + wide, outputs))


# ---- on the device ----


def dequantize(codes: jax.Array, scale: jax.Array, kind: BaseWeights, dtype: Any) -> jax.Array:
  """Codes and scales -> a kernel [..., in, out] in `dtype`; computed in float32."""
  scale = scale.astype(jnp.float32)
  if kind == "int8":
    return (codes.astype(jnp.float32) * scale[..., None, :]).astype(dtype)
  *front, blocks, outputs = scale.shape
  pairs = codes.reshape(*front, blocks, codes.shape[-2] // blocks, outputs)
  nibbles = jnp.concatenate([pairs & 15, pairs >> 4], axis=-2)
  levels = nibbles.astype(jnp.float32) - 8 if kind == "int4" else _look_up(nibbles)
  kernel = (levels * scale[..., None, :]).astype(dtype)
  return kernel.reshape(*front, 2 * codes.shape[-2], outputs)


def _look_up(code: jax.Array) -> jax.Array:
  """nf4's levels, float32: by a tree of selections, since accelerators are slow to gather single
  numbers."""
  values: list[Any] = [jnp.float32(level) for level in NF4]
  for bit in range(4):
    high = (code >> bit & 1).astype(bool)
    values = [jnp.where(high, b, a) for a, b in zip(values[::2], values[1::2])]
  return values[0]


@functools.partial(jax.checkpoint, static_argnums=(3, 4), prevent_cse=False)
def product(
  x: jax.Array, codes: jax.Array, scale: jax.Array, kind: BaseWeights, dtype: Any
) -> jax.Array:
  """x @ kernel in `dtype`. A backward pass widens the codes again: it keeps no kernel."""
  if kind == "int8":  # the activations are multiplied: fewer than the weights
    return (x @ codes.astype(dtype)) * scale.astype(dtype)
  return x @ dequantize(codes, scale, kind, dtype)


def cast(params: Params, dtype: Any) -> Params:
  """Parameters in the dtype that is computed in; codes and their scales stay as they are."""

  def one(path: tuple, x: jax.Array) -> jax.Array:
    stays = path[-1].key == "kernel_scale" or not jnp.issubdtype(x.dtype, jnp.floating)
    return x if stays else x.astype(dtype)

  return jax.tree_util.tree_map_with_path(one, params)


def parameter_count(params: Params) -> int:
  """Of a model: a byte of two codes counts as two, and a scale as none."""
  count = 0
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    name = path[-1].key
    pairs = name in [f"kernel_{kind}" for kind in FOUR_BITS]
    count += 0 if name == "kernel_scale" else x.size * (2 if pairs else 1)
  return count
