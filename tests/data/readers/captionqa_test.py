"""CaptionQA's rows, made as its hub preview shows them: parquet and JSON, what its program passes
over, prompts to the byte."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.bad_images import encoded, noise

from caprl_jax.data.readers.benchmarks import captionqa
from caprl_jax.data.readers.benchmarks.prompts import stage2_prompt, user_text
from caprl_jax.data.readers.benchmarks.row import CAPTIONQA
from caprl_jax.data.rows import BadRow, image_bytes
from caprl_jax.scoring.captionqa import CANNOT_ANSWER, shown_options

STEM, CHOICES = "How is the cat positioned?", ["Standing", "Sitting", "Lying"]
QUESTIONS = [
  {
    "question": STEM,
    "choices": CHOICES,
    "answer": "Sitting",
    "category": ["Spatial - Relationship"],
    "source": "a",
  },
  {
    "question": "Do you see a sign?",
    "choices": ["Yes", "No"],
    "answer": "No",
    "category": ["Object Existence - Object presence", "Hallucination - Object Evaluation"],
    "source": "b",
  },
]
IMAGE = encoded(noise())


def item(**changes):
  row = {"id": "nat_001", "images": [{"bytes": IMAGE, "path": None}], "questions": QUESTIONS}
  return row | {"domain": "natural", "image_paths": ["images/1.jpg"]} | changes


def read(source):
  found = list(captionqa.read_captionqa(str(source)))
  bad = [row for row in found if isinstance(row, BadRow)]
  return [row for row in found if not isinstance(row, BadRow)], bad


def test_parquet_rows_are_questions_with_shuffled_options(tmp_path, monkeypatch):
  pq.write_table(pa.Table.from_pylist([item(), item(id="nat_002")]), tmp_path / "natural.parquet")
  rows, bad = read(f"captionqa:{tmp_path}")
  assert not bad and [row.name for row in rows] == [
    f"nat_00{i}, question {n}" for i in (1, 2) for n in (0, 1)
  ]
  rng = random.Random(0)
  for row, question in zip(rows, QUESTIONS * 2):
    gold = question["choices"].index(question["answer"])
    shown = shown_options(question["question"], question["choices"], gold, rng)
    assert (row.options, row.cannot) == (shown.texts, shown.cannot)
    assert row.options["ABCD".index(row.gold)] == question["answer"]
    assert row.benchmark == CAPTIONQA and image_bytes(row) == IMAGE
  assert [row.kind for row in rows[:2]] == ["natural: Spatial", "natural: Object Existence"]
  asked = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", rows[0].options))
  question = f"Question:\n{STEM}\n\nOptions:\n{asked}\n\nAnswer:"
  assert stage2_prompt(rows[0], "A cat.") == f"Caption:\nA cat.\n\n{question}"
  assert user_text(rows[0]) == question and CANNOT_ANSWER in question
  # the hub's splits are such files; of `all`, one generator goes through the four
  asked = []
  monkeypatch.setattr(
    captionqa.hub_datasets,
    "split_files",
    lambda s: asked.append(s) or [tmp_path / "natural.parquet"],
  )
  every, _ = read("captionqa:all")
  assert [s.rpartition(":")[2] for s in asked] == list(captionqa.DOMAINS)
  assert (
    len(every) == 16
    and every[:4] == rows
    and [r.options for r in every[4:8]] != [r.options for r in rows]
  )


def test_json_copies_and_what_the_authors_program_passes_over(tmp_path):
  (tmp_path / "1.png").write_bytes(IMAGE)
  questions = [
    QUESTIONS[0] | {"answer": "Flying"},
    QUESTIONS[0] | {"choices": ["Sitting"]},
    QUESTIONS[0] | {"category": None},
    QUESTIONS[0] | {"question": "Where is <image>?"},
    "no object",
  ]
  rows = [
    item(images="1.png", questions=questions, domain=None),
    item(images=None, image_paths=["gone.jpg"]),
    item(images=["1.png"], questions=[]),
    [1],
  ]
  path = tmp_path / "copy.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  good, bad = read(path)
  assert [row.name for row in good] == ["nat_001, question 2"] and good[0].kind == ""
  assert good[0].image == tmp_path / "1.png"
  assert good[0].options == shown_options(STEM, CHOICES, 1, random.Random(0)).texts
  messages = [row.message for row in bad]
  assert all(row.message.startswith(row.where) and str(path) in row.where for row in bad)
  for part in ("'Flying' is none of two or more choices", "['Sitting']", "2 image placeholders"):
    assert sum(part in message for message in messages) == 1, part
  assert sum("gone.jpg" in message for message in messages) == 2  # one for each of its questions
  assert len(bad) == 4 + 2 + 1 + 1


@pytest.mark.parametrize(
  "source, message",
  [
    ("captionqa:everything", "captionqa:'everything' is not known"),
    ("captionqa:empty.jsonl", "no rows"),
    ("captionqa:other.parquet", "the columns .*questions.* are missing.*CaptionQA's layout"),
  ],
)
def test_sources_refused(tmp_path, monkeypatch, source, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty.jsonl").write_text("")
  pq.write_table(pa.Table.from_pylist([{"image": IMAGE}]), "other.parquet")
  with pytest.raises(ValueError, match=message):
    read(source)
