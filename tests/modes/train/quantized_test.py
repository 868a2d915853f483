"""Mode `train` on a rounded base: it learns as on the whole one, goes on bit for bit, and writes
the checkpoint's own weights with the adapters."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import tiny

from caprl_jax.harness.metrics import read_metrics
from caprl_jax.modes import export
from caprl_jax.modes.train import run as train

# Even ids are worth most: what a random captioner can learn.
REWARD = """
import jax.numpy as jnp


def reward(tokens_BGT, valid_BGT):
  return ((tokens_BGT % 2 == 0) & valid_BGT).sum(-1) / 6.0
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tiny")
  config = tiny.write_all(folder)
  (folder / "own.py").write_text(REWARD)
  config.policy.trainable = "lora"
  config.policy.lora = dict(rank=4, alpha=8.0, base_weights="nf4")
  config.reward = dict(accuracy=0.0, custom=f"{folder / 'own.py'}:reward")
  config.optimizer = dict(learning_rate=4e-2, schedule="constant")
  config.train = dict(steps=32, sample_every=32)
  config.evaluate = dict(batch_size=8, group_images=0)
  config.checkpoint = dict(every_steps=16)
  return config


def test_a_run_on_rounded_weights(config, tmp_path, caplog):
  run = tmp_path / "run"
  with caplog.at_level(logging.INFO, "caprl_jax"):
    train.run(config, run)
  assert "nf4 base weights: at " in caplog.text
  effect = json.loads((run / "summary.json").read_text())["rounding"]
  assert 0 < effect["kl"] < 0.1 and 0 < effect["logits_rms"] < 0.5 * effect["logits_std"]
  rewards = [row["reward/mean"] for row in read_metrics(run / "metrics.jsonl")]
  assert np.mean(rewards[-8:]) > np.mean(rewards[:8]) + 0.02, rewards

  # The base is in no checkpoint, and the run goes on from one as if it had not stopped.
  kept = b"".join(p.read_bytes() for p in run.glob("checkpoints/*/state/_METADATA"))
  assert b"lora_a" in kept and b"kernel_nf4" not in kept
  again = tmp_path / "again"
  shutil.copytree(run, again)
  shutil.rmtree(again / "checkpoints" / "32")
  for name in ("policy", "adapters"):
    shutil.rmtree(again / name)
  record = json.loads((again / "record_train.json").read_text())
  del record["complete"]
  (again / "record_train.json").write_text(json.dumps(record))
  train.run(config, again)
  for name in ("adapters/adapter_model.safetensors", "policy/model.safetensors"):
    assert (run / name).read_bytes() == (again / name).read_bytes(), name

  # Written: the checkpoint's weights, which were never rounded, and the adapters' product.
  tensors = [
    safetensors.numpy.load_file(path / name)
    for path, name in (
      (tmp_path.joinpath(config.policy.checkpoint), "model.safetensors"),
      (run / "policy", "model.safetensors"),
      (run / "adapters", "adapter_model.safetensors"),
    )
  ]
  base, merged, adapters = tensors
  assert base.keys() == merged.keys() and len(adapters) == 2 * 7 * 2
  for name, value in base.items():
    module = name.removesuffix(".weight").replace("model.layers.", "model.language_model.layers.")
    a, b = (adapters.get(f"base_model.model.{module}.lora_{x}.weight") for x in "AB")
    want = value if a is None else value + 2.0 * b @ a
    np.testing.assert_allclose(merged[name], want, rtol=1e-6, atol=1e-6, err_msg=name)

  config.export = dict(output=str(tmp_path / "exported"), run=str(run), dtype="float32")
  export.run(config, tmp_path / "export")
  exported = safetensors.numpy.load_file(tmp_path / "exported" / "model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, exported, merged)


def test_only_what_is_not_trained_can_be_rounded(config, tmp_path):
  other = config.copy_and_resolve_references()
  other.policy.trainable = "decoder"
  with pytest.raises(ValueError, match=r"base_weights = 'nf4' and trainable = 'decoder'"):
    train.run(other, tmp_path)
  other = config.copy_and_resolve_references()
  other.rollout.weights = "int8"
  with pytest.raises(ValueError, match=r"weights = 'int8' and policy.lora.base_weights = 'nf4'"):
    train.run(other, tmp_path)
