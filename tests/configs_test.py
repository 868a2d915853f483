"""Every file in configs/: built, overridden, and its sections read."""

import pathlib
import re

import pytest

from caprl_jax import (
  caption, config_file, configuration, curation, dataset, demo, endpoint, export, gallery, main, plan, pretrain,
  pretrain_policy, prism, setup_run, sft, sharding,
)  # fmt: skip
from caprl_jax.optimizer import build_optimizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
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
      configuration.load_section(config, "policy", setup_run.PolicySection)
    elif mode == "evaluate" and "prism" in config:
      cfg = configuration.load_section(config, "prism", prism.PrismConfig)
      assert prism.named(cfg.captioners, "") and prism.named(cfg.benchmarks, "")
      configuration.load_section(config, "policy", setup_run.PolicySection)
      configuration.load_section(config, "judge", setup_run.JudgeSection)
    elif mode == "curate":
      configuration.load_section(config, "curation", curation.CurationConfig)
      configuration.load_section(config, "endpoint", endpoint.EndpointConfig)
      for section in ("generator", "answerer"):
        configuration.load_section(config, section, setup_run.PolicySection)
    elif mode == "dataset":
      configuration.load_section(config, "dataset", dataset.DatasetConfig)
    elif mode == "gallery":
      assert configuration.load_section(config, "gallery", gallery.GalleryConfig).files
      configuration.load_section(config, "judge", setup_run.JudgeSection)
    elif mode == "demo":
      configuration.load_section(config, "demo", demo.DemoConfig)
      configuration.load_section(config, "policy", setup_run.PolicySection)
      configuration.load_section(config, "judge", setup_run.JudgeSection)
    elif mode == "export":
      configuration.load_section(config, "export", export.ExportConfig)
      configuration.load_section(config, "policy", setup_run.PolicySection)
    else:
      configuration.load_section(config, "plan", plan.PlanConfig)
      settings = setup_run.read_settings(config)
      build_optimizer(settings.optimizer, settings.train.steps)
      assert settings.train.steps > 0


def test_the_quickstart_s_files_are_here():
  assert {path.stem for path in CONFIGS} >= {"quickstart", "quickstart_sft"}
  settings = setup_run.read_settings(config_file.load_config(str(ROOT / "configs" / "quickstart.py")))
  assert (pathlib.Path(settings.policy.checkpoint) / "config.json").is_file()
  assert settings.data.train == "easy_vqa:train" and settings.data.eval == "easy_vqa:test"


@pytest.mark.parametrize(
  "override, message",
  [
    ("--config.optimizer.learning_rat=1",
     r"optimizer\.learning_rat is not a key of .*did you mean --config\.optimizer\.learning_rate\?"),
    ("--config.update.loss.clip_hihg=1", r"did you mean --config\.update\.loss\.clip_high"),
    ("--config.group_size=4", r"did you mean --config\.rollout\.group_size"),
    ("--config.rollout=4", r"--config\.rollout is a section"),
  ],
)
def test_an_unknown_key_names_the_nearest(override, message, tmp_path, capsys):
  code = main.main(
      ["main", f"--config={ROOT / 'configs' / 'quickstart.py'}", f"--workdir={tmp_path / 'run'}", override])
  assert code == 2
  assert re.search(message, capsys.readouterr().err)


def test_an_unknown_key_in_a_file_names_the_nearest():
  config = config_file.load_config(str(ROOT / "configs" / "quickstart.py"))
  with config.unlocked():
    config.rollout.group_sise = 4
  with pytest.raises(ValueError, match=r"config\.rollout\.group_sise is not a known key; did you mean 'group_size'\?"):
    setup_run.read_settings(config)
  config = config_file.load_config(str(ROOT / "configs" / "quickstart.py"))
  with config.unlocked():
    config.rolout = {}
  with pytest.raises(ValueError, match=r"config\.rolout is not a known key; did you mean 'rollout'\?"):
    setup_run.read_settings(config)
