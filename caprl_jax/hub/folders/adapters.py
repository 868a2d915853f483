"""A base model's tensors and PEFT's LoRA adapters -> the tensors of the merged model.

W + B A * scale, made when a tensor is asked for, in float32; what the adapters' file holds whole
(`modules_to_save`, biases) takes the place of the base's.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from caprl_jax.hub.folders.kinds import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, WEIGHTS
from caprl_jax.hub.folders.tensors import ChangedTensors, StoredTensors, open_safetensors
from caprl_jax.hub.folders.text_files import read_json
from caprl_jax.json_files import shown

_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"
_STEP = (
  "Merge it where PEFT is installed (`model.merge_and_unload()`, then `save_pretrained`) and name "
  "the result"
)
# Settings under which the merged matrix is another one, or the base is another model.
_OTHER_KINDS = {
  "use_dora": "DoRA",
  "fan_in_fan_out": "fan_in_fan_out",
  "lora_bias": "lora_bias",
  "layer_replication": "layer_replication",
  "trainable_token_indices": "trainable_token_indices",
  "target_parameters": "target_parameters",
  "use_qalora": "QALoRA",
  "use_bdlora": "BD-LoRA",
  "alora_invocation_tokens": "activated LoRA",
  "arrow_config": "Arrow",
  "velora_config": "VeLoRA",
  "monteclora_config": "MonteCLoRA",
  "kasa_config": "KaSA",
}
# Ways to begin that change the base, which the adapters alone do not restore.
_OTHER_BEGINNINGS = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Adapter:
  """A folder's adapter_config.json, read and found to be plain LoRA.

  base: the model that it is for, as the file says.
  """

  folder: pathlib.Path
  base: str
  settings: dict[str, Any]

  def scale(self, module: str, rank: int) -> float:
    """What B A is multiplied with at a module, of which A has `rank` rows."""
    alpha = _by_pattern(self.settings.get("alpha_pattern"), module, self.settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

  def rank(self, module: str) -> int:
    """The rank that the settings give a module."""
    return _by_pattern(self.settings.get("rank_pattern"), module, self.settings["r"])


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
  """The value of the first pattern that is the module's name or ends it, as PEFT has it."""
  for pattern, value in (patterns or {}).items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      return value
  return default


def read_adapter(folder: pathlib.Path) -> Adapter | None:
  """The adapters in a folder; None where it has no adapter_config.json.

  Raises:
    ValueError: they are no LoRA that can be merged, or the file lacks what that takes.
  """
  file = folder / ADAPTER_CONFIG
  if not file.exists():
    return None
  settings = read_json(file)
  kind = settings.get("peft_type")
  if kind != "LORA":
    raise ValueError(
      f"{file}: adapters of the kind {shown(kind)}; only LORA is merged here. {_STEP}"
    )
  for key, name in _OTHER_KINDS.items():
    if settings.get(key):
      raise ValueError(
        f"{file}: {key} = {shown(settings[key])}: {name} is not plain LoRA, and is not merged "
        f"here. {_STEP}"
      )
  begin = settings.get("init_lora_weights")
  if isinstance(begin, str) and begin.lower().startswith(_OTHER_BEGINNINGS):
    raise ValueError(
      f"{file}: init_lora_weights = {begin!r}, which begins by changing the base. {_STEP}"
    )
  for key in ("r", "lora_alpha"):
    if not isinstance(settings.get(key), (int, float)) or settings[key] <= 0:
      raise ValueError(
        f"{file}: {key} = {shown(settings.get(key))}; it must be a number above zero. Copy the "
        "file from where the adapters were trained"
      )
  base = settings.get("base_model_name_or_path")
  held = any((folder / name).exists() for name in (WEIGHTS, INDEX))
  whole = (folder / "config.json").exists() and (held or not base)  # the folder itself is the base
  if not whole and (not isinstance(base, str) or not base):
    raise ValueError(
      f"{file}: base_model_name_or_path = {shown(base)}: write there the directory or hub name of "
      "the model that the adapters are for"
    )
  return Adapter(folder, str(folder) if whole else str(base), settings)


@dataclasses.dataclass
class _Change:
  """What the adapters have for one tensor of the base."""

  whole: str | None = None
  a: str | None = None
  b: str | None = None
  embedding: bool = False


