"""Rows and lists as exports, joined files and other programs leave them."""

import base64
import io
import json
import tarfile
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from caprl_jax.api import images as api_images
from caprl_jax.data.readers import image_sources
from caprl_jax.data.readers.conversations import read_examples
from caprl_jax.data.readers.image_lists import UnreadableImage
from caprl_jax.data.readers.qa_sources import read_qa_rows

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "y"}]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}]
NFD = unicodedata.normalize("NFD", "café.png")


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "sub").mkdir()
  names = ("a.png", "b.png", "sub/a.png", "[1].png", "{1}.png", "GIF89a_1.png", NFD)
  for name in names:
    Image.new("RGB", (8, 8)).save(tmp_path / name)
  return tmp_path


# ---- lists of images ----


@pytest.mark.parametrize(
  "name, text, found",
  [
    ("a.csv", "\n\nimage,caption\na.png,A red,\n", ["a.png"]),
    ("a.jsonl", '["a.png", "b.png"]', ["a.png", "b.png"]),
    ("a.jsonl", '{\n "image": "a.png"\n}', ["a.png"]),
    ("a.json", '{"data": [{"image": "a.png"}, "b.png"]}', ["a.png", "b.png"]),
    ("a.json", '{"images": [{"file_name": "a.png"}], "annotations": []}', ["a.png"]),
    ("a.jsonl", '{"images": ["a.png"]}\n{"images": ["b.png"]}\n', ["a.png", "b.png"]),
    ("a.txt", "sub\\a.png\n", ["sub\\a.png"]),
    ("a.csv", "image\nsub\\a.png\n", ["sub\\a.png"]),
    ("a.txt", "file://sub/a.png\n", ["file://sub/a.png"]),
    ("a.txt", "[1].png\na.png\n", ["[1].png", "a.png"]),
    ("a.txt", "{1}.png\n", ["{1}.png"]),
    ("a.txt", "GIF89a_1.png\n", ["GIF89a_1.png"]),
    ("a.txt", unicodedata.normalize("NFC", NFD), [unicodedata.normalize("NFC", NFD)]),
  ],
)
def test_lists_that_are_read(name, text, found, folder):
  (folder / name).write_text(text)
  rows = image_sources.find_images(str(folder / name))
  assert [row.name for row in rows] == found
  assert all(row.image.is_file() for row in rows)


def test_one_row_with_a_list_of_its_image_keeps_its_name(folder):
  """It is no list of rows, as COCO's file of images is."""
  image = {"bytes": base64.b64encode((folder / "a.png").read_bytes()).decode(), "path": None}
  (folder / "a.jsonl").write_text(json.dumps({"images": [image], "name": "first"}) + "\n")
  [row] = image_sources.find_images(str(folder / "a.jsonl"))
  assert row.name == "first"


def test_rows_of_text_alone_fail_when_their_turn_comes(folder):
  rows = [{"image": None}, {"image": "a.png"}, {"conversations": TURNS}, {"image": float("nan")}]
  (folder / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"image": ""}])))
  found = image_sources.find_images(str(folder / "a.jsonl"))
  alone = [row.name for row in found if isinstance(row.image, UnreadableImage)]
  assert alone == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5"] and len(found) == 5
  with pytest.raises(ValueError, match="a.jsonl:3: it names no image; add one or drop the row"):
    found[2].image.read()


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("a.csv", 'image,caption\na.png,"12 inch\nb.png,x\nc.png,y\n', "csv:2: not CSV"),
    ("a.csv", "\nimage,caption\na.png,x\na.png,A red, big car\n", "csv:4: it has more cells"),
    ("a.tsv", "image\tcaption\na.png\tx\ty\n", r"tsv:2: .*quotes around a text with '\\t' in it"),
    ("a.csv", "image;caption\na.png;x\n", "kept apart by ';'; save it with ','"),
    ("a.jsonl", '{"image": null}\n', r"jsonl:1: .*keys \['image'\]"),
    ("a.json", '{"data": [\n {"image": "a.png"},\n]}', "a.json: not JSON .*line 3"),
  ],
)
def test_lists_of_which_rows_would_be_lost_are_refused(name, text, message, folder):
  (folder / name).write_text(text)
  with pytest.raises(ValueError, match=message):
    image_sources.find_images(str(folder / name))


def test_a_tar_with_more_behind_its_end_is_refused(folder):
  made = io.BytesIO()
  with tarfile.open(fileobj=made, mode="w") as tar:
    tar.add(folder / "a.png", "a.png")
  (folder / "one.tar").write_bytes(made.getvalue())
  assert len(image_sources.find_images(str(folder / "one.tar"))) == 1
  (folder / "joined.tar").write_bytes(made.getvalue() * 2)
  with pytest.raises(ValueError, match="joined.tar: more stands behind the end mark at byte"):
    image_sources.find_images(str(folder / "joined.tar"))


# ---- captions and conversations ----


def conversation(folder, item):
  (folder / "a.json").write_text(json.dumps([item]))
  [found] = read_examples(str(folder / "a.json"), "say")
  return found.image and found.image.name, [turn.text for turn in found.turns]


def image_part(**part):
  content = [{"type": "image", **part}, {"type": "text", "text": "q"}]
  return [{"role": "user", "content": content}, MESSAGES[1]]


