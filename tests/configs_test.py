"""Every file in configs/: built, overridden, and its sections read."""

import ast
import pathlib
import re

import pytest
from helpers.paths import ROOT

from caprl_jax import main
from caprl_jax.config import keys, presets, registry
from caprl_jax.config import loading as config_file
from caprl_jax.config import schema as configuration
from caprl_jax.data.readers.benchmarks.row import BENCHMARKS
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import kinds
from caprl_jax.harness.sections import TrainSection
from caprl_jax.harness.settings import read_settings
from caprl_jax.modes.gallery import run as gallery
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.modes.pretrain import run as pretrain
from caprl_jax.modes.prism.section import PrismConfig
from caprl_jax.modes.sft import run as sft
from caprl_jax.rl import optimizer
from caprl_jax.rl.optimizer import build_optimizer
from caprl_jax.scoring import answers as scoring

CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_built_and_read(path):
  config = config_file.load_config(str(path))
  assert config.is_locked
  plain = configuration.to_plain(config)  # what a checkpoint keeps of it
  assert plain["mode"] == config.mode and isinstance(config.get("seed", 0), int)
  registry.check_top_level(config)
  presets.expand(config)
  for mode in registry.modes_of(config).values():
    for name, where in mode.sections.items():
      section = configuration.load_section(config, name, keys.resolve(where))
      if check := CHECKS.get(type(section)):
        check(section)
  if config.mode == "train":
    read_settings(config)
    configuration.load_section(config, "plan", PlanConfig)


def _check_sft(cfg):
  for phase in cfg.phases:
    build_optimizer(phase.optimizer, phase.steps)
    assert phase.steps > 0 and all(weight > 0 for weight, _ in phase.templates)


def _check_new_policy(section):
  assert section.checkpoint or (section.architecture and section.tokenizer)


def _check_pretrain(cfg):
  for stage in cfg.stages.values():
    build_optimizer(stage.optimizer, 100)


def _check_prism(cfg):
  assert cfg.checkpoints and cfg.sources


def _check_gallery(cfg):
  assert cfg.files


def _check_optimizer(cfg):
  build_optimizer(cfg, 100)


def _check_train(cfg):
  assert cfg.steps > 0


# What a section of a shipped config must be, beyond what its dataclass checks.
CHECKS = {
  sft.SFTConfig: _check_sft,
  sft.NewPolicyConfig: _check_new_policy,
  pretrain.PretrainConfig: _check_pretrain,
  PrismConfig: _check_prism,
  gallery.GalleryConfig: _check_gallery,
  optimizer.OptimizerConfig: _check_optimizer,
  TrainSection: _check_train,
}


# Rows such as a config's data have, which need no download.
ROWS = {"easy_vqa": "easy_vqa:test", "data/charts/": "charts:test:6:96x72"}


def settings_of(value, place=""):
  """(dotted key, value) of all that a config sets."""
  if isinstance(value, dict):
    for key, held in value.items():
      yield from settings_of(held, f"{place}.{key}" if place else key)
  elif isinstance(value, (list, tuple)) and any(isinstance(held, (dict, tuple)) for held in value):
    for held in value:
      yield from settings_of(held, place)
  else:
    yield place, value


def named(settings):
  """The kinds of questions and the {facts} of rows that settings name."""
  chosen, facts = set(), set()
  for key, value in settings:
    texts = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else ()
    if key.endswith("kinds"):
      chosen |= set(texts)
    elif re.search(r"(informed|ideal|templates|context_text)$", key):
      texts = [text for text in texts if isinstance(text, str)]
      facts |= {name for text in texts for name in re.findall(r"\{(\w+)\}", text)}
  return chosen, facts


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_kinds_and_facts_that_a_config_names_are_those_of_its_rows(path):
  """Configs inherit from each other, and their data differ."""
  settings = list(settings_of(configuration.to_plain(config_file.load_config(str(path)))))
  sources = {
    rows
    for _, value in settings
    for prefix, rows in ROWS.items()
    if isinstance(value, str) and value.startswith(prefix)
  }
  chosen, facts = named(settings)
  assert len(sources) < 2
  if not sources:  # data of the user's own, of which a config cannot know more
    assert not chosen, "kinds of which questions?"
    return
  rows = read_qa_rows(sources.pop(), 0)
  assert chosen <= set(kinds(rows))
  assert facts <= {name for row in rows for name in row.facts or {}}


