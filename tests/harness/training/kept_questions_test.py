"""Questions that were kept once are kept again; rows and digests that say so."""

import dataclasses
import json

import pytest
from helpers.qa_rows import ROWS, png

from caprl_jax.data.rows import CaptionRow, Question
from caprl_jax.data.usable_rows import ImageFacts
from caprl_jax.harness.training.kept_questions import FILE, KeptQuestions, Split
from caprl_jax.harness.training.row_digests import digest_of_all, row_digests

SETTINGS = {"filter": {"max_blind": 0.25}, "seed": 0}


def split(rows):
  return Split(rows, row_digests(rows, [ImageFacts(sha256=row.name) for row in rows]))


def kept_of(rows):
  """The second question of every row, both of the third, none of the fourth."""
  some = [dataclasses.replace(row, questions=row.questions[1:]) for row in rows]
  return [*some[:2], rows[2], *some[4:]]


def recall(folder, rows, settings=SETTINGS, goes_on=False):
  found = KeptQuestions(folder, settings, goes_on).recall([split(rows), split(ROWS[:2])])
  return found and found[0]


@pytest.fixture
def folder(tmp_path):
  splits = [split(ROWS), split(ROWS[:2])]
  KeptQuestions(tmp_path, SETTINGS, goes_on=False).keep(
    splits, [kept_of(ROWS), ROWS[:1]], {"kept/city": 3}
  )
  return tmp_path


def test_the_same_questions_are_kept_again(folder):
  assert recall(folder, ROWS) == [kept_of(ROWS), ROWS[:1]]
  assert KeptQuestions(folder, SETTINGS, False).recall([split(ROWS), split(ROWS[:2])])[1] == {
    "kept/city": 3
  }
  moved = [dataclasses.replace(row, image=png((i, 9, 9)), where="x") for i, row in enumerate(ROWS)]
  assert [row.questions for row in recall(folder, moved)[0]] == [
    row.questions for row in kept_of(ROWS)
  ]


def test_lost_rows_are_no_matter_and_new_ones_are_left_out_of_a_run_that_goes_on(folder, caplog):
  new = dataclasses.replace(ROWS[0], name="new")
  assert recall(folder, ROWS[1:])[0] == kept_of(ROWS)[1:]
  assert recall(folder, [*ROWS, new]) is None
  assert recall(folder, [*ROWS, new], goes_on=True)[0] == kept_of(ROWS)
  assert "1 rows are new since the questions were chosen" in caplog.text


def test_other_settings_choose_anew(folder):
  assert recall(folder, ROWS, {**SETTINGS, "seed": 1}) is None
  assert recall(folder / "nowhere", ROWS) is None


@pytest.mark.parametrize("text", ["{}", "[]", '{"settings": %s, "splits": [{"a": ["b"]}]}'])
def test_a_damaged_file_is_named(folder, text):
  (folder / FILE).write_text(text.replace("%s", json.dumps(SETTINGS)))
  with pytest.raises(ValueError, match=f"{FILE} is damaged"):
    recall(folder, ROWS)


def test_digests_are_of_contents_and_not_of_places():
  row, facts = ROWS[0], ImageFacts(sha256="a")
  of = lambda row, facts=facts: row_digests([row], [facts])[0]
  assert of(row) == of(dataclasses.replace(row, image=b"", where="x:3"))
  others = [
    of(dataclasses.replace(row, name="b")),
    of(dataclasses.replace(row, questions=row.questions[:1])),
    of(dataclasses.replace(row, questions=(Question("Q?", ("a", "b"), 0), *row.questions[1:]))),
    of(row, ImageFacts(sha256="b")),
    of(CaptionRow(b"", "A cat.", row.name)),
  ]
  assert len({of(row), *others}) == 6
  assert of(dataclasses.replace(row, name="\udcff"))  # a file's name that is no UTF-8
  assert digest_of_all(["a", "b"]) != digest_of_all(["b", "a"])
