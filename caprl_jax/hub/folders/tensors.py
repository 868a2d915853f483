"""A checkpoint's folder -> its tensors, read when asked for; of several files, those that
transformers reads.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  safetensors finds NumPy's bfloat16 only once this is imported
import numpy as np
import safetensors

from caprl_jax.hub.folders.kinds import (
  ADAPTER_WEIGHTS,
  INDEX,
  WEIGHTS,
  no_weights_message,
)
from caprl_jax.hub.folders.notices import warn_once
from caprl_jax.hub.folders.text_files import is_pointer, pointer_message, read_json
from caprl_jax.json_files import shown


def open_safetensors(path: pathlib.Path):
  """A safetensors file, opened; a ValueError says where it is missing or damaged."""
  try:
    if is_pointer(path):
      raise ValueError(pointer_message(path))
    return safetensors.safe_open(path, framework="numpy")
  except FileNotFoundError as error:
    raise ValueError(
      f"{path}: no such file. Download it, or convert the model's weights to safetensors."
    ) from error
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} ({path.stat().st_size:,} bytes) is truncated or not a safetensors "
      f"file: {error}. Download it again."
    ) from error


@dataclasses.dataclass(frozen=True)
class StoredTensors(Mapping):
  """Tensor name -> array, read when asked for. A file is open while a tensor of it is read and no
  longer: what is read of an open one counts as the process's memory."""

  path: pathlib.Path
  places: dict[str, str]  # tensor name -> name of its file

  def __getitem__(self, name: str) -> np.ndarray:
    with open_safetensors(self.path / self.places[name]) as file:
      try:
        return file.get_tensor(name)
      except AttributeError as error:  # safetensors looks for a NumPy type of this name
        raise ValueError(
          f"{self.path}: tensor {name!r} is stored as "
          f"{file.get_slice(name).get_dtype()}, which NumPy lacks. Use the "
          "checkpoint in bfloat16, float16 or float32."
        ) from error

  def shape_of(self, name: str) -> tuple[int, ...]:
    """Shape of a tensor that is not read."""
    return self._headers[name][0]

  def dtype_of(self, name: str) -> str:
    """A tensor's type as safetensors spells it: F32, BF16, ..."""
    return self._headers[name][1]

  @functools.cached_property
  def _headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
    headers = {}
    for place in sorted(set(self.places.values())):
      with open_safetensors(self.path / place) as file:
        for name in file.keys():
          if self.places.get(name) == place:
            part = file.get_slice(name)
            headers[name] = (tuple(part.get_shape()), part.get_dtype())
    return headers

  def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor; no more of it is read."""
    if all(not s.start and s.stop in (None, n) for s, n in zip(index, self.shape_of(name))):
      return self[name]
    with open_safetensors(self.path / self.places[name]) as file:
      return file.get_slice(name)[index]

  def place_of(self, name: str) -> str:
    """The file that holds a tensor."""
    return self.places[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self.places)

  def __len__(self) -> int:
    return len(self.places)


@dataclasses.dataclass(frozen=True)
class ChangedTensors(Mapping):
  """Tensors of which some are made of others, or are other's: read when asked for, as the rest.

  made: name -> (its shape, what makes it).
  without: names that are left out.
  """

  tensors: Mapping[str, Any]
  made: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]
  without: frozenset[str] = frozenset()

  def __getitem__(self, name: str) -> np.ndarray:
    if name in self.made:
      return self.made[name][1]()
    if name in self.without:
      raise KeyError(name)
    return self.tensors[name]

  def shape_of(self, name: str) -> tuple[int, ...]:
    """A tensor's shape; nothing is read where the file tells."""
    if name in self.made:
      return self.made[name][0]
    of = getattr(self.tensors, "shape_of", None)
    return tuple(of(name)) if of else np.shape(self.tensors[name])

  def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor."""
    read = None if name in self.made else getattr(self.tensors, "read_part", None)
    return read(name, index) if read else np.asarray(self[name])[index]

  def place_of(self, name: str) -> str:
    """The file that holds a tensor; "" where it is made."""
    of = getattr(self.tensors, "place_of", None)
    return of(name) if of and name not in self.made else ""

  def __iter__(self) -> Iterator[str]:
    kept = (name for name in self.tensors if name not in self.without and name not in self.made)
    yield from kept
    yield from self.made

  def __len__(self) -> int:
    return sum(1 for _ in self)


def open_tensors(path: pathlib.Path, config: Mapping[str, Any]) -> StoredTensors:
  """The tensors of a folder, from the files that transformers reads: those that config.json names
  (`transformers_weights`), model.safetensors, or an index's shards. Every file is opened, which
  proves its size.

  What is passed over is named in a warning.

  Raises:
    ValueError: a file is missing or damaged, or the index names a tensor that its shards lack.
  """
  named = config.get("transformers_weights")
  if isinstance(named, str) and named:
    chosen = named
    if not re.fullmatch(r"[\w.-]+\.safetensors(\.index\.json)?", named):
      raise ValueError(
        f"{path}: config.json says transformers_weights = {shown(named)}; it must name a "
        ".safetensors file of the folder, or such a file's index"
      )
  elif (path / WEIGHTS).exists() or not (path / INDEX).exists():
    chosen = WEIGHTS
    if not (path / WEIGHTS).exists():
      raise ValueError(no_weights_message(path, config))
  else:
    chosen = INDEX
  found = _sharded(path, chosen) if chosen.endswith(".json") else _single(path, chosen)
  _name_the_others(path, chosen, found)
  return found


def _single(path: pathlib.Path, name: str) -> StoredTensors:
  with open_safetensors(path / name) as file:
    return StoredTensors(path, {tensor: name for tensor in file.keys()})


def _sharded(path: pathlib.Path, index: str) -> StoredTensors:
  """All tensors of the shards that an index names, listed there or not, as transformers takes
  them: of one that two shards hold, the last shard's."""
  listed = read_json(path / index).get("weight_map")
  if not isinstance(listed, dict) or not listed:
    raise ValueError(
      f"{path / index}: weight_map is {shown(listed)}, and must say of each tensor which file "
      "holds it. Download it again."
    )
  for shard in listed.values():
    odd = not isinstance(shard, str) or pathlib.PurePath(shard).is_absolute() or ".." in shard
    if odd or len(os.fsencode(shard)) > 255 or "\0" in shard:  # no file can have such a name
      raise ValueError(f"{path / index}: {shown(shard)} is no file of this folder")
  shards = sorted(set(listed.values()))
  absent = [shard for shard in shards if not (path / shard).exists()]
  if absent:
    raise ValueError(
      f"{path / absent[0]}: no such file. Download it: {INDEX} names {len(shards)} shards, of "
      f"which {len(absent)} are absent"
    )
  places: dict[str, str] = {}
  for shard in shards:
    with open_safetensors(path / shard) as file:
      for name in file.keys():
        if name in places:
          warn_once(
            f"{path}: tensor {name} is in {places[name]} and in {shard}; that of {shard} is read, "
            "as transformers does"
          )
        places[name] = shard
  lost = [name for name in listed if name not in places]
  if lost:
    raise ValueError(
      f"{path / listed[lost[0]]}: {len(lost)} tensors that {index} promises are "
      f"absent, first {shown(lost[0])}. The files are of different versions: download "
      "the model again."
    )
  return StoredTensors(path, places)


