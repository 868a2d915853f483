"""Names of datasets and mixtures."""

import gzip
import json

import numpy as np
import pytest
from PIL import Image

from caprl_jax.data.batches import index_stream, train_iterator
from caprl_jax.data.readers import caprl_json, caprl_parquet, jsonl, tfds
from caprl_jax.data.readers.qa_sources import (
  Part,
  parse_mixture,
  read_parts,
  read_qa_rows,
  scan_qa_rows,
)
from caprl_jax.data.rows import QARow, Question, read_image

QUESTIONS = (Question("What color is it?", ("red", "blue"), 0), Question("Q?", ("x", "y", "z"), 2))


@pytest.fixture
def rows(tmp_path):
  made = []
  for i in range(4):
    file = tmp_path / f"{i}.png"
    Image.new("RGB", (4, 4), (60 * i, 0, 0)).save(file)
    made.append(QARow(file, QUESTIONS, f"{i}.png"))
  return made


def test_every_format_reads_the_same_rows(rows, tmp_path):
  jsonl.write_jsonl(tmp_path / "a.jsonl", rows)
  caprl_json.write_json(tmp_path / "a.json", rows)
  caprl_parquet.write_parquet(tmp_path / "p" / "a.parquet", rows)
  folder = tfds.write_tfds(tmp_path / "tfds", {"train": rows})
  for source in ("a.jsonl", "a.json", "p/a.parquet", "p", "p/*.parquet"):
    read = read_qa_rows(str(tmp_path / source), 0)
    assert [(row.name, row.questions) for row in read] == [
      (row.name, row.questions) for row in rows
    ], source
  assert [row.name for row in read_qa_rows(f"tfds:{folder}:train", 0)] == [row.name for row in rows]
  assert len(read_qa_rows("easy_vqa:test", 0, max_rows=3)) == 3
  whole = [row.name for row in read_qa_rows("easy_vqa:test", 0)]
  drawn = [
    [row.name for _, rows in read_parts("easy_vqa:test", seed, 50, drawn=True) for row in rows]
    for seed in (0, 0, 1)
  ]
  assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 50
  assert drawn[0] == [name for name in whole if name in drawn[0]] != whole[:50]
  charts = read_qa_rows("charts:test:2:96x72", 0)
  assert len(charts) == 2 and read_image(charts[0]).size == (96, 72)


def test_json_rows_are_known_by_their_keys_not_by_the_suffix(rows, tmp_path):
  jsonl.write_jsonl(tmp_path / "ours.jsonl", rows)
  caprl_json.write_json(tmp_path / "released.json", rows)
  ours = [json.loads(line) for line in (tmp_path / "ours.jsonl").read_text().splitlines()]
  released = json.loads((tmp_path / "released.json").read_text())
  mixed = {"data": ours + released}
  for name in ("a.json", "a.jsonl", "a.JSON"):
    (tmp_path / name).write_text(json.dumps(mixed, indent=1))
    assert [row.questions for row in read_qa_rows(str(tmp_path / name), 0)] == [QUESTIONS] * 8
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
  with pytest.raises(ValueError, match="is compressed; unpack it first"):
    read_qa_rows(str(tmp_path / "a.jsonl.gz"), 0)


@pytest.mark.parametrize(
  "text, parts",
  [
    ("a.jsonl", [Part("a.jsonl")]),
    ("a b.jsonl + charts:train", [Part("a b.jsonl"), Part("charts:train")]),
    (
      "0.7*easy_vqa:train + 3 * x/*.parquet",
      [Part("easy_vqa:train", 0.7), Part("x/*.parquet", 3.0)],
    ),
    ("c++.jsonl + 2024*.parquet", [Part("c++.jsonl"), Part("2024*.parquet")]),
  ],
)
def test_mixtures(text, parts):
  assert list(parse_mixture(text)) == parts


@pytest.mark.parametrize(
  "text, message",
  [
    ("a.jsonl +  + b.jsonl", "is empty"),
    ("", "is empty"),
    ("0.5*a.jsonl + b.jsonl", "every source of a mixture a weight, or none"),
    ("0*a.jsonl + 1*b.jsonl", "must be greater than 0"),
    ("-1*a.jsonl + 1*b.jsonl", "must be greater than 0"),
    ("1.2.3*a.jsonl", "'1.2.3' is no weight"),
  ],
)
def test_mixtures_refused(text, message):
  with pytest.raises(ValueError, match=message):
    parse_mixture(text)


