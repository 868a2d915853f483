"""How stable rewards are, by matrices made by hand: what is known to agree, to differ, and to say
nothing."""

import numpy as np
import pytest

from caprl_jax.scoring import reliability

GOOD_AND_BAD = np.array([[1, 1, 1, 1], [0, 0, 0, 0]], bool)  # captions x questions


def test_questions_that_agree_are_reliable():
  found = reliability.split_half([GOOD_AND_BAD, ~GOOD_AND_BAD], 0)
  assert found == pytest.approx((1, 1, 1, 4)) and found.at(8) == pytest.approx(1)


def test_questions_about_other_things_are_not():
  """Of two captions each tells what the other does not: one half says the opposite of the other."""
  opposite = np.array([[1, 0], [0, 1]], bool)
  found = reliability.split_half([opposite] * 3, 0)
  assert found.halves == pytest.approx(-1) and found.questions == 2


def test_a_level_that_all_captions_of_an_image_share_is_no_reliability():
  """Easy and hard images: rewards differ between images, and not within them."""
  easy, hard = np.ones((3, 4), bool), np.zeros((3, 4), bool)
  assert np.isnan(reliability.split_half([easy, hard], 0).halves)
  assert np.isnan(reliability.split_half([np.ones((4, 1), bool)], 0).halves)
  assert np.isnan(reliability.split_half([], 0).whole)


def test_noise_is_found_as_it_was_made():
  """Verdicts are a caption's worth and as much noise: of one question the reliability is a half."""
  rng = np.random.default_rng(0)
  images = [rng.normal(size=(8, 1)) + rng.normal(size=(8, 6)) for _ in range(300)]
  found = reliability.split_half(images, 0)
  assert found.one == pytest.approx(0.5, abs=0.03)
  assert found.whole == pytest.approx(6 / 7, abs=0.03) and found.halves == pytest.approx(
    3 / 4, 0.05
  )
  assert found.at(6) == pytest.approx(found.whole) and found.at(1) == pytest.approx(found.one)


def test_agreement_of_ways_to_ask():
  same = reliability.agreement([np.stack([GOOD_AND_BAD] * 3)])
  assert same == pytest.approx((1, 1, 1))
  one_off = GOOD_AND_BAD.copy()
  one_off[0, 0] = False  # of 8 verdicts one differs
  found = reliability.agreement([np.stack([GOOD_AND_BAD, one_off])])
  share = (8 - 1) / 16
  chance = share**2 + (1 - share) ** 2
  assert found.same == 7 / 8 and found.kappa == pytest.approx((7 / 8 - chance) / (1 - chance))
  assert found.rewards == pytest.approx(1)  # the better caption is still the better one
  assert np.isnan(reliability.agreement([GOOD_AND_BAD[None]])).all()
  always = reliability.agreement([np.ones((2, 2, 3), bool)])
  assert always.same == 1 and np.isnan(always.kappa) and np.isnan(always.rewards)


def test_questions_that_separate_no_captions():
  first = np.array([[1, 1, 0], [1, 0, 0]], bool)
  found = reliability.separation([first, np.array([[0], [1]], bool)])
  assert found.always_right.tolist() == [True, False, False, False]
  assert found.always_wrong.tolist() == [False, False, True, False]
  assert found.separates.tolist() == [False, True, False, True]


def test_chance_is_not_stepped_up():
  assert reliability.stepped_up(-0.3, 8) == -0.3 and reliability.stepped_up(0.5, 2) == 2 / 3
