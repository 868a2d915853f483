"""Images as programs have them -> rows, and what is no image."""

import io

import numpy as np
import pytest
from PIL import Image

from caprl_jax.api.images import image_rows, is_one
from caprl_jax.data.rows import read_image

COLORS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def pixels(image) -> np.ndarray:
  (row,) = image_rows([image])
  return np.asarray(read_image(row))


def test_pixels_stay_what_they_are():
  np.testing.assert_array_equal(pixels(COLORS), COLORS)
  np.testing.assert_array_equal(pixels(Image.fromarray(COLORS)), COLORS)
  gray = COLORS[..., 0]
  for of_gray in (gray, gray[..., None], Image.fromarray(gray)):
    np.testing.assert_array_equal(pixels(of_gray), np.stack([gray] * 3, -1))
  # a mode that PNG does not have
  np.testing.assert_array_equal(
    pixels(Image.new("CMYK", (2, 2))), np.full((2, 2, 3), 255, np.uint8)
  )


def test_a_photograph_is_turned_as_its_file_says(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(COLORS).save(tmp_path / "turned.png", exif=exif)
  opened = Image.open(tmp_path / "turned.png")
  np.testing.assert_array_equal(pixels(opened), pixels(tmp_path / "turned.png"))
  assert pixels(opened).shape == (5, 6, 3)


@pytest.mark.parametrize(
  "image, message",
  [
    (COLORS.astype(np.float32) / 255, "holds float32; .*0 to 255"),
    (np.moveaxis(COLORS, -1, 0), r"shape \(3, 6, 5\).*moveaxis"),
    (3, r"image 0 is 3 \(int\); give a path"),
  ],
)
def test_what_is_no_image_is_refused(image, message):
  with pytest.raises(ValueError, match=message):
    image_rows([image])


def test_one_and_several():
  png = io.BytesIO()
  Image.fromarray(COLORS).save(png, "PNG")
  for one in ("a.png", png.getvalue(), Image.fromarray(COLORS), COLORS):
    assert is_one(one)
  for several in (["a.png"], ("a.png",), np.stack([COLORS, COLORS])):
    assert not is_one(several)
  assert [row.name for row in image_rows(np.stack([COLORS, COLORS]))] == ["image 0", "image 1"]
