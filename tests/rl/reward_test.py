"""Answers -> rewards: fractions by hand, and which captions cannot be scored."""

import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.rl.caption_form import stamp_table
from caprl_jax.rl.judge_protocol import no_answers
from caprl_jax.rl.reward import RewardArrays, RewardConfig, own_reward, score_captions
from caprl_jax.types import Answers, Captions, OwnReward, Questions, Vocabulary

ASKED = jnp.array([[True, True, True, False], [True, False, False, False], [False] * 4])


def answers(credit, valid) -> Answers:
  credit = jnp.asarray(credit, jnp.float32)
  return Answers(
    choice_BGK=jnp.zeros(credit.shape, int),
    correct_BGK=credit == 1,
    credit_BGK=credit,
    misled_BGK=jnp.asarray(credit == 0, jnp.float32),
    valid_BGK=jnp.asarray(valid),
    asked_BGK=jnp.broadcast_to(ASKED[:, None], credit.shape),
    question_BGK=jnp.broadcast_to(jnp.arange(credit.shape[2]), credit.shape),
    score_BGKA=jnp.zeros((*credit.shape, 2)),
  )


def captions(group: int, length=5, tokens=8, ended=True) -> Captions:
  valid = jnp.broadcast_to(jnp.arange(tokens) < length, (3, group, tokens))
  ids = jnp.broadcast_to(jnp.arange(tokens), valid.shape)
  return Captions(ids, jnp.zeros(valid.shape), valid, jnp.full((3, group), ended))


def caption_reward(answers, captions, cfg, stamp_VX=None):
  """Reward, which captions are scored, and the terms."""
  vocabulary = Vocabulary(None, None, (), 0, stamp_VX)
  scored = score_captions(answers, captions, vocabulary, cfg)
  return scored.reward_BG, scored.scored_BG, scored.terms


def valid_where_asked(group: int):
  return jnp.broadcast_to(ASKED[:, None], (3, group, 4))


def test_reward_is_the_mean_over_the_questions_that_exist():
  credit = [
    [[1, 0, 1, 1], [0, 0, 0, 1]],  # the fourth question does not exist
    [[1, 9, 9, 9], [0, 9, 9, 9]],
    [[1, 1, 1, 1], [0, 0, 0, 0]],
  ]
  reward, scored, terms = caption_reward(
    answers(credit, valid_where_asked(2)), captions(2), RewardConfig()
  )
  np.testing.assert_allclose(reward, [[2 / 3, 0], [1, 0], [0, 0]], rtol=1e-6)
  # no question: unscored
  np.testing.assert_array_equal(scored, [[True, True], [True, True], [False, False]])
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
  reward, _, terms = caption_reward(
    answers(credit, valid_where_asked(1)), captions(1), RewardConfig(accuracy=3.0)
  )
  np.testing.assert_allclose(reward, [[2], [3], [0]], rtol=1e-6)
  np.testing.assert_allclose(terms["accuracy"], [[2 / 3], [1], [0]], rtol=1e-6)


CREDIT = [[[1, 0, 1, 0]]] * 3  # the first image is asked three questions, the second one


def rewarded(cfg, caption=None):
  caption = caption or captions(1)
  reward, _, terms = caption_reward(answers(CREDIT, valid_where_asked(1)), caption, cfg)
  return np.asarray(reward)[:2, 0], {
    name: np.asarray(value)[:2, 0] for name, value in terms.items()
  }


def test_being_misled_costs_and_abstaining_does_not():
  reward, terms = rewarded(RewardConfig(accuracy=1.0, misled=0.5))
  np.testing.assert_allclose(terms["misled"], [1 / 3, 0])
  np.testing.assert_allclose(reward, [2 / 3 - 0.5 / 3, 1], rtol=1e-6)
  silent = answers(CREDIT, valid_where_asked(1))
  silent = silent.replace(misled_BGK=jnp.zeros_like(silent.misled_BGK))
  reward, _, _ = caption_reward(silent, captions(1), RewardConfig(accuracy=1.0, misled=0.5))
  np.testing.assert_allclose(reward[:2, 0], [2 / 3, 1], rtol=1e-6)


