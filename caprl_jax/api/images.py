"""Images as programs have them (paths, Pillow's, arrays) -> rows as the captioner reads them."""

import io
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from caprl_jax.data.rows import CaptionRow, to_rgb
from caprl_jax.json_files import shown

# what PNG has a place for; images in other modes become RGB
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def is_one(images: Any) -> bool:
  """Whether it is an image, not several."""
  if isinstance(images, (str, os.PathLike, bytes, Image.Image)):
    return True
  return hasattr(images, "ndim") and images.ndim in (2, 3)


def image_rows(images: Iterable[Any]) -> list[CaptionRow]:
  """A row for each image, named by its path, or by its place where it has none.

  Args:
    images: paths, encoded files' bytes, Pillow images, or uint8 arrays [height, width] or [height,
      width, 1, 3 or 4 channels].

  Raises:
    ValueError: an item is none of these. (That a file is there is for the captioner to find.)
  """
  return [_row(image, number) for number, image in enumerate(images)]


def _row(image: Any, number: int) -> CaptionRow:
  if isinstance(image, (str, os.PathLike)):
    return CaptionRow(pathlib.Path(image).expanduser(), "", os.fspath(image))
  name = f"image {number}"
  if isinstance(image, bytes):
    return CaptionRow(image, "", name)
  if not isinstance(image, Image.Image):
    image = _of_array(image, name)
  return CaptionRow(_encoded(image), "", str(getattr(image, "filename", "") or name))


def _of_array(image: Any, name: str) -> Image.Image:
  if not hasattr(image, "ndim"):
    raise ValueError(
      f"{name} is {shown(image)} ({type(image).__name__}); give a path, a Pillow image, an array "
      "or a list of such"
    )
  array = np.asarray(image)
  if array.ndim not in (2, 3) or array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
    raise ValueError(
      f"{name} has the shape {array.shape}; an image is [height, width] or [height, width, 1, 3 or "
      "4 channels] (of channels first: np.moveaxis(image, 0, -1))"
    )
  if array.dtype != np.uint8:
    raise ValueError(
      f"{name} holds {array.dtype}; an image's array holds uint8 from 0 to 255 (of 0 to 1: "
      "(255 * image).round().astype(np.uint8))"
    )
  return Image.fromarray(array[..., 0] if array.shape[-1] == 1 and array.ndim == 3 else array)


def _encoded(image: Image.Image) -> bytes:
  """The pixels as a PNG that is not compressed, upright as the image's EXIF asks."""
  upright = ImageOps.exif_transpose(image)
  if upright.mode not in _PNG_MODES:
    upright = to_rgb(upright)
  png = io.BytesIO()
  upright.save(png, "PNG", compress_level=0)
  return png.getvalue()
