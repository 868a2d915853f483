"""Pictures -> patches in the order that a vision tower wants, positions, image tokens. Host code,
numpy only.

Sizes, patch and token counts are those of the checkpoints' own processors; pixels stay uint8 until
they are on the device. Letters: S patch slots, E numbers in a patch, U units, I image tokens.
"""

import dataclasses
import functools
import math

import numpy as np
from PIL import Image

# OpenAI CLIP's pixel statistics: what Qwen2.5-VL's processor normalises with when its file names no
# others.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 200  # Qwen2-VL's own limit


@dataclasses.dataclass(frozen=True)
class ImagePatches:
  """One picture, laid out for the tower. Field shapes as in `types.Images` without the batch
  axis.
  """

  patches_SE: np.ndarray
  position_S2: np.ndarray
  valid_S: np.ndarray
  unit_I: np.ndarray
  grid_units: tuple[int, int]  # rows and columns of image tokens

  @property
  def num_tokens(self) -> int:
    return self.grid_units[0] * self.grid_units[1]


@dataclasses.dataclass(frozen=True)
class SmartResize:
  """Qwen's processor: one grid of patches per image, of whatever size the pixel limits allow.

  window_units: merge units along the side of an attention window (Qwen2.5-VL); None where attention
    is over the image.
  """

  patch_size: int
  merge_size: int
  min_pixels: int
  max_pixels: int
  window_units: int | None = None
  mean: tuple[float, ...] = CLIP_MEAN
  std: tuple[float, ...] = CLIP_STD

  def limited(self, min_pixels: int | None, max_pixels: int | None) -> tuple["SmartResize", str]:
    """With other limits; None: its own, which gives way where it contradicts the other, and a text
    says so.
    """
    least, most, notice = min_pixels or self.min_pixels, max_pixels or self.max_pixels, ""
    if least > most:
      given = max_pixels or min_pixels
      notice = f"min_pixels = {least} is more than max_pixels = {most}: both are {given} now"
      least = most = given
    return dataclasses.replace(self, min_pixels=least, max_pixels=most), notice

  def within(self, min_pixels: int | None, max_pixels: int | None) -> "SmartResize":
    """For one image that has limits of its own: they hold as far as the processor's allow, as where
    a tool resizes the image first (qwen_vl_utils) and the processor after it.
    """
    least, most = (
      min(max(pixels, self.min_pixels), self.max_pixels)
      for pixels in (min_pixels or self.min_pixels, max_pixels or self.max_pixels)
    )
    return dataclasses.replace(self, min_pixels=least, max_pixels=most)

  def size(self, height: int, width: int) -> tuple[int, int]:
    """Height and width after resizing: multiples of a merge unit, within the pixel limits, aspect
    kept.

    Raises ValueError when one side is more than 200 times the other, or when it rounds to nothing,
    which only a `min_pixels` of 0 lets it do.
    """
    unit = self.patch_size * self.merge_size
    if max(height, width) > MAX_ASPECT * min(height, width):
      raise ValueError(
        f"image of {width}x{height} pixels: one side is over {MAX_ASPECT} times the other; crop it"
      )
    rows, columns = round(height / unit) * unit, round(width / unit) * unit
    if rows * columns > self.max_pixels:
      shrink = math.sqrt(height * width / self.max_pixels)
      rows = max(unit, math.floor(height / shrink / unit) * unit)
      columns = max(unit, math.floor(width / shrink / unit) * unit)
    elif rows * columns < self.min_pixels:
      grow = math.sqrt(self.min_pixels / (height * width))
      rows, columns = math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    if not rows or not columns:
      raise ValueError(
        f"image of {width}x{height} pixels rounds to {columns}x{rows}: raise min_pixels, enlarge it"
      )
    return rows, columns

  def units(self, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of image tokens of a picture of this size. Raises ValueError as `size`."""
    rows, columns = self.size(height, width)
    unit = self.patch_size * self.merge_size
    return rows // unit, columns // unit

  def shape(self, height: int, width: int) -> tuple[int, int]:
    """Patch slots and image tokens of a picture of this size."""
    down, across = self.units(height, width)
    if self.window_units is None:
      return down * across * self.merge_size**2, down * across
    side = self.window_units
    return -(-down // side) * -(-across // side) * (side * self.merge_size) ** 2, down * across

  def patchify(self, image: Image.Image) -> ImagePatches:
    """Resizes an RGB picture and cuts it into patches. Raises ValueError for an extreme aspect
    ratio.
    """
    rows, columns = self.size(image.height, image.width)
    pixels = _resized(image, columns, rows)
    units = self.units(image.height, image.width)
    position, valid, unit = window_layout(*units, self.window_units, self.merge_size)
    patches = cut_patches(pixels, self.patch_size)[position[:, 0], position[:, 1]].reshape(
      len(position), -1
    )
    if not valid.all():
      patches[~valid] = 0
    return ImagePatches(patches, position, valid, unit, units)


@dataclasses.dataclass(frozen=True)
class Tiles:
  """InternVL's processor: square tiles in the grid whose aspect is nearest, and the whole picture
  as one more tile.
  """

  tile_size: int
  patch_size: int
  merge_size: int
  min_tiles: int = 1
  max_tiles: int = 12
  crop: bool = True  # False: the whole picture is one tile
  mean: tuple[float, ...] = CLIP_MEAN
  std: tuple[float, ...] = CLIP_STD

  def within(self, min_pixels: int | None, max_pixels: int | None) -> "Tiles":
    """Itself: tiles have one size, whatever an image asks for."""
    del min_pixels, max_pixels
    return self

  @property
  def tile_patches(self) -> int:
    """Patches of a tile."""
    return (self.tile_size // self.patch_size) ** 2

  @property
  def tile_tokens(self) -> int:
    return self.tile_patches // self.merge_size**2

  def grid(self, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tiles for a picture of this size, the thumbnail not counted."""
    if not self.crop or self.max_tiles < 2:
      return 1, 1
    best, columns, rows = math.inf, 1, 1
    for across, down in _tile_grids(self.min_tiles, self.max_tiles):
      difference = abs(width / height - across / down)
      # Of grids with one aspect the larger is taken, unless it would blow the picture up more than
      # twofold.
      enough = width * height > 0.5 * self.tile_size**2 * across * down
      if difference < best or (difference == best and enough):
        best, columns, rows = difference, across, down
    return rows, columns

  def shape(self, height: int, width: int) -> tuple[int, int]:
    """Patch slots and image tokens of a picture of this size."""
    tiles = self._count(*self.grid(height, width))
    return tiles * self.tile_patches, tiles * self.tile_tokens

  def _count(self, rows: int, columns: int) -> int:
    return rows * columns + (rows * columns > 1)

  def patchify(self, image: Image.Image) -> ImagePatches:
    """Cuts an RGB picture into tiles and the tiles into patches; tokens are tile after tile."""
    rows, columns = self.grid(image.height, image.width)
    size = self.tile_size
    whole = _resized(image, columns * size, rows * size)
    tiles = [
      whole[r * size : (r + 1) * size, c * size : (c + 1) * size]
      for r in range(rows)
      for c in range(columns)
    ]
    if len(tiles) > 1:
      tiles.append(_resized(image, size, size))
    side = size // self.patch_size // self.merge_size
    position, valid, unit = window_layout(side, side, None, self.merge_size)
    patches = np.concatenate(
      [cut_patches(t, self.patch_size)[position[:, 0], position[:, 1]] for t in tiles]
    )
    count = len(tiles)
    units = np.concatenate([unit + i * len(unit) for i in range(count)]).astype(np.int32)
    return ImagePatches(
      patches.reshape(len(patches), -1),
      np.tile(position, (count, 1)),
      np.tile(valid, count),
      units,
      (count, len(unit)),
    )


@functools.cache
def _tile_grids(least: int, most: int) -> list[tuple[int, int]]:
  """(columns, rows) of all grids of `least` to `most` tiles, by their number."""
  every = [(across, down) for across in range(1, most + 1) for down in range(1, most + 1)]
  return sorted((g for g in every if least <= g[0] * g[1] <= most), key=lambda g: g[0] * g[1])


def _resized(image: Image.Image, width: int, height: int) -> np.ndarray:
  if (width, height) != image.size:
    image = image.resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(image, np.uint8)


def cut_patches(pixels: np.ndarray, patch: int) -> np.ndarray:
  """[height, width, 3] -> [rows, columns, 3, patch, patch]."""
  height, width, _ = pixels.shape
  return pixels.reshape(height // patch, patch, width // patch, patch, 3).transpose(0, 2, 4, 1, 3)


@functools.lru_cache(maxsize=4096)  # most images of a dataset have one of a few sizes
def window_layout(
  units_down: int, units_across: int, side: int | None, merge: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Where each patch of a grid goes: windows of side x side merge units (None: one window, of the
  grid's size).

  Returns position_S2 (row, column in patches), valid_S, and unit_I: for image tokens in raster
  order, the unit that holds them. Windows at the right and lower edges have empty slots at the end.
  The arrays are shared: read only.
  """
  tall, wide = side or units_down, side or units_across
  slots = tall * wide * merge**2
  windows_down, windows_across = -(-units_down // tall), -(-units_across // wide)
  position = np.zeros((windows_down * windows_across * slots, 2), np.int32)
  valid = np.zeros(len(position), bool)
  unit = np.zeros((units_down, units_across), np.int32)
  within = np.stack(np.meshgrid(np.arange(merge), np.arange(merge), indexing="ij"), -1).reshape(
    -1, 2
  )
  for window in range(windows_down * windows_across):
    top, left = window // windows_across * tall, window % windows_across * wide
    rows, columns = np.meshgrid(
      np.arange(top, min(top + tall, units_down)),
      np.arange(left, min(left + wide, units_across)),
      indexing="ij",
    )
    rows, columns = rows.ravel(), columns.ravel()
    first = window * slots
    stop = first + len(rows) * merge**2
    unit[rows, columns] = first // merge**2 + np.arange(len(rows))
    corner = np.stack([rows, columns], -1) * merge
    position[first:stop] = (corner[:, None] + within).reshape(-1, 2)
    valid[first:stop] = True
  unit = unit.reshape(-1)
  for shared in (position, valid, unit):
    shared.flags.writeable = False
  return position, valid, unit


def pad_image(image: ImagePatches, slots: int, tokens: int) -> dict[str, np.ndarray]:
  """Pads one picture to a bucket of `slots` patch slots and `tokens` image tokens, as
  `types.Images` fields.

  Raises ValueError when it does not fit.
  """
  extra, more = slots - len(image.valid_S), tokens - len(image.unit_I)
  if extra < 0 or more < 0:
    raise ValueError(
      f"image with {len(image.valid_S)} patch slots and {len(image.unit_I)} tokens "
      f"does not fit a bucket of {slots} slots and {tokens} tokens; lower "
      "max_pixels"
    )
  return dict(
    patches_BSE=np.pad(image.patches_SE, ((0, extra), (0, 0))),
    position_BS2=np.pad(image.position_S2, ((0, extra), (0, 0))),
    valid_BS=np.pad(image.valid_S, (0, extra)),
    unit_BI=np.pad(image.unit_I, (0, more)),
  )
