"""config.json -> nothing, or what is wrong with a number in it, before anything is made of it."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from caprl_jax.json_files import cut, shown

_LAYERS = ("num_hidden_layers", "depth")
_MOST_LAYERS = 1000
_SIZES = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_attention_heads",
  "num_key_value_heads",
  "num_heads",
  "head_dim",
  "out_hidden_size",
  "patch_size",
  "image_size",
  "window_size",
  "spatial_merge_size",
  "temporal_patch_size",
  "in_channels",
  "in_chans",
  "num_channels",
  "num_position_embeddings",
)
_MOST = 2**31 - 1  # what a tensor's side can be
_LISTS = ("fullatt_block_indexes", "deepstack_visual_indexes", "mrope_section")
_REALS = ("rope_theta", "rms_norm_eps", "layer_norm_eps", "downsample_ratio")
_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def check_numbers(config: Mapping[str, Any], where: str | pathlib.Path) -> None:
  """Raises ValueError, starting with `where`, for a size of a config.json that cannot be one: a
  text, a fraction, one below 1, more than 1000 layers. What is absent, or null, is left aside."""
  for place, key, value in _numbers(config, ""):
    what = _wrong(key, value)
    if what:
      raise ValueError(
        f"{where}: {cut(place)} = {shown(value)} in config.json must be {what}; take the file of "
        "the checkpoint that this one was made from"
      )


def _numbers(config: Mapping[str, Any], place: str):
  """Place, key and value of all settings, those of sections among them."""
  for key, value in config.items():
    if isinstance(value, Mapping):
      yield from _numbers(value, f"{place}{key}.")
    elif value is not None:
      yield f"{place}{key}", key, value


def _wrong(key: str, value: Any) -> str:
  """What a setting must be, "" where it is that."""
  if key in _SIZES or key in _LAYERS:
    most = _MOST_LAYERS if key in _LAYERS else _MOST
    values = value if isinstance(value, list) and len(value) == 2 else [value]
    fits = all(_is_whole(v) and 1 <= v <= most for v in values)
    return "" if fits else f"a whole number from 1 to {most:,}"
  if key in _LISTS:
    fits = isinstance(value, list) and all(_is_whole(v) and 0 <= v <= _MOST for v in value)
    return "" if fits else "a list of whole numbers"
  if key in _IDS:
    return "" if _is_whole(value) and 0 <= value <= _MOST else "the id of a token"
  if key in _REALS:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "" if fits and math.isfinite(value) and value > 0 else "a number above 0"
  return ""


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)