def merge_adapter(
  adapter: Adapter, tensors: Mapping[str, Any], spellings: Callable[[str], Iterator[str]]
) -> ChangedTensors:
  """The base's tensors with the adapters merged in; nothing is read yet.

  Args:
    spellings: a tensor's name as transformers' module has it -> the names that checkpoints use for
      it.

  Raises:
    ValueError: a tensor of the adapters is not understood, fits no tensor of the base or has
      another shape, or adapts an embedding that is the head too.
  """
  file = adapter.folder / ADAPTER_WEIGHTS
  if not file.exists():
    held = sorted(f.name for f in adapter.folder.iterdir() if f.name.startswith("adapter_model"))
    raise ValueError(
      f"{file}: no such file{f'; there is {held[0]}, which is pickled' if held else ''}. Let PEFT "
      "write the adapters with safe_serialization=True"
    )
  with open_safetensors(file) as opened:
    stored = StoredTensors(adapter.folder, {name: file.name for name in opened.keys()})
  changes = _changes(file, stored)
  made, head_there = {}, any(n.endswith(_HEAD) for n in [*tensors, *changes])
  for name, change in changes.items():
    there = next((n for n in spellings(name) if n in tensors), None)
    if there is None and not (name.endswith(_HEAD) and change.whole):
      raise ValueError(
        f"{file}: adapts {name}, which the base {adapter.base} lacks; are the adapters of another "
        f"model? The base's own names are like {next(iter(tensors), '')!r}"
      )
    if name.endswith(_EMBEDDING) and not head_there:
      if not change.whole:
        raise ValueError(
          f"{file}: adapts {name}, which is the head as well (tied), and PEFT's own merging "
          f"changes both. {_STEP}"
        )
      # the head stays what it was, as a model with a saved embedding of its own runs
      made[_HEAD] = _as_it_is(tensors, str(there))
    made[there or name] = _made(
      adapter, file, stored, tensors=tensors, name=name, there=there, change=change
    )
  return ChangedTensors(tensors, made)


def _changes(file: pathlib.Path, stored: StoredTensors) -> dict[str, _Change]:
  """Names of the base's tensors, as transformers' modules have them -> what is there for them."""
  changes: dict[str, _Change] = {}
  for key in stored:
    name = key.removeprefix("base_model.model.")
    name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
    low = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.default)?(\.weight)?", name)
    if low:
      change = changes.setdefault(f"{low[1]}.weight", _Change())
      change.embedding = bool(low[2])
      setattr(change, low[3].lower(), key)
    elif re.search(r"\.lora_|trainable_tokens", name):
      raise ValueError(f"{file}: tensor {key} is not plain LoRA's, and is not merged here. {_STEP}")
    else:
      changes.setdefault(name.replace(".base_layer.", "."), _Change()).whole = key
  for name, change in changes.items():
    if (change.a is None) != (change.b is None):
      raise ValueError(f"{file}: of {name} there is one of lora_A and lora_B only; copy it again")
  return changes


def _as_it_is(tensors: Mapping[str, Any], name: str):
  return _shape(tensors, name), lambda: np.asarray(tensors[name])


def _shape(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
  of = getattr(tensors, "shape_of", None)
  return tuple(of(name)) if of else np.shape(tensors[name])


def _made(
  adapter: Adapter,
  file: pathlib.Path,
  stored: StoredTensors,
  tensors: Mapping[str, Any],
  name: str,
  there: str | None,
  change: _Change,
) -> tuple[tuple[int, ...], Callable[[], np.ndarray]]:
  """Shape of a changed tensor, and what makes it."""
  if change.a is None or change.b is None:
    whole = change.whole
    assert whole is not None
    return stored.shape_of(whole), lambda: stored[whole]
  base = stored if change.whole else tensors
  source = change.whole or there
  assert source is not None
  shape, a, b = _shape(base, source), stored.shape_of(change.a), stored.shape_of(change.b)
  rank = a[0] if a else 0
  # An embedding is looked up by rows: its matrices lie the other way.
  product = (a[-1], b[0]) if change.embedding else (b[0], a[-1])
  if len(shape) != 2 or len(a) != 2 or len(b) != 2 or product != shape or b[1] != rank:
    raise ValueError(
      f"{file}: lora_A {a} and lora_B {b} do not fit {name} {shape}; are the adapters of another "
      "model?"
    )
  module = name.removesuffix(".weight")
  if rank != adapter.rank(module):
    raise ValueError(
      f"{file}: lora_A of {name} has rank {rank}, but {ADAPTER_CONFIG} gives it "
      f"{adapter.rank(module)}; are the two files of one training?"
    )
  scale, a_name, b_name = adapter.scale(module, rank), change.a, change.b

  def merged() -> np.ndarray:
    delta = np.asarray(stored[b_name], np.float32) @ np.asarray(stored[a_name], np.float32)
    delta = delta.T if change.embedding else delta
    return np.asarray(base[source], np.float32) + scale * delta

  return shape, merged
