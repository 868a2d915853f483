"""Verdicts of a judge on captions -> how stable the rewards are that they make, and what of them
the captions have earned.

A reward is the share of a caption's questions that are answered right. Training looks at the
difference to the other captions of the same image alone, so rewards are compared after their
image's mean is taken off. Letters: C captions and Q questions of an image, T times that the same
was asked in another way. Images are lists, as they differ in C and Q.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SPLITS = 200  # random halves of the questions


class Reliability(NamedTuple):
  """How well one half of the questions foretells what the other says of captions.

  halves: correlation of the two halves' rewards within images; `whole` that of the whole reward
  with another one of as many questions (Spearman and Brown); `one` that of one question's with
  another's. questions: of an image, on average. NaN where nothing differs, or no image has two
  questions.
  """

  halves: float
  whole: float
  one: float
  questions: float

  def at(self, questions: float) -> float:
    """The reliability of a reward of so many questions (Spearman and Brown's prophecy)."""
    return stepped_up(self.one, questions)


class Agreement(NamedTuple):
  """How far verdicts agree that should be the same: `same`, the share of pairs of ways that have
  the same verdict; `kappa`, what is left of it beyond chance (Fleiss); `rewards`, the correlation
  of rewards within images. NaN where nothing differs."""

  same: float
  kappa: float
  rewards: float


class Separation(NamedTuple):
  """Of questions, each asked with several captions: bool arrays over all of them. What is answered
  right from every caption, or wrong from every one, moves no caption against another."""

  always_right: np.ndarray
  always_wrong: np.ndarray

  @property
  def separates(self) -> np.ndarray:
    """Those that tell captions apart."""
    return ~(self.always_right | self.always_wrong)


def split_half(right: Sequence[np.ndarray], seed: int) -> Reliability:
  """The reliability of rewards, from verdicts [C, Q] of each image.

  The questions of each image are cut in two at random `SPLITS` times. Images with one question or
  one caption say nothing about it.
  """
  used = [np.asarray(one, float) for one in right if min(np.shape(one)) > 1]
  nothing = Reliability(*[float("nan")] * 4)
  if not used:
    return nothing
  rng, found = np.random.default_rng(seed), []
  for _ in range(SPLITS):
    first, second = [], []
    for right_CQ in used:
      order = rng.permutation(right_CQ.shape[1])
      # An odd question goes to either half as often.
      middle = len(order) // 2 + (len(order) % 2) * int(rng.integers(2))
      for half, places in ((first, order[:middle]), (second, order[middle:])):
        half.append(_within(right_CQ[:, places].mean(1)))
    found.append(_correlation(np.concatenate(first), np.concatenate(second)))
  found = [value for value in found if np.isfinite(value)]
  if not found:
    return nothing
  questions = float(np.mean([one.shape[1] for one in used]))
  halves = float(np.mean(found))
  one = stepped_up(halves, 2 / questions)
  return Reliability(halves, stepped_up(halves, 2), one, questions)


def stepped_up(reliability: float, times: float) -> float:
  """The reliability of a test that is `times` as long (Spearman 1910, Brown 1910). One below 0 is
  chance, of which more is no less reliable: it stays as it is."""
  if reliability < 0:
    return reliability
  return times * reliability / (1 + (times - 1) * reliability)


def agreement(right: Sequence[np.ndarray]) -> Agreement:
  """How far T ways of asking agree, from verdicts [T, C, Q] of each image."""
  every = np.concatenate([np.reshape(one, (len(one), -1)) for one in right], axis=1).astype(float)
  ways = len(every)
  if ways < 2:
    return Agreement(*[float("nan")] * 3)
  yes = every.sum(0)
  # Pairs of ways that agree, of all pairs, averaged over verdicts.
  same = float(np.mean((yes * (yes - 1) + (ways - yes) * (ways - yes - 1)) / (ways * (ways - 1))))
  share = float(every.mean())
  chance = share**2 + (1 - share) ** 2
  kappa = (same - chance) / (1 - chance) if chance < 1 else float("nan")
  rewards_T = [
    np.concatenate([_within(np.asarray(one[way], float).mean(1)) for one in right])
    for way in range(ways)
  ]
  pairs = [
    _correlation(rewards_T[a], rewards_T[b]) for a in range(ways) for b in range(a + 1, ways)
  ]
  finite = [value for value in pairs if np.isfinite(value)]
  return Agreement(same, kappa, float(np.mean(finite)) if finite else float("nan"))


def separation(right: Sequence[np.ndarray]) -> Separation:
  """Which questions tell captions apart, from verdicts [C, Q] of each image, in their order."""
  return Separation(
    np.concatenate([np.asarray(one, bool).all(0) for one in right]),
    np.concatenate([(~np.asarray(one, bool)).all(0) for one in right]),
  )


def _within(reward_C: np.ndarray) -> np.ndarray:
  return reward_C - reward_C.mean()


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
  """Of numbers whose mean is 0 within each image; NaN where one of them does not vary."""
  size = np.sqrt((a**2).sum() * (b**2).sum())
  return float((a * b).sum() / size) if size > 1e-12 else float("nan")
