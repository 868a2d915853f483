"""benchmarks/models/real_size.py at a tiny size, with Qwen's whole vocabulary: both write the same
ids from a checkpoint in shards."""

import copy
import json
import sys

import pytest

from benchmarks.models import real_size
from caprl_jax.hub.published_configs import CONFIGS

NAME = "Qwen/Qwen2.5-VL-3B-Instruct"


def tiny():
  """The published config with everything but the vocabulary made small."""
  config = copy.deepcopy(CONFIGS[NAME])
  config |= dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
  config |= dict(num_attention_heads=2, num_key_value_heads=1)
  config["rope_scaling"] = dict(type="mrope", mrope_section=[4, 6, 6])
  config["vision_config"] |= dict(
    depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64
  )
  config["vision_config"]["fullatt_block_indexes"] = [1]
  return config


def test_ours_and_transformers_write_the_same_ids(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(real_size, "SHARD_BYTES", 1 << 20)
  report = real_size.write_checkpoint(tmp_path / "model", tiny())
  names = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
  assert "model.embed_tokens.weight" in names["weight_map"]  # as the published files have it
  assert "visual.blocks.0.attn.qkv.weight" in names["weight_map"]
  assert report["checkpoint_gb"] == pytest.approx(2 * report["parameters_billions"])
  assert report["parameters_billions"] == pytest.approx(151936 * 64 / 1e9, rel=0.05)
  real_size.draw_image(tmp_path / "image.png", 56)
  for who, run in real_size.RUN.items():
    report[who] = run(tmp_path / "model", tmp_path / "image.png", 4) | {"peak_gb": 1.0}
  assert report["ours"]["ids"] == report["transformers"]["ids"]
  assert len(report["ours"]["ids"]) == 4 and all(type(i) is int for i in report["ours"]["ids"])
  report |= {"model": NAME, "layers": 2}
  assert f"| {NAME} | 2 | 0.01 | 4 of 4 |" in real_size.row(report)
  files = [tmp_path / f"{name}.json" for name in ("large", "small")]
  files[0].write_text(json.dumps(report | {"model": "large", "parameters_billions": 3.0}))
  files[1].write_text(json.dumps(report | {"layers": None}))
  monkeypatch.setattr(sys, "argv", ["real_size", "--table", *map(str, files)])
  assert real_size.main() == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[2].startswith(f"| {NAME} | all | 0.01 |") and lines[3].startswith(
    "| large | 2 | 3.0"
  )


def test_the_first_id_that_differs():
  of = lambda *ids: {"ids": list(ids)}
  assert real_size.equal_ids({"ours": of(1, 2, 3), "transformers": of(1, 2, 4)}) == 2
  assert real_size.equal_ids({"ours": of(1, 2), "transformers": of(1, 2, 4)}) == 2
