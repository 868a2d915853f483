"""Answers -> rewards: fractions by hand, and which captions cannot be scored."""

import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.reward import RewardConfig, caption_reward
from caprl_jax.types import Answers, Captions

ASKED = jnp.array([[True, True, True, False], [True, False, False, False], [False] * 4])


def answers(credit, valid) -> Answers:
  credit = jnp.asarray(credit, jnp.float32)
  return Answers(choice_BGK=jnp.zeros(credit.shape, int), correct_BGK=credit == 1, credit_BGK=credit,
                 misled_BGK=jnp.asarray(credit == 0, jnp.float32), valid_BGK=jnp.asarray(valid),
                 asked_BGK=jnp.broadcast_to(ASKED[:, None], credit.shape),
                 question_BGK=jnp.broadcast_to(jnp.arange(credit.shape[2]), credit.shape),
                 score_BGKA=jnp.zeros((*credit.shape, 2)))


def captions(group: int, length=5, tokens=8, ended=True) -> Captions:
  valid = jnp.broadcast_to(jnp.arange(tokens) < length, (3, group, tokens))
  ids = jnp.broadcast_to(jnp.arange(tokens), valid.shape)
  return Captions(ids, jnp.zeros(valid.shape), valid, jnp.full((3, group), ended))


def valid_where_asked(group: int):
  return jnp.broadcast_to(ASKED[:, None], (3, group, 4))


def test_reward_is_the_mean_over_the_questions_that_exist():
  credit = [[[1, 0, 1, 1], [0, 0, 0, 1]],  # the fourth question does not exist
            [[1, 9, 9, 9], [0, 9, 9, 9]],
            [[1, 1, 1, 1], [0, 0, 0, 0]]]
  reward, scored, terms = caption_reward(answers(credit, valid_where_asked(2)), captions(2), RewardConfig())
  np.testing.assert_allclose(reward, [[2 / 3, 0], [1, 0], [0, 0]], rtol=1e-6)
  np.testing.assert_array_equal(scored, [[True, True], [True, True], [False, False]])  # no question: unscored
  np.testing.assert_array_equal(terms["accuracy"], reward)
  assert reward.dtype == jnp.float32


def test_probabilities_count_as_they_are():
  credit = [[[0.25, 0.5, 0.9, 0]]] * 3
  reward, _, _ = caption_reward(answers(credit, valid_where_asked(1)), captions(1), RewardConfig())
  np.testing.assert_allclose(reward, [[1.65 / 3], [0.25], [0]], rtol=1e-6)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_judge_that_is_not_finite_on_one_question_leaves_the_caption_unscored(broken):
  credit = np.ones((3, 2, 4), np.float32)
  credit[0, 1, broken] = np.nan
  valid = np.array(valid_where_asked(2))
  valid[0, 1, broken] = False
  reward, scored, terms = caption_reward(answers(credit, valid), captions(2), RewardConfig())
  np.testing.assert_array_equal(scored, [[True, False], [True, True], [False, False]])
  np.testing.assert_array_equal(reward, [[1, 0], [1, 1], [0, 0]])
  assert np.isfinite(terms["accuracy"]).all()


def test_the_weight_scales_the_reward_but_not_the_term():
  credit = [[[1, 0, 1, 0]]] * 3
  reward, _, terms = caption_reward(answers(credit, valid_where_asked(1)), captions(1), RewardConfig(accuracy=3.0))
  np.testing.assert_allclose(reward, [[2], [3], [0]], rtol=1e-6)
  np.testing.assert_allclose(terms["accuracy"], [[2 / 3], [1], [0]], rtol=1e-6)
