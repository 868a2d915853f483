"""Rows: which are refused and in what words, how images become RGB, JSON lines there and back."""

import io
import json
import os
import pathlib
import re

import numpy as np
from PIL import Image
import pytest

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


# JSON lines.


def write_lines(path: pathlib.Path, *items) -> pathlib.Path:
  lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
  path.write_text("\n".join(lines), "utf-8")
  return path


def line(**changes):
  question = {"stem": "What color is it?", "options": ["red", "blue"], "gold": 0}
  return {"image": "images/1.png", "questions": [question | changes]}


def test_round_trip(picture, tmp_path):
  other = tmp_path / "elsewhere.png"
  picture.rename(other)
  Image.new("RGB", (1, 1)).save(picture)
  written = [
    rows.QARow(picture, (COLOR, rows.Question("Où\u2028?", ("ü", "b"), 0)), "one", {"color": "ü"}),
    rows.QARow(other, (COLOR,), "two"),
  ]
  rows.write_jsonl(tmp_path / "new" / "a.jsonl", written, image_root=picture.parent)
  assert rows.read_jsonl(tmp_path / "new" / "a.jsonl", image_root=picture.parent) == written
  first, second = (tmp_path / "new" / "a.jsonl").read_text("utf-8").strip().split("\n")
  assert json.loads(first)["image"] == "1.png" and "ü" in first
  assert json.loads(second)["image"] == other.as_posix() and "facts" not in second
  captions = [rows.CaptionRow(picture, "A red thing.\nIndeed.", "one")]
  rows.write_caption_jsonl(tmp_path / "c.jsonl", captions)
  assert rows.read_caption_jsonl(tmp_path / "c.jsonl") == captions
  assert json.loads((tmp_path / "c.jsonl").read_text())["image"] == "images/1.png"


def test_defaults_and_blank_lines(picture, tmp_path):
  path = write_lines(tmp_path / "a.jsonl", "", line(), "")
  [row] = rows.read_jsonl(path)
  question = rows.Question("What color is it?", ("red", "blue"), 0)
  assert row == rows.QARow(picture, (question,), "images/1.png")


@pytest.mark.parametrize(
  "gold, options, index",
  [
    (1, ["red", "blue"], 1),
    ("B", ["red", "blue"], 1),
    (" Blue", ["red", "blue"], 1),
    ("A", ["A", "B"], 0),  # letter and text agree
    ("b", ["a", "c", "b"], 2),  # a letter is a capital, so this is the text
    ("Z", ["red", "z"], 1),
    ("2", ["2", "3", "4"], 0),
  ],
)
def test_gold_forms(gold, options, index, picture, tmp_path):
  path = write_lines(tmp_path / "a.jsonl", line(gold=gold, options=options))
  assert rows.read_jsonl(path)[0].questions[0].gold == index


@pytest.mark.parametrize(
  "item, message",
  [
    (line(gold="green"), r"questions\[0\]: gold 'green' fits none of the options .*red.*blue"),
    (line(gold="A", options=["B", "A"]), "gold 'A' fits 'B' and 'A' of the options"),
    (line(gold="red", options=["red", "Red"]), "gold 'red' fits 'red' and 'Red'"),
    (line(gold=""), "gold '' fits none"),
    (line(gold=2), r"questions\[0\]: question .* has gold 2"),
    (line(gold=True), r"questions\[0\]: gold is True, but it must be an index, a letter or a text"),
    (line(gold=None), "gold is None, but"),
    (line(options=["1", 2]), r"options\[1\] is 2, but it must be a string"),
    (line(optoins=[]), "'optoins' is not a known key; did you mean 'options'.*known keys: stem, "),
    ({"image": "images/1.png"}, "the key 'questions' is missing"),
    (line() | {"questions": []}, "questions is empty"),
    (line() | {"questions": ["Q?"]}, r"questions\[0\] is 'Q\?', but it must be an object"),
    (line() | {"imgae": "1"}, "'imgae' is not a known key; did you mean 'image'"),
    (line() | {"facts": {"color": 3}}, r"facts\.color is 3, but it must be a string"),
    (line() | {"image": "2.png"}, "image '2.png' is not a file in .*image_root"),
    (line() | {"image": ""}, "image '' is not a file"),
    ([1], r"is \[1\], but it must be an object"),
    ("{'image': 1}", "not JSON"),
  ],
)
def test_refusals_name_file_and_line(item, message, picture, tmp_path):
  path = write_lines(tmp_path / "a.jsonl", line(), "", item)
  with pytest.raises(ValueError, match=re.escape(f"{path}:3") + ":? " + f".*{message}"):
    rows.read_jsonl(path)


@pytest.mark.parametrize(
  "item, message",
  [
    ({"image": "images/1.png", "caption": " "}, ":1: caption is empty"),
    ({"image": "images/1.png", "captoin": "A"}, ":1: 'captoin' is not a known key; .*'caption'"),
    ({"image": "images/1.png"}, ":1: the key 'caption' is missing"),
  ],
)
def test_caption_refusals(item, message, picture, tmp_path):
  with pytest.raises(ValueError, match=message):
    rows.read_caption_jsonl(write_lines(tmp_path / "c.jsonl", item))


def test_files_without_rows(tmp_path):
  with pytest.raises(ValueError, match=r"a\.jsonl: cannot be read: No such file"):
    rows.read_jsonl(tmp_path / "a.jsonl")
  with pytest.raises(ValueError, match=r"a\.jsonl: no rows"):
    rows.read_jsonl(write_lines(tmp_path / "a.jsonl", "", ""))
  (tmp_path / "a.jsonl").write_bytes(b'{"image": "\xff"}')
  with pytest.raises(ValueError, match=r"a\.jsonl:1: not JSON .*utf-8"):
    rows.read_jsonl(tmp_path / "a.jsonl")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(picture, tmp_path):
  path = tmp_path / "out" / "a.jsonl"
  good = rows.QARow(picture, (COLOR,), "a")
  rows.write_jsonl(path, [good])
  before = path.read_bytes()
  with pytest.raises(ValueError, match="row 'b' has its image in memory"):
    rows.write_jsonl(path, [good, rows.QARow(b"123", (COLOR,), "b")])
  with pytest.raises(ValueError, match=r"a\.jsonl: no rows"):
    rows.write_jsonl(path, [])
  with pytest.raises(ValueError, match="row 'c': caption is empty"):
    rows.write_caption_jsonl(path, [rows.CaptionRow(picture, "", "c")])
  assert path.read_bytes() == before and os.listdir(path.parent) == ["a.jsonl"]
