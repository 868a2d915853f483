"""Figures of a captioned set, as counted by hand; which rows are shown."""

import numpy as np
import pytest

from caprl_jax.data.readers.image_folders import PassedOver
from caprl_jax.harness.row_shards import RowResult
from caprl_jax.modes.caption.statistics import Statistics, has_loop


def test_statistics_are_those_counted_by_hand():
  passed_over = PassedOver()
  passed_over.add("hidden", ".git/", 3)
  passed_over.add("no image (.txt)", "a.txt")
  found = Statistics(hosts=2, shard_rows=2, samples=16, seed=0, passed_over=passed_over)
  lengths = [1, 2, 3, 4, 20]
  texts = ["a", "b", "b", "c", "b"]
  for number, (length, text) in enumerate(zip(lengths, texts)):
    tokens = [7] * length  # the longest is a loop
    about = {"bucket": "16x4" if number else "128x32", "secs": 0.1 if number // 2 % 2 else 0.05}
    row = {
      "image": f"{number}",
      "caption": text,
      "tokens": tokens,
      "finish": "length" if length > 3 else "end",
    }
    found.add(RowResult(number, None, row, about))
  for number, reason in ((5, "not an image"), (6, "no such file"), (7, "not an image")):
    row = {"image": f"{number}", "error": "?"}
    found.add(RowResult(number, None, row, {"reason": reason}))
  figures = found.figures()
  rate = figures.pop("images_per_sec")
  assert figures == {
    "images": 8,
    "captioned": 5,
    "failed": 3,
    "failed_by_reason": {"not an image": 2, "no such file": 1},
    "passed_over": {"files": 4, "by_reason": {"hidden": 3, "no image (.txt)": 1}},
    "cut_share": 0.4,
    "caption_tokens": {"mean": 6.0, "p5": 1, "p50": 3, "p95": 20, "max": 20},
    "distinct_captions": 3,
    "repeat_share": 0.4,
    "loop_share": 0.2,
    "images_by_bucket": {"16x4": 4, "128x32": 1},
  }
  assert rate == pytest.approx(20 + 10)  # host 0 at 20 a second, host 1 at 10
  assert [item.number for item in found.longest.rows()] == [4, 3] and [
    item.number for item in found.shortest.rows()
  ] == [0, 1]
  assert [item.number for item in found.cuts.rows()] == [3, 4] and len(found.failures.rows()) == 2
  empty = Statistics(1, 1, 48, 0).figures()
  assert empty["captioned"] == 0 and empty["cut_share"] is None and empty["caption_tokens"] is None


def test_loops():
  text = list(range(40))
  for tokens, loops in (
    (text, False),
    (text + [1, 2, 3, 4] * 3, True),
    (text + [1, 2, 3, 4] * 2, False),
    ([5] * 11, False),
    ([5] * 12, True),
    (text[:5] + list(range(32)) * 3, True),
    (text[:5] + list(range(33)) * 3, False),
    ([1, 2, 3, 4, 9, 1, 2, 3, 4, 8, 1, 2, 3, 4], False),
    ([], False),
  ):
    assert has_loop(tokens) == loops, tokens


def test_random_samples_are_the_seed_s_and_spread():
  picked = []
  for seed in (0, 0, 1):
    sample = Statistics(1, 1, samples=200, seed=seed).random
    for number in range(10_000):
      sample.add(RowResult(number, None, {}, {}))
    picked.append([item.number for item in sample.rows()])
  assert picked[0] == picked[1] != picked[2] and len(set(picked[0])) == 100
  assert 4000 < np.mean(picked[0]) < 6000
