"""Answers in the form of the released curation's third step, and what its fourth makes of them."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from caprl_jax.data.readers.caprl_json import parse_row
from caprl_jax.data.readers.jsonl import plain_questions
from caprl_jax.data.rows import QARow, Question
from caprl_jax.harness.row_shards import RowResult
from caprl_jax.inference.vqa import VqaAnswer
from caprl_jax.modes.curate.released_rows import released_row, write_released_rows

COLOR = Question("What color\nis it?", ("red", "green", "blue", "grey"), 2)
SHAPE = Question("Which shape?", ("circle", "square"), 0)


def item(*answers, questions=(COLOR, SHAPE), image=pathlib.Path("images/a.png")):
  row = QARow(image, questions, "a.png")
  verdicts = [dataclasses.asdict(answer) for answer in answers]
  said = {"image": "a.png", "questions": plain_questions(row), "verdicts": verdicts}
  return RowResult(0, row, said | {"failures": [], "error": ""}, {})


def answer(visual, blind):
  return VqaAnswer(np.mean(visual), np.mean(blind), visual_right=visual, blind_right=blind)


def test_a_row():
  both = item(answer((1, 1, 1, 1), (0, 1, 0, 0)), answer((0, 0, 1, 0), (0, 0, 0, 0)))
  sample, visual, blind = json.loads(json.dumps(released_row(both, 4)))
  assert sample == {
    "image_path": "images/a.png",
    "qa_list": [
      {
        "question": "What color\nis it?\n   - A) red\n   - B) green\n   - C) blue\n   - D) grey\n"
        "   - E) Can not answer based on the caption",
        "answer": "C",
      },
      {"question": "Which shape?\n   - A) circle\n   - B) square", "answer": "A"},
    ],
  }
  assert visual == [1, 1, 1, 1, 0, 0, 1, 0] and blind == [0, 1, 0, 0, 0, 0, 0, 0]


def test_the_sample_is_what_we_read(tmp_path):
  (tmp_path / "a.png").write_bytes(b"an image")
  made = released_row(item(answer((1,), (0,)), answer((1,), (0,)), image=tmp_path / "a.png"), 1)
  assert parse_row(made[0], tmp_path, "here").questions == (COLOR, SHAPE)


def test_what_was_not_asked_is_not_there():
  some = item(VqaAnswer(error="it spells a token"), answer((1,), (0,)), image=b"in memory")
  sample, visual, blind = released_row(some, 1)
  assert [qa["answer"] for qa in sample["qa_list"]] == ["A"] and (visual, blind) == ([1], [0])
  assert sample["image_path"] == "a.png"
  assert released_row(item(), 1) is None  # its image could not be read


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_files(tmp_path, name):
  rows = [item(answer((1,), (0,)), answer((1,), (1,))), item()] * 2
  path = tmp_path / "new" / name
  assert write_released_rows(path, rows, 1) == 2
  text = path.read_text()
  lines = [json.loads(line) for line in ([text] if name == "rows.json" else text.splitlines())]
  found = lines[0] if name == "rows.json" else lines
  assert [row[1:] for row in found] == [[[1, 1], [0, 1]]] * 2


def test_answers_of_an_older_version():
  with pytest.raises(ValueError, match="'a.png': its answers .* delete the folder stages/3"):
    released_row(item(VqaAnswer(1.0, 0.0), VqaAnswer(1.0, 0.0)), 4)
