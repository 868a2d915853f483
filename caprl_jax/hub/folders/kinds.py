"""A folder that cannot be loaded -> what it is, and the one step that helps."""

import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from caprl_jax.hub.folders.notices import warn_once
from caprl_jax.json_files import shown

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_CONVERT = (
  'Convert it once where torch is installed: `python -c "from transformers import CLASS; '
  "CLASS.from_pretrained('FOLDER').save_pretrained('NEW')\"`, and copy the tokenizer's and "
  "processor's files"
)
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")

# quant_method of config.json -> how people call it
_QUANTISED = {
  "awq": "AWQ",
  "gptq": "GPTQ",
  "bitsandbytes": "bitsandbytes",
  "fp8": "fp8",
  "fbgemm_fp8": "fp8",
  "compressed-tensors": "compressed-tensors",
}
# Ends of tensor names that only quantised checkpoints have -> which
_QUANTISED_NAMES = (
  (r"\.(SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map)$", "bitsandbytes"),
  (r"\.quant_state\.", "bitsandbytes"),
  (r"\.(weight_packed|weight_shape|weight_global_scale)$", "compressed-tensors"),
  (r"\.g_idx$", "GPTQ"),
  (r"\.(qweight|qzeros)$", "AWQ or GPTQ"),
  (r"(\.weight_scale|\.input_scale|_scale_inv|\.weight_zero_point)$", "fp8 or int8"),
  (r"\.W_q$", "HQQ"),
  (r"\.weight\._(data|scale)$", "Quanto"),
  (r"\.(codes|codebooks)$", "AQLM"),
  (r"_proj_(blocks|scales)$", "MXFP4"),
)
_PLAIN_TYPES = ("F64", "F32", "F16", "BF16")


def folder_message(path: pathlib.Path) -> str | None:
  """What a folder without config.json is and what to name instead; None where nothing is known."""
  names = {file.name for file in path.iterdir()}
  for known in (_empty, _hub_cache, _training_state, _other_format, _deeper, _weights_alone):
    message = known(path, names)
    if message:
      return f"{path} {message}"
  return None


def _empty(path: pathlib.Path, names: set[str]) -> str | None:
  del path
  return (
    None
    if names - {".cache", ".gitattributes"}
    else (
      "is an empty folder. Download the model into it: `hf download OWNER/NAME --local-dir "
      "FOLDER`, or give the hub name itself"
    )
  )


def _hub_cache(path: pathlib.Path, names: set[str]) -> str | None:
  """The outer folder of a model in the hub's cache, or the one with its snapshots."""
  snapshots = path if path.name == "snapshots" else path / "snapshots"
  if not snapshots.is_dir() or not (names & {"blobs", "refs"} or path is snapshots):
    return None
  held = sorted(folder for folder in snapshots.iterdir() if (folder / "config.json").exists())
  if not held:
    return (
      "is a model's folder in the hub's cache, and no snapshot in it is whole. Give the hub name, "
      "so that it is downloaded"
    )
  main = snapshots.parent / "refs" / "main"
  newest = snapshots / main.read_text().strip() if main.exists() else held[-1]
  return (
    f"is a model's folder in the hub's cache. Name the snapshot: {newest}, or give the hub name"
  )


