"""Mode `train` end to end on tiny real models: outputs, resuming bit for bit, stopping it."""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import tiny
from helpers.paths import ROOT

from caprl_jax import sharding
from caprl_jax.data.readers.jsonl import read_jsonl
from caprl_jax.harness import metrics
from caprl_jax.harness.checkpoints import Checkpoints
from caprl_jax.harness.metrics import read_metrics
from caprl_jax.harness.process.run_record import RunRecord
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.setup import set_up
from caprl_jax.hub.load import load_policy
from caprl_jax.modes import export
from caprl_jax.modes.evaluate import run as evaluate
from caprl_jax.modes.train import run as train

# Runs the mode and is killed, as by the machine, right after the checkpoint of step 2.
KILLED = """
import json, os, pathlib, signal, sys
import ml_collections
from caprl_jax.modes.train import run as train
from caprl_jax.harness.checkpoints import Checkpoints

save = Checkpoints.save

def save_and_die(self, state, *args, **kwargs):
  save(self, state, *args, **kwargs)
  if int(state.step) == 2:
    self.wait()
    os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = save_and_die
config = ml_collections.ConfigDict(json.loads(pathlib.Path(sys.argv[1]).read_text()))
train.run(config, pathlib.Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return tiny.write_all(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
  """The workdir of a whole run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("whole")
  train.run(config, workdir)
  return workdir


def steps_of(workdir):
  """metrics.jsonl without the times, which no two runs share."""
  return [
    {k: v for k, v in row.items() if not k.startswith("time/")}
    for row in read_metrics(workdir / "metrics.jsonl")
  ]


def assert_same_policy(a, b):
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  one, other = (load_policy(str(path / "policy"), mesh).params for path in (a, b))
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
  ):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def test_mode_evaluate_finds_what_the_run_found_and_needs_no_training_data(
  config, finished, tmp_path
):
  """Named by its workdir, in that workdir, whose files stay as they are; it can be exported
  afterwards."""
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  kept = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
  alone = config.copy_and_resolve_references()
  alone.policy.checkpoint, alone.data.train = str(workdir), "nowhere.jsonl"
  evaluate.run(alone, workdir)
  found, run = (tiny.read_back(workdir / name) for name in ("evaluation.json", "summary.json"))
  assert found["figures"] == run["after"] and found["checkpoint"] == str(workdir)
  assert found["counts"]["eval_rows"] == run["counts"]["eval_rows"]
  captions = lambda name: [
    [c["text"] for c in row["captions"]]
    for row in tiny.read_back(workdir / "samples" / name)["rows"]
  ]
  assert captions("evaluation.json") == captions("after.json")
  assert {path: path.read_bytes() for path in kept} == kept
  alone.policy.int8 = "both"
  evaluate.run(alone, tmp_path / "int8")
  rounded = tiny.read_back(tmp_path / "int8" / "evaluation.json")
  assert (
    rounded["figures"].keys() == found["figures"].keys() and rounded["counts"] == found["counts"]
  )
  assert rounded["figures"] != found["figures"]
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    loaded, base, summary = export.open_run(str(workdir), mesh)
    assert loaded.model.cfg and summary == run and base == config.policy.checkpoint
    _, _, summary = export.open_run(str(workdir / "checkpoints" / "2"), mesh)
    assert "before" in summary and "after" not in summary, "figures of another step"


def test_a_run_leaves_all_its_outputs(finished, config):
  rows = read_metrics(finished / "metrics.jsonl")
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  for name in (
    "rollout/length",
    "judge/accuracy",
    "judge/accuracy/color",
    "judge/accuracy/shape",
    "reward/mean",
    "advantage/flat_groups",
    "update/loss",
    "update/grad_norm",
    "update/entropy",
    "time/step_secs",
    "time/data_secs",
  ):
    assert all(np.isfinite(row[name]) for row in rows), name
  assert all(row["update/nonfinite"] == 0 for row in rows)

  summary = tiny.read_back(finished / "summary.json")
  assert summary.keys() >= {"gate", "before", "after", "counts", "versions", "config", "wall_secs"}
  assert summary["gate"] == {}  # skipped by this config
  record = tiny.read_back(finished / "record_train.json")
  assert record["complete"]["step"] == 4
  assert record["made_of"].keys() == {"policy.checkpoint", "judge.source", "data.eval"}
  (start,) = record["starts"]
  assert start["versions"] == summary["versions"]
  for stage in ("before", "after"):
    figures = summary[stage]
    assert 0 <= figures["accuracy"] <= 1 and figures["questions"] == 24 and figures["images"] == 12
    assert figures.keys() >= {
      "accuracy/color",
      "accuracy/shape",
      "length_tokens",
      "truncated",
      "flat_groups",
      "unscored",
    }
  assert summary["counts"]["train_rows"] == summary["counts"]["eval_rows"] == 12
  assert summary["wall_secs"].keys() >= {"setup", "gate", "before", "train", "after"}
  assert summary["versions"]["jax"] == jax.__version__

  names = {path.name for path in (finished / "samples").glob("*.json")}
  assert names == {
    "before.json",
    "after.json",
    "step_000001.json",
    "step_000002.json",
    "step_000004.json",
  }
  sample = tiny.read_back(finished / "samples" / "step_000002.json")
  row = sample["rows"][0]
  assert (
    sample["step"] == 2 and len(row["captions"]) == 4 and len(row["captions"][0]["answers"]) == 2
  )
  assert (finished / "samples" / row["image"]).is_file()
  assert all(c["reward"] == np.mean([a["correct"] for a in c["answers"]]) for c in row["captions"])

  assert {path.name for path in (finished / "checkpoints").iterdir() if path.name.isdigit()} == {
    "2",
    "4",
  }
  report = (finished / "report.html").read_text()
  assert report.lstrip().lower().startswith("<!doctype html") and "<svg" in report


