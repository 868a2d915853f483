"""Samples: which question an answer is to, pictures named by what they show, and no error that ends
a run."""

import dataclasses
import logging

import numpy as np
import pytest
from helpers import tiny
from PIL import Image

from caprl_jax.data.batches import QABatcher, stack
from caprl_jax.data.judge_questions import QuestionShape, TokenizedQuestion
from caprl_jax.data.rows import QARow, Question, read_image
from caprl_jax.harness.extras import extra
from caprl_jax.harness.samples import save_samples
from caprl_jax.types import Answers, Captions, Samples


class NoPrompt:
  """Stands for `batches.ImagePrompt`: samples need neither images nor prompts."""

  def __call__(self, row, image=None):
    return None, None


def make_rows(folder, names, colors):
  rows = []
  for i, (name, color) in enumerate(zip(names, colors, strict=True)):
    Image.new("RGB", (8, 8), color).save(folder / f"{i}.png")
    # the second and third have the same tokens below
    questions = tuple(Question(stem, ("yes", "no"), 0, "any") for stem in "abc")
    rows.append(QARow(folder / f"{i}.png", questions, name, {}))
  return rows


def save(path, rows, count=2):
  """Samples of one caption for each row, which got right all that it was asked."""
  tokenized = [
    [TokenizedQuestion((n,), ((7,), (8,)), 0, 0, (0.0, 0.0)) for n in (1, 2, 2)] for _ in rows
  ]
  batcher = QABatcher(rows, tokenized, NoPrompt(), count, QuestionShape(2, 1, 1))
  batch = stack([batcher.example(i, np.random.default_rng(i)) for i in range(len(rows))])
  B = len(rows)
  yes, zero = np.ones((B, 1, count), bool), np.zeros((B, 1, count), np.float32)
  asked = batch.questions.valid_BK[:, None]
  answers = Answers(
    choice_BGK=np.zeros((B, 1, count), np.int32),
    correct_BGK=yes,
    credit_BGK=zero,
    misled_BGK=zero,
    asked_BGK=asked,
    valid_BGK=asked,
    question_BGK=np.broadcast_to(np.arange(count), (B, 1, count)),
    score_BGKA=np.zeros((B, 1, count, 2), np.float32),
  )
  one = np.ones((B, 1, 1), bool)
  captions = Captions(np.zeros((B, 1, 1), np.int32), np.zeros((B, 1, 1)), one, one[..., 0])
  reward = np.ones((B, 1), np.float32)
  parts = [(batch, Samples(captions, answers, reward, one[..., 0]))]
  save_samples(path, "train", 1, parts, batcher, tiny.tokenizer(True), 10)
  return batch, tiny.read_back(path)["rows"]


def test_pictures_are_named_by_what_they_show(tmp_path):
  names = ["0b5c2f", "a/b.png", "a_b.png", "a b.jpg", "..", "same"]
  colors = ["red", "green", "blue", "white", "black", "red"]
  rows = make_rows(tmp_path, names, colors)
  _, saved = save(tmp_path / "samples" / "x.json", rows)
  assert [row["name"] for row in saved] == names
  for row, color in zip(saved, colors, strict=True):
    with Image.open(tmp_path / "samples" / row["image"]) as image:
      assert image.getpixel((0, 0)) == Image.new("RGB", (1, 1), color).getpixel((0, 0))
  assert len({row["image"] for row in saved}) == 5
  assert len(list((tmp_path / "samples" / "images").iterdir())) == 5  # nothing half written


def test_a_question_is_known_by_its_place_and_not_by_its_tokens(tmp_path):
  rows = make_rows(tmp_path, "xyzuvw", ["red"] * 6)
  batch, saved = save(tmp_path / "x.json", rows)
  for b, row in enumerate(saved):
    assert [q["stem"] for q in row["questions"]] == ["abc"[i] for i in batch.question_BK[b]]
  assert {q["stem"] for row in saved for q in row["questions"]} == {"a", "b", "c"}


def test_fewer_questions_than_places_are_marked(tmp_path):
  rows = make_rows(tmp_path, "x", ["red"])
  batch, saved = save(tmp_path / "x.json", rows, count=5)
  assert sorted(batch.question_BK[0, :3]) == [0, 1, 2] and set(batch.question_BK[0, 3:]) == {-1}
  assert len(saved[0]["questions"]) == 3


def test_an_error_in_an_extra_is_a_warning_once(tmp_path, caplog):
  rows = make_rows(tmp_path, "x", ["red"])
  (gone,) = [dataclasses.replace(row, image=tmp_path / "gone.png") for row in rows]
  with pytest.raises(ValueError, match="gone"):
    read_image(gone)
  with caplog.at_level(logging.WARNING, "caprl_jax"):
    for step in (1, 2):
      path = tmp_path / "samples" / f"{step}.json"
      with extra("samples", path):
        save(path, [gone])
  (record,) = caplog.records
  assert "the run goes on without samples" in record.getMessage()
  assert str(tmp_path / "samples" / "1.json") in record.getMessage()
  assert "gone.png" in record.getMessage()


def test_ctrl_c_is_no_error_of_an_extra(tmp_path):
  with pytest.raises(KeyboardInterrupt), extra("samples", tmp_path / "x.json"):
    raise KeyboardInterrupt
