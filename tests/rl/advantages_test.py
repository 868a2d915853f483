"""Estimators on numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.rl.advantages import AdvantageConfig, check_group_size, flat_groups, group_advantages

ESTIMATORS = ("grpo", "rloo", "dr_grpo")
REWARD = jnp.array([[1.0, 0.0, 0.5, 0.5]])
ALL = jnp.ones((1, 4), bool)


def advantages(estimator, reward=REWARD, scored=ALL, **kwargs):
  return np.asarray(
    group_advantages(jnp.asarray(reward), jnp.asarray(scored), AdvantageConfig(estimator, **kwargs))
  )


def test_by_hand():
  # mean 0.5, squared deviations 0.25 + 0.25 over n - 1 = 3: std = 6 ** -0.5
  np.testing.assert_allclose(advantages("dr_grpo"), [[0.5, -0.5, 0, 0]])
  np.testing.assert_allclose(
    advantages("grpo"), np.array([[0.5, -0.5, 0, 0]]) / (6**-0.5 + 1e-4), rtol=1e-6
  )
  np.testing.assert_allclose(
    advantages("grpo", epsilon=1.0), np.array([[0.5, -0.5, 0, 0]]) / (6**-0.5 + 1), rtol=1e-6
  )
  # the others' means: 1/3, 2/3, 1/2, 1/2
  np.testing.assert_allclose(advantages("rloo"), [[2 / 3, -2 / 3, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", [0.0, 1 / 3, 0.7, 1.0])
def test_flat_groups_are_exactly_zero(estimator, value):
  reward = np.full((2, 7), value, np.float32)
  reward[1, 3] += 0.125
  got = advantages(estimator, reward, np.ones((2, 7), bool))
  assert (got[0] == 0.0).all()
  assert (got[1] != 0.0).all()
  np.testing.assert_array_equal(
    flat_groups(jnp.asarray(reward), jnp.ones((2, 7), bool)), [True, False]
  )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("garbage", [0.0, 100.0, np.nan, np.inf])
def test_unscored_captions_get_zero_and_stay_out_of_the_baseline(estimator, garbage):
  reward = np.array([[1.0, garbage, 0.0, 0.5, garbage, 0.5]], np.float32)
  scored = np.array([[True, False, True, True, False, True]])
  got = advantages(estimator, reward, scored)
  np.testing.assert_array_equal(got[~scored], 0)
  np.testing.assert_allclose(got[scored], advantages(estimator)[0], rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_or_no_scored_caption_is_a_flat_group(estimator):
  reward = np.array([[1.0, 0.0, 0.0], [1.0, 0.5, 0.0]], np.float32)
  scored = np.array([[True, False, False], [False, False, False]])
  assert (advantages(estimator, reward, scored) == 0).all()
  assert flat_groups(jnp.asarray(reward), jnp.asarray(scored)).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_sum_to_zero_and_do_not_mix(estimator):
  rng = np.random.default_rng(0)
  reward = (
    rng.integers(0, 4, (5, 8)).astype(np.float32) / 3 + 10 * np.arange(5, dtype=np.float32)[:, None]
  )
  scored = rng.random((5, 8)) < 0.8
  got = advantages(estimator, reward, scored)
  np.testing.assert_allclose(got.sum(1), 0, atol=1e-4)
  for b in range(5):
    np.testing.assert_allclose(
      got[b : b + 1], advantages(estimator, reward[b : b + 1], scored[b : b + 1]), atol=1e-6
    )


def test_rloo_is_the_mean_of_the_others_scored():
  rng = np.random.default_rng(1)
  reward = rng.random((3, 6)).astype(np.float32)
  scored = np.array(
    [[True] * 6, [True, True, False, True, False, True], [False, True, True, False, False, False]]
  )
  want = np.zeros((3, 6))
  for b, g in zip(*np.nonzero(scored)):
    others = [reward[b, i] for i in range(6) if i != g and scored[b, i]]
    want[b, g] = reward[b, g] - np.mean(others)
  np.testing.assert_allclose(advantages("rloo", reward, scored), want, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_group_of_one_is_refused(estimator):
  with pytest.raises(ValueError, match=f"group_size = 1 gives no baseline.*{estimator}"):
    check_group_size(1, AdvantageConfig(estimator))
  check_group_size(2, AdvantageConfig(estimator))