def _name_the_others(path: pathlib.Path, chosen: str, found: StoredTensors) -> None:
  """Warns of weights in the folder that are not read, unless they are the same."""
  read = set(found.places.values())
  if chosen == WEIGHTS and (path / INDEX).exists():
    listed = read_json(path / INDEX).get("weight_map")
    shards = sorted(set(listed.values()) - read) if isinstance(listed, dict) else []
    there = [shard for shard in shards if isinstance(shard, str) and (path / shard).exists()]
    if shards and not (len(there) == len(shards) and _index_says_the_same(path, found)):
      warn_once(
        f"{path}: {WEIGHTS} is read, as transformers does, and not {INDEX} with its "
        f"{len(shards)} shards, which are other weights; remove what is old"
      )
    read |= set(there)
  others = sorted(
    file.name
    for file in path.iterdir()
    if file.name not in read
    and file.name != ADAPTER_WEIGHTS
    and re.fullmatch(r".*\.safetensors|pytorch_model.*\.bin|consolidated.*\.pth", file.name)
  )
  if others:
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    warn_once(f"{path}: {chosen} is read; {', '.join(others[:4])}{more} are not")


def _index_says_the_same(path: pathlib.Path, found: StoredTensors) -> bool:
  """Whether the index's shards hold what was found; most that do not, differ in the first
  tensor."""
  try:
    other = _sharded(path, INDEX)
    return found.keys() == other.keys() and all(
      found.shape_of(name) == other.shape_of(name) and np.array_equal(found[name], other[name])
      for name in found
    )
  except ValueError:  # they are damaged, and are not read
    return False