def test_a_kind_that_the_rows_do_not_have_is_found():
  config = config_file.load_config(str(ROOT / "configs" / "charts.py"))
  with config.unlocked():
    config.question_filter.kinds = ("shape",)
  chosen, facts = named(settings_of(configuration.to_plain(config)))
  assert chosen == {"shape"} and facts == {"description"}


def test_the_quickstart_s_files_are_here():
  assert {path.stem for path in CONFIGS} >= {"quickstart", "quickstart_sft"}
  settings = read_settings(config_file.load_config(str(ROOT / "configs" / "quickstart.py")))
  assert (pathlib.Path(settings.policy.checkpoint) / "config.json").is_file()
  assert settings.data.train == "easy_vqa:train" and settings.data.eval == "easy_vqa:test"


@pytest.mark.parametrize(
  "override, message",
  [
    (
      "--config.optimizer.learning_rat=1",
      r"optimizer\.learning_rat is not a key of .*"
      r"did you mean --config\.optimizer\.learning_rate\?",
    ),
    (
      "--config.policy_update.loss.clip_hihg=1",
      r"did you mean --config\.policy_update\.loss\.clip_high",
    ),
    ("--config.group_size=4", r"did you mean --config\.rollout\.group_size"),
    ("--config.rollout=4", r"--config\.rollout is a section"),
  ],
)
def test_an_unknown_key_names_the_nearest(override, message, tmp_path, capsys):
  code = main.main(
    [
      "main",
      f"--config={ROOT / 'configs' / 'quickstart.py'}",
      f"--workdir={tmp_path / 'run'}",
      override,
    ]
  )
  assert code == 2
  assert re.search(message, capsys.readouterr().err)


def test_an_unknown_key_in_a_file_names_the_nearest():
  config = config_file.load_config(str(ROOT / "configs" / "quickstart.py"))
  with config.unlocked():
    config.rollout.group_sise = 4
  with pytest.raises(
    ValueError, match=r"config\.rollout\.group_sise is not a known key; did you mean 'group_size'\?"
  ):
    read_settings(config)
  config = config_file.load_config(str(ROOT / "configs" / "quickstart.py"))
  with config.unlocked():
    config.rolout = {}
  with pytest.raises(
    ValueError, match=r"config\.rolout is not a known key; did you mean 'rollout'\?"
  ):
    read_settings(config)


def test_the_paper_s_evaluation_has_all_its_files():
  config = config_file.load_config(str(ROOT / "configs" / "prism.py"))
  found = configuration.load_section(config, "prism", PrismConfig).sources
  assert len(found) == 12 and set(found) < set(scoring.METRICS)
  assert all(pathlib.Path(path).stem in BENCHMARKS for path in found.values())


# ---- keys that a file leaves at their defaults ----


def overridden(path, *arguments):
  config = config_file.load_config(str(ROOT / "configs" / path))
  matches = [config_file.OVERRIDE.fullmatch(argument) for argument in arguments]
  config_file.apply_overrides(config, matches, path)
  return config


