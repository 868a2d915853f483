"""easy-VQA as rows: counts, options, determinism, and the facts its questions give away."""

import importlib.util
import json
import re

import pytest

from caprl_jax.data import rows
from caprl_jax.data.readers import easy_vqa

if importlib.util.find_spec("easy_vqa") is None:
  pytest.skip("needs `pip install easy-vqa`", allow_module_level=True)

IMAGES = {"train": 4000, "test": 1000}
QUESTIONS = {"train": 38_575, "test": 9_673}


@pytest.fixture(scope="module")
def splits():
  return {split: easy_vqa.read_easy_vqa(split, seed=0) for split in easy_vqa.SPLITS}


@pytest.mark.parametrize("split", easy_vqa.SPLITS)
def test_counts_answers_and_options(splits, split):
  read = splits[split]
  assert len(read) == IMAGES[split]
  assert rows.kinds(read) == ["color", "shape", "yes/no"]
  answers = {
    (row.name, question.stem): question.options[question.gold]
    for row in read
    for question in row.questions
  }
  listed = json.loads((easy_vqa.easy_vqa_root() / split / "questions.json").read_text())
  assert answers == {(f"{split}/images/{i}.png", stem): answer for stem, answer, i in listed}
  assert len(answers) == sum(len(row.questions) for row in read) == QUESTIONS[split]
  sizes = {"color": 4, "shape": 3, "yes/no": 2}
  allowed = {"color": easy_vqa.COLORS, "shape": easy_vqa.SHAPES, "yes/no": easy_vqa.YES_NO}
  for row in read:
    for question in row.questions:
      assert len(set(question.options)) == len(question.options) == sizes[question.kind]
      assert set(question.options) <= set(allowed[question.kind])


def test_gold_has_every_place_equally_often(splits):
  for kind, places in (("color", 4), ("shape", 3), ("yes/no", 2)):
    golds = [q.gold for row in splits["train"] for q in row.questions if q.kind == kind]
    for place in range(places):
      assert golds.count(place) / len(golds) == pytest.approx(1 / places, abs=0.02)


def test_images_are_files_and_open(splits):
  assert all(row.image.is_file() for read in splits.values() for row in read)
  assert rows.read_image(splits["test"][0]).size == (64, 64)


def test_options_depend_on_the_seed(splits):
  assert easy_vqa.read_easy_vqa("test", seed=0) == splits["test"]
  other = easy_vqa.read_easy_vqa("test", seed=1)
  assert other != splits["test"]
  assert [row.facts for row in other] == [row.facts for row in splits["test"]]
  # Golden, for other processes and machines. If numpy or the draw changes it, paste the new options
  # and say in the changelog that easy-VQA's options have changed.
  question = splits["test"][0].questions[1]
  assert question.stem == "what is the color of the triangle?"
  assert question.options == ("brown", "yellow", "red", "black")


def test_options_do_not_depend_on_other_rows_or_questions(splits, tmp_path, monkeypatch):
  last = splits["test"][-1]
  question = next(q for q in last.questions if q.kind == "color")
  (tmp_path / "test").mkdir()
  listed = [[question.stem, question.options[question.gold], 999]] * 2  # a repeat is dropped
  (tmp_path / "test" / "questions.json").write_text(json.dumps(listed))
  monkeypatch.setattr(easy_vqa, "easy_vqa_root", lambda: tmp_path)
  [row] = easy_vqa.read_easy_vqa("test", seed=0)
  assert row.name == last.name == "test/images/999.png" and row.questions == (question,)
  listed[1] = [question.stem, "no", 999]
  (tmp_path / "test" / "questions.json").write_text(json.dumps(listed))
  with pytest.raises(ValueError, match="image 999 has two answers to 'wh"):
    easy_vqa.read_easy_vqa("test", seed=0)


def test_facts(splits):
  """Counts of the rows that lack one: only images whose few questions leave it open."""
  lacking = {
    split: {fact: sum(fact not in row.facts for row in read) for fact in ("color", "shape")}
    for split, read in splits.items()
  }
  assert lacking == {"train": {"color": 288, "shape": 163}, "test": {"color": 78, "shape": 46}}


def test_facts_agree_with_the_pixels(splits):
  """Facts come from the questions alone; the pixels of every colour must bear them out."""
  means = {}
  for row in splits["test"]:
    if "color" in row.facts:
      image = rows.read_image(row)
      # The background is near white; the shape holds the most frequent colour far from it.
      colors = [c for c in image.getcolors(64 * 64) if sum(c[1]) < 600]
      means.setdefault(row.facts["color"], []).append(max(colors)[1])
  for channel, name in enumerate(("red", "green", "blue")):
    assert all(pixel[channel] == max(pixel) for pixel in means[name])
  assert all(max(pixel) - min(pixel) < 40 for pixel in means["gray"] + means["black"])


@pytest.mark.parametrize(
  "answers, facts",
  [
    ({"what color is the shape?": "red"}, {"color": "red"}),
    ({"what is the red shape?": "circle"}, {"color": "red", "shape": "circle"}),
    ({"what color is the circle?": "red"}, {"color": "red", "shape": "circle"}),
    ({"is there a red shape?": "yes"}, {"color": "red"}),
    ({"is there a red shape?": "no"}, {}),
    ({"is no circle present?": "no"}, {"shape": "circle"}),
    ({"does the image not contain a circle?": "no"}, {"shape": "circle"}),
    ({"is there not a circle in the image?": "yes"}, {}),
    ({"is there not a circle?": "yes", "is a triangle present?": "no"}, {"shape": "rectangle"}),
  ],
)
def test_facts_from_wordings(answers, facts):
  assert easy_vqa._facts(answers, "1.png") == facts


@pytest.mark.parametrize(
  "answers",
  [
    {"is there a circle?": "yes", "is no circle present?": "yes"},
    {"is there a circle?": "yes", "what shape is present?": "triangle"},
    {f"is there a {shape}?": "no" for shape in easy_vqa.SHAPES},
  ],
)
def test_contradictions_are_refused(answers):
  with pytest.raises(ValueError, match=r"image 1\.png has questions that contradict each other"):
    easy_vqa._facts(answers, "1.png")


def test_refusals(monkeypatch):
  with pytest.raises(ValueError, match="no split 'valid'; use one of train, test"):
    easy_vqa.read_easy_vqa("valid", seed=0)
  with pytest.raises(ValueError, match="answer 'purple', which is none of"):
    easy_vqa._question("what color is the shape?", "purple", "0/test/images/0.png/…")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=re.escape("`pip install easy-vqa`")):
    easy_vqa.easy_vqa_root()
