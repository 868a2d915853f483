"""A dataset split by what its images show: the model's answers against transformers, the files and
the page, answers that are kept, settings that are refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers.captioner_directory import make_folder
from helpers.paths import ROOT
from inference.vqa_test import theirs

from caprl_jax import main
from caprl_jax.data.readers import jsonl
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import QARow, Question
from caprl_jax.inference.vqa import AnswerConfig
from caprl_jax.modes.dataset import image_kinds
from caprl_jax.modes.dataset.section import DatasetConfig

COLOR = Question("What color is it?", ("red", "dark blue", "tan"), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = make_folder(tmp_path_factory.mktemp("kinds"))
  images = sorted(path.glob("*.png"))
  rows = [QARow(image, (COLOR,), f"row {i}") for i, image in enumerate(images)]
  jsonl.write_jsonl(path / "rows.jsonl", rows)
  return path


def run(folder, tmp_path, *more):
  return main.main(
    [
      "main",
      f"--config={ROOT / 'configs' / 'image_kinds.py'}",
      f"--workdir={tmp_path / 'work'}",
      f"--config.dataset.input={folder / 'rows.jsonl'}",
      f"--config.dataset.output={tmp_path}/{{kind}}.jsonl",
      f"--config.answerer.checkpoint={folder / 'qwen'}",
      "--config.answerer.dtype=float32",
      "--config.answerer.param_dtype=float32",
      "--config.answerer.max_pixels=None",
      *more,
    ]
  )


def test_each_image_goes_where_the_model_says(folder, tmp_path, monkeypatch, caplog):
  words = {"natural": "image", "other": "circle", "third": "The answer is red"}
  config = tmp_path / "config.py"
  config.write_text(
    (ROOT / "configs" / "image_kinds.py")
    .read_text()
    .replace("  return config", f"  config.dataset.image_kinds = {words!r}\n  return config")
  )
  assert run(folder, tmp_path, f"--config={config}") == 0
  question = [Question(image_kinds.STEM, tuple(words.values()), k) for k in range(3)]
  cfg = AnswerConfig(permutations=3, none_of_above=False)
  want: dict[str, list[str]] = {name: [] for name in words}
  sure = []
  for row in read_qa_rows(str(folder / "rows.jsonl"), 0):
    mean = [sums[2] for sums in theirs(folder, row.image, question, cfg, 0)]
    want[[*words][int(np.argmax(mean))]].append(row.name)
    sure.append(max(mean))
  figures = json.loads((tmp_path / "work" / "dataset.json").read_text())["image_kinds"]
  for name, names in want.items():
    path = tmp_path / f"{name}.jsonl"
    found = [row.name for row in read_qa_rows(str(path), 0)] if path.exists() else []
    assert found == names and figures[name]["images"] == len(names)
    if not names:
      assert f"{path} is not written: no image shows {words[name]}" in caplog.text
  assert sum(map(bool, want.values())) > 1  # the test could tell
  kept = [
    json.loads(line)[1]["probabilities"]
    for path in sorted((tmp_path / "work" / "image_kinds").glob("*.jsonl"))
    for line in path.read_text().splitlines()
  ]
  np.testing.assert_allclose(sorted(map(max, kept)), sorted(sure), atol=1e-4)
  page = (tmp_path / "work" / "dataset.html").read_text()
  assert "Images by what they show" in page and "not sure (below 0.9)" in page
  # asked once
  monkeypatch.setattr(image_kinds.PolicySection, "load", None)
  assert run(folder, tmp_path, f"--config={config}") == 0


def test_answers_are_of_the_images_that_were_asked_about(folder, tmp_path, capsys):
  """A row that asks the same twice stays, as in training; another image of the same name is asked
  anew."""
  images = sorted(folder.glob("*.png"))
  shutil.copy(images[0], tmp_path / "a.png")
  again = dataclasses.replace(COLOR, gold=2)
  jsonl.write_jsonl(tmp_path / "rows.jsonl", [QARow(tmp_path / "a.png", (COLOR, again), "a")])
  source = f"--config.dataset.input={tmp_path / 'rows.jsonl'}"
  assert run(folder, tmp_path, source) == 0
  (written,) = (
    path for name in ("natural", "chart_or_document") for path in tmp_path.glob(f"{name}.jsonl")
  )
  assert len(read_qa_rows(str(written), 0)[0].questions) == 2
  shutil.copy(images[1], tmp_path / "a.png")
  assert run(folder, tmp_path, source) == 2
  assert "is left from a job with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(image_kinds={"a": "x"}), "name from 2 to 10 kinds, not 1"),
    (dict(image_kinds={"a": "x", "b/c": "y"}), "names are of letters, digits"),
    (dict(image_kinds={"a": "x", "b": "x "}), "must differ"),
    (dict(image_kinds={"a": "x", "b": ""}), "must differ"),
    (dict(image_kinds={"a": "x", "A": "y"}), "must differ"),
    (dict(output="rows_{kind}.parquet"), "dataset.image_kinds names none"),
    (dict(image_kinds={"a": "x", "b": "y"}, output="all.parquet"), "write {kind} once"),
    (dict(batch_size=0), "batch_size = 0"),
  ],
)
def test_settings_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    DatasetConfig("rows.jsonl", **change)


def test_a_kind_in_words_of_the_template_is_refused(folder, tmp_path, capsys):
  flag = "--config.dataset.image_kinds.natural=an <|image_pad|>"
  assert run(folder, tmp_path, flag) == 2
  assert "dataset.image_kinds: it spells a token" in capsys.readouterr().err