@pytest.mark.parametrize(
  "path, argument, key, value",
  [
    ("quickstart.py", "--config.judge.int8", "judge.int8", True),
    ("quickstart.py", "--config.judge.int8=False", "judge.int8", False),
    ("quickstart.py", "--config.mesh.fsdp=2", "mesh.fsdp", 2),
    ("quickstart.py", "--config.policy.trainable=lora", "policy.trainable", "lora"),
    ("quickstart.py", "--config.policy.lora.rank=4", "policy.lora.rank", 4),
    ("quickstart.py", "--config.policy.max_pixels=4096", "policy.max_pixels", 4096),
    ("quickstart.py", "--config.policy.max_pixels=None", "policy.max_pixels", None),
    ("quickstart.py", "--config.data.bad_rows=drop", "data.bad_rows", "drop"),
    # a path: no number is meant
    ("caprl_3b.py", "--config.calibrate.captions=17", "calibrate.captions", "17"),
    ("prism.py", "--config.prism.bad_rows=drop", "prism.bad_rows", "drop"),
    (
      "pretrain_caprl.py",
      "--config.pretrain.eval_open_question={question}",
      "pretrain.eval_open_question",
      "{question}",
    ),
    (
      "pretrain_caprl.py",
      "--config.pretrain.stages.align.kinds=['a']",
      "pretrain.stages.align.kinds",
      ("a",),
    ),
    (
      "pretrain_caprl.py",
      "--config.pretrain.stages.align.kinds=a",
      "pretrain.stages.align.kinds",
      ("a",),
    ),
    ("curate.py", "--config.curate.benchmarks=('a', 'b')", "curate.benchmarks", ("a", "b")),
    ("curate.py", "--config.curate.benchmarks=a", "curate.benchmarks", ("a",)),
    ("caprl_3b.py", "--config.optimizer.weight_decay=0", "optimizer.weight_decay", 0.0),
  ],
)
def test_a_key_that_the_file_leaves_out_can_be_set(path, argument, key, value):
  config, (name, *_) = overridden(path, argument), key.split(".")
  got = config
  for part in key.split("."):
    got = got[part]
  assert got == value and type(got) is type(value) and config.is_locked
  types = keys.section_types(name)
  if len(types) == 1 and name != "calibrate":
    configuration.load_section(config, name, types[0])


@pytest.mark.parametrize(
  "argument, message",
  [
    (
      "--config.judge.int_8=True",
      r"judge\.int_8 is not a key of quickstart\.py; did you mean .*judge\.int8",
    ),
    ("--config.nowhere.size=1", r"--config\.nowhere\.size is not a key of quickstart\.py"),
    ("--config.judge.int8=perhaps", r"--config\.judge\.int8=perhaps: it must be True or False"),
    ("--config.policy.max_pixels=many", r"max_pixels=many: it must be an integer or None"),
    (
      "--config.policy.max_pixels",
      r"write --config\.policy\.max_pixels=VALUE \(an integer or None\)",
    ),
    ("--config.policy.trainable=Lora", r"trainable=Lora: it must be one of 'full'"),
    ("--config.policy.lora=1", r"--config\.policy\.lora is a section; set its keys"),
    ("--config.mesh=1", r"--config\.mesh is a section; set its keys"),
  ],
)
def test_a_key_that_no_section_has_cannot_be_set(argument, message):
  with pytest.raises(ValueError, match=message):
    overridden("quickstart.py", argument)


def test_the_schema_is_whole():
  assert {
    "judge.int8",
    "rollout.sampling.top_p",
    "policy_update.loss.kl",
    "prism.benchmarks",
  } <= set(keys.keys())
  for path in CONFIGS:
    config = config_file.load_config(str(path))
    for key in config_file.leaves(config):
      assert keys.annotation_of(key) is not None or key.startswith(
        (
          "policy.architecture",
          "policy.preprocessor",
          "pretrain_policy.architecture",
          "pretrain_policy.preprocessor",
        )
      ), f"{path.name}: {key}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_says_its_command_and_what_to_expect(path):
  text = ast.get_docstring(ast.parse(path.read_text()))
  assert f"python -m caprl_jax.main --config={path.relative_to(ROOT)}" in text
  assert re.search(r"^(Expected|Not run yet)\b", text, re.MULTILINE)
