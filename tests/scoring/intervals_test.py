"""Means, bootstrap intervals and paired comparisons over images."""

import numpy as np
import pytest

from caprl_jax.scoring import intervals
from caprl_jax.scoring.intervals import bootstrap_interval, mean_and_best, paired_difference


def test_mean_and_best():
  assert mean_and_best(np.array([[0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])) == (
    0.25,
    pytest.approx(2 / 3),
  )


def test_the_bootstrap_interval_is_the_normal_one_for_many_images():
  values = np.random.default_rng(0).normal(3, 2, 2000)
  low, high = bootstrap_interval(values, seed=1, samples=8000)
  half = 1.96 * values.std() / np.sqrt(len(values))
  assert [low, high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.06 * half)
  narrow = bootstrap_interval(values, seed=1, level=0.5, samples=8000)
  assert narrow[1] - narrow[0] == pytest.approx(2 * half * 0.6745 / 1.96, rel=0.06)


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
  draw = np.random.default_rng(2)
  inside = 0
  for trial in range(300):
    low, high = bootstrap_interval(draw.random(60) < 0.4, seed=trial, level=0.9, samples=400)
    inside += low <= 0.4 <= high
  assert 0.85 < inside / 300 < 0.95


def test_images_are_drawn_not_captions():
  images = np.random.default_rng(3).random(50)
  # four captions that always agree tell no more than one
  alike_BG = np.repeat(images[:, None], 4, 1)
  assert bootstrap_interval(alike_BG, seed=4) == bootstrap_interval(images, seed=4)
  assert bootstrap_interval(alike_BG.reshape(-1), seed=4) != bootstrap_interval(images, seed=4)


def test_the_bootstrap_is_deterministic_and_bounded_in_memory(monkeypatch):
  values = np.random.default_rng(5).random(40)
  want = bootstrap_interval(values, seed=6, samples=333)
  assert (
    bootstrap_interval(values, seed=6, samples=333)
    == want
    != bootstrap_interval(values, seed=7, samples=333)
  )
  monkeypatch.setattr(intervals, "_CHUNK", 100)
  assert bootstrap_interval(values, seed=6, samples=333) == want
  assert bootstrap_interval([0.25], seed=0) == (0.25, 0.25)


def test_a_paired_difference_of_few_images_is_exact():
  found = paired_difference(np.array([3.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0]), seed=0)
  # of the 8 ways of signs, all + and all - are as far from 0
  assert found.mean == 2 and found.p == 2 / 8
  assert 1 <= found.low < 2 < found.high <= 3
  assert paired_difference(np.ones(5), np.ones(5), seed=0) == (0, 0, 0, 1)
  assert paired_difference(np.array([1.0, -1.0]), np.zeros(2), seed=0).p == 1


def test_a_paired_difference_of_many_images():
  draw = np.random.default_rng(8)
  hard = draw.random(400)  # what the two share: with it unpaired the difference would drown
  a, b = hard + 0.02 + 0.1 * draw.normal(size=400), hard + 0.1 * draw.normal(size=400)
  found = paired_difference(a, b, seed=9)
  difference = a - b
  error = difference.std(ddof=1) / 20
  assert found.mean == pytest.approx(difference.mean())
  want = [found.mean - 1.96 * error, found.mean + 1.96 * error]
  assert [found.low, found.high] == pytest.approx(want, abs=0.15 * error)
  assert found == paired_difference(a, b, seed=9)
  back = paired_difference(b, a, seed=9)
  assert back.mean == pytest.approx(-found.mean) and back.p == found.p
  assert paired_difference(a + 1, b, seed=9).p == 1 / 2001


def test_p_is_uniform_without_a_difference_and_normal_with_one():
  draw = np.random.default_rng(10)
  p = [
    paired_difference(draw.normal(size=30), draw.normal(size=30), seed=i, samples=300).p
    for i in range(400)
  ]
  assert 0.03 < np.mean(np.array(p) < 0.05) < 0.08 and 0.45 < np.mean(p) < 0.55
  shifted = draw.normal(size=500)
  shifted += 2 / np.sqrt(500) * shifted.std() - shifted.mean()  # z = 2: p is 0.0455
  assert paired_difference(shifted, np.zeros(500), seed=0, samples=20000).p == pytest.approx(
    0.0455, abs=0.006
  )


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: bootstrap_interval([], 0), "values: none"),
    (lambda: bootstrap_interval([1, np.nan], 0), "1 of 2 are not finite"),
    (lambda: bootstrap_interval([1], 0, level=95), "level = 95"),
    (lambda: bootstrap_interval([1], 0, samples=0), "samples = 0"),
    (lambda: paired_difference([1, 2], [1], 0), "2 images against 1"),
    (lambda: mean_and_best(np.zeros((0, 4))), "scores: none"),
  ],
)
def test_numbers_that_have_no_interval(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_the_interval_of_a_ratio():
  """Right answers per word: an image brings its answers and its words."""
  right, words = np.array([1.0, 0.5, 0.8, 0.2]), np.array([10.0, 5.0, 8.0, 2.0])
  assert intervals.ratio_interval(right, words, 0) == pytest.approx((0.1, 0.1))
  low, high = intervals.ratio_interval(right, words[::-1].copy(), 0)
  assert low < right.sum() / words.sum() < high
  assert (low, high) == intervals.ratio_interval(right, words[::-1].copy(), 0)
  intervals.ratio_interval(right, np.array([0.0, 1.0, 1.0, 0.0]), 0)  # silence is a length too
  for below in ([0.0] * 4, [1.0, 1.0, 1.0, -1.0], [1.0]):
    with pytest.raises(ValueError, match="the same images"):
      intervals.ratio_interval(right, np.array(below), 0)