@pytest.mark.parametrize(
  "length, ended, worth",
  [(4, False, 1.0), (5, True, 1.0), (5, False, 0.75), (6, False, 0.5), (8, False, 0.0)],
)
def test_the_length_term_counts_text_without_the_end_token(length, ended, worth):
  cfg = RewardConfig(length=0.2, length_full_tokens=4, length_zero_tokens=8)
  reward, terms = rewarded(cfg, captions(1, length=length, ended=ended))
  np.testing.assert_allclose(terms["length"], worth)
  np.testing.assert_allclose(reward, np.array([2 / 3, 1]) + 0.2 * worth, rtol=1e-6)


def test_repetition_and_truncation_cost():
  caption = captions(1, length=8, ended=False)
  caption = caption.replace(
    tokens_BGT=jnp.broadcast_to(jnp.array([1, 2, 1, 2, 1, 2, 1, 2]), (3, 1, 8))
  )
  reward, terms = rewarded(
    RewardConfig(accuracy=0.0, repetition=0.3, repetition_ngram=2, truncated=0.1), caption
  )
  np.testing.assert_allclose(terms["repetition"], 5 / 7, rtol=1e-6)  # 7 pairs, 2 kinds
  np.testing.assert_allclose(reward, -0.3 * 5 / 7 - 0.1, rtol=1e-6)


def test_timestamps_are_read_from_the_tokens_bytes():
  table = jnp.asarray(stamp_table([b"[00:0", b"1] a ", b"x"]))
  caption = captions(1, length=2)
  caption = caption.replace(
    tokens_BGT=jnp.broadcast_to(jnp.array([0, 1, 2, 2, 2, 2, 2, 2]), (3, 1, 8))
  )
  reward, _, terms = caption_reward(
    answers(CREDIT, valid_where_asked(1)), caption, RewardConfig(timestamps=0.2), table
  )
  np.testing.assert_allclose(terms["timestamps"][:2, 0], 1.0)
  np.testing.assert_allclose(reward[:2, 0], np.array([2 / 3, 1]) + 0.2, rtol=1e-6)


def test_an_unscored_caption_has_no_terms():
  caption = captions(1, length=8, ended=False)
  reward, scored, terms = caption_reward(
    answers(CREDIT, valid_where_asked(1)), caption, RewardConfig(length=1.0, truncated=1.0)
  )
  assert (
    not scored[2].any() and reward[2, 0] == 0 and all(value[2, 0] == 0 for value in terms.values())
  )


@pytest.mark.parametrize(
  "wrong, message",
  [
    (dict(misled=-0.5), "weights of a reward's terms are at least 0.*'misled': -0.5"),
    (dict(length=-1.0), "'length': -1.0"),
    (dict(accuracy=0.0), "every weight of the reward is 0"),
    (
      dict(length_full_tokens=9, length_zero_tokens=9),
      "length_full_tokens = 9 must be below length_zero_tokens = 9",
    ),
    (dict(repetition_ngram=0), "repetition_ngram = 0 at least 1"),
  ],
)
def test_weights_that_mean_nothing_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    RewardConfig(**wrong)


