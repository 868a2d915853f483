"""Mode `export`: what it writes is what transformers reads, bit for bit."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from helpers import captioner_directory, tiny

from caprl_jax import main, sharding
from caprl_jax.hub.load import load_policy
from caprl_jax.modes.train import run as train


def export(output, *more):
  return main.main(
    [
      "main",
      "--config=configs/export.py",
      f"--config.export.output={output}",
      f"--workdir={output.parent / 'work'}",
      *more,
    ]
  )


def load(path):
  return load_policy(str(path), sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize("case", ["qwen2_5_vl", "qwen3_vl-tied", "internvl-qwen3"])
def test_a_checkpoint_comes_out_as_it_went_in(case, tmp_path):
  source, output = tmp_path / "source", tmp_path / "output"
  captioner_directory.write_checkpoint(source, case)
  assert (
    export(
      output,
      f"--config.policy.checkpoint={source}",
      "--config.export.dtype=float32",
      "--config.export.shard_gb=0.0001",
    )
    == 0
  )
  names = {p.name for p in output.iterdir()}
  assert {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "README.md",
    "model.safetensors.index.json",
  } <= names
  assert sum(n.endswith(".safetensors") for n in names) > 1
  for name in names & {p.name for p in source.iterdir()} - {
    "config.json",
    "README.md",
    "model.safetensors",
  }:
    assert (source / name).read_bytes() == (output / name).read_bytes(), name
  a, b = load(source), load(output)
  for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
    np.testing.assert_array_equal(x, y)

  theirs, again = (
    transformers.AutoModelForImageTextToText.from_pretrained(p, dtype=torch.float32).eval()
    for p in (source, output)
  )
  state = again.state_dict()
  for name, value in theirs.state_dict().items():
    assert torch.equal(value, state[name]), name
  paths = captioner_directory.write_images_of_many_sizes(tmp_path / "images")[:2]
  assert captioner_directory.generated_by_transformers(
    source, paths, 8
  ) == captioner_directory.generated_by_transformers(output, paths, 8)


def test_a_run_is_exported_with_its_numbers(tmp_path):
  config = tiny.write_all(tmp_path / "made")
  config.train.steps = 2
  config.policy.max_pixels = 24 * 24
  train.run(config, tmp_path / "run")
  output = tmp_path / "output"
  assert (
    export(output, f"--config.export.run={tmp_path / 'run'}", "--config.export.dtype=float32") == 0
  )
  for x, y in zip(
    jax.tree.leaves(load(output).params),
    jax.tree.leaves(load(tmp_path / "run" / "policy").params),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)
  for written in (output, tmp_path / "run" / "policy"):  # and sees images as it was trained to
    assert tiny.read_back(written / "preprocessor_config.json")["max_pixels"] == 24 * 24
    pixels = load(written).model.cfg.vision.pixels
    # the checkpoint's own would contradict
    assert pixels.max_pixels == 24 * 24 and pixels.min_pixels == 24 * 24
  card = (output / "README.md").read_text()
  accuracy = json.loads((tmp_path / "run" / "summary.json").read_text())["after"]["accuracy"]
  assert "| accuracy | " in card and f"{accuracy:.4g}" in card and "base_model" in card
  half = tmp_path / "half"
  assert export(half, f"--config.export.run={tmp_path / 'run'}") == 0
  for x, y in zip(
    jax.tree.leaves(load(output).params), jax.tree.leaves(load(half).params), strict=True
  ):
    np.testing.assert_array_equal(
      np.asarray(x).astype("bfloat16"), np.asarray(y).astype("bfloat16")
    )


def test_what_cannot_be_exported_is_said(tmp_path, capsys):
  for more, what in (
    (
      f"--config.export.run={tmp_path}",
      "is no training run with a checkpoint; name the",
    ),
    ("--config.export.dtype=float33", "float33"),
  ):
    assert export(tmp_path / "out", more, f"--config.policy.checkpoint={tmp_path / 'none'}") == 2
    assert what in capsys.readouterr().err
