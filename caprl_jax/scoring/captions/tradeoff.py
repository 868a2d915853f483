"""What captions tell and what they say falsely -> the two against each other, over all captions and
over their length.

Both are shares: of questions answered right and wrong, or of facts told and captions with a false
statement. Fewer false statements alone may be fewer facts: only both together say which caption is
better. Letters: S statements (one caption's question, or one caption's facts).
"""

from typing import Any, NamedTuple

import numpy as np

from caprl_jax.scoring import intervals

MOST_BINS = 4
LEAST_CAPTIONS = 8  # of a bin


class Said(NamedTuple):
  """Arrays [S]: told and false from 0 to 1; words of the caption that it was said in; image and
  caption, as numbers of theirs."""

  told: np.ndarray
  false: np.ndarray
  words: np.ndarray
  image: np.ndarray
  caption: np.ndarray

  def where(self, mask_S: np.ndarray) -> "Said":
    """Some of the statements."""
    return Said(*(array[mask_S] for array in self))


def tradeoff(said: Said, seed: int, level: float) -> dict[str, Any]:
  """`point` of all, and `by_length`: the same of captions of like length, from short to long; empty
  where all are as long, or too few."""
  bins = length_bins(said.words, said.caption)
  return point(said, seed, level) | {
    "by_length": [point(said.where(mask), seed, level) for mask in bins]
  }


def point(said: Said, seed: int, level: float) -> dict[str, Any]:
  """Shares told and false with their intervals over images, mean words, and how many captions."""
  figures: dict[str, Any] = {}
  for name, values in (("told", said.told), ("false", said.false)):
    figures[name] = float(values.mean())
    figures[f"{name}_interval"] = list(
      intervals.ratio_interval(
        sums_by(values, said.image), sums_by(np.ones_like(values), said.image), seed, level
      )
    )
  _, first = np.unique(said.caption, return_index=True)
  return figures | {"words": float(said.words[first].mean()), "captions": len(first)}


def length_bins(words_S: np.ndarray, caption_S: np.ndarray) -> list[np.ndarray]:
  """Masks [S] of captions of like length, short ones first, each with about the same number of
  captions and none cut in two by its length. Empty where there would be one bin alone."""
  _, first = np.unique(caption_S, return_index=True)
  lengths = words_S[first]
  count = min(MOST_BINS, len(lengths) // LEAST_CAPTIONS)
  if count < 2:
    return []
  edges = np.unique(np.quantile(lengths, np.arange(1, count) / count, method="lower"))
  place_S = np.searchsorted(edges, words_S, side="left")
  masks = [place_S == place for place in range(len(edges) + 1)]
  masks = [mask for mask in masks if mask.any()]
  few = any(len(np.unique(caption_S[mask])) < LEAST_CAPTIONS // 2 for mask in masks)
  return [] if len(masks) < 2 or few else masks


def sums_by(values_S: np.ndarray, image_S: np.ndarray) -> np.ndarray:
  """The sum of each image's values, images in the order of their numbers."""
  _, place_S = np.unique(image_S, return_inverse=True)
  return np.bincount(place_S, weights=values_S)
