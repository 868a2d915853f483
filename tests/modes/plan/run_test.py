"""Published sizes, and the step compiled ahead of time, also for a TPU where libtpu is."""

import importlib.util
import json
import logging
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import pytest
from helpers.paths import ROOT

from caprl_jax import sharding
from caprl_jax.config import loading as config_file
from caprl_jax.harness.settings import read_settings
from caprl_jax.hub.load import init_decoder, init_policy
from caprl_jax.hub.published_configs import CONFIGS
from caprl_jax.models.decoder import DecoderConfig
from caprl_jax.models.families import is_vision_language
from caprl_jax.models.policy import PolicyConfig
from caprl_jax.modes.plan import changes, compiling, report
from caprl_jax.modes.plan import run as plan_run
from caprl_jax.modes.plan.abstract import shallower
from caprl_jax.modes.plan.chips import machine_of
from caprl_jax.modes.plan.estimate import Known, estimate
from caprl_jax.modes.plan.section import PlanConfig

LIBTPU = os.environ.get("CAPRL_JAX_LIBTPU", "")  # launch/test.sh puts it where jax does not see it
HAS_LIBTPU = (
  pathlib.Path(LIBTPU, "libtpu").is_dir()
  if LIBTPU
  else importlib.util.find_spec("libtpu") is not None
)

# libtpu then takes half the time, and the program is what it is for a TPU.
LITTLE_EFFORT = {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"}

# Parameters of the files on the Hugging Face hub.
COUNTS = {
  "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
  "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
  "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
  "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
  "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
  "OpenGVLab/InternVL3_5-1B-HF": 1_060_897_792,
  "OpenGVLab/InternVL3_5-2B-HF": 2_348_347_392,
  "OpenGVLab/InternVL3_5-4B-HF": 4_732_489_216,
  "OpenGVLab/InternVL3_5-8B-HF": 8_528_318_464,
  "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
  "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
  "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
  "Qwen/Qwen3-0.6B": 596_049_920,
  "Qwen/Qwen3-4B": 4_022_468_096,
  "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
}


def parameter_count(config: dict) -> int:
  """Parameters of the model of a config.json, without any memory."""
  init = (
    init_policy(PolicyConfig.from_hf(config))
    if is_vision_language(config)
    else init_decoder(DecoderConfig.from_hf(config))
  )
  boxed = sharding.abstract_params(lambda: init(jax.random.key(0)))
  return sum(x.size for x in jax.tree.leaves(nn.unbox(boxed)))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_as_many_as_published(name):
  assert parameter_count(CONFIGS[name]) == COUNTS[name]


@pytest.mark.parametrize(
  "name",
  [
    *("caprl_3b", "caprl_qwen3vl_2b", "caprl_qwen3vl_4b", "caprl_internvl35_8b", "colab_lora"),
    *("gpu_h100x8", "gpu_24gb_lora"),
  ],
)
def test_the_recipes_name_published_models(name):
  config = config_file.load_config(str(ROOT / "configs" / f"{name}.py"))
  assert config.policy.checkpoint in COUNTS and config.judge.source in COUNTS


def test_a_shallower_model_has_the_same_width():
  config = shallower(CONFIGS["Qwen/Qwen3-VL-2B-Instruct"], 2)
  assert config["text_config"]["num_hidden_layers"] == config["vision_config"]["depth"] == 2
  assert config["vision_config"]["deepstack_visual_indexes"] == [1]
  assert config["text_config"]["hidden_size"] == 2048
  # the table is as it was
  assert CONFIGS["Qwen/Qwen3-VL-2B-Instruct"]["vision_config"]["depth"] == 24


def test_largest_arrays():
  text = """
    %a = f32[4,1024,1024]{2,1,0} fusion(%b), kind=kLoop
    ROOT %c = bf16[1024,1024]{1,0:T(8,128)} dot(%a, %a)
    %d = f32[9999999999]{0} parameter(0)"""
  assert compiling.largest_arrays(text) == [
    (4 / 256, "f32[4,1024,1024]", "fusion", 1),
    (1 / 512, "bf16[1024,1024]", "dot", 1),
  ]


def command(tmp_path, *more, config="colab_lora"):
  return subprocess.run(
    [
      sys.executable,
      "-m",
      "caprl_jax.main",
      f"--config=configs/{config}.py",
      "--config.mode=plan",
      f"--workdir={tmp_path}",
      "--config.plan.layers=1",
      *more,
    ],
    cwd=ROOT,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      **LITTLE_EFFORT,
      "PYTHONPATH": os.pathsep.join(p for p in (LIBTPU, os.environ.get("PYTHONPATH")) if p),
    },
    capture_output=True,
    text=True,
    timeout=1100,
  )