@pytest.mark.parametrize(
  "item, image, texts",
  [
    ({"image": "a.png", "caption": "y", "error": None}, "a.png", ["say", "y"]),
    ({"image": "a.png", "conversations": TURNS, "error": None}, "a.png", ["q", "y"]),
    ({"image": "a.png", "conversations": TURNS, "caption": None}, "a.png", ["q", "y"]),
    ({"conversations": None, "messages": MESSAGES}, None, ["q", "y"]),
    ({"image": float("nan"), "conversations": TURNS}, None, ["q", "y"]),
    ({"image": {"bytes": None, "path": None}, "conversations": TURNS}, None, ["q", "y"]),
    ({"messages": [{"role": "user", "value": "q"}, MESSAGES[1]]}, None, ["q", "y"]),
    ({"messages": [{"role": "user", "content": ["q"]}, MESSAGES[1]]}, None, ["q", "y"]),
    ({"messages": image_part(url="a.png")}, "a.png", ["q", "y"]),
    ({"image": "a.png", "messages": image_part(image="a.png")}, "a.png", ["q", "y"]),
  ],
)
def test_conversations_that_are_read(item, image, texts, folder):
  assert conversation(folder, item) == (image, texts)


@pytest.mark.parametrize(
  "item, message",
  [
    ({"image": "a.png", "messages": image_part(image="b.png")}, "'a.png' and, in its turns, 'b."),
    ({"image": "a.png", "images": ["b.png"], "messages": MESSAGES}, "is 'a.png', and images"),
    ({"image": "a.png", "caption": "y", "conversations": TURNS}, "has caption and conversations"),
    ({"image": 0, "conversations": TURNS}, "image 0 must be a path"),
    ({"image": False, "conversations": TURNS}, "image False must be a path"),
    ({"messages": [MESSAGES[0], MESSAGES[1] | {"tool_calls": [1]}]}, "tool_calls = .1., which are"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}, MESSAGES[1]]}, "is 'video'"),
    ({"messages": [MESSAGES[0]] * 1000}, "user, user"),
  ],
)
def test_conversations_that_say_two_things_are_refused(item, message, folder):
  with pytest.raises(ValueError, match=message) as failure:
    conversation(folder, item)
  assert len(str(failure.value)) < 500


# ---- questions ----


def questions(path):
  return [(q.stem, q.options, q.gold) for row in read_qa_rows(str(path), 0) for q in row.questions]


def write_parquet(path, truth):
  image = {"bytes": (path.parent / "a.png").read_bytes(), "path": "a.png"}
  columns = {"id": "1", "image": image, "prompt": "p", "data_source": "d", "extra_info": "{}"}
  columns["reward_model"] = {"ground_truth": truth}
  pq.write_table(pa.table({name: [value] for name, value in columns.items()}), path)
  return path


@pytest.mark.parametrize(
  "choices, answer, options, gold",
  [
    ({"A": "x", "B": "y"}, "B", ("x", "y"), 1),
    (["Can not answer", "x", "y"], 1, ("x", "y"), 0),
    (["Can not answer", "x", "y"], "B", ("x", "y"), 0),
    (["A) Can not answer based on the caption", "B) x", "C) y"], 1, ("x", "y"), 0),
    (["A) Can not answer", "B) x", "C) y"], "C", ("x", "y"), 1),
    (["x", "Can not answer", "y"], "y", ("x", "y"), 1),
    (["x", "y", "Can not answer"], 1, ("x", "y"), 1),
  ],
)
def test_choices_of_parquet(choices, answer, options, gold, folder):
  truth = [{"question": "q", "choices": choices, "answer": answer}]
  path = write_parquet(folder / "a.parquet", json.dumps(truth))
  assert questions(path) == [("q", options, gold)]


def test_a_folder_of_parquet_is_looked_through_as_one_of_images(folder, caplog):
  (folder / "rows").mkdir()
  truth = json.dumps([{"question": "q", "choices": ["x", "y"], "answer": "A"}])
  path = write_parquet(folder / "a.parquet", truth).rename(folder / "rows" / "A.PARQUET")
  for copy in (".ipynb_checkpoints/a.parquet", "__MACOSX/a.parquet", "._a.parquet"):
    (folder / "rows" / copy).parent.mkdir(exist_ok=True)
    (folder / "rows" / copy).write_bytes(path.read_bytes())
  assert len(questions(folder / "rows")) == 1
  with pytest.raises(ValueError, match="question and choices must be texts"):
    spelled = json.dumps([{"question": "q", "choices": "xy", "answer": "A"}])
    questions(write_parquet(folder / "b.parquet", spelled))


def test_one_fault_of_a_file_is_told_once(folder):
  rows = {"data": [{"image": "a.png", "questions": []}] * 9}
  (folder / "a.json").write_text(json.dumps(rows, indent=1) + ",")
  with pytest.raises(ValueError, match="a.json: not JSON .Extra data: line 40") as failure:
    questions(folder / "a.json")
  assert str(failure.value).count("a.json") == 1


@pytest.mark.parametrize("mode, value, shown", [("I", 40000, 156), ("F", 0.5, 128)])
def test_an_image_in_memory_is_scaled_as_one_in_a_file(mode, value, shown):
  png = api_images._encoded(Image.new(mode, (4, 4), value))
  assert Image.open(io.BytesIO(png)).getpixel((0, 0)) == (shown,) * 3
