"""What is trained and what is not; adapters, alone, merged, and in PEFT."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from helpers import oracle, tiny

from caprl_jax import sharding
from caprl_jax.hub.load import load_policy, with_new_adapters, without_adapters
from caprl_jax.hub.lora import merge_lora, save_adapters
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.layers import LoraConfig
from caprl_jax.models.trainable import (
  is_lora,
  merge_params,
  merge_trees,
  split_lora,
  split_params,
  trainable_filter,
)
from caprl_jax.modes.train import run as train

LORA = LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"))


def flat(tree):
  return {".".join(p.key for p in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_split_and_merge_are_inverse():
  tree = {"a": {"x": 1, "y": 2}, "b": {"c": {"x": 3}}}
  chosen, rest = split_params(tree, lambda path: path.endswith("x"))
  assert chosen == {"a": {"x": 1}, "b": {"c": {"x": 3}}} and rest == {"a": {"y": 2}}
  assert merge_trees(chosen, rest) == tree == merge_trees(rest, chosen) == merge_params(tree, None)
  assert split_params(tree, lambda path: True) == (tree, {})


@pytest.mark.parametrize("case", ["qwen2_5_vl", "qwen3_vl", "internvl-qwen3"])
def test_what_each_kind_trains(case):
  pair = oracle.make_pair(case)
  names = flat(pair.params)
  chosen = {
    kind: {n for n in names if trainable_filter(kind, pair.cfg.family)(n)}
    for kind in ("full", "decoder", "projector", "lora")
  }
  assert chosen["full"] == set(names) and not chosen["lora"]
  assert chosen["decoder"] == {n for n in names if n.startswith("language_model.")}
  assert chosen["projector"] and all("merger" in n or "projector" in n for n in chosen["projector"])
  assert not any("blocks" in n or "visual.layer." in n for n in chosen["projector"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A directory with transformers' random Qwen2.5-VL, and ours with random adapters on it."""
  pair = oracle.make_pair("qwen2_5_vl")
  folder = tmp_path_factory.mktemp("base")
  pair.theirs.save_pretrained(folder)
  pair.processor.save_pretrained(folder)
  vocab = {chr(ord("a") + i): i for i in range(26)}
  import tokenizers

  (folder / "tokenizer.json").write_text(
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [])).to_str()
  )
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  loaded = load_policy(str(folder), mesh, lora=LORA)
  rng = np.random.default_rng(0)
  noise = lambda path, x: (
    x + (rng.normal(size=x.shape) * 0.1).astype(np.float32) if is_lora(path) else x
  )
  params = jax.tree_util.tree_map_with_path(
    lambda p, x: noise(".".join(k.key for k in p), x), loaded.params
  )
  return folder, loaded, params, pair


def logits(model, params, images, prompts):
  return np.asarray(_logits(params, images, prompts, model))


@functools.partial(jax.jit, static_argnames="model")  # op by op it would be a hundred programs
def _logits(params, images, prompts, model):
  hidden, _ = model.apply({"params": params}, images, prompts, method="prefill")
  return hidden @ head_matrix(model.cfg.text, params["language_model"]).T


def test_new_adapters_change_nothing(base):
  _, loaded, _, pair = base
  images, prompts = oracle.batch(pair.cfg)
  got, want = (
    logits(m, p, images, prompts)
    for m, p in ((loaded.model, loaded.params), (pair.ours, pair.params))
  )
  np.testing.assert_array_equal(got, want)
  _, adapters = split_lora(loaded.params)
  assert {n.split(".")[-2] for n in flat(adapters)} == set(LORA.targets)
  a, b = (flat(adapters)[f"language_model.layers.self_attn.q_proj.lora_{x}"] for x in "ab")
  assert a.shape == (3, 48, 3) and b.shape == (3, 3, 48)
  assert 0.9 / np.sqrt(48) < np.abs(a).max() < 1 / np.sqrt(48) and not np.asarray(b).any()


def test_adapters_are_float32_on_a_base_of_any_type(base):
  """bfloat16 would round most steps of an optimizer away."""
  folder, loaded, _, _ = base
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  coarse = load_policy(str(folder), mesh, jnp.bfloat16, jnp.bfloat16, lora=LORA)
  again = with_new_adapters(without_adapters(coarse), LORA, mesh)
  for one in (coarse, again):
    rest, adapters = split_lora(one.params)
    assert {x.dtype for x in jax.tree.leaves(rest)} == {jnp.dtype("bfloat16")}
    for name, x in flat(adapters).items():
      np.testing.assert_array_equal(x, flat(split_lora(loaded.params)[1])[name])


def test_merged_adapters_give_the_same_logits(base):
  _, loaded, params, pair = base
  images, prompts = oracle.batch(pair.cfg)
  merged = merge_lora(params, LORA)
  assert not any(is_lora(n) for n in flat(merged))
  apart, together = (
    logits(loaded.model, params, images, prompts),
    logits(pair.ours, merged, images, prompts),
  )
  # they do something
  assert np.abs(together - logits(pair.ours, pair.params, images, prompts)).max() > 0.1
  valid = np.asarray(prompts.valid_BP)
  np.testing.assert_allclose(together[valid], apart[valid], atol=2e-4 * np.abs(apart).max())


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="pip install peft")
def test_peft_loads_the_adapters(base, tmp_path):
  import peft

  folder, loaded, params, pair = base
  save_adapters(tmp_path, params, LORA, str(folder))
  theirs = transformers.AutoModelForImageTextToText.from_pretrained(
    folder, attn_implementation="eager"
  )
  theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
  adapted = [n for n, _ in theirs.named_modules() if n.endswith("lora_A.default")]
  # three layers, three maps each
  assert len(adapted) == 3 * 3 and all("language_model" in n for n in adapted)
  images, prompts = oracle.batch(pair.cfg)
  ours = logits(loaded.model, params, images, prompts)
  for i, picture in enumerate(oracle.pictures()[:2]):
    valid = np.asarray(prompts.valid_BP[i])
    with torch.no_grad():
      want = theirs(**pair.inputs(picture, prompts.tokens_BP[i][valid])).logits[0].numpy()
    assert oracle.relative_error(ours[i][valid], want) < 1e-4


def test_a_run_with_adapters_changes_only_them(tmp_path):
  config = tiny.write_all(tmp_path / "made")
  config.policy.trainable = "lora"
  config.policy.lora = dict(rank=2, alpha=4.0, targets=("q_proj", "up_proj"))
  config.train.steps = 2
  train.run(config, tmp_path / "run")
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  before, after = (
    flat(load_policy(str(p), mesh).params)
    for p in (config.policy.checkpoint, tmp_path / "run" / "policy")
  )
  moved = {n for n in before if np.abs(before[n] - after[n]).max() > 0}
  assert moved == {
    "language_model.layers.self_attn.q_proj.kernel",
    "language_model.layers.mlp.up_proj.kernel",
  }
  assert {p.name for p in (tmp_path / "run" / "adapters").iterdir()} == {
    "adapter_config.json",
    "adapter_model.safetensors",
  }


@pytest.mark.parametrize("kind", ["decoder", "projector", "lora"])
def test_what_is_not_trained_has_no_optimizer_state(kind, base):
  _, loaded, params, pair = base
  chosen, rest = split_params(params, trainable_filter(kind, pair.cfg.family))
  tx = optax.adamw(1e-3)
  state = jax.eval_shape(tx.init, chosen)
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert size(state) == 2 * size(chosen) + 1 and size(chosen) + size(rest) == size(params)