@pytest.mark.parametrize("name", ["sees_image", "writes_scores"])
def test_a_judge_that_sees_the_image_is_planned_with_its_tower(name):
  """Lowered for this machine, of reduced depth."""
  path = ROOT / "configs" / "ablations" / f"judge_{name}.py"
  config = config_file.load_config(str(path)).unlock()
  config.data.update(batch_size=2)
  config.rollout = dict(group_size=2, sampling=dict(max_tokens=8))
  config.policy_update.microbatches = config.judge.microbatches = 1
  settings = read_settings(config)
  small = PlanConfig(topology=None, image=(56, 84), judge_prompt_tokens=16, layers=1)
  lowered, sizes = compiling.lower_step(settings, small, jax.devices()[:1])
  judge = shallower(CONFIGS["Qwen/Qwen2.5-VL-3B-Instruct"], 1)
  assert sizes["judge"] == 2 * parameter_count(judge)  # bytes in bfloat16
  assert "while" in lowered.as_text()  # the rollout's loop: it is the whole step


def test_a_judge_that_writes_scores_takes_time_for_them():
  scored, written = (
    estimate_of(
      config_file.load_config(str(ROOT / "configs" / "ablations" / f"judge_{name}.py")),
      "v5p:2x2x2",
    )
    for name in ("sees_image", "writes_scores")
  )
  assert written.stages["judge"].secs > 1.2 * scored.stages["judge"].secs
  assert sum(written.memory.stages["judge"].values()) > sum(scored.memory.stages["judge"].values())


@pytest.mark.parametrize("kind", ["endpoint", "custom"])
def test_a_step_without_a_judge_on_the_chips(kind, tmp_path, caplog):
  """Estimated, and lowered at reduced depth for this machine."""
  path = str(ROOT / "configs" / "caprl_3b_v5e16.py")
  whole = estimate_of(config_file.load_config(path))
  config = config_file.load_config(path).unlock()
  if kind == "endpoint":
    config.judge.endpoint = dict(url="http://localhost:1/v1", model="big")
    config.judge.update(reading="generate", abstain="last")
  else:
    config.judge.source, config.reward = "", dict(custom="mine.py:words")
  found = estimate_of(config)
  assert "judge" not in found.memory.arguments and list(found.stages) == ["rollout", "update"]
  judge = whole.memory.arguments["judge"]
  assert found.memory.total <= whole.memory.total - judge
  said = report.estimate_text(found, PlanConfig(), machine_of("v5e:4x4"))
  named = {"endpoint": "big (http://localhost:1/v1)", "custom": "there is no judge"}[kind]
  assert named in said and "judge.int8" not in said
  assert all("judge" not in name for name, _ in changes.changes(found.settings, 16))

  config.data.update(batch_size=2)
  config.rollout = dict(group_size=2, sampling=dict(max_tokens=8))
  config.policy_update.microbatches = config.judge.microbatches = 1
  config.mesh = dict(data=1, fsdp=1, tensor=1)
  lowered, sizes = compiling.lower_step(
    read_settings(config), PlanConfig(topology=None, image=(56, 84), layers=1), jax.devices()[:1]
  )
  assert sizes["judge"] == 0 and sizes["policy, trained"] > 0
  assert "while" in lowered.as_text()


def estimate_of(config, machine="v5e:4x4"):
  settings, plan = read_settings(config), PlanConfig()
  return estimate(settings, Known.of(settings, plan), machine_of(machine), 1.0)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="pip install libtpu")
def test_the_step_compiles_for_a_tpu(tmp_path):
  """The LoRA config on one v5e chip, of reduced depth, its moments in the host's memory."""
  done = command(tmp_path, "--config.optimizer.moment_memory=host")
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / "plan.json").read_text())
  assert report["devices"] == 1 and 0 < report["gib_per_device"]["total"] < 16
  frozen, trained = (
    report["gib_all_devices"]["policy, frozen"],
    report["gib_all_devices"]["policy, trained"],
  )
  assert trained < frozen / 100
  moments = report["gib_all_devices"]["optimizer"]
  assert report["gib_per_device"]["host"] == pytest.approx(moments, rel=0.01)
  assert report["gib_per_device"]["arguments"] == pytest.approx(
    sum(report["gib_all_devices"].values()) - moments, rel=0.02
  )
  # Nothing of [caption tokens of the batch, vocabulary] in float32 or more: 4 images x 4 captions x
  # 64 tokens.
  assert all("[1024,151936]" not in what for _, what, _, _ in report["largest"])


def test_without_a_compiler_there_is_the_estimate(tmp_path, monkeypatch, caplog):
  caplog.set_level(logging.INFO, "caprl_jax")
  config = config_file.load_config(str(ROOT / "configs" / "colab_lora.py")).unlock()
  config.plan = dict(topology="v5e:1x1")
  monkeypatch.setattr(plan_run, "can_compile", lambda topology: False)
  plan_run.run(config, tmp_path)
  assert "not compiled, since libtpu is not installed" in caplog.text
  written = json.loads((tmp_path / "plan.json").read_text())
  assert "estimate" in written and "gib_per_device" not in written


def test_a_missing_topology_is_said(tmp_path):
  done = command(tmp_path, "--config.plan.topology=v9:1x1")
  assert done.returncode == 2 and "v9:1x1" in done.stderr and "pip install libtpu" in done.stderr