def _training_state(path: pathlib.Path, names: set[str]) -> str | None:
  """Folders that training leaves: ours, FSDP's, DeepSpeed's, Orbax's."""
  made = [name for name in ("policy", "adapters", "best") if _is_model(path / name)]
  if made and names & {"summary.json", "checkpoints", "metrics.jsonl", "samples"}:
    places = " or ".join(str(path / name) for name in made)
    return f"is the workdir of a training run. Name the captioner in it: {places}"
  if "checkpoints" in names and names & {"config.json", "summary.json", "metrics.jsonl"}:
    return (
      "is the workdir of a training run that has written no captioner yet. Write one from its "
      f"newest checkpoint: `--config=configs/export.py --config.export.run={path}`"
    )
  if (
    any(name.startswith("global_step") for name in names)
    or "zero_to_fp32.py" in names
    or any(name.endswith("_model_states.pt") for name in names)
  ):
    return (
      "is a DeepSpeed checkpoint: `python zero_to_fp32.py . OUT --safe_serialization` in it writes "
      "the weights; put config.json and the tokenizer's files beside them"
    )
  if any(re.fullmatch(r"model_world_size_\d+_rank_\d+\.pt", name) for name in names):
    return (
      "is a checkpoint of verl: `python -m verl.model_merger merge --backend fsdp --local_dir "
      f"{path} --target_dir OUT` writes the weights; name OUT"
    )
  if any(name.endswith(".distcp") or name.startswith("pytorch_model_fsdp") for name in names):
    return (
      "is an FSDP checkpoint: `accelerate merge-weights FOLDER OUT` writes the weights; put "
      "config.json and the tokenizer's files beside them"
    )
  if names & {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"}:
    return (
      "is a part of an Orbax checkpoint. As a captioner, name the run that it belongs to, WORKDIR, "
      "or WORKDIR/checkpoints/STEP; as something else, export it: "
      "`--config=configs/export.py --config.export.run=WORKDIR`"
    )
  return None


def _other_format(path: pathlib.Path, names: set[str]) -> str | None:
  del path
  if "model_index.json" in names:
    return "is a diffusers pipeline, which no captioner or judge is"
  if "params.json" in names and any(name.startswith("consolidated") for name in names):
    return "has its maker's own layout. Use the copy with config.json that transformers reads"
  return None


def _deeper(path: pathlib.Path, names: set[str]) -> str | None:
  """The model, or several, one level down."""
  held = [path / name for name in sorted(names) if _is_model(path / name)]
  if not held:
    return None
  listed = ", ".join(str(folder) for folder in held[:4]) + (" ..." if len(held) > 4 else "")
  if len(held) == 1:
    return f"holds no config.json, but its folder {held[0].name} does. Name that: {listed}"
  return f"holds no config.json, but {len(held)} of its folders do. Name one of them: {listed}"


def _weights_alone(path: pathlib.Path, names: set[str]) -> str | None:
  del path
  if ADAPTER_WEIGHTS in names:
    return (
      f"holds adapters without their {ADAPTER_CONFIG}. Copy that file from where they were trained"
    )
  return None


def _is_model(folder: pathlib.Path) -> bool:
  return any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def no_weights_message(path: pathlib.Path, config: Mapping[str, Any]) -> str:
  """What to say of a folder with config.json that holds no weights to read."""
  names = sorted(file.name for file in path.iterdir())
  training = _training_state(path, set(names))
  if training:
    return f"{path} {training}"
  made = config.get("architectures")
  known = isinstance(made, list) and made and str(made[0]).isidentifier()
  convert = _CONVERT.replace("CLASS", made[0] if known else "AutoModelForImageTextToText").replace(
    "FOLDER", str(path)
  )
  shards = [match for name in names if (match := _SHARD.fullmatch(name))]
  if shards:
    count = int(shards[0][2])
    held = {int(match[1]) for match in shards}
    absent = sorted(set(range(1, count + 1)) - held)
    lacking = f", and of its {count} shards {_listed(absent)} are absent" if absent else ""
    return (
      f"{path}: shards of a model ({shards[0][0]}, ...) without their index {INDEX}{lacking}. "
      "Download that file from where the shards came from; transformers cannot read them without "
      "it either"
    )
  bins = [name for name in names if re.fullmatch(r"pytorch_model.*\.bin", name)]
  if bins:
    return f"{path}: weights only as {bins[0]}, which is pickled. {convert}"
  for ending, what in ((".pth", "torch"), (".h5", "TensorFlow"), (".msgpack", "Flax")):
    found = [name for name in names if name.endswith(ending)]
    if found:
      return f"{path}: weights only as {found[0]}, of {what}. {convert}"
  ggufs = [name for name in names if name.endswith(".gguf")]
  if ggufs:
    return (
      f"{path}: no {WEIGHTS}, but a GGUF file. A judge may be that file: name {path / ggufs[0]}; "
      "a captioner has to be in safetensors"
    )
  onnx = [name for name in names if name.endswith((".onnx", ".xml"))] + [
    name for name in names if name == "onnx"
  ]
  if onnx:
    return f"{path}: a model exported as {onnx[0]}. Use the checkpoint that it was made from"
  if any((path / ".cache" / "huggingface").rglob("*.incomplete")):
    return f"{path}: no {WEIGHTS}; its download was not finished. Run the same `hf download` again"
  broken = [name for name in names if (path / name).is_symlink() and not (path / name).exists()]
  if broken:
    return f"{path / broken[0]} is a link to a file that is gone. Download the model again"
  other = [name for name in names if name.endswith(".safetensors")]
  if other:
    return (
      f"{path}: no {WEIGHTS} and no {INDEX}; it holds {', '.join(other[:4])}. If that is the whole "
      f"model, rename it to {WEIGHTS}"
    )
  return (
    f"{path / WEIGHTS}: no such file. Download it, or convert the model's weights to safetensors."
  )


def _listed(numbers: list[int]) -> str:
  return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")


def check_state(
  path: pathlib.Path,
  config: Mapping[str, Any],
  names: Iterable[str],
  dtype_of: Callable[[str], str],
) -> None:
  """Looks at the names of a checkpoint's tensors for what is no plain model.

  Args:
    dtype_of: a tensor's type as safetensors spells it; asked for a few.

  Raises:
    ValueError: an unmerged PEFT state, a wrapped or a quantised model.
  """
  names = list(names)
  _check_wrappers(path, names)
  settings = config.get("quantization_config")
  settings = settings if isinstance(settings, dict) else {}
  method = str(settings.get("quant_method", "")) or (
    "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else ""
  )
  said = _QUANTISED.get(method.lower(), method)
  shown_by = None
  for pattern, kind in _QUANTISED_NAMES:
    found = next((name for name in names if re.search(pattern, name)), None)
    if found is not None:
      said, shown_by = said or kind, found
      break
  if shown_by is None:
    matrices = [name for name in names if name.endswith(".weight")]
    odd = [n for n in matrices if dtype_of(n) not in _PLAIN_TYPES]
    if odd:
      shown_by, kind = odd[0], dtype_of(odd[0])
      said = said or ("fp8" if kind.startswith("F8") else kind)
  if shown_by is not None:
    bits = f", {settings['bits']} bits" if isinstance(settings.get("bits"), int) else ""
    raise ValueError(
      f"{path}: its weights are quantised ({said}{bits}; tensor {shown_by}), which this package "
      "does not read. Name the unquantised checkpoint that it was made from; int8 for a judge is "
      "judge.int8"
    )
  if settings:
    warn_once(
      f"{path}: config.json has a quantization_config ({said or shown(settings)}), but no tensor "
      "is quantised; they are read as they are"
    )


def _check_wrappers(path: pathlib.Path, names: list[str]) -> None:
  """Raises ValueError for the state of a model inside a wrapper."""
  peft = next(
    (
      n
      for n in names
      if re.search(r"(^base_model\.model\.|\.lora_[A-Za-z_]+(\.|$)|\.base_layer\.)", n)
    ),
    None,
  )
  if peft is not None:
    raise ValueError(
      f"{path}: the state of an unmerged PEFT model (tensor {peft}), which transformers cannot "
      "load either. Write it again after `model = model.merge_and_unload()`, or let PEFT write its "
      "adapters (`model.save_pretrained`) and name their folder"
    )
  prefixes = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "pretrained_model.", "state_dict.")
  for prefix in prefixes:
    held = [name for name in names if name.startswith(prefix)]
    if held and 2 * len(held) > len(names):
      raise ValueError(
        f"{path}: its tensors are those of a wrapped model (all begin with {prefix!r}: {held[0]}). "
        "Write the model inside the wrapper: `model.module.save_pretrained(...)`, or take the "
        "prefix off the names"
      )
