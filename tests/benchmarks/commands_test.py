"""The commands and configs that long benchmarks make, as far as this can be told without hours."""

import importlib.util
import json
import shlex

import pytest
from helpers.paths import ROOT

from caprl_jax import main
from caprl_jax.harness.settings import read_settings

CHARTS = "charts:test:4:96x72"


def load(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("data, train", [("easy_vqa", "easy_vqa:test"), ("charts", None)])
def test_commands_of_captions_teach(data, train, tmp_path, monkeypatch, capsys):
  """Each is one that the main program would take. What it would leave is made up here, which the
  table then shows."""
  module = load("captions_teach")
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  asked = []

  def main_program(*arguments):
    asked.append(shlex.join(arguments))
    config, workdir, _ = main._parse(main._define_flags(), ["main", *arguments])
    if config.mode == "pretrain":
      workdir.mkdir(parents=True, exist_ok=True)
      found = {"accuracy": 0.5, "blind": 0.25, "kinds": {"color": {"accuracy": 0.5}}}
      (workdir / "vqa.json").write_text(json.dumps(found))

  monkeypatch.setattr(module, "main_program", main_program)
  if train is None:  # a file, as mode dataset writes it
    train = str(tmp_path / "charts.jsonl")
    arguments = ("--config=configs/dataset.py", f"--config.dataset.input={CHARTS}")
    assert main.main(["main", *arguments, f"--config.dataset.output={train}"]) == 0
  arguments = (f"--data={data}", f"--train={train}", "--caprl=configs/quickstart_policy")
  monkeypatch.setattr("sys.argv", ["captions_teach.py", *arguments, "--warm=configs", "--seeds=1"])
  module.main()
  kinds = [command.split("--workdir=")[0] for command in asked]
  assert len(kinds) == 6 and sum("pretrain_language.py" in kind for kind in kinds) == 1
  assert "| CapRL | 0.500 (0.500) | 0.500 | 0.250 |" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["easy_vqa", "charts"])
def test_configs_of_misled(data, monkeypatch):
  monkeypatch.chdir(ROOT)
  config = load("misled").training_config(data, ROOT / "configs" / "quickstart_policy", 0.5, 3)
  assert read_settings(config).train.steps == 3