def test_the_exported_captioner_is_the_trained_one(finished, config):
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  after = load_policy(str(finished / "policy"), mesh)
  before = load_policy(config.policy.checkpoint, mesh)
  assert (
    after.tokenizer.to_json() == before.tokenizer.to_json() and after.model.cfg == before.model.cfg
  )
  moved = [
    float(abs(a - b).max())
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(before.params), strict=True)
  ]
  assert max(moved) > 1e-4
  # Adam moves a parameter by about the learning rate a step; 4 steps of 1e-3 (the last digits:
  # Adam's b2 = 0.95).
  assert max(moved) < 4 * 1e-3 * 1.5
  saved = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(after.params)])
  assert np.isfinite(saved).all()


def test_a_second_run_says_that_the_run_is_complete(finished, config, caplog):
  before = (finished / "metrics.jsonl").read_bytes()
  with caplog.at_level(logging.INFO, "caprl_jax"):
    train.run(config, finished)
  assert "this run is complete after step 4" in caplog.text and "CapRL" not in caplog.text
  assert (finished / "metrics.jsonl").read_bytes() == before


def test_what_is_missing_of_a_finished_run_is_made_again(finished, config, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  shutil.rmtree(workdir / "policy")
  (workdir / "report.html").unlink()
  monkeypatch.setattr(train, "set_up", None)  # neither judge nor data are needed
  train.run(config, workdir)
  assert_same_policy(workdir, finished)
  page = (finished / "report.html").read_text()
  assert (workdir / "report.html").read_text() == page.replace(finished.name, workdir.name)
  for name in ("summary.json", "record_train.json"):
    assert (workdir / name).read_bytes() == (finished / name).read_bytes()


def test_a_kill_before_the_captioner_is_written_is_healed_by_the_same_command(
  finished, config, tmp_path, monkeypatch
):
  """Of a finished run whose `train.steps` was raised: its old captioner must not pass for the new
  one. Its extras fail all the while."""
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  longer = config.copy_and_resolve_references()
  longer.train.steps = 5
  longer.train.sample_every = 1

  def killed(*_):
    raise SystemExit  # nothing catches it, as nothing catches a kill

  def fails(*_, **__):
    raise OSError("no space left")

  with monkeypatch.context() as patch:
    patch.setattr(train, "save_policy", killed)
    for name in ("save_samples", "write_report", "open_trackers"):
      patch.setattr(train, name, fails)
    patch.setattr(evaluate, "save_samples", fails)
    with pytest.raises(SystemExit):
      train.run(longer, workdir)
  assert "after" in tiny.read_back(workdir / "summary.json")
  assert "complete" not in tiny.read_back(workdir / "record_train.json")
  assert [row["step"] for row in read_metrics(workdir / "metrics.jsonl")] == [1, 2, 3, 4, 5]
  assert_same_policy(workdir, finished)  # still the old one

  train.run(longer, workdir)
  summary = tiny.read_back(workdir / "summary.json")
  assert tiny.read_back(workdir / "record_train.json")["complete"]["step"] == 5
  assert tiny.read_back(workdir / "samples" / "after.json")["step"] == 5
  with pytest.raises(AssertionError):
    assert_same_policy(workdir, finished)
  train.run(config, workdir)  # fewer steps than it has: complete
  assert tiny.read_back(workdir / "summary.json") == summary


def test_a_summary_of_something_else_is_left_alone(config, tmp_path):
  (tmp_path / "summary.json").write_text('{"figures": 1}')
  with pytest.raises(ValueError, match="is not a training run's; use another --workdir"):
    train.run(config, tmp_path)
  with pytest.raises(ValueError, match="is no training run with a checkpoint"):
    export.open_run(str(tmp_path), None)
  assert tiny.read_back(tmp_path / "summary.json") == {"figures": 1}


def test_a_workdir_of_another_config_is_refused(finished, config):
  other = config.copy_and_resolve_references()
  other.optimizer.learning_rate = 0.5
  other.seed = 1
  both = r"\(differing: seed was 0 and is 1; optimizer.learning_rate was 0.001 and is 0.5\)"
  with pytest.raises(ValueError, match=f"another config {both}; use another --workdir"):
    train.run(other, finished)


def test_a_killed_run_resumes_bit_for_bit(finished, config, tmp_path, caplog):
  (tmp_path / "config.json").write_text(config.to_json())
  workdir = tmp_path / "run"
  workdir.mkdir()
  done = subprocess.run(
    [sys.executable, "-c", KILLED, str(tmp_path / "config.json"), str(workdir)],
    cwd=ROOT,
    env=os.environ,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert [row["step"] for row in read_metrics(workdir / "metrics.jsonl")] == [1, 2]
  assert "after" not in tiny.read_back(workdir / "summary.json")
  # What a kill in the middle of step 3 may leave: a line beyond the checkpoint, and a torn one.
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"step": 3, "reward/mean": 9.0}) + '\n{"step": 4, "rew')
  shutil.copytree(workdir, tmp_path / "host")
  train.run(config, workdir)
  # The same with the moments in the host's memory from there on.
  elsewhere = config.copy_and_resolve_references()
  elsewhere.optimizer.moment_memory = "host"
  caplog.set_level(logging.INFO, "caprl_jax")
  train.run(elsewhere, tmp_path / "host")
  assert "optimizer.moment_memory was device and is host" in caplog.text.replace("'", "")
  assert "CapRL: 0 compilations after the first step" in caplog.text
  for run in (workdir, tmp_path / "host"):
    for one, other in zip(steps_of(run), steps_of(finished), strict=True):
      assert {k: (v, other[k]) for k, v in one.items() if v != other[k]} == {}, run
    assert_same_policy(run, finished)
  a, b = (tiny.read_back(path / "summary.json") for path in (workdir, finished))
  assert a["before"] == b["before"] and a["after"] == b["after"]


