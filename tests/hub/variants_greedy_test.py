"""Captions of odd checkpoints, and of what is exported from them, are those of transformers."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from helpers import captioner_directory
from helpers.paths import ROOT

from caprl_jax import main

BASE = ROOT / "configs" / "quickstart_policy"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write(path, tensors) -> None:
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  return captioner_directory.write_images_of_many_sizes(tmp_path_factory.mktemp("p") / "images")[:2]


def captions(checkpoint, pictures, work) -> list[list[int]]:
  """Token ids that mode `caption` writes."""
  source, output = work / "rows.jsonl", work / "out.jsonl"
  work.mkdir()
  source.write_text("".join(json.dumps({"image": str(path)}) + "\n" for path in pictures))
  done = main.main(
    [
      "main",
      "--config=configs/caption.py",
      f"--config.policy.checkpoint={checkpoint}",
      f"--config.caption.input={source}",
      f"--config.caption.output={output}",
      f"--config.caption.prompt={captioner_directory.PROMPT}",
      "--config.caption.max_tokens=12",
      "--config.caption.batch_size=2",
      f"--workdir={work / 'run'}",
    ]
  )
  assert done == 0
  return [json.loads(line)["tokens"] for line in output.read_text().splitlines()]


def another_head(folder):
  """Tied by config.json, and another head in the file: the embedding's rows, shuffled."""
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  embedding = tensors["model.embed_tokens.weight"]
  rows = np.random.default_rng(0).permutation(len(embedding))
  write(folder / "model.safetensors", tensors | {"lm_head.weight": embedding[rows]})


def stale_shards(folder):
  """Older shards and their index beside the weights."""
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  names, places = sorted(tensors), {}
  for shard, part in zip(SHARDS, (names[::2], names[1::2])):
    halved = lambda v: (v.astype(np.float32) / 2).astype(v.dtype)
    write(folder / shard, {name: halved(tensors[name]) for name in part})
    places |= dict.fromkeys(part, shard)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("spoil", [another_head, stale_shards])
def test_captions_are_those_of_transformers_after_export_too(spoil, pictures, tmp_path):
  folder, exported = tmp_path / "model", tmp_path / "exported"
  shutil.copytree(BASE, folder)
  template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
  (folder / "chat_template.jinja").write_text(template)
  spoil(folder)
  want = captioner_directory.generated_by_transformers(folder, pictures, 12)
  assert captions(folder, pictures, tmp_path / "ours") == want
  assert (
    main.main(
      [
        "main",
        "--config=configs/export.py",
        f"--config.policy.checkpoint={folder}",
        f"--config.export.output={exported}",
        f"--workdir={tmp_path / 'work'}",
      ]
    )
    == 0
  )
  assert captioner_directory.generated_by_transformers(exported, pictures, 12) == want
  plain = captioner_directory.generated_by_transformers(base_with_template(tmp_path), pictures, 12)
  assert (want == plain) == (spoil is stale_shards)


def base_with_template(tmp_path):
  shutil.copytree(BASE, tmp_path / "base")
  shutil.copy(tmp_path / "model" / "chat_template.jinja", tmp_path / "base")
  return tmp_path / "base"
