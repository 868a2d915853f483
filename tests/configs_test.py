"""Every file in configs/: built, overridden, and its sections read."""

import pathlib
import re
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from caprl_jax import main, sharding
from caprl_jax.config import loading as config_file
from caprl_jax.config import schema as configuration
from caprl_jax.data.readers import benchmarks
from caprl_jax.harness import sections as shared_sections
from caprl_jax.harness.settings import KNOWN_SECTIONS, read_settings
from caprl_jax.inference import endpoint
from caprl_jax.modes import demo, export, plan, sections, sft
from caprl_jax.modes.caption import run as caption
from caprl_jax.modes.curate import run as curation
from caprl_jax.modes.dataset import run as dataset
from caprl_jax.modes.gallery import run as gallery
from caprl_jax.modes.pretrain import policy as pretrain_policy
from caprl_jax.modes.pretrain import run as pretrain
from caprl_jax.modes.prism import run as prism
from caprl_jax.rl.optimizer import build_optimizer
from caprl_jax.scoring import answers as scoring

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_built_and_read(path):
  config = config_file.load_config(str(path))
  assert config.is_locked
  plain = configuration.to_plain(config)  # what a checkpoint keeps of it
  assert plain["mode"] == config.mode and isinstance(config.get("seed", 0), int)
  modes = main._modes(config)
  assert modes
  for mode in modes:
    if mode == "sft":
      cfg = configuration.load_section(config, "sft", sft.SFTConfig)
      section = configuration.load_section(config, "policy", sft.NewPolicyConfig)
      configuration.load_section(config, "mesh", sharding.MeshConfig)
      assert section.checkpoint or (section.architecture and section.tokenizer)
      for phase in cfg.phases:
        build_optimizer(phase.optimizer, phase.steps)
        assert phase.steps > 0 and all(weight > 0 for weight, _ in phase.templates)
    elif mode == "pretrain":
      cfg = configuration.load_section(config, "pretrain", pretrain.PretrainConfig)
      configuration.load_section(config, "pretrain_policy", pretrain_policy.PretrainPolicyConfig)
      for stage in cfg.stages.values():
        build_optimizer(stage.optimizer, 100)
    elif mode == "caption":
      configuration.load_section(config, "caption", caption.CaptionConfig)
      configuration.load_section(config, "policy", shared_sections.PolicySection)
    elif mode == "evaluate" and "prism" in config:
      cfg = configuration.load_section(config, "prism", prism.PrismConfig)
      assert prism.named(cfg.captioners, "") and prism.named(cfg.benchmarks, "")
      configuration.load_section(config, "policy", shared_sections.PolicySection)
      configuration.load_section(config, "judge", shared_sections.JudgeSection)
    elif mode == "curate":
      configuration.load_section(config, "curate", curation.CurateConfig)
      configuration.load_section(config, "endpoint", endpoint.EndpointConfig)
      for section in ("generator", "answerer"):
        configuration.load_section(config, section, shared_sections.PolicySection)
    elif mode == "dataset":
      configuration.load_section(config, "dataset", dataset.DatasetConfig)
    elif mode == "gallery":
      assert configuration.load_section(config, "gallery", gallery.GalleryConfig).files
      configuration.load_section(config, "judge", shared_sections.JudgeSection)
    elif mode == "demo":
      configuration.load_section(config, "demo", demo.DemoConfig)
      configuration.load_section(config, "policy", shared_sections.PolicySection)
      configuration.load_section(config, "judge", shared_sections.JudgeSection)
    elif mode == "export":
      configuration.load_section(config, "export", export.ExportConfig)
      configuration.load_section(config, "policy", shared_sections.PolicySection)
    else:
      configuration.load_section(config, "plan", plan.PlanConfig)
      settings = read_settings(config)
      build_optimizer(settings.optimizer, settings.train.steps)
      assert settings.train.steps > 0


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
  found = prism.named(
    config_file.load_config(str(ROOT / "configs" / "prism.py")).prism.benchmarks, ""
  )
  assert len(found) == 12 and set(found) < set(scoring.METRICS)
  assert all(pathlib.Path(path).stem in benchmarks.BENCHMARKS for path in found.values())


# ---- keys that a file leaves at their defaults ----


def overridden(path, *arguments):
  config = config_file.load_config(str(ROOT / "configs" / path))
  matches = [config_file.OVERRIDE.fullmatch(argument) for argument in arguments]
  config_file.apply_overrides(config, matches, path, lambda: sections)
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
    ("caprl_3b.py", "--config.optimizer.weight_decay=0", "optimizer.weight_decay", 0.0),
  ],
)
def test_a_key_that_the_file_leaves_out_can_be_set(path, argument, key, value):
  config, (name, *_) = overridden(path, argument), key.split(".")
  got = config
  for part in key.split("."):
    got = got[part]
  assert got == value and type(got) is type(value) and config.is_locked
  if len(sections.SECTIONS[name]) == 1 and name != "calibrate":
    configuration.load_section(config, name, sections.SECTIONS[name][0])


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


def test_the_schema_leaves_logging_and_devices_alone():
  """It is read before the log is set up and before processes find each other, which must come
  before any device.
  """
  program = (
    "import logging; from caprl_jax import main; main._schema(); from jax._src import "
    "xla_bridge; print(logging.root.handlers, xla_bridge.backends_are_initialized())"
  )
  made = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
  assert made.stdout == "[] False\n", made.stderr


def test_the_schema_is_whole():
  assert set(sections.SECTIONS) == set(KNOWN_SECTIONS)
  known = sections.keys()
  assert {
    "judge.int8",
    "rollout.sampling.top_p",
    "policy_update.loss.kl",
    "prism.benchmarks",
  } <= set(known)
  for path in CONFIGS:
    config = config_file.load_config(str(path))
    for key in config_file._leaves(config):
      assert sections.annotation_of(key) is not None or key.startswith(
        (
          "policy.architecture",
          "policy.preprocessor",
          "pretrain_policy.architecture",
          "pretrain_policy.preprocessor",
        )
      ), f"{path.name}: {key}"
