"""Scores of many images -> means, intervals, a test of the difference of two captioners."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_CHUNK = 1 << 22  # random numbers at a time, to bound memory


class Difference(NamedTuple):
  """`mean` of a - b, its interval from `low` to `high`, and the two-sided `p` of no difference."""

  mean: float
  low: float
  high: float
  p: float


def mean_and_best(scores_BG: np.ndarray) -> tuple[float, float]:
  """Scores of the captions of each image -> the mean over images of their mean, and of their best
  (BoN).
  """
  scores_BG = _finite(scores_BG, "scores")
  assert scores_BG.ndim == 2, scores_BG.shape
  return float(scores_BG.mean(1).mean()), float(scores_BG.max(1).mean())


def bootstrap_interval(
  values_per_image: np.ndarray, seed: int, level: float = 0.95, samples: int = 2000
) -> tuple[float, float]:
  """The percentile bootstrap interval of the mean (Efron and Tibshirani 1993, chapter 13).

  Images are drawn again, not captions, whose scores hang together: a row of (B, …) values is an
  image, and its mean is drawn as one. One image alone gives an interval without width. The same
  seed gives the same interval.

  Raises ValueError for no images, values that are not finite, a level outside 0..1 or samples < 1.
  """
  if not 0 < level < 1 or samples < 1:
    raise ValueError(
      f"level = {level}, samples = {samples}; 0 < level < 1 and samples >= 1 are needed"
    )
  values_B = _per_image(values_per_image)
  images = len(values_B)
  draw = np.random.default_rng(seed)
  means = _in_chunks(
    lambda rows: values_B[draw.integers(images, size=(rows, images))].mean(1), samples, images
  )
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def ratio_interval(
  above: np.ndarray, below: np.ndarray, seed: int, level: float = 0.95, samples: int = 2000
) -> tuple[float, float]:
  """The percentile bootstrap interval of sum(above) / sum(below), values per image in one order.

  Such as right answers per word: images are drawn again, and bring both with them. Raises
  ValueError as `bootstrap_interval`, for different numbers of images, and where `below` is negative
  or 0 for all of them.
  """
  above_B, below_B = _per_image(above), _per_image(below)
  if len(above_B) != len(below_B) or below_B.min() < 0 or below_B.max() == 0:
    raise ValueError(
      f"{len(above_B)} images over {len(below_B)}, from {below_B.min()} to {below_B.max()}; a "
      "ratio needs the same images, in one order, and a divisor that is not negative, nor 0 for all"
    )
  if not 0 < level < 1 or samples < 1:
    raise ValueError(
      f"level = {level}, samples = {samples}; 0 < level < 1 and samples >= 1 are needed"
    )
  images = len(above_B)
  draw = np.random.default_rng(seed)

  def ratios(rows: int) -> np.ndarray:
    drawn = draw.integers(images, size=(rows, images))
    below = below_B[drawn].sum(1)
    # a draw of nothing but images whose divisor is 0 has no ratio
    return np.where(below > 0, above_B[drawn].sum(1) / np.where(below > 0, below, 1.0), np.nan)

  found = _in_chunks(ratios, samples, images)
  low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def paired_difference(
  a: np.ndarray, b: np.ndarray, seed: int, level: float = 0.95, samples: int = 2000
) -> Difference:
  """The mean of a - b over the same images in the same order; values as in `bootstrap_interval`.

  The interval is that of the bootstrap of the differences. p is that of the sign-flip permutation
  test of the mean (Fisher 1935, section 21): exact where there are no more than `samples` ways to
  flip the signs, else from `samples` random ones, then at least 1 / (samples + 1). Raises
  ValueError as `bootstrap_interval`, and for different numbers of images.
  """
  a_B, b_B = _per_image(a), _per_image(b)
  if len(a_B) != len(b_B):
    raise ValueError(
      f"{len(a_B)} images against {len(b_B)}; a paired difference needs the same "
      "images, in one order"
    )
  difference_B = a_B - b_B
  low, high = bootstrap_interval(difference_B, seed, level, samples)
  images = len(difference_B)
  mean = difference_B.mean()
  # sums of the same numbers differ by the order of adding
  least = abs(difference_B.sum()) * (1 - 1e-9) - 1e-12
  if images < 63 and 2**images <= samples:
    signs = ((np.arange(2**images)[:, None] >> np.arange(images)) & 1) * 2 - 1
    p = np.mean(np.abs(signs @ difference_B) >= least)
  else:
    flip = np.random.default_rng([seed, 1])
    sums = _in_chunks(
      lambda rows: (
        flip.integers(2, size=(rows, images), dtype=np.int8) @ (2 * difference_B)
        - difference_B.sum()
      ),
      samples,
      images,
    )
    p = (1 + np.sum(np.abs(sums) >= least)) / (samples + 1)
  return Difference(float(mean), low, high, float(p))


def _in_chunks(sample: Callable[[int], np.ndarray], samples: int, images: int) -> np.ndarray:
  at_once = max(1, _CHUNK // images)
  return np.concatenate(
    [sample(min(at_once, samples - start)) for start in range(0, samples, at_once)]
  )


def _per_image(values: np.ndarray) -> np.ndarray:
  values = _finite(values, "values")
  assert values.ndim >= 1, values.shape
  return values.reshape(len(values), -1).mean(1)


def _finite(values: np.ndarray, name: str) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if not values.size:
    raise ValueError(f"{name}: none, of shape {values.shape}; give at least one image")
  if not np.isfinite(values).all():
    raise ValueError(
      f"{name}: {np.sum(~np.isfinite(values))} of {values.size} are not finite; "
      "give failures a score or drop the image"
    )
  return values
