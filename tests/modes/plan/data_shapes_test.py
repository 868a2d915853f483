"""Mode `plan` reads the sizes of a config's images, and says what buckets of shapes save."""

import json
import logging

import pytest
from helpers import tiny
from PIL import Image

from caprl_jax.data.readers.jsonl import read_jsonl, write_jsonl
from caprl_jax.modes.plan import run as plan_run


@pytest.mark.parametrize("buckets", [2, 1])
def test_a_plan_of_the_data_that_is_there(buckets, tmp_path, caplog):
  caplog.set_level(logging.INFO, "caprl_jax")
  config = tiny.write_all(tmp_path / "tiny")
  rows = read_jsonl(tmp_path / "tiny" / "data" / "rows.jsonl")
  Image.new("RGB", (20, 20)).save(rows[0].image)  # the processor makes it larger: 4 tokens
  (tmp_path / "tiny" / "data" / "images" / "1.png").write_bytes(b"no image")
  write_jsonl(tmp_path / "tiny" / "data" / "rows.jsonl", rows)
  config.data.batch_size, config.data.shape_buckets = 4, buckets
  config.plan = dict(topology="v5e-1", compile=False, data=True)
  plan_run.run(config, tmp_path)
  written = json.loads((tmp_path / "plan.json").read_text())["data"]
  assert "1 rows that cannot be used are left out" in caplog.text
  assert written["rows"] == 11 and len(written["buckets"]) == len(written["step_secs"]) == buckets
  assert written["buckets"][-1]["image"] == [48, 48]
  if buckets == 2:
    small, large = written["buckets"]
    assert (small["image_tokens"], large["image_tokens"]) == (6, 9)
    assert small["share"] == pytest.approx(6 / 11)
    assert written["saved"] == pytest.approx(1 - (6 * 32 + 5 * 64) / 11 / 64)
    # the first image has 16 slots of the 32 that its bucket has
    assert written["padding"] == pytest.approx(16 / (6 * 32 + 5 * 64))
    assert written["step_secs"][0] < written["step_secs"][1]
    assert "11 images of data.train in 2 buckets of shapes, which saves 27.3%" in caplog.text
    assert "54.5% of up to 6 tokens (the largest has 48 x 32 pixels), a step" in caplog.text
  else:
    assert written["saved"] == pytest.approx(0)
    assert written["padding"] == pytest.approx(1 - (16 + 5 * 32 + 5 * 64) / 11 / 64)
    assert "11 images of data.train in 1 bucket of shapes, 29.5%" in caplog.text
