"""JSON lines: what is refused and in what words, there and back, images in memory or archives."""

import base64
import dataclasses
import io
import json
import os
import pathlib
import re

import pytest
from helpers.qa_rows import png
from PIL import Image

from caprl_jax.data import rows
from caprl_jax.data.readers import jsonl

COLOR = rows.Question(
  "What color is it?", ("red", "blue", "dark green"), 1, "color", "hand-written"
)


@pytest.fixture
def picture(tmp_path):
  (tmp_path / "images").mkdir()
  file = tmp_path / "images" / "1.png"
  Image.new("RGB", (4, 3), "red").save(file)
  return file


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
  jsonl.write_jsonl(tmp_path / "new" / "a.jsonl", written, image_root=picture.parent)
  assert jsonl.read_jsonl(tmp_path / "new" / "a.jsonl", image_root=picture.parent) == written
  first, second = (tmp_path / "new" / "a.jsonl").read_text("utf-8").strip().split("\n")
  assert json.loads(first)["image"] == "1.png" and "ü" in first
  assert json.loads(second)["image"] == other.as_posix() and "facts" not in second
  captions = [rows.CaptionRow(picture, "A red thing.\nIndeed.", "one")]
  jsonl.write_caption_jsonl(tmp_path / "c.jsonl", captions)
  assert jsonl.read_caption_jsonl(tmp_path / "c.jsonl") == captions
  assert json.loads((tmp_path / "c.jsonl").read_text())["image"] == "images/1.png"
  ours = {
    "image": "images/1.png",
    "caption": captions[0].caption,
    "name": "one",
    "tokens": [3, 1],
    "finish": "end",
  }
  assert jsonl.read_caption_jsonl(write_lines(tmp_path / "ours.jsonl", ours)) == captions


def test_defaults_and_blank_lines(picture, tmp_path):
  path = write_lines(tmp_path / "a.jsonl", "", line(), "")
  [row] = jsonl.read_jsonl(path)
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
  assert jsonl.read_jsonl(path)[0].questions[0].gold == index


