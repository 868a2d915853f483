"""A checkpoint's tensors -> rounded kernels, read part by part; and what is written of a captioner
whose kernels are rounded: the checkpoint's own tensors, with the adapters merged into them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from caprl_jax import sharding
from caprl_jax.models.family import Keys
from caprl_jax.models.layers import LoraConfig
from caprl_jax.models.quantized.codes import (
  FOUR_BITS,
  BaseWeights,
  block_size,
  entries,
  is_base_kernel,
  quantize,
)
from caprl_jax.models.trainable import split_lora
from caprl_jax.types import Params

Index = tuple[slice, ...]


class RoundedLeaf:
  """A stack of kernels in a checkpoint, as codes and scales; any part of them can be read.

  Args:
    read: gives a part [layer, in, out] of the kernels, of one layer.
    shape: of the kernels, [layers, in, out].
  """

  def __init__(
    self,
    read: Callable[[Index], np.ndarray],
    shape: tuple[int, ...],
    kind: BaseWeights,
    scale_dtype: Any,
    where: str,
  ):
    self.read, self.shape, self.kind, self.scale_dtype = read, shape, kind, scale_dtype
    self.where = where
    self.block = shape[1] if kind == "int8" else block_size(shape[1])
    self.codes: dict[tuple, np.ndarray] = {}
    self.scales: dict[tuple, np.ndarray] = {}

  def arrays(self, kernel: Any) -> dict[str, jax.Array]:
    """Codes and scales as `quantized.entries` has them of `kernel`, a struct. Raises ValueError for
    weights that are not finite."""
    stored, scale = entries(kernel, self.kind, self.scale_dtype).items()
    made = {}
    for (name, struct), part in ((stored, self.code_part), (scale, self.scale_part)):
      if struct.sharding is None:
        made[name] = jax.numpy.asarray(part((slice(None),) * len(struct.shape)))
      else:
        made[name] = jax.make_array_from_callback(struct.shape, struct.sharding, part)
    return made

  def code_part(self, index: Index) -> np.ndarray:
    """A part of the codes."""
    share = 1 if self.kind == "int8" else 2  # codes to a byte
    rows = _bounds(index[1], self.shape[1] // share)
    first, last = rows[0] * share // self.block, -(-rows[1] * share // self.block)
    key = self._key(index[0], (first, last), index[2])
    if key not in self.codes:
      self._make(key)
    begin = rows[0] - first * self.block // share
    return self.codes[key][:, begin : begin + rows[1] - rows[0]]

  def scale_part(self, index: Index) -> np.ndarray:
    """A part of the scales."""
    whole = (0, self.shape[1] // self.block)
    rows = whole if self.kind == "int8" else _bounds(index[1], whole[1])
    key = self._key(index[0], rows, index[-1])
    if key not in self.scales:  # where it lies in other parts than the codes
      self._make(key)
    scales = self.scales[key]
    return scales[:, 0] if self.kind == "int8" else scales

  def _key(self, layers: slice, blocks: tuple[int, int], columns: slice) -> tuple:
    """Layers, whole blocks and columns."""
    return _bounds(layers, self.shape[0]), blocks, _bounds(columns, self.shape[2])

  def _make(self, key: tuple) -> None:
    """Reads and rounds a part, layer by layer. Parts stay: devices that hold the same one ask for
    it in turn."""
    layers, blocks, columns = key
    rows = slice(blocks[0] * self.block, blocks[1] * self.block)
    made: list[np.ndarray] = []
    for place, number in enumerate(range(*layers)):
      kernel = self.read((slice(number, number + 1), rows, slice(*columns)))[0]
      try:
        one = quantize(kernel, self.kind, self.scale_dtype, self.block)
      except ValueError as error:
        raise ValueError(f"{self.where}, layer {number}: {error}") from error
      one = (one[0], one[1].reshape(-1, one[1].shape[-1]))  # int8's scales are one row
      made = made or [np.empty((layers[1] - layers[0], *x.shape), x.dtype) for x in one]
      for whole, part in zip(made, one, strict=True):
        whole[place] = part
    self.codes[key], self.scales[key] = made


def _bounds(index: slice, length: int) -> tuple[int, int]:
  start, stop, _ = index.indices(length)
  return start, stop


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where the weights of a captioner are as its checkpoint has them, and the dtype that they are
  read in."""

  tensors: Mapping[str, Any]
  keys: Keys
  dtype: Any


class MergedTensors(Mapping):
  """The tensors of a captioner under the names this package writes, each made when asked for: the
  checkpoint's own, adapters merged into those that they adapt.

  Args:
    params: with adapters; of the others only the paths are looked at. All processes make it.
    dtype: casts what is given; None: as `stored.dtype` says.
  """

  def __init__(self, stored: Stored, params: Params, lora: LoraConfig, dtype: Any = None):
    self.stored, self.scale, self.dtype = stored, lora.scale, dtype or stored.dtype
    base, adapters = split_lora(params)
    adapters = sharding.to_host(adapters)
    found = {_path(path): x for path, x in jax.tree_util.tree_leaves_with_path(adapters)}
    # written name -> (candidates in the checkpoint, A and B of that layer)
    self.sources: dict[str, tuple[list[str], tuple[Any, Any] | None]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
      name = _path(path)
      if name.endswith(".kernel_scale") and is_base_kernel(_kernel_of(name)):
        continue
      name = _kernel_of(name)
      candidates, _ = stored.keys.candidates(name)
      module = name.rpartition(".")[0]
      pair = [found.get(f"{module}.{part}") for part in ("lora_a", "lora_b")]
      for i in range(len(leaf)) if "{}" in candidates[0] else (None,):
        adapter = (
          None if pair[0] is None or name != f"{module}.kernel" else (pair[0][i], pair[1][i])
        )
        names = [candidate.format(i) for candidate in candidates]
        self.sources[names[0]] = (names, adapter)

  def __getitem__(self, name: str) -> np.ndarray:
    candidates, adapter = self.sources[name]
    there = next(n for n in candidates if n in self.stored.tensors)
    array = np.asarray(self.stored.tensors[there]).astype(self.stored.dtype)
    if adapter is not None:
      a, b = (np.asarray(x, np.float32) for x in adapter)
      # a checkpoint's matrices are transposed
      merged = array.astype(np.float32) + (a @ b).T * np.float32(self.scale)
      array = merged.astype(self.stored.dtype)
    return np.ascontiguousarray(array.astype(self.dtype))

  def __iter__(self) -> Iterator[str]:
    return iter(self.sources)

  def __len__(self) -> int:
    return len(self.sources)


def _path(path: tuple) -> str:
  return ".".join(part.key for part in path)


def _kernel_of(name: str) -> str:
  """The parameter whose entry in a rounded tree has this path."""
  module, _, leaf = name.rpartition(".")
  stored = ("kernel_scale", *(f"kernel_{kind}" for kind in FOUR_BITS))
  return f"{module}.kernel" if leaf in stored else name
