"""Parameter trees <-> Hugging Face tensors, by a model's `Keys`; layers stacked on the way in.

Nothing is read before the device that needs it asks for its part, so the host never holds a model.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from caprl_jax import sharding
from caprl_jax.hub.folders.notices import warn_once
from caprl_jax.hub.folders.quantized import RoundedLeaf
from caprl_jax.hub.folders.tensors import ChangedTensors
from caprl_jax.json_files import shown
from caprl_jax.models.family import Keys
from caprl_jax.models.quantized.codes import BaseWeights, is_base_kernel
from caprl_jax.types import Params

TRANSPOSED_ROWS = 256
_EMPTY = (
  ". Empty tensors are what DeepSpeed's ZeRO-3 saves without gathering: `python zero_to_fp32.py . "
  "OUT --safe_serialization` in the checkpoint's folder writes the whole ones"
)


def _entries(
  params: Params, keys: "Keys | _OfLayer"
) -> Iterator[tuple[tuple, str, list[str], bool, Any]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = ".".join(p.key for p in path)
    yield path, name, *keys.candidates(name), leaf


class _Leaf:
  """One parameter's tensors in the checkpoint; `read` gives any part of it."""

  def __init__(
    self,
    tensors: Mapping,
    names: list[str],
    stacked: bool,
    transposed: bool,
    dtype: Any,
  ):
    self.tensors, self.names, self.stacked, self.transposed, self.dtype = (
      tensors,
      names,
      stacked,
      transposed,
      dtype,
    )
    self.known: dict[tuple, np.ndarray] = {}

  def read(self, index: tuple[slice, ...]) -> np.ndarray:
    key = tuple((s.start, s.stop) for s in index)
    if key not in self.known:  # replicas on several devices ask for the same part
      names, inner = self.names, index
      if self.stacked:
        names, inner = self.names[index[0]], index[1:]
      first = self._one(names[0], inner)
      shape = first.shape[::-1] if self.transposed else first.shape
      whole = np.empty((len(names), *shape), self.dtype)
      self._put(first, whole[0, ...])
      del first
      for i, name in enumerate(names[1:], 1):
        self._put(self._one(name, inner), whole[i, ...])
      self.known = {key: whole if self.stacked else whole[0, ...]}
    return self.known[key]

  def _one(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor as it is stored."""
    index = index[::-1] if self.transposed else index
    read = getattr(self.tensors, "read_part", None)
    return read(name, index) if read else np.asarray(self.tensors[name])[index]

  def _put(self, tensor: np.ndarray, out: np.ndarray) -> None:
    if self.transposed:
      put_transposed(tensor, out)
    else:
      out[...] = tensor


def put_transposed(tensor: np.ndarray, out: np.ndarray) -> None:
  """Puts tensor.T into an array, in its dtype: some rows of a matrix at a time, which a core's
  cache holds. All at once, each number would wait for memory, five times as long."""
  if tensor.ndim != 2:
    out[...] = tensor.T
    return
  for first in range(0, len(tensor), TRANSPOSED_ROWS):
    rows = slice(first, first + TRANSPOSED_ROWS)
    out[:, rows] = tensor[rows].astype(out.dtype, copy=False).T


def _shape(tensors: Mapping, name: str) -> tuple[int, ...]:
  of = getattr(tensors, "shape_of", None)
  return tuple(of(name)) if of else np.shape(tensors[name])


def settle_tie(
  says: bool, hint: bool, tensors: Mapping, keys: Keys, source: str
) -> tuple[bool, Mapping]:
  """Whether a decoder's head is its embedding, by config.json and by what the tensors are.

  As transformers has it: a head of its own that differs is read, whatever config.json says; an
  embedding that is absent is the tied head.

  Args:
    says: what transformers makes of config.json; hint: whether any spelling in it says tied.
    source: names the checkpoint in messages.

  Returns:
    Whether it is tied, and the tensors without a head that is the embedding once more.

  Raises:
    ValueError: there is no head and config.json says that there is.
  """
  ours = "language_model." if any(p.startswith("language_model.") for p, _ in keys.prefixes) else ""
  heads, _ = keys.candidates(f"{ours}lm_head")
  embeddings, _ = keys.candidates(f"{ours}embed_tokens.embedding")
  head = next((name for name in heads if name in tensors), None)
  embedding = next((name for name in embeddings if name in tensors), None)
  if head is None:
    if not says and not hint:
      raise ValueError(
        f"{source}: tie_word_embeddings is false in config.json (or absent, which is the same "
        f"there), but the weights have no {heads[0]}; transformers would draw a random one. Set it "
        "to true if the embedding is the head, or else download the weights again"
      )
    if not says:
      warn_once(
        f"{source}: the weights have no {heads[0]}, and only a part of config.json that "
        "transformers does not look at says tie_word_embeddings: true; the embedding is taken as "
        "the head"
      )
    return True, tensors
  if not says:
    return False, tensors
  if embedding is None:
    made = {embeddings[0]: (_shape(tensors, head), lambda: np.asarray(tensors[head]))}
    return True, ChangedTensors(tensors, made, frozenset({head}))
  if _equal(tensors, head, embedding):
    return True, ChangedTensors(tensors, {}, frozenset({head}))
  warn_once(
    f"{source}: config.json ties {head} to the embedding, but the file has another one, as PEFT's "
    "merging leaves it; that is read, as transformers does, and written untied"
  )
  return False, tensors


def _equal(tensors: Mapping, one: str, other: str) -> bool:
  """Whether two matrices hold the same numbers; read a few rows at a time."""
  shape = _shape(tensors, one)
  if shape != _shape(tensors, other) or len(shape) != 2:
    return False
  rows = max(1, 2**24 // shape[1])
  read = lambda name, at: _Leaf(tensors, [name], False, False, np.float32).read(
    (slice(at, min(at + rows, shape[0])), slice(None))
  )
  return all(np.array_equal(read(one, at), read(other, at)) for at in range(0, shape[0], rows))


def params_from_tensors(
  abstract: Params,
  tensors: Mapping,
  keys: "Keys | _OfLayer",
  source: str,
  shardings: Any = None,
  each: Callable[[str, jax.Array], Any] | None = None,
  base_weights: BaseWeights | None = None,
) -> Params:
  """Fills a tree of ShapeDtypeStructs from a checkpoint.

  Args:
    abstract: the parameters' shapes and dtypes (`jax.eval_shape` of an init).
    tensors: checkpoint key -> array; may be lazy, and offer `shape_of(name)` and `read_part(name,
      index)`.
    source: names the checkpoint in errors.
    shardings: a tree like `abstract`; each device is given its part and no more is read for it.
    each: (dotted name, parameter) -> what is kept in its place, before the next one is read.
    base_weights: what the decoder's kernels are rounded to, one by one (`models/quantized.py`).

  Raises:
    ValueError: tensors missing or left over (both listed), or a shape that does not fit, all before
    any is read; a kernel that is to be rounded has weights that are not finite.
  """
  leaves = _find_leaves(abstract, tensors, keys, source)
  structure = jax.tree_util.tree_structure(abstract)
  shapes = jax.tree.leaves(abstract)
  places = [None] * len(leaves) if shardings is None else structure.flatten_up_to(shardings)
  names = (name for _, name, *_ in _entries(abstract, keys))
  filled: list[Any] = []
  for name, leaf, shape, place in zip(names, leaves, shapes, places):
    if base_weights and is_base_kernel(name):
      kernel = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
      where = f"{source}: tensors {leaf.names[0]} to {leaf.names[-1]}"
      value = RoundedLeaf(leaf.read, shape.shape, base_weights, shape.dtype, where).arrays(kernel)
    elif place is None:
      value = jax.numpy.asarray(leaf.read((slice(None),) * len(shape.shape)))
    else:
      value = jax.make_array_from_callback(shape.shape, place, leaf.read)
    leaf.known.clear()
    filled.append(value if each is None else jax.block_until_ready(each(name, value)))
    del value
  params = jax.tree_util.tree_unflatten(structure, filled)
  return _entries_in_place(params) if base_weights else params


def _entries_in_place(params: Params) -> Params:
  """A tree in which the entries of a rounded kernel stand under its name -> in its place."""
  out = {}
  for name, value in params.items():
    if name == "kernel" and isinstance(value, dict):
      out |= value
    else:
      out[name] = _entries_in_place(value) if isinstance(value, dict) else value
  return out


@dataclasses.dataclass(frozen=True)
class _OfLayer:
  """The keys of one layer's parameters, which are not stacked."""

  keys: Keys
  number: int
  unused: str = ".*"

  def candidates(self, path: str) -> tuple[list[str], bool]:
    names, transposed = self.keys.candidates(path)
    return [name.format(self.number) for name in names], transposed


def layer_from_tensors(
  abstract: Params, tensors: Mapping, keys: Keys, number: int, source: str, shardings: Any
) -> Params:
  """As `params_from_tensors`, of one layer of a stack: `abstract` has the names of the whole model
  and no axis of layers."""
  return params_from_tensors(abstract, tensors, _OfLayer(keys, number), source, shardings)


def _find_leaves(
  abstract: Params, tensors: Mapping, keys: "Keys | _OfLayer", source: str
) -> list[_Leaf]:
  """Which tensors each parameter is read from. Raises ValueError as `params_from_tensors` says."""
  used, missing, leaves = set(), [], []
  for _, name, candidates, transposed, leaf in _entries(abstract, keys):
    stacked = "{}" in candidates[0]
    found = []
    for i in range(leaf.shape[0]) if stacked else (None,):
      names = [key.format(i) for key in candidates]
      there = next((n for n in names if n in tensors), None)
      if there is None:
        missing.append(names[0])
        continue
      want = leaf.shape[1:] if stacked else leaf.shape
      want = want[::-1] if transposed else want
      shape = _shape(tensors, there)
      if shape != want:
        place = getattr(tensors, "place_of", lambda _: "")(there)
        raise ValueError(
          f"{source}: tensor {there}{place and f' in {place}'} has shape {shape}, "
          f"but config.json asks for {want} ({name})" + (_EMPTY if 0 in shape else "")
        )
      used.add(there)
      found.append(there)
    leaves.append(_Leaf(tensors, found, stacked, transposed, leaf.dtype))
  if missing:
    raise ValueError(
      f"{source}: {len(missing)} tensors are missing, for example {shown(missing[:5], 300)}"
    )
  embedding = next((k for k in used if k.endswith("embed_tokens.weight")), None)
  # A tied head may be written out too: it is the embedding once more.
  again = lambda k: k.endswith("lm_head.weight") and embedding and _equal(tensors, k, embedding)
  extra = [k for k in tensors if k not in used and not re.fullmatch(keys.unused, k)]
  extra = [k for k in extra if not again(k)]
  if extra:
    raise ValueError(
      f"{source}: {len(extra)} tensors fit no parameter, for example "
      f"{shown(sorted(extra)[:5], 300)}; is config.json of another model?"
    )
  return leaves


class TensorsOfParams(Mapping):
  """The checkpoint's tensors under the names this package writes, each made when asked for (by all
  processes alike); the inverse of `params_from_tensors`. `dtype` casts them."""

  def __init__(self, params: Params, keys: Keys, dtype=None):
    self.dtype, self.sources = dtype, {}
    for _, _, candidates, transposed, leaf in _entries(params, keys):
      for i in range(leaf.shape[0]) if "{}" in candidates[0] else (None,):
        self.sources[candidates[0].format(i)] = (leaf, i, transposed)

  def __getitem__(self, name: str) -> np.ndarray:
    leaf, number, transposed = self.sources[name]
    array = np.asarray(sharding.to_host(leaf if number is None else leaf[number]))
    dtype = array.dtype if self.dtype is None else self.dtype
    if not transposed:
      return np.ascontiguousarray(array, dtype)
    out = np.empty(array.shape[::-1], dtype)
    put_transposed(array, out)
    return out

  def __iter__(self) -> Iterator[str]:
    return iter(self.sources)

  def __len__(self) -> int:
    return len(self.sources)
