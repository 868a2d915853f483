"""Presets: what they fill in, what stands, and that each is read by every recipe."""

import ml_collections
import pytest
from helpers.paths import ROOT

from caprl_jax import main
from caprl_jax.api import training
from caprl_jax.config import loading as config_file
from caprl_jax.config import presets
from caprl_jax.harness.settings import read_settings

PROMPT = "Please describe this image in detail."


def settings(*overrides: str, config="caprl_3b", tmp_path=None):
  options = main._define_flags()
  argv = [
    "main",
    f"--config={ROOT / 'configs' / config}.py",
    f"--workdir={tmp_path / 'run'}",
    *overrides,
  ]
  return read_settings(main._parse(options, argv)[0])


def test_the_released_recipe(tmp_path):
  made = settings(tmp_path=tmp_path)
  judge, loss = made.step.judge, made.step.update.loss
  assert (judge.reading, judge.prompt, judge.abstain, judge.abstain_letter) == (
    "generate",
    "official",
    "last",
    "next",
  )
  assert (judge.draws, judge.replacement, judge.independent, judge.shuffle) == (
    8,
    True,
    True,
    False,
  )
  assert (judge.temperature, judge.max_tokens) == (0.6, 10)
  assert made.step.reward.accuracy == 2.0 and made.step.advantage.estimator == "rloo"
  assert made.step.advantage.whiten == "released" and loss.surrogate == "reinforce" and loss.kl == 0
  assert made.step.rollout.group_size == 8 and made.step.rollout.sampling.max_tokens == 4096
  assert (
    made.optimizer.learning_rate,
    made.optimizer.warmup_steps,
    made.optimizer.final_fraction,
  ) == (1e-6, 20, 0.1)
  assert (loss.aggregation, loss.set_captions) == ("set_token_mean", 4)  # OpenRLHF's micro-batches
  assert made.step.rollout.end_cut
  assert made.optimizer.schedule_steps == 17_640 and made.optimizer.warmup_from_zero
  assert made.data.batch_size == 128 and made.step.update.microbatches == 16  # the file's own


def test_paper_and_released_code_differ_where_they_do(tmp_path):
  paper, plus = (
    settings(f"--config.preset={name}", tmp_path=tmp_path) for name in ("paper", "official_caprlpp")
  )
  assert (
    paper.step.advantage.estimator == "grpo"
    and paper.step.update.loss.kl > 0
    and paper.step.judge.shuffle
  )
  assert plus.step.advantage.whiten == "none" and plus.step.judge.abstain_letter == "F"
  assert plus.step.reward.length == 0.2 and plus.step.update.loss.aggregation == "sequence_mean"
  assert plus.optimizer.learning_rate == 1e-5 and plus.optimizer.schedule == "constant"
  assert plus.step.update.loss.dual_clip == 3.0
  assert (plus.optimizer.b2, plus.optimizer.weight_decay) == (0.999, 0.01)  # verl's defaults


@pytest.mark.parametrize(
  "config, judge",
  [
    ("caprl_internvl35_8b", "Qwen/Qwen2.5-3B-Instruct"),
    ("caprl_qwen3vl_2b", "Qwen/Qwen3-4B-Instruct-2507"),
    ("caprl_qwen3vl_4b", "Qwen/Qwen3-4B-Instruct-2507"),
  ],
)
def test_the_recipes_of_other_captioners(config, judge, tmp_path):
  made = settings(config=config, tmp_path=tmp_path)
  assert made.judge.source == judge
  assert made.policy.min_pixels is made.policy.max_pixels is None
  verl = "qwen3vl" in config
  assert made.policy.param_dtype == ("bfloat16" if verl else "float32")
  space = " " if verl else ""  # verl keeps the one behind the data's <image>
  assert made.policy.instruction == f"{space}{PROMPT}"


def test_an_optimizer_with_its_own_rate_is_the_files(tmp_path):
  made = settings("--config.preset=official_caprl_3b", config="quickstart", tmp_path=tmp_path)
  file = config_file.load_config(str(ROOT / "configs" / "quickstart.py"))
  assert made.optimizer.schedule_steps is None
  assert made.optimizer.warmup_steps == file.optimizer.warmup_steps
  made = settings("--config.optimizer.learning_rate=2e-6", tmp_path=tmp_path)
  assert made.optimizer.schedule_steps == 17_640 and made.optimizer.learning_rate == 2e-6


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("config", ["caprl_3b", "quickstart", "colab_lora"])
def test_every_preset_is_read(name, config, tmp_path):
  made = settings(f"--config.preset={name}", config=config, tmp_path=tmp_path)
  preset = presets.PRESETS[name]
  assert (
    made.step.judge.prompt == "official" and made.step.judge.reading == preset["judge"]["reading"]
  )
  assert made.step.advantage.estimator == preset["advantage"]["estimator"]
  assert made.step.update.loss.kl == preset["policy_update"]["loss"].get("kl", 0)
  assert made.data.shape_buckets == (1 if name.startswith("official") else None)
  if config != "caprl_3b":  # models, sizes and optimizer are the file's
    file = config_file.load_config(str(ROOT / "configs" / f"{config}.py"))
    assert (
      made.judge.source == file.judge.source
      and made.optimizer.learning_rate == file.optimizer.learning_rate
    )
    assert made.step.rollout.sampling.max_tokens == file.rollout.sampling.max_tokens


