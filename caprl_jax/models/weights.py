"""Parameter trees <-> Hugging Face tensors: one readable rule a model, layers stacked on the way in.

A parameter's path is its checkpoint key: `kernel` is a transposed `weight`, `embedding` and `scale` are `weight`,
what lives under `layers` or `blocks` is stacked over the number that stands there in the checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
import re

import jax
import numpy as np

from caprl_jax.types import Params

# (path prefix in our tree, key prefixes that writers have used; the first one is what we write)
DECODER_KEYS = (
    ("lm_head", ("lm_head.weight",)),
    ("", ("model.",)),
)
QWEN25_VL_KEYS = (
    ("language_model.lm_head", ("lm_head.weight",)),
    ("language_model.", ("model.", "model.language_model.", "language_model.model.")),
    ("visual.", ("visual.", "model.visual.")),
)
# Tensors that a checkpoint may hold and no parameter needs: buffers that old writers saved.
UNUSED_KEYS = re.compile(r".*rotary_emb\.inv_freq$|.*rotary_pos_emb\.inv_freq$")


def _leaf_key(path: str) -> tuple[str, bool]:
  """A parameter's path -> its checkpoint key and whether the matrix is transposed there."""
  path = path.replace("merger.mlp_", "merger.mlp.")
  head, _, leaf = path.rpartition(".")
  if leaf == "kernel":
    return f"{head}.weight", True
  if leaf in ("embedding", "scale"):
    return f"{head}.weight", False
  if leaf == "proj":  # the patch embedding's 5-D kernel is stored as it is
    return f"{path}.weight", False
  return path, False


def _candidates(path: str, table) -> list[str]:
  """Checkpoint keys that a parameter may have, `{}` standing for the layer number; ours first."""
  for ours, theirs in table:
    if path == ours or (path.startswith(ours) and (ours == "" or ours.endswith("."))):
      rest = path[len(ours):]
      rest = re.sub(r"^(layers|blocks)\.", r"\1.{}.", rest)
      return [prefix + rest for prefix in theirs]
  raise KeyError(path)


def _entries(params: Params, table) -> Iterator[tuple[tuple, str, list[str], bool, tuple[int, ...], np.dtype]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = ".".join(p.key for p in path)
    if name.rpartition(".")[2] == "lm_head":
      keys, transposed = _candidates(name, table), False
    else:
      key, transposed = _leaf_key(name)
      keys = _candidates(key, table)
    yield path, name, keys, transposed, leaf.shape, leaf.dtype


def params_from_tensors(abstract: Params, tensors: Mapping[str, np.ndarray], table, source: str,
                        place: Callable[[tuple, np.ndarray], jax.Array] | None = None) -> Params:
  """Fills a tree of ShapeDtypeStructs from a checkpoint.

  Args:
    abstract: the parameters' shapes and dtypes (`jax.eval_shape` of an init).
    tensors: checkpoint key -> array; may be lazy.
    table: `DECODER_KEYS` or `QWEN25_VL_KEYS`.
    source: names the checkpoint in errors.
    place: (tree path, host array) -> device array, to put each one straight into its sharding.

  Raises:
    ValueError: tensors missing or left over (both listed), or a shape that does not fit.
  """
  used, missing, leaves = set(), [], []
  for path, name, keys, transposed, shape, dtype in _entries(abstract, table):
    stacked = "{}" in keys[0]
    numbers = range(shape[0]) if stacked else (None,)
    pieces = []
    for i in numbers:
      names = [key.format(i) for key in keys]
      found = next((n for n in names if n in tensors), None)
      if found is None:
        missing.append(names[0])
        continue
      tensor = np.asarray(tensors[found])
      tensor = tensor.T if transposed else tensor
      want = shape[1:] if stacked else shape
      if tensor.shape != want:
        raise ValueError(f"{source}: tensor {found} has shape {tensor.shape[::-1] if transposed else tensor.shape}, "
                         f"but config.json asks for {want[::-1] if transposed else want} ({name})")
      used.add(found)
      pieces.append(tensor.astype(dtype))
    if len(pieces) == len(numbers):
      array = np.stack(pieces) if stacked else pieces[0]
      leaves.append(place(path, array) if place else jax.numpy.asarray(array))
  if missing:
    raise ValueError(f"{source}: {len(missing)} tensors are missing, for example {missing[:5]}")
  # A tied head may be written out too; it is the embedding once more.
  extra = [k for k in tensors if k not in used and k != "lm_head.weight" and not UNUSED_KEYS.match(k)]
  if extra:
    raise ValueError(f"{source}: {len(extra)} tensors fit no parameter, for example {sorted(extra)[:5]}; "
                     "is config.json of another model?")
  return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), leaves)


def tensors_from_params(params: Params, table) -> dict[str, np.ndarray]:
  """The checkpoint's tensors under the names this package writes; the inverse of `params_from_tensors`."""
  tensors = {}
  leaves = jax.tree_util.tree_leaves(params)
  for leaf, (_, _, keys, transposed, _, _) in zip(leaves, _entries(params, table)):
    array = np.asarray(leaf)
    if "{}" in keys[0]:
      for i, layer in enumerate(array):
        tensors[keys[0].format(i)] = np.ascontiguousarray(layer.T if transposed else layer)
    else:
      tensors[keys[0]] = np.ascontiguousarray(array.T if transposed else array)
  return tensors
