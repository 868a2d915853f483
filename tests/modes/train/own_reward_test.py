"""Mode `train` with a reward function of one's own, and with a judge behind a server."""

import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.servers.chat import honest, judging, serving, shown

import caprl_jax
from caprl_jax import sharding
from caprl_jax.harness.metrics import read_metrics
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.setup import set_up
from caprl_jax.inference import endpoint
from caprl_jax.inference.endpoint_judge import MARKUP
from caprl_jax.modes.export import model_card
from caprl_jax.modes.plan.abstract import model_configs
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.modes.train import run as train

pytestmark = pytest.mark.slow

# As TRL's users write it. The facts of each row are columns.
TEXTS = """
def reward(completions, color, accuracy, **kwargs):
  assert len(completions) == len(color) == len(kwargs["name"]) == len(accuracy)
  return [None if len(c) % 5 == 0 else len(c) / 10 + (c.count(one) > 0)
          for c, one in zip(completions, color)]
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  config = tiny.write_all(tmp_path_factory.mktemp("tiny"))
  config.data.batch_size, config.data.max_eval_rows = 4, 4
  config.rollout.group_size = 2
  config.evaluate = dict(batch_size=4, group_images=0, every_steps=0)
  config.train = dict(steps=4, sample_every=1)
  config.optimizer = dict(learning_rate=1e-3, schedule="constant")
  return config


def metrics_of(workdir):
  return [
    {name: value for name, value in row.items() if not name.startswith("time/")}
    for row in read_metrics(workdir / "metrics.jsonl")
  ]


def captions_of(path):
  return [caption for row in tiny.read_back(path)["rows"] for caption in row["captions"]]


def test_texts_and_a_judge_behind_a_server(config, tmp_path, caplog, monkeypatch):
  """A whole run; one that stopped in the middle goes on bit for bit, failures of the server
  included."""
  pytest.importorskip("openai")
  monkeypatch.setattr(endpoint, "_FIRST_WAIT_SECS", 0.001)

  def answer(message):
    # random captions say nothing: a judge of the text's length stands in for an honest one
    caption, _, options = shown(message)
    said = honest(message)
    return said if said in options else sorted(options)[len(caption) % len(options)]

  def behave(handler, name, attempt):
    if handler.command == "POST" and len(shown(name)[0]) % 7 == 1:
      return handler.say(400, {"error": "filtered"})
    return judging(answer)(handler, name, attempt)

  own = config.copy_and_resolve_references()
  (tmp_path / "own.py").write_text(TEXTS)
  own.reward = dict(accuracy=1.0, custom=f"{tmp_path / 'own.py'}:reward")
  (tmp_path / "whole").mkdir()
  with serving(behave) as server:
    own.judge = dict(
      reading="generate",
      abstain="last",
      endpoint=dict(url=server.url, model="m", max_failures=1000, concurrency=8),
    )
    caplog.set_level(logging.INFO)
    train.run(own, tmp_path / "whole")
    # as a kill after step 2 leaves it
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "4")
    with jax.set_mesh(sharding.make_mesh(read_settings(own).mesh)):
      train.train(set_up(read_settings(own)), {}, tmp_path / "part")
  assert metrics_of(tmp_path / "part") == metrics_of(tmp_path / "whole")
  assert "resuming after step 2" in caplog.text
  assert "is a function of texts: a step is several programs" in caplog.text
  assert f"judge m ({server.url})" in caplog.text and "no answer to" in caplog.text
  rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
  assert all(row["time/reward_secs"] > 0 and row["update/nonfinite"] == 0 for row in rows)
  assert all(0 <= row["judge/blind"] <= 1 for row in rows)
  excluded = {"none": 0, "failed": 0, "scored": 0}
  for step in range(1, 5):
    captions = captions_of(tmp_path / "whole" / "samples" / f"step_{step:06d}.json")
    for caption in captions:
      text, failed = caption["text"], not all(one["valid"] for one in caption["answers"])
      sent = MARKUP.sub(lambda match: match[0] + " ", text)
      kind = "failed" if failed else "none" if len(text) % 5 == 0 else "scored"
      excluded[kind] += 1
      assert failed == (len(sent) % 7 == 1)
      if kind != "scored":
        assert caption["reward"] is None and caption["advantage"] == 0
      else:
        right = np.mean([one["correct"] for one in caption["answers"]])
        assert caption["reward"] >= right + len(text) / 10 - 1e-5
    share = np.mean([caption["reward"] is None for caption in captions])
    assert rows[step - 1]["reward/unscored"] == pytest.approx(share)
  assert min(excluded.values()) > 0, excluded
  summary = tiny.read_back(tmp_path / "whole" / "summary.json")
  assert (
    summary["after"]["questions"] > 0 and summary["config"]["judge"]["endpoint"]["model"] == "m"
  )


def test_without_a_judge_the_rows_need_no_questions(config, tmp_path, caplog):
  """From Python: rows with facts alone, held-out images of a folder, and a function that scores.
  Nothing is asked, and what is told of held-out images is the reward itself."""
  own = config.copy_and_resolve_references()
  del own.judge
  own.data = dict(batch_size=4, max_train_rows=8)
  rows = map(json.loads, pathlib.Path(config.data.train).read_text().splitlines())
  (tmp_path / "rows.jsonl").write_text(
    "".join(json.dumps({"image": row["image"], "facts": row["facts"]}) + "\n" for row in rows)
  )
  images = pathlib.Path(config.data.train).parent / "images"
  shutil.copytree(images, tmp_path / "images")
  held_out = tmp_path / "held_out"
  held_out.mkdir()
  for name in ("0.png", "1.png"):
    shutil.copy(images / name, held_out)
  own.data.train, own.data.eval = str(tmp_path / "rows.jsonl"), str(held_out)
  del own.reward

  def lengths(completions, color=None, **more):
    assert more["questions"] == [[]] * len(completions) and set(more["accuracy"]) == {None}
    known = color or [None] * len(completions)
    return [len(c) / 10 + (one is not None) for c, one in zip(completions, known)]

  own.train.steps, own.evaluate.every_steps = 2, 2
  with caplog.at_level(logging.INFO):
    result = caprl_jax.train(own, tmp_path / "run", reward=lengths)
  for said in (
    "judge none",
    "gate skipped: there is no judge",
    "after: reward",
    "held-out reward",
  ):
    assert said in caplog.text, said
  assert result.gate == {} and result.step == 2
  samples = result.samples("after")
  assert result.after["images"] == 2 == len(samples) and "accuracy" not in result.after
  assert result.after["reward"] == pytest.approx(np.mean([len(s.caption) / 10 for s in samples]))
  assert all(s.questions == 0 and s.reward == pytest.approx(len(s.caption) / 10) for s in samples)
  for row in result.metrics:
    assert row["reward/mean"] == pytest.approx(row["reward/custom"]) and row["reward/mean"] >= 1
    assert not [name for name in row if name.startswith("judge/")] and "reward/accuracy" not in row
    assert row["reward/unscored"] == 0 and row["update/nonfinite"] == 0
  best = tiny.read_back(tmp_path / "run" / "best" / "best.json")
  assert best == {"step": 2, "reward": pytest.approx(result.after["reward"])}
  record = tiny.read_back(tmp_path / "run" / "record_train.json")["made_of"]
  assert record["judge.source"] == "none" and record["reward.custom"]
  page = result.report.read_text()
  assert "not complete" not in page and "Reward of held-out captions" in page
  summary = tiny.read_back(tmp_path / "run" / "summary.json")
  card = model_card("base", summary, "float32")
  assert "Reward: `" in card and "| reward |" in card and "the captions of an image compete" in card
  caplog.clear()
  with caplog.at_level(logging.INFO):
    caprl_jax.train(own, tmp_path / "run", reward=lengths)
  with pytest.raises(ValueError, match="neither a judge nor a reward of your own"):
    caprl_jax.train(own, tmp_path / "run")
  assert "this run is complete after step 2: reward" in caplog.text
  own.reward = dict(custom="python:lengths")
  assert model_configs(read_settings(own), PlanConfig())[1] is None


def test_a_function_that_fails_stops_the_run_with_its_row(config, tmp_path):
  own = config.copy_and_resolve_references()
  (tmp_path / "own.py").write_text(
    "def reward(completions, name):\n  return [0 / 0 for _ in name]\n"
  )
  own.reward = dict(custom=f"{tmp_path / 'own.py'}:reward")
  with jax.set_mesh(sharding.make_mesh(read_settings(own).mesh)):
    made = set_up(read_settings(own))
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="raised ZeroDivisionError in line 2: .*row 'images/"):
      train.train(made, {}, tmp_path / "run")
