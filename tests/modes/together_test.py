"""Modes that share their work among processes: two find what one does."""

import importlib
import json

import jax
import ml_collections
import pytest
from helpers import tiny, tiny_runs
from helpers.processes import CONFIG, start, wait

from caprl_jax.config import registry
from caprl_jax.data.readers.jsonl import read_jsonl
from caprl_jax.harness.metrics import read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Models and data, and a config of three modes in a row: greedy, since what is drawn depends on
  which images share a batch."""
  folder = tmp_path_factory.mktemp("together")
  configs = tiny_runs.write(folder)
  config = configs["curate"] | configs["pretrain"] | configs["prism"]
  config["mode"] = "curate,prism,pretrain"
  config["prism"] |= dict(captions=1, temperature=0.0, answer_temperature=0.0, answer_batch_size=1)
  stage = config["pretrain"]["stages"]["instruct"] | dict(steps=2, batch_size=2)
  config["pretrain"] |= dict(
    order=["instruct"],
    stages=dict(instruct=stage),
    eval=str(folder / "data" / "rows.jsonl"),
    answer=dict(permutations=2, batch_size=2),
  )
  (folder / "config.py").write_text(CONFIG.format(text=json.dumps(config)))
  return folder


def test_two_processes_curate_evaluate_and_ask_as_one_does(folder):
  started = {
    number: start(folder, folder / name, number, 1, f"--config.curate.output={folder / name}.jsonl")
    for number, name in ((1, "one"), (2, "two"))
  }
  for number, name in ((1, "one"), (2, "two")):
    wait(started[number], folder / name)
  one, two = folder / "one", folder / "two"
  kept = [read_jsonl(run.with_suffix(".jsonl")) for run in (one, two)]
  about = [[(row.name, row.questions) for row in rows] for rows in kept]
  assert about[0] == about[1] and len(kept[0]) == 12
  assert (one / "answers.jsonl").read_text() == (two / "answers.jsonl").read_text()
  lines = [
    [len(path.read_text().splitlines()) - 1 for path in (run / "cache").iterdir()]
    for run in (one, two)
  ]
  assert len(lines[1]) == 4 and min(lines[1]) > 0, "each process has captioned and answered"
  assert sum(lines[1]) == sum(lines[0]), "nothing twice"
  losses = [
    [row["update/loss"] for row in read_metrics(run / "training" / "instruct" / "metrics.jsonl")]
    for run in (one, two)
  ]
  assert losses[1] == pytest.approx(losses[0], rel=1e-4)
  asked = [tiny.read_back(run / "vqa.json") for run in (one, two)]
  assert asked[1]["images"] == 12 and asked[1]["questions"] == 24
  for name in ("accuracy", "blind", "probability", "blind_probability"):
    assert asked[1][name] == pytest.approx(asked[0][name], abs=1e-3)
  for record in ("curate", "prism", "pretrain"):
    assert tiny.read_back(two / f"record_{record}.json")["complete"]


@pytest.mark.parametrize("mode", ["dataset", "demo"])
def test_modes_of_one_process_say_so_before_any_work(mode, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  config = ml_collections.ConfigDict(
    dict(
      policy=dict(checkpoint="none"),
      judge=dict(source="none"),
      dataset=dict(input="none", output=str(tmp_path / "rows.jsonl")),
      demo=dict(),
    )
  )
  module = importlib.import_module(registry.MODES[mode].module)
  message = f"mode {mode} runs in one process, and this run has 2: start it on one host"
  with pytest.raises(ValueError, match=message):
    module.run(config, tmp_path)
  assert not [*tmp_path.iterdir()]
