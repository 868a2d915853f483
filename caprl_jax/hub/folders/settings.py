"""config.json -> the same with what it leaves open filled in as transformers does, and said.

Only what no tensor's shape shows is looked at here: sizes prove themselves when weights are read.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from caprl_jax.hub.folders.notices import warn_once
from caprl_jax.json_files import shown
from caprl_jax.models.layers import ACTIVATIONS

# transformers' class defaults (5.24). A decoder's by model_type.
_TEXT = {
  "qwen2_5_vl_text": {"rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 1e6},
  "qwen3_vl_text": {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 5e5},
  "qwen2": {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4},
  "qwen3": {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4},
  "llama": {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4},
}
_MROPE = {"qwen2_5_vl_text": [16, 24, 24], "qwen3_vl_text": [24, 20, 20]}
_VISION = {
  "qwen2_5_vl": {
    "num_heads": 16,
    "hidden_act": "silu",
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "patch_size": 14,
    "spatial_merge_size": 2,
  },
  "qwen3_vl": {
    "num_heads": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "deepstack_visual_indexes": [8, 16, 24],
    "patch_size": 16,
    "spatial_merge_size": 2,
  },
  "internvl": {
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "norm_type": "layer_norm",
    "use_mean_pooling": True,
    "image_size": [448, 448],
    "patch_size": [14, 14],
  },
}
# "dynamic" is "default" up to max_position_embeddings tokens.
_ROPE = ("default", "mrope", "llama3", "dynamic")
# Settings that change what a decoder computes and that ours does not have: key -> what is harmless.
_PLAIN = {
  "use_sliding_window": (False,),
  "mlp_bias": (False,),
  "partial_rotary_factor": (1.0, 1),
  "attn_logit_softcapping": (),
  "final_logit_softcapping": (),
  "residual_multiplier": (1.0, 1),
  "num_experts": (0, 1),
  "num_local_experts": (0, 1),
}


def complete_text(config: Mapping[str, Any], where: str | pathlib.Path) -> dict[str, Any]:
  """A decoder's settings (`Family.text` of a captioner's) with transformers' defaults in.

  Raises:
    ValueError: a setting that this package does not have.
  """
  kind = str(config.get("model_type"))
  text, filled = dict(config), {}
  if kind not in _TEXT:
    return text  # `DecoderConfig.from_hf` says which are known
  if _half_head(text) == 0:
    raise ValueError(
      f"{where}: config.json has more num_attention_heads than its hidden_size can be cut into"
    )
  for key, harmless in _PLAIN.items():
    if text.get(key) is not None and text[key] not in harmless:
      raise ValueError(f"{where}: {key} = {shown(text[key])} in config.json is not supported")
  layers = text.get("layer_types")
  if isinstance(layers, list) and set(layers) - {"full_attention"}:
    raise ValueError(
      f"{where}: layer_types = {shown(layers)} in config.json: only full_attention is supported"
    )
  one, other = text.get("rope_scaling"), text.get("rope_parameters")
  _check_rope(one or other, where)
  rope = one or other or {}
  both = isinstance(one, Mapping) and isinstance(other, Mapping)
  if both and any(one.get(k) != other[k] for k in other if k in one):
    warn_once(
      f"{where}: config.json has rope_scaling = {shown(one)} and rope_parameters = {shown(other)}; "
      "rope_scaling is taken, as transformers does"
    )
  for key, value in _TEXT[kind].items():
    if not text.get(key) and not (key == "rope_theta" and rope.get(key)):
      filled[key] = value
  if kind in _MROPE:
    sections = rope.get("mrope_section")
    if sections is None:
      filled["mrope_section"] = sections = _MROPE[kind]
      text["rope_scaling" if one else "rope_parameters"] = {**rope, "mrope_section": sections}
    half = _half_head(text)
    if not _integers(sections) or len(sections) != 3 or (half and sum(sections) != half):
      raise ValueError(
        f"{where}: mrope_section = {shown(sections)} in config.json must be three numbers whose "
        f"sum is half a head, {half}. Take the file of the checkpoint that this one was made from"
      )
  _say(filled, where, "config.json")
  text |= {key: value for key, value in filled.items() if key != "mrope_section"}
  _check_activation(text["hidden_act"], where)
  return text


def _check_rope(rope: Any, where: str | pathlib.Path) -> None:
  if rope is not None and not isinstance(rope, Mapping):
    raise ValueError(f"{where}: rope settings {shown(rope)} in config.json must be an object")
  kind = (rope or {}).get("rope_type", (rope or {}).get("type", "default"))
  if kind not in _ROPE:
    raise ValueError(
      f"{where}: rope type {shown(kind)} in config.json is not supported; supported: "
      f"{', '.join(_ROPE)}. Use the checkpoint without it"
    )
  if kind == "dynamic":
    warn_once(
      f"{where}: rope type 'dynamic' in config.json is read as 'default', which it is for texts of "
      "up to max_position_embeddings tokens"
    )


def complete_vision(config: Mapping[str, Any], where: str | pathlib.Path) -> dict[str, Any]:
  """A captioner's config.json with transformers' defaults in its `vision_config`.

  Raises:
    ValueError: it has none, or an activation that this package does not have.
  """
  vision = config.get("vision_config")
  if not isinstance(vision, Mapping):
    raise ValueError(
      f"{where}: vision_config = {shown(vision)} in config.json; take the whole file of the "
      "checkpoint"
    )
  defaults = _VISION.get(str(config.get("model_type")), {})
  filled = {key: value for key, value in defaults.items() if vision.get(key) is None}
  _say(filled, where, "vision_config of config.json")
  vision = {**vision, **filled}
  for name in (vision.get("hidden_act"), config.get("projector_hidden_act")):
    if name is not None:
      _check_activation(name, where)
  return {**config, "vision_config": vision}


def _half_head(text: Mapping[str, Any]) -> int | None:
  """Half of a head's width, where the sizes are there; reading them names what is missing."""
  if isinstance(text.get("head_dim"), int):
    return text["head_dim"] // 2
  width, heads = text.get("hidden_size"), text.get("num_attention_heads")
  if text.get("model_type") == "qwen3_vl_text":
    return 64
  if isinstance(width, int) and isinstance(heads, int) and heads:
    return width // heads // 2
  return None


def _integers(values: Any) -> bool:
  return isinstance(values, (list, tuple)) and all(isinstance(value, int) for value in values)


def _check_activation(name: Any, where: str | pathlib.Path) -> None:
  if not isinstance(name, str) or name not in ACTIVATIONS:
    raise ValueError(
      f"{where}: activation {shown(name)} in config.json is not supported; supported: "
      f"{', '.join(ACTIVATIONS)}"
    )


def _say(filled: Mapping[str, Any], where: str | pathlib.Path, file: str) -> None:
  if filled:
    told = ", ".join(f"{key} = {shown(value)}" for key, value in filled.items())
    warn_once(f"{where}: {file} does not say {told}; transformers' own default")