def test_the_releases_parquet_is_trained_on_from_start_to_report(config, tmp_path):
  """CapRL-QA-75K's own columns; its rows are named by an md5 without a suffix."""
  rows = read_jsonl(config.data.train)
  names = [hashlib.md5(row.name.encode()).hexdigest() for row in rows]
  asked = lambda q: {
    "question": q.stem,
    "choices": [f"{letter}) {option}" for letter, option in zip("ABC", q.options)],
    "answer": "ABC"[q.gold],
  }
  released = [
    {
      "id": name,
      "image": {"bytes": row.image.read_bytes(), "path": None},
      "prompt": [{"role": "user", "content": "<image> Please describe this image in detail."}],
      "data_source": "image_caption_rl",
      "reward_model": {"ground_truth": [asked(q) for q in row.questions]},
    }
    for name, row in zip(names, rows, strict=True)
  ]
  for part in range(2):
    path = tmp_path / f"train-{part:05d}-of-00002.parquet"
    pq.write_table(pa.Table.from_pylist(released[part::2]), path)
  on_parquet = config.copy_and_resolve_references()
  on_parquet.data.train = on_parquet.data.eval = str(tmp_path / "train-*.parquet")
  on_parquet.train = dict(steps=2, sample_every=1)
  on_parquet.evaluate = dict(batch_size=8, group_images=0)
  workdir = tmp_path / "run"
  train.run(on_parquet, workdir)
  assert [row["step"] for row in read_metrics(workdir / "metrics.jsonl")] == [1, 2]
  summary = tiny.read_back(workdir / "summary.json")
  assert summary["counts"] == {"train_rows": 12, "eval_rows": 12}
  assert summary["after"]["questions"] == 24
  shown = {
    row["name"]: workdir / "samples" / row["image"]
    for path in (workdir / "samples").glob("*.json")
    for row in tiny.read_back(path)["rows"]
  }
  assert set(shown) == set(names) and all(path.is_file() for path in shown.values())
  report = (workdir / "report.html").read_text()
  assert any(name in report for name in names) and "Not there yet" not in report
  assert (workdir / "policy" / "config.json").exists()
  assert RunRecord(workdir, "train").complete_step == 2


def test_an_interrupted_run_keeps_its_last_step(
  finished, config, tmp_path, monkeypatch, interruptible
):
  """A real SIGINT while step 2's numbers are written; no checkpoint was due before."""
  rare = config.copy_and_resolve_references()
  rare.checkpoint.every_steps = 100
  settings = read_settings(rare)
  write = metrics.MetricsWriter.write

  def write_then_interrupt(self, step, numbers):
    write(self, step, numbers)
    if step == 2:
      signal.raise_signal(signal.SIGINT)

  with jax.set_mesh(sharding.make_mesh(settings.mesh)):
    made = set_up(settings)
    monkeypatch.setattr(metrics.MetricsWriter, "write", write_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
      train.train(made, {}, tmp_path)
    monkeypatch.undo()
    checkpoints = Checkpoints(tmp_path, settings.checkpoint)
    assert checkpoints.latest_step() == 3  # step 3 was under way when step 2 was reported
    checkpoints.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    train.train(made, {}, tmp_path)
  assert steps_of(tmp_path) == steps_of(finished)
