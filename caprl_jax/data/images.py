"""Pictures -> patches in window-major order, positions, image tokens. Host code, numpy only.

Resizing, patch and token counts are Qwen2-VL's processor's (`smart_resize`); pixels stay uint8 until they are on
the device. Letters: S patch slots, E numbers in a patch, U units, I image tokens.
"""

import dataclasses
import math

import numpy as np
from PIL import Image

from caprl_jax.models.vision import VisionConfig

MAX_ASPECT = 200  # Qwen2-VL's own limit


def smart_size(height: int, width: int, cfg: VisionConfig) -> tuple[int, int]:
  """Height and width after resizing: multiples of a merge unit, within the pixel limits, aspect kept.

  Raises ValueError when one side is more than 200 times the other.
  """
  unit = cfg.patch_size * cfg.merge_size
  if max(height, width) > MAX_ASPECT * min(height, width):
    raise ValueError(f"image of {width}x{height} pixels: one side is over {MAX_ASPECT} times the other; crop it")
  rows, columns = round(height / unit) * unit, round(width / unit) * unit
  if rows * columns > cfg.max_pixels:
    shrink = math.sqrt(height * width / cfg.max_pixels)
    rows = max(unit, math.floor(height / shrink / unit) * unit)
    columns = max(unit, math.floor(width / shrink / unit) * unit)
  elif rows * columns < cfg.min_pixels:
    grow = math.sqrt(cfg.min_pixels / (height * width))
    rows, columns = math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
  return rows, columns


@dataclasses.dataclass(frozen=True)
class ImagePatches:
  """One picture, laid out for the tower. Field shapes as in `types.Images` without the batch axis."""
  patches_SE: np.ndarray
  position_S2: np.ndarray
  valid_S: np.ndarray
  unit_I: np.ndarray
  grid_units: tuple[int, int]  # rows and columns of image tokens

  @property
  def num_tokens(self) -> int:
    return self.grid_units[0] * self.grid_units[1]


def window_layout(units_down: int, units_across: int, cfg: VisionConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Where each patch of a grid goes.

  Returns position_S2 (row, column in patches), valid_S, and unit_I: for image tokens in raster order, the unit
  that holds them. Windows at the right and lower edges have empty slots at the end.
  """
  side, merge = cfg.window_units, cfg.merge_size
  slots = cfg.window_slots
  windows_down, windows_across = -(-units_down // side), -(-units_across // side)
  position = np.zeros((windows_down * windows_across * slots, 2), np.int32)
  valid = np.zeros(len(position), bool)
  unit = np.zeros((units_down, units_across), np.int32)
  within = np.stack(np.meshgrid(np.arange(merge), np.arange(merge), indexing="ij"), -1).reshape(-1, 2)
  for window in range(windows_down * windows_across):
    top, left = window // windows_across * side, window % windows_across * side
    slot = window * slots
    for row in range(top, min(top + side, units_down)):
      for column in range(left, min(left + side, units_across)):
        unit[row, column] = slot // merge ** 2
        position[slot:slot + merge ** 2] = within + (row * merge, column * merge)
        valid[slot:slot + merge ** 2] = True
        slot += merge ** 2
  return position, valid, unit.reshape(-1)


def patchify(image: Image.Image, cfg: VisionConfig) -> ImagePatches:
  """Resizes an RGB picture and cuts it into patches. Raises ValueError for an extreme aspect ratio."""
  rows, columns = smart_size(image.height, image.width, cfg)
  if (columns, rows) != image.size:
    image = image.resize((columns, rows), Image.Resampling.BICUBIC)
  pixels = np.asarray(image, np.uint8)
  patch = cfg.patch_size
  grid = pixels.reshape(rows // patch, patch, columns // patch, patch, 3).transpose(0, 2, 4, 1, 3)
  units = (rows // patch // cfg.merge_size, columns // patch // cfg.merge_size)
  position, valid, unit = window_layout(*units, cfg)
  patches = grid[position[:, 0], position[:, 1]].reshape(len(position), -1)
  return ImagePatches(np.where(valid[:, None], patches, 0).astype(np.uint8), position, valid, unit, units)


def pad_image(image: ImagePatches, slots: int, tokens: int) -> dict[str, np.ndarray]:
  """Pads one picture to a bucket of `slots` patch slots and `tokens` image tokens, as `types.Images` fields.

  Raises ValueError when it does not fit.
  """
  extra, more = slots - len(image.valid_S), tokens - len(image.unit_I)
  if extra < 0 or more < 0:
    raise ValueError(f"image with {len(image.valid_S)} patch slots and {len(image.unit_I)} tokens does not fit a "
                     f"bucket of {slots} slots and {tokens} tokens; raise data.image_slots / data.image_tokens or "
                     "lower max_pixels")
  return dict(patches_BSE=np.pad(image.patches_SE, ((0, extra), (0, 0))),
              position_BS2=np.pad(image.position_S2, ((0, extra), (0, 0))),
              valid_BS=np.pad(image.valid_S, (0, extra)), unit_BI=np.pad(image.unit_I, (0, more)))
