"""Rows: which are refused and in what words, how images become RGB."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from caprl_jax.data import rows

COLOR = rows.Question("What color is it?", ("red", "blue", "dark green"), 1, "color")


def png(image: Image.Image, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, "PNG", **options)
  return buffer.getvalue()


def read(image: pathlib.Path | bytes) -> np.ndarray:
  got = rows.read_image(rows.QARow(image, (COLOR,), "the row"))
  assert got.mode == "RGB"
  return np.asarray(got)


@pytest.fixture
def picture(tmp_path):
  (tmp_path / "images").mkdir()
  file = tmp_path / "images" / "1.png"
  Image.new("RGB", (4, 3), "red").save(file)
  return file


# Validation.


@pytest.mark.parametrize(
  "stem, options, gold, message",
  [
    ("  ", ("a", "b"), 0, "here: the question has no text"),
    ("Q?", ("a",), 0, r"here: question 'Q\?' has 1 option\(s\) \['a'\]; give it at least 2"),
    ("Q?", ("a", " "), 0, "option 1 is empty"),
    ("Q?", ("b", "Red ", "red"), 0, "the options 'Red ' and 'red', which differ at most in case"),
    ("Q?", ("red", "red"), 0, "the options 'red' and 'red'"),
    ("Q?", ("a", "b"), None, "gold None; it must be the index"),
    ("Q?", ("a", "b"), True, "gold True; it must be the index"),
    ("Q?", ("a", "b"), 2, "gold 2, but its 2 options are numbered from 0 to 1"),
    ("Q?", ("a", "b"), -1, "gold -1, but"),
  ],
)
def test_bad_questions(stem, options, gold, message):
  with pytest.raises(ValueError, match=message):
    rows.check_question(rows.Question(stem, options, gold), "here")


def test_check_rows():
  good = rows.QARow(b"", (COLOR,), "a")
  rows.check_rows([good], "data")
  with pytest.raises(ValueError, match="data: no rows"):
    rows.check_rows([], "data")
  with pytest.raises(ValueError, match="data: row 'b' has no questions"):
    rows.check_rows([good, rows.QARow(b"", (), "b")], "data")
  with pytest.raises(ValueError, match=r"data: row 'b': question 'Q\?' has 0 option"):
    rows.check_rows([good, rows.QARow(b"", (rows.Question("Q?", (), 0),), "b")], "data")


def test_kinds_are_sorted_and_unique():
  shape = rows.Question("What shape?", ("a", "b"), 0, "a shape")
  assert rows.kinds([rows.QARow(b"", (COLOR, shape, COLOR), "a")]) == ["a shape", "color"]


# Images.


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1"])
def test_rgb_is_what_transformers_makes(mode):
  image_transforms = pytest.importorskip("transformers.image_transforms")
  pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8)
  image = Image.fromarray(pixels, "RGBA").convert(mode)
  data = png(image, **({"transparency": 3} if mode == "P" else {}))
  expected = image_transforms.convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
  np.testing.assert_array_equal(read(data), expected)


def test_transparency_becomes_white():
  assert (read(png(Image.new("RGBA", (2, 2), (9, 9, 9, 0)))) == 255).all()


def test_16_bit_png_keeps_its_brightness():
  data = png(Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)))
  np.testing.assert_array_equal(read(data)[0, :, 0], [0, 100, 255])


@pytest.mark.parametrize(
  "values, expected",
  [
    (np.int32([0, 100, 255]), [0, 100, 255]),
    (np.int32([0, 25700, 65535]), [0, 100, 255]),
    (np.int32([-1000, 0, 1000]), [0, 128, 255]),
    (np.int32([0, 50000, 100000]), [0, 128, 255]),
    (np.int32([99999, 99999, 99999]), [0, 0, 0]),  # flat, of unknown range
    (np.float32([0, 0.2, 1]), [0, 51, 255]),
    (np.float32([0, 100, 200]), [0, 100, 200]),
    (np.float32([-1, 0, 1]), [0, 128, 255]),
  ],
)
def test_32_bit_images_are_scaled(values, expected, tmp_path):
  Image.fromarray(values[None]).save(tmp_path / "a.tiff")
  np.testing.assert_array_equal(read(tmp_path / "a.tiff")[0, :, 2], expected)


def test_pixels_that_are_not_finite_are_refused(tmp_path):
  Image.fromarray(np.float32([[0, np.nan]])).save(tmp_path / "a.tiff")
  with pytest.raises(ValueError, match="row 'the row'.*not finite"):
    read(tmp_path / "a.tiff")


def test_exif_orientation_is_applied(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # turn by a quarter to see it upright
  Image.new("RGB", (8, 4), "red").save(tmp_path / "a.jpg", exif=exif)
  assert read(tmp_path / "a.jpg").shape == (8, 4, 3)


def test_unreadable_images_name_row_and_file(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  whole = png(Image.fromarray(noise))
  (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match=r"row 'the row': cannot read its image \(.*cut\.png\)"):
    read(tmp_path / "cut.png")
  with pytest.raises(ValueError, match=r"\(.*absent\.png\): FileNotFoundError"):
    read(tmp_path / "absent.png")
  with pytest.raises(ValueError, match=r"\(5 bytes in memory\): UnidentifiedImageError"):
    read(b"hello")


def test_the_class_of_a_failure(tmp_path):
  reasons: dict[str, str] = {}
  (tmp_path / "bad.png").write_bytes(b"no image")
  whole = io.BytesIO()
  Image.effect_noise((60, 60), 50).save(whole, "PNG")
  (tmp_path / "torn.png").write_bytes(whole.getvalue()[:300])
  for name in ("bad", "torn", "absent"):
    with pytest.raises(ValueError) as failure:
      rows.read_image(rows.CaptionRow(tmp_path / f"{name}.png", "", name))
    try:
      raise ValueError("outer") from failure.value
    except ValueError as error:
      reasons[name] = rows.failure_reason(error)
  assert reasons == {"bad": "not an image", "torn": "damaged image", "absent": "no such file"}
  assert rows.failure_reason(ValueError("one side is over 200 times the other")) == "too narrow"
