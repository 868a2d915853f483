"""A run that is watched: held-out evaluation on the way, the best captioner kept, trackers with
tables of samples.
"""

import json

import jax
import numpy as np
import pytest
from helpers import tiny
from PIL import Image

from caprl_jax import sharding
from caprl_jax.harness.metrics import read_metrics
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.setup import set_up
from caprl_jax.harness.training.summary import Best
from caprl_jax.hub.load import load_policy
from caprl_jax.modes.evaluate.run import Evaluator
from caprl_jax.modes.train import run as train


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  config = tiny.write_all(tmp_path_factory.mktemp("tiny"))
  config.evaluate.every_steps = 2
  config.train.trackers = ("tensorboard", "wandb")
  config.judge.draws = 3  # presentations: samples, metrics and report have to follow them
  config.train.sample_every = 2
  config.reward.misled = 0.25
  config.judge.margin = 0.05
  config.optimizer.learning_rate = 3e-2
  return config


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
  pytest.importorskip("wandb", reason="pip install wandb")
  pytest.importorskip("tensorboardX", reason="pip install tensorboardX")
  workdir = tmp_path_factory.mktemp("watched")
  train.run(config, workdir)
  return workdir


def test_held_out_figures_join_the_step_they_belong_to(workdir):
  rows = read_metrics(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows if "eval/accuracy" in row] == [2, 4]
  last = rows[-1]
  after = json.loads((workdir / "summary.json").read_text())["after"]
  # evaluated twice, on the same parameters
  for name in ("accuracy", "misled", "abstained", "length_tokens"):
    np.testing.assert_allclose(last[f"eval/{name}"], after[name], rtol=1e-5)
  for name in (
    "judge/blind",
    "update/learning_rate",
    "advantage/excluded_groups",
    "update/grad_norm_vision",
  ):
    assert np.isfinite(last[name]), name
  np.testing.assert_allclose(
    last["judge/accuracy"] + last["judge/misled"] + last["judge/abstained"], 1, rtol=1e-5
  )
  np.testing.assert_allclose(
    last["reward/mean"],
    last["reward/accuracy"] - 0.25 * last["reward/misled"],
    rtol=1e-4,
    atol=1e-5,
  )


def test_the_best_captioner_is_kept_and_loads(workdir, config):
  figures = json.loads((workdir / "best" / "best.json").read_text())
  rows = {
    row["step"]: row["eval/accuracy"]
    for row in read_metrics(workdir / "metrics.jsonl")
    if "eval/accuracy" in row
  }
  assert figures["accuracy"] == max(rows.values())
  assert figures["step"] == min(
    step for step, accuracy in rows.items() if accuracy == figures["accuracy"]
  )
  assert sorted(p.name for p in workdir.glob("best*")) == ["best"]
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])):
    made = set_up(read_settings(config))
    loaded = load_policy(str(workdir / "best"), made.mesh)
    again = Evaluator(made)(loaded.params, workdir / "again.json", "again", 0)
  np.testing.assert_allclose(again["accuracy"], figures["accuracy"])


def test_a_worse_captioner_does_not_replace_the_best(tmp_path, config):
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])):
    made = set_up(read_settings(config))
    best = Best(made.policy, tmp_path)
    best.keep(1, made.policy.params, {"accuracy": 0.5})
    before = (tmp_path / "best" / "best.json").stat().st_mtime_ns
    Best(made.policy, tmp_path).keep(2, made.policy.params, {"accuracy": 0.5})  # as after a restart
  assert (tmp_path / "best" / "best.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("left", ["best.new", "best.old"])
def test_a_kill_between_two_renames_loses_no_best(tmp_path, left):
  (tmp_path / left).mkdir()
  (tmp_path / left / "best.json").write_text('{"step": 3, "accuracy": 0.75}')
  assert Best(None, tmp_path).value == 0.75
  assert sorted(p.name for p in tmp_path.iterdir()) == ["best"]


def test_samples_follow_the_draws(workdir):
  samples = json.loads((workdir / "samples" / "step_000002.json").read_text())
  for row in samples["rows"]:
    Image.open(workdir / "samples" / row["image"]).verify()
    for caption in row["captions"]:
      assert len(caption["answers"]) == 3
      for answer in caption["answers"]:
        question = row["questions"][answer["question"]]
        assert answer["correct"] == (answer["choice"] == question["gold"])


def test_trackers_have_the_numbers_and_the_samples(workdir):
  accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  events = accumulator.EventAccumulator(
    str(workdir / "tensorboard"), size_guidance={accumulator.IMAGES: 0}
  ).Reload()
  rows = read_metrics(workdir / "metrics.jsonl")
  np.testing.assert_allclose(
    [e.value for e in events.Scalars("reward/mean")],
    [row["reward/mean"] for row in rows],
    rtol=1e-5,
  )
  assert [e.step for e in events.Scalars("eval/accuracy")] == [2, 4]
  assert events.Tags()["images"] and events.Tags()["tensors"]
  assert list(workdir.glob("wandb/offline-run-*/*.wandb"))


def test_the_report_shows_them(workdir):
  page = (workdir / "report.html").read_text()
  for title in ("Held-out accuracy", "Silence and falsehood", "Sampler against update"):
    assert title in page
