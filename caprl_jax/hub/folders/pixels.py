"""What a checkpoint says of its image processor -> the same with nothing left open, or refused as
transformers refuses it.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from caprl_jax.hub.folders.notices import warn_once
from caprl_jax.json_files import shown
from caprl_jax.models.family import VisionConfig
from caprl_jax.models.image_processor import CLIP_MEAN, CLIP_STD, SmartResize, Tiles

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
_SIZE = ("shortest_edge", "longest_edge")
_SIZE_REMEDY = (
  'write "size": {"shortest_edge": LEAST, "longest_edge": MOST}, the least and most pixels of an '
  "image (or min_pixels and max_pixels), as the base checkpoint's preprocessor_config.json has it"
)
# What transformers' Qwen2VLImageProcessor, which Qwen2.5-VL and Qwen3-VL use, has where its file is
# silent.
_QWEN = {
  "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
  "image_mean": list(CLIP_MEAN),
  "image_std": list(CLIP_STD),
}
# ... and its GotOcr2ImageProcessor, which InternVL uses, but for the size: a tower takes one only.
_TILES = {
  "min_patches": 1,
  "max_patches": 12,
  "image_mean": list(CLIP_MEAN),
  "image_std": list(CLIP_STD),
}
_CLASSES = {
  "internvl": ("GotOcr2ImageProcessor", "InternVLImageProcessor"),
  "qwen2_5_vl": ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"),
  "qwen3_vl": ("Qwen2VLImageProcessor", "Qwen3VLImageProcessor"),
}


def complete_processor(
  said: Mapping[str, Any], config: Mapping[str, Any], where: pathlib.Path
) -> dict[str, Any]:
  """All that the image processor of a checkpoint depends on.

  Args:
    said: preprocessor_config.json, or its part of processor_config.json; empty where neither is.
    config: config.json, as the family's `adapt` returns it.
    where: names the folder in messages.

  Raises:
    ValueError: nothing is said, or something that transformers refuses, would take for another
      processor, or that is not supported.
  """
  if "tiles" in config:  # InternVL's own layout: its code cuts by config.json
    return dict(said)
  if not said:
    raise ValueError(
      f"{where}: no {PREPROCESSOR}, and no image_processor in a {PROCESSOR}: how images are "
      "resized and normalised is not known, and transformers refuses such a checkpoint too. Copy "
      "the file from the checkpoint that this one was made from"
    )
  family = str(config.get("model_type"))
  _check_kind(said, family, where)
  defaults = _TILES if family == "internvl" else _QWEN
  found = dict(said)
  filled = {
    key: value
    for key, value in defaults.items()
    if key != "size"
    and key not in found
    or key in ("min_patches", "max_patches")
    and not found[key]
  }
  if family != "internvl":
    size, by_default = _limits(found, where)
    found["size"] = size
    filled |= {"size": {key: size[key] for key in by_default}} if by_default else {}
    _check_patches(found, config["vision_config"], where)
  found |= {key: value for key, value in filled.items() if key != "size"}
  for key in ("image_mean", "image_std"):
    found[key] = _channels(found[key], key, where)
  if family == "internvl" and not found.get("size"):
    tile = config["vision_config"]["image_size"]
    warn_once(
      f"{where}: the image processor's file does not say size; tiles are the tower's, "
      f"{shown(tile)} pixels, where transformers would take its own default and fail"
    )
  if filled:
    told = ", ".join(f"{key} = {shown(value)}" for key, value in filled.items())
    warn_once(f"{where}: the image processor's file does not say {told}; transformers' own default")
  return found


def _check_kind(said: Mapping[str, Any], family: str, where: pathlib.Path) -> None:
  kind = said.get("image_processor_type")
  known = _CLASSES.get(family, ())
  plain = str(kind).removesuffix("Fast").removesuffix("Pil")
  if known and kind is not None and plain not in known:
    raise ValueError(
      f"{where}: image_processor_type = {kind!r}, but {family} has a {known[0]}. Copy "
      f"{PREPROCESSOR} from the checkpoint that this one was made from"
    )
  changed = {
    k: said[k] for k in ("do_resize", "do_rescale", "do_normalize") if said.get(k) is False
  }
  if said.get("resample") not in (None, 3):
    changed["resample"] = said["resample"]
  factor = said.get("rescale_factor")
  if factor is not None and abs(factor * 255 - 1) > 1e-6:
    changed["rescale_factor"] = factor
  if changed:
    raise ValueError(
      f"{where}: the image processor has {changed}; only bicubic resizing, rescaling by 1/255 "
      "and normalising are supported"
    )


def _limits(said: Mapping[str, Any], where: pathlib.Path) -> tuple[dict[str, int], tuple[str, ...]]:
  """Least and most pixels as `size` has them, and which of them nothing says.

  As transformers has it: `size` as it stands, or else the class's; `min_pixels` and `max_pixels`
  beside it replace its values.
  """
  size, by_default = said.get("size"), ()
  if size is None:
    size, by_default = _QWEN["size"], _SIZE
  if not isinstance(size, Mapping):
    raise ValueError(
      f"{where}: size = {shown(size)} of the image processor is no area: {_SIZE_REMEDY}"
    )
  size = dict(size)
  for old, new in zip(("min_pixels", "max_pixels"), _SIZE):
    if said.get(old) is not None:
      size.pop(old, None)
      size[new] = said[old]
      by_default = tuple(key for key in by_default if key != new)
  size = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in size.items()}
  wrong = any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in size.values())
  if set(size) != set(_SIZE) or wrong:
    raise ValueError(
      f"{where}: size = {shown(said.get('size'))} of the image processor does not say least and "
      f"most pixels, and transformers refuses it too: {_SIZE_REMEDY}"
    )
  return {key: size[key] for key in _SIZE}, by_default


def _check_patches(
  found: Mapping[str, Any], vision: Mapping[str, Any], where: pathlib.Path
) -> None:
  """Raises ValueError where processor and tower disagree about patches."""
  for key, theirs, default in (
    ("patch_size", vision.get("patch_size", 14), 14),
    ("merge_size", vision.get("spatial_merge_size", 2), 2),
    ("temporal_patch_size", vision.get("temporal_patch_size", 2), 2),
  ):
    ours = found.get(key)
    if (default if ours is None else ours) != theirs:
      said = "says nothing, which is" if ours is None else "says"
      raise ValueError(
        f"{where}: of {key} the image processor's file {said} {default if ours is None else ours}, "
        f"but the tower of config.json has {theirs}. Take both files of one checkpoint"
      )


def _channels(value: Any, key: str, where: pathlib.Path) -> list[float]:
  """One number for each of red, green and blue."""
  values = [value] * 3 if isinstance(value, (int, float)) else value
  numbers = isinstance(values, (list, tuple)) and all(isinstance(v, (int, float)) for v in values)
  if not numbers or len(values) != 3 or (key == "image_std" and 0 in values):
    raise ValueError(
      f"{where}: {key} = {shown(value)} of the image processor must be three numbers"
      + (" other than 0" if key == "image_std" else "")
    )
  return list(values)


def says_another(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
  """Whether two descriptions of an image processor differ in what pictures become."""

  def picked(said: Mapping[str, Any]) -> tuple:
    size = said.get("size") if isinstance(said.get("size"), Mapping) else {}
    least, most = said.get("min_pixels"), said.get("max_pixels")
    return (
      least or size.get("shortest_edge"),
      most or size.get("longest_edge"),
      *(size.get(key) for key in ("height", "width")),
      *(said.get(key) for key in ("image_mean", "image_std", "patch_size", "min_patches")),
      said.get("max_patches"),
    )

  return picked(one) != picked(other)


def processor_of(vision: VisionConfig) -> dict[str, Any]:
  """preprocessor_config.json of a tower that came from no checkpoint."""
  pixels = vision.pixels
  if isinstance(pixels, SmartResize):
    return {
      "image_processor_type": "Qwen2VLImageProcessor",
      "patch_size": pixels.patch_size,
      "merge_size": pixels.merge_size,
      "temporal_patch_size": getattr(vision, "temporal_patch_size", 2),
      "size": {"shortest_edge": pixels.min_pixels, "longest_edge": pixels.max_pixels},
      "image_mean": list(pixels.mean),
      "image_std": list(pixels.std),
    }
  assert isinstance(pixels, Tiles)
  return {
    "image_processor_type": "GotOcr2ImageProcessor",
    "crop_to_patches": pixels.crop,
    "size": {"height": pixels.tile_size, "width": pixels.tile_size},
    "min_patches": pixels.min_tiles,
    "max_patches": pixels.max_tiles,
    "image_mean": list(pixels.mean),
    "image_std": list(pixels.std),
  }