@pytest.mark.parametrize(
  "item, message",
  [
    (line(gold="green"), r"questions\[0\]: gold 'green' fits none of the options .*red.*blue"),
    (line(gold="A", options=["B", "A"]), "gold 'A' fits 'B' and 'A' of the options"),
    (line(gold="RED", options=["red", "Red"]), "gold 'RED' fits 'red' and 'Red'"),
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
    jsonl.read_jsonl(path)


PNG = png("red", (64, 48))
TEXT = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
  "image, name",
  [
    (["images/1.png"], "images/1.png"),
    ({"path": "images/1.png", "bytes": None}, "images/1.png"),
    ("images\\1.png", "images\\1.png"),
    ("file://images/1.png", "file://images/1.png"),
    (f"data:image/png;base64,{TEXT}", None),
    (TEXT, None),
    ({"path": "x.png", "bytes": TEXT}, "x.png"),
  ],
)
def test_spellings_of_images(image, name, picture, tmp_path):
  picture.write_bytes(PNG)
  [row] = jsonl.read_jsonl(write_lines(tmp_path / "a.jsonl", line() | {"image": image}))
  assert rows.image_bytes(row) == PNG and len(row.name) < 30
  assert name is None or row.name == name


@pytest.mark.parametrize(
  "image, message",
  [
    (["images/1.png"] * 2, "2 images, but a row has one"),
    ("data:image/png;base64,iVBORw0KGgo$", "no base64"),
    (f"data:image/png;base64,{'QUJD' * 999}", "cannot be opened"),
    ("https://x.org/a.png", "download it first"),
    ("x" * 999, "not a file"),
    ("y" * 99_999, "neither a path nor"),
  ],
)
def test_images_that_cannot_be_read_are_one_short_bad_row(image, message, picture, tmp_path):
  path = write_lines(tmp_path / "a.jsonl", line(), line() | {"image": image}, line())
  good, bad, other = jsonl.scan_jsonl(path)
  assert isinstance(bad, rows.BadRow) and re.search(message, bad.message) and good == other
  assert bad.message.startswith(f"{path}:2: ") and bad.message.count(str(path)) == 1
  assert len(bad.message) < 400 + len(str(tmp_path))


def test_options_with_letters_and_too_many(picture, tmp_path):
  path = write_lines(
    tmp_path / "a.jsonl",
    line(options=["A. red", "B. blue"], gold="B"),
    line(options=["a man", "a woman", "(C) nobody"]),
    line(options=[f"option {i}" for i in range(30)], gold=28),
    line() | {"name": None, "facts": None},
  )
  labelled, some, many, nulls = jsonl.scan_jsonl(path)
  assert labelled.questions[0] == rows.Question("What color is it?", ("red", "blue"), 1)
  assert "questions[0]: option 2, '(C) nobody', carries a letter" in some.message
  assert "has 30 options; there are letters for 26" in many.message
  assert nulls.name == "images/1.png" and nulls.facts is None


@pytest.mark.parametrize(
  "item, message",
  [
    ({"image": "images/1.png", "caption": " "}, ":1: caption is empty"),
    ({"image": "images/1.png", "captoin": "A"}, ":1: 'captoin' is not a known key; .*'caption'"),
    ({"image": "images/1.png"}, ":1: the key 'caption' is missing"),
    (
      {"image": "images/1.png", "error": "torn"},
      r":1: an error stands in the caption's place \(torn\)",
    ),
    (
      {"image": "images/1.png", "caption": "A", "tokens": [1], "finish": "length"},
      ":1: the caption was cut",
    ),
  ],
)
def test_caption_refusals(item, message, picture, tmp_path):
  with pytest.raises(ValueError, match=message):
    jsonl.read_caption_jsonl(write_lines(tmp_path / "c.jsonl", item))


def test_files_without_rows(tmp_path):
  with pytest.raises(ValueError, match=r"a\.jsonl: cannot be read: No such file"):
    jsonl.read_jsonl(tmp_path / "a.jsonl")
  with pytest.raises(ValueError, match=r"a\.jsonl: no rows"):
    jsonl.read_jsonl(write_lines(tmp_path / "a.jsonl", "", ""))
  (tmp_path / "a.jsonl").write_bytes(b'{"image": "\xff"}')
  with pytest.raises(ValueError, match=r"a\.jsonl:1: not JSON .*utf-8"):
    jsonl.read_jsonl(tmp_path / "a.jsonl")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(picture, tmp_path):
  path = tmp_path / "out" / "a.jsonl"
  good = rows.QARow(picture, (COLOR,), "a")
  jsonl.write_jsonl(path, [good])
  before = path.read_bytes()
  with pytest.raises(ValueError, match="row 'b' has its image in memory"):
    jsonl.write_jsonl(path, [good, rows.QARow(b"123", (COLOR,), "b")])
  with pytest.raises(ValueError, match=r"a\.jsonl: no rows"):
    jsonl.write_jsonl(path, [])
  with pytest.raises(ValueError, match="row 'c': caption is empty"):
    jsonl.write_caption_jsonl(path, [rows.CaptionRow(picture, "", "c")])
  assert path.read_bytes() == before and os.listdir(path.parent) == ["a.jsonl"]


def test_all_bad_lines_are_counted_and_may_be_dropped(picture, tmp_path, caplog):
  path = write_lines(tmp_path / "a.jsonl", line(), "{", line(gold=7), line())
  found = list(jsonl.scan_jsonl(path))
  assert [row.where for row in found if isinstance(row, rows.BadRow)] == [
    f"{path}:2",
    f"{path}:3",
  ] and found[3].where == f"{path}:4"
  with pytest.raises(
    ValueError, match=r"2 bad rows of 4 .*'drop'(.|\n)*:2: not JSON(.|\n)*:3: questions\[0\]"
  ):
    rows.good_rows(found)
  assert rows.good_rows(found, "drop") == [found[0], found[3]]
  assert "dropped 2 bad rows of 4" in caplog.text and f"{path}:3: questions[0]" in caplog.text


@dataclasses.dataclass(frozen=True)
class Stored:
  data: bytes
  where: str = "archive, row 3"

  def read(self):
    return self.data


def test_stored_images_are_saved_by_content(tmp_path):
  buffer = io.BytesIO()
  Image.new("RGB", (4, 3), "red").save(buffer, "JPEG")
  data = buffer.getvalue()
  written = [rows.QARow(Stored(data), (COLOR,), "a"), rows.QARow(data, (COLOR,), "b")]
  with pytest.raises(
    ValueError,
    match="row 'a' has its image in memory or in an archive .archive, row 3.*image_folder",
  ):
    jsonl.write_jsonl(tmp_path / "a.jsonl", written)
  jsonl.write_jsonl(tmp_path / "a.jsonl", written, image_folder=tmp_path / "pictures")
  first, second = jsonl.read_jsonl(tmp_path / "a.jsonl")
  assert (
    first.image == second.image
    and first.image.suffix == ".jpg"
    and first.image.read_bytes() == data
  )
  assert (first.name, first.questions, second.name) == ("a", (COLOR,), "b")
  assert rows.read_image(written[0]).size == (4, 3) and rows.image_bytes(first) == data
  broken = rows.QARow(Stored(b"no image"), (COLOR,), "c")
  with pytest.raises(ValueError, match=r"row 'c': cannot read its image \(archive, row 3\)"):
    rows.read_image(broken)
  with pytest.raises(ValueError, match="row 'c': its image .8 bytes. is in no known format"):
    jsonl.write_jsonl(tmp_path / "b.jsonl", [broken], image_folder=tmp_path / "pictures")
  assert not (tmp_path / "b.jsonl").exists()
