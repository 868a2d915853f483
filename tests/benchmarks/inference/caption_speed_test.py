"""The lengths that benchmarks/inference/caption_speed.py forces."""

import numpy as np
import pytest

from benchmarks.inference.caption_speed import lengths


def test_the_longest_is_so_many_times_the_mean():
  for mean, tail in ((24, 10), (200, 5)):
    found = lengths(256, mean, tail)
    assert found.mean() == pytest.approx(mean, rel=0.02) and found.min() >= 1
    assert found.max() == pytest.approx(tail * mean, abs=1)
    assert np.median(found) < 0.9 * mean and found.argmax() not in (0, 255)
  assert set(lengths(8, 24, 1.0)) == {24}
  with pytest.raises(ValueError, match="--tail 10 must be from 1 to half of --images 8"):
    lengths(8, 24, 10)
