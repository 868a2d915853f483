"""One registry: its modules and dataclasses exist, misspelt sections and old names are refused in
every mode, and asking it costs no import of jax."""

import dataclasses
import importlib
import re
import subprocess
import sys

import ml_collections
import pytest
from helpers.paths import ROOT

from caprl_jax import main
from caprl_jax.config import keys, loading, registry


def run(tmp_path, capsys, config, *arguments):
  """(exit code, what stderr says) of a command that must not get as far as a run."""
  code = main.main(["main", f"--config={config}", f"--workdir={tmp_path / 'run'}", *arguments])
  return code, capsys.readouterr().err


def config_of(mode, tmp_path, line):
  """A config file: the shipped one of a mode, and a line that follows."""
  example = re.search(r"--config=(\S+)", registry.MODES[mode].example)[1]
  path = tmp_path / "config.py"
  path.write_text(
    "from caprl_jax.config.loading import load_config\n"
    "def get_config():\n"
    f"  config = load_config({str(ROOT / example)!r}).unlock()\n"
    f"  config.mode = {mode!r}\n"
    f"  {line}\n"
    "  return config\n"
  )
  return path


@pytest.mark.parametrize("name", registry.MODES)
def test_a_mode_has_its_module_and_its_sections(name):
  mode = registry.MODES[name]
  assert mode.module in (f"caprl_jax.modes.{name}", f"caprl_jax.modes.{name}.run")
  assert callable(importlib.import_module(mode.module).run)
  for path in mode.sections.values():
    assert dataclasses.is_dataclass(keys.resolve(path))
  config = re.search(r"--config=(\S+)", mode.example)[1]
  assert (ROOT / config).is_file()
  if "--config.mode=" not in mode.example:
    assert loading.load_config(str(ROOT / config)).mode == name


@pytest.mark.parametrize("mode", registry.MODES)
def test_a_misspelt_section_is_an_error_in_every_mode(mode, tmp_path, capsys):
  config = config_of(mode, tmp_path, "config.polcy = dict(dtype='float32')")
  code, err = run(tmp_path, capsys, config)
  assert code == 2 and "config.polcy is not a known key; did you mean 'policy'" in err


@pytest.mark.parametrize(
  "mode, line, message",
  [
    ("train", "config.update = dict(microbatches=2)", "update is called config.policy_update now"),
    ("train", "config.curation = dict(input='x')", "curation is called config.curate now"),
    ("curate", "config.curation = dict(input='x')", "curation is called config.curate now"),
    (
      "train",
      "config.curate = dict(informed=())",
      "config.curate.informed is called config.question_filter.informed now",
    ),
    (
      "train",
      "config.curate = dict(max_blind=0.1)",
      "config.curate.max_blind is called config.question_filter.max_blind now",
    ),
    (
      "pretrain",
      "config.pretrain.stages.read = dict(told='It is {color}.')",
      "config.pretrain.stages.read.told is called config.pretrain.stages.read.context_text now",
    ),
    ("evaluate", "config.prism = dict(captions=1)", "set config.mode = 'prism'"),
  ],
)
def test_an_old_name_in_a_file_fails_with_the_new_one(mode, line, message, tmp_path, capsys):
  code, err = run(tmp_path, capsys, config_of(mode, tmp_path, line))
  assert code == 2 and message in err, err


@pytest.mark.parametrize(
  "argument, message",
  [
    (
      "--config.update.loss.kl=0.1",
      "--config.update.loss.kl is called --config.policy_update.loss.kl now",
    ),
    (
      "--config.curation.input=x",
      "--config.curation.input is called --config.curate.input now",
    ),
    (
      "--config.curate.informed=()",
      "--config.curate.informed is called --config.question_filter.informed now",
    ),
    (
      "--config.curate.max_blind=0.1",
      "config.curate.max_blind is called config.question_filter.max_blind now",
    ),
    (
      "--config.pretrain.stages.read.told=Look.",
      "--config.pretrain.stages.read.told is called --config.pretrain.stages.read.context_text now",
    ),
    ("--config.prism.captions=2 --config.mode=evaluate", "set config.mode = 'prism'"),
  ],
)
def test_an_old_name_on_the_command_line_fails_with_the_new_one(
  argument, message, tmp_path, capsys
):
  code, err = run(tmp_path, capsys, ROOT / "configs" / "quickstart.py", *argument.split())
  assert code == 2 and message in err, err


def test_mode_curate_has_a_max_blind_of_its_own():
  path = str(ROOT / "configs" / "curate.py")
  config = loading.load_config(path)
  override = loading.OVERRIDE.fullmatch("--config.curate.max_blind=0.3")
  loading.apply_overrides(config, [override], path)
  registry.check_top_level(config)
  assert config.curate.max_blind == 0.3


def test_every_new_name_is_a_key():
  sections = registry.section_names()
  for old, (new, mode) in registry.RENAMED.items():
    assert new in sections or keys.annotation_of(new) is not None, old
    assert (keys.annotation_of(old) is not None) == (mode is not None or old in sections), old


def test_the_upgrade_notes_have_every_old_name():
  notes = (ROOT / "CHANGELOG.md").read_text().partition("### Upgrade notes")[2].partition("###")[0]
  rows = re.findall(r"^\| `([\w.]+)`(?: \(but in mode `(\w+)`\))? \| `([\w.]+)` \|$", notes, re.M)
  assert {old: (new, mode or None) for old, mode, new in rows} == registry.RENAMED


def test_a_stored_config_is_read_with_the_new_names():
  old = {"mode": "train", "curate": {"informed": []}, "update": {"loss": {"kl": 0.0}}}
  new = {
    "mode": "train",
    "question_filter": {"informed": []},
    "policy_update": {"loss": {"kl": 0.0}},
  }
  assert registry.with_new_names(old) == new
  assert registry.with_new_names(new) == new
  registry.check_top_level(ml_collections.ConfigDict(new))
  both = {"mode": "curate,train", "curate": {"input": "images", "output": "qa.jsonl"}}
  assert registry.with_new_names(both) == both


def test_help_and_a_mistyped_flag_do_not_wait_for_jax(tmp_path):
  config = ROOT / "configs" / "quickstart.py"
  commands = (
    ["main", "--help"],
    ["main", f"--config={config}", "--workdri=x"],
    ["main", f"--config={config}", f"--workdir={tmp_path}", "--config.mode=tarin"],
    ["main", f"--config={config}", "--config.data.batch_size=4"],  # no workdir
  )
  program = (
    "import sys; from caprl_jax import main; "
    f"codes = [main.main(argv) for argv in {commands!r}]; "
    "print(codes, 'jax' in sys.modules, file=sys.stderr)"
  )
  made = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
  assert made.stderr.endswith("[0, 2, 2, 2] False\n"), made.stderr


def test_a_key_s_type_leaves_logging_and_devices_alone():
  """It is asked for before the log is set up and before processes find each other, which must come
  before any device.
  """
  program = (
    "import logging; from caprl_jax.config import keys; keys.keys(); from jax._src import "
    "xla_bridge; print(logging.root.handlers, xla_bridge.backends_are_initialized())"
  )
  made = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
  assert made.stdout == "[] False\n", made.stderr