@pytest.mark.parametrize(
  "source, message",
  [
    ("a.txt", "'a.txt' is not known; it may be\n  easy_vqa:train"),
    ("tfds:folder", "write tfds:FOLDER:SPLIT"),
    ("charts:train:many", "write charts:SPLIT, charts:SPLIT:NUMBER"),
    ("nowhere.parquet", "no parquet file there"),
  ],
)
def test_sources_refused(source, message):
  with pytest.raises(ValueError, match=message):
    list(scan_qa_rows(source, 0))


def test_parts_are_cut_and_cleaned_one_by_one(rows, tmp_path, caplog):
  jsonl.write_jsonl(tmp_path / "a.jsonl", rows)
  (tmp_path / "b.jsonl").write_text("{\n" + (tmp_path / "a.jsonl").read_text())
  mixture = f"2*{tmp_path / 'a.jsonl'} + 1*{tmp_path / 'b.jsonl'}"
  with pytest.raises(ValueError, match=r"b\.jsonl:1: not JSON"):
    read_parts(mixture, 0)
  parts = read_parts(mixture, 0, max_rows=3, bad_rows="drop")
  assert [(part.weight, [row.name for row in found]) for part, found in parts] == [
    (2.0, ["0.png", "1.png", "2.png"])
  ] + [(1.0, ["0.png", "1.png", "2.png"])]
  assert "dropped 1 bad rows of 5" in caplog.text


def test_a_mixture_gives_each_source_its_share():
  stream = index_stream([(10, 3.0), (4, 1.0)], seed=7)
  drawn = np.array([stream[i] for i in range(400)])
  assert (drawn < 10).sum() == 300
  first, second = drawn[drawn < 10], drawn[drawn >= 10]
  # each source whole before any of its rows comes again, in a new order
  for part, rows in ((first, 10), (second, 4)):
    rounds = part[: len(part) // rows * rows].reshape(-1, rows)
    assert (np.sort(rounds) == np.sort(rounds[0])).all() and (rounds[0] != rounds[1]).any()
  assert sorted(np.unique(drawn)) == list(range(14))
  plain = index_stream([(10, None), (4, None)], seed=7)
  assert sorted(plain[i] for i in range(14)) == list(range(14))


def test_a_mixture_resumes_exactly():
  example = lambda index, rng: dict(row=np.int32(index), noise=rng.integers(0, 1 << 30))
  make = lambda: train_iterator(example, [(10, 0.5), (4, 0.5)], 4, 3)
  iterator = make()
  before = [next(iterator) for _ in range(5)]
  state = json.loads(json.dumps(iterator.get_state()))
  after = [next(iterator) for _ in range(5)]
  fresh = make()
  fresh.set_state(state)
  for want in after:
    got = next(fresh)
    assert (got["row"] == want["row"]).all() and (got["noise"] == want["noise"]).all()
  assert len({int(n) for batch in before + after for n in batch["noise"]}) == 40


def test_rows_without_questions(rows, tmp_path):
  """Where nobody asks any: JSON lines and a list of CapRL's first release, images alone; what has
  questions keeps them."""
  image = str(rows[0].image)
  (tmp_path / "a.jsonl").write_text(
    json.dumps({"image": image, "name": "a", "facts": {"color": "red"}})
    + "\n"
    + json.dumps({"image": image, "name": "b", "questions": []})
    + "\n"
  )
  (tmp_path / "b.json").write_text(json.dumps([{"image_path": image}]))
  (tmp_path / "list.csv").write_text(f"image\n{image}\n")
  caprl_parquet.write_parquet(tmp_path / "c.parquet", rows)
  found = {
    name: read_qa_rows(str(tmp_path / name), 0, asked=False)
    for name in ("a.jsonl", "b.json", "list.csv", "c.parquet")
  }
  assert [(row.name, row.facts, row.questions) for row in found["a.jsonl"]] == [
    ("a", {"color": "red"}, ()),
    ("b", None, ()),
  ]
  assert [row.questions for row in found["b.json"] + found["list.csv"]] == [(), ()]
  assert [row.questions for row in found["c.parquet"]] == [row.questions for row in rows]
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "x.png").write_bytes((rows[0].image).read_bytes())
  [row] = read_qa_rows(str(tmp_path / "images"), 0, asked=False)
  assert row.name.endswith("x.png") and read_image(row).mode == "RGB"
  for name in ("a.jsonl", "b.json", "images", "list.csv"):
    with pytest.raises(ValueError):
      read_qa_rows(str(tmp_path / name), 0)
  with pytest.raises(ValueError, match="data source = 'nothing': no such file or folder"):
    read_qa_rows("nothing", 0, asked=False)
