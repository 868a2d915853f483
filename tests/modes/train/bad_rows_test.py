"""Bad rows in a training run: refused before anything is loaded, or dropped; a row that fails later
has the next one in its place, also when the run goes on without it."""

import json
import pathlib

import pytest
from helpers import tiny
from PIL import Image

from caprl_jax import main
from caprl_jax.data import batches
from caprl_jax.harness.metrics import read_metrics
from caprl_jax.modes.train import run as training

CONFIG = """
import json, ml_collections
def get_config():
  return ml_collections.ConfigDict(json.loads({text!r}))
"""
LOST = "images/7.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Tiny models, and twelve rows of which three are bad."""
  folder = tmp_path_factory.mktemp("tiny")
  config = tiny.write_all(folder)
  images = folder / "data" / "images"
  (images / "3.png").write_bytes((images / "3.png").read_bytes()[:-60])
  (images / "5.png").write_bytes(b"<html>404</html>")
  Image.new("RGB", (2, 900)).save(images / "8.png")
  whole = tiny.write_data(folder / "held_out", 4)
  config.data.eval, config.data.batch_size = str(whole), 4
  config.evaluate = dict(batch_size=4, group_images=0)
  config.checkpoint.every_steps = 1
  (folder / "config.py").write_text(CONFIG.format(text=config.to_json()))
  return folder


def run(folder, workdir, *flags):
  return main.main(["main", f"--config={folder / 'config.py'}", f"--workdir={workdir}", *flags])


def test_all_are_refused_before_a_model_is_loaded(folder, tmp_path, capsys):
  assert run(folder, tmp_path, "--config.judge.source=/not/looked/for/yet") == 2
  said = capsys.readouterr().err
  assert "3 bad rows of 16 (--config.data.bad_rows=drop leaves them out)" in said
  for line, why in {4: "truncated", 6: "a web page", 9: "over 200 times"}.items():
    (one,) = [text for text in said.splitlines() if f"rows.jsonl:{line}:" in text]
    assert why in one
  assert len((tmp_path / "bad_rows.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_run_goes_on_without_a_row_as_if_it_only_failed(folder, tmp_path, monkeypatch, capsys):
  # evaluations would be two programs more to compile
  monkeypatch.setattr(training, "Evaluator", lambda made: lambda *what: {"accuracy": 0.0})
  read = batches.read_image

  def failing(row):
    if row.name == LOST:
      raise ValueError(f"row {row.name!r}: cannot read its image: disk error")
    return read(row)

  monkeypatch.setattr(batches, "read_image", failing)
  drop = "--config.data.bad_rows=drop"
  assert run(folder, tmp_path / "whole", drop, "--config.train.steps=4") == 0
  said = capsys.readouterr().err
  assert "dropped 3 of 16 rows (" in said and said.count("dropped, though it could be read") == 1
  summary = tiny.read_back(tmp_path / "whole" / "summary.json")
  assert summary["counts"]["train_rows"] == 9 and summary["counts"]["bad_rows"] == 3
  bad = (tmp_path / "whole" / "bad_rows.jsonl").read_text().splitlines()
  assert [pathlib.Path(json.loads(line)["where"]).name for line in bad] == [
    "rows.jsonl:4",
    "rows.jsonl:6",
    "rows.jsonl:9",
    "rows.jsonl:8",  # later
  ]

  assert run(folder, tmp_path / "stopped", drop, "--config.train.steps=2") == 0
  (folder / "data" / LOST).unlink()  # now the reader says so
  capsys.readouterr()
  assert run(folder, tmp_path / "stopped", drop, "--config.train.steps=4") == 0
  assert "begun with 9 rows: 1 of them cannot be used any more" in capsys.readouterr().err
  want, got = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped"))
  assert [row["step"] for row in got] == [1, 2, 3, 4]
  for a, b in zip(want, got, strict=True):
    assert a.keys() == b.keys()
    assert {k: v for k, v in a.items() if "secs" not in k} == {
      k: v for k, v in b.items() if "secs" not in k
    }