def test_what_the_config_says_stands(tmp_path):
  made = settings(
    "--config.preset=paper",
    "--config.judge.draws=4",
    "--config.policy_update.loss.kl=0.01",
    tmp_path=tmp_path,
  )
  # overridden though only the preset has them
  assert made.step.judge.draws == 4 and made.step.update.loss.kl == 0.01
  config = ml_collections.ConfigDict(dict(preset="paper", judge=dict(draws=3)))
  presets.expand(config)
  once = config.to_dict()
  presets.expand(config)
  assert config.judge.draws == 3 and config.judge.reading == "generate" and config.to_dict() == once


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_an_ablation_stays_what_it_is_under_another_preset(preset, tmp_path):
  flag = f"--config.preset={preset}"
  made = settings(flag, config="ablations/sampling_rounds", tmp_path=tmp_path)
  assert made.step.judge.draws == 1 and made.step.judge.shuffle
  assert made.step.advantage.estimator == presets.PRESETS[preset]["advantage"]["estimator"]
  for name, reading in (("sees_image", "letter_prob"), ("writes_scores", "generate")):
    made = settings(flag, config=f"ablations/judge_{name}", tmp_path=tmp_path)
    assert made.judge.sees_image and made.judge.reading == reading and made.judge.draws == 0


def test_a_judge_that_sees_the_image_keeps_its_section():
  judge = dict(source="x", sees_image=True, reading="letter_prob", temperature=0.3)
  for own in (None, "paper"):  # in the file, or on the command line
    config = config_file.load_config(str(ROOT / "configs" / "quickstart.py")).unlock()
    config.judge, config.reward = judge, dict(length=0.7)
    config.gate.ideal, config.question_filter.informed = None, ()
    config.preset = own
    presets.rename(config, "paper")
    found = read_settings(config)
    assert found.judge.reading == "letter_prob" and found.judge.temperature == 0.3
    assert found.judge.prompt == "plain" and found.step.advantage.estimator == "grpo"
    assert found.step.reward.length == (0.7 if own else 0.0)


@pytest.mark.parametrize(
  "config, preset, policy",
  [
    ("caprl_qwen3vl_4b", "official_caprl_3b", ("float32", PROMPT, 3136, 1_000_000)),
    ("caprl_3b", "official_caprlpp", ("bfloat16", f" {PROMPT}", None, None)),
    ("caprl_3b", "paper", ("float32", PROMPT, 3136, 1_000_000)),
    ("quickstart", "official_caprlpp", ("float32", PROMPT, None, None)),  # the file's
  ],
)
def test_prompt_pixels_and_parameters_are_the_presets(config, preset, policy, tmp_path):
  made = settings(f"--config.preset={preset}", config=config, tmp_path=tmp_path).policy
  found = (made.param_dtype, made.instruction, made.min_pixels, made.max_pixels)
  assert found == policy


def test_a_preset_named_in_python_is_the_command_lines(tmp_path):
  path = str(ROOT / "configs" / "caprl_3b.py")
  for name in presets.PRESETS:
    made = read_settings(training.load_config(path, {"judge.draws": 3, "preset": name}))
    flags = (f"--config.preset={name}", "--config.judge.draws=3")
    assert made == settings(*flags, tmp_path=tmp_path), name


@pytest.mark.parametrize("name", ["caprl_3b", "ablations/judge_size", "gpu_24gb_lora"])
def test_a_preset_named_too_late_is_refused(name):
  path = ROOT / "configs" / f"{name}.py"
  config = training.load_config(path, {"reward.accuracy": 1.0})
  config.preset = "paper"
  with pytest.raises(ValueError, match="filled in with 'official_caprl_3b' already.*load_config"):
    read_settings(config)


def test_bfloat16_parameters_that_would_not_move_are_told(tmp_path, caplog):
  flag = "--config.policy.param_dtype=bfloat16"
  settings(flag, tmp_path=tmp_path)
  assert "most steps are smaller than what a bfloat16 parameter can move by" in caplog.text
  caplog.clear()
  settings(config="caprl_qwen3vl_4b", tmp_path=tmp_path)  # at 1e-5
  settings(config="gpu_24gb_lora", tmp_path=tmp_path)  # its adapters are float32
  settings(flag, "--config.mode=evaluate", tmp_path=tmp_path)  # nothing is trained
  assert "bfloat16 parameter" not in caplog.text


def test_an_unknown_preset_is_named(tmp_path):
  with pytest.raises(ValueError, match="preset = 'papr' is none of .*'paper'"):
    settings("--config.preset=papr", tmp_path=tmp_path)