def test_a_reward_of_the_users_own_is_one_more_term():
  credit = jnp.asarray([[[1, 0, 1, 1], [0, 0, 0, 1]]] * 3)
  answered, written = answers(credit, valid_where_asked(2)), captions(2)
  own = OwnReward(
    jnp.array([[0.5, jnp.nan], [2.0, 1.0], [1.0, 1.0]]),
    jnp.array([[True, True], [False, True], [True, True]]),
  )
  cfg = RewardConfig(accuracy=1.0, custom="own.py:reward", custom_weight=2.0)
  scored = score_captions(answered, written, Vocabulary(None, None, (), 0), cfg, own)
  # not finite, none by the mask, an image without a question
  np.testing.assert_array_equal(scored.scored_BG, [[True, False], [False, True], [False, False]])
  np.testing.assert_allclose(scored.reward_BG, [[2 / 3 + 1, 0], [0, 2], [0, 0]], rtol=1e-6)
  np.testing.assert_array_equal(scored.terms["custom"], [[0.5, 0], [0, 1], [0, 0]])
  assert dict(scored.weights) == {"accuracy": 1.0, "custom": 2.0}
  watched = RewardConfig(custom="own.py:reward", custom_weight=0.0)
  scored = score_captions(answered, written, Vocabulary(None, None, (), 0), watched, own)
  assert "custom" in scored.terms and dict(scored.weights) == {"accuracy": 1.0}
  RewardConfig(accuracy=0.0, custom="own.py:reward")
  with pytest.raises(ValueError, match="every weight of the reward is 0"):
    RewardConfig(accuracy=0.0, custom="own.py:reward", custom_weight=0.0)
  with pytest.raises(ValueError, match="at least 0"):
    RewardConfig(custom="own.py:reward", custom_weight=-1.0)


def test_the_arrays_of_a_reward_function():
  credit = [[[1, 0, 1, 1], [0, 0, 0, 1]]] * 3
  answered = answers(credit, valid_where_asked(2))
  answered = answered.replace(question_BGK=answered.question_BGK[..., ::-1])
  kind_BK = jnp.array([[3, 2, 1, 0]] * 3)
  questions = Questions(*[None] * 6, kind_BK=kind_BK, prior_BKA=None)
  seen = []

  def custom(arrays: RewardArrays) -> OwnReward:
    seen.append(arrays)
    return OwnReward(arrays.accuracy_BG, arrays.ended_BG)

  own = own_reward(custom, captions(2), answered, questions)
  [arrays] = seen
  np.testing.assert_allclose(own.reward_BG[:2], [[2 / 3, 0], [1, 0]], rtol=1e-6)
  assert arrays.length_BG.tolist() == [[4, 4]] * 3  # the end token is no text
  assert arrays.kind_BGK[0, 0].tolist() == [0, 1, 2, 3]
  assert own_reward(None, captions(2), answered, questions) is None


def test_without_a_judge_ones_own_reward_is_all_there_is():
  """Nobody answers: K is 0, and a caption is scored where the function gave a reward."""
  nothing = jnp.zeros((3, 0))
  questions = Questions(
    **dict.fromkeys(Questions.__dataclass_fields__, nothing) | {"prior_BKA": jnp.zeros((3, 0, 2))}
  )
  unasked = no_answers((3, 2), questions)
  assert not unasked.judged and unasked.score_BGKA.shape == (3, 2, 0, 2)
  cfg = RewardConfig(custom="x.py:f", length=0.5, length_full_tokens=4, length_zero_tokens=8)
  cfg = cfg.without_judge()
  assert cfg.accuracy == 0 and not cfg.is_accuracy and RewardConfig().is_accuracy
  seen = []

  def custom(arrays):
    seen.append(arrays)
    return OwnReward(arrays.length_BG * 1.0, jnp.array([[True, False]] * 3))

  own = own_reward(custom, captions(2), unasked, questions)
  assert seen[0].correct_BGK.shape == (3, 2, 0) and seen[0].kind_BGK.shape == (3, 2, 0)
  found = score_captions(unasked, captions(2), Vocabulary(None, None, (), 0), cfg, own)
  np.testing.assert_array_equal(found.scored_BG, [[True, False]] * 3)
  np.testing.assert_allclose(found.reward_BG, [[4 + 0.5, 0]] * 3)
  assert found.terms.keys() == {"custom", "length"}
  with pytest.raises(ValueError, match="misled = 0.5 counts a judge's answers, and none is named"):
    RewardConfig(custom="x.py:f", misled=0.5).without_judge()
  with pytest.raises(ValueError, match="without a judge reward.accuracy counts for nothing"):
    RewardConfig(custom="x.py:f", custom_weight=0.0).without_judge()
