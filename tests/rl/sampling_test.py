"""Decoding: the loop on a chain worked out by hand, and what the filters keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.models.attention import Prefix
from caprl_jax.rl.sampling import SamplingConfig, decode, draw
from caprl_jax.types import Vocabulary


def chain(first, end_ids, T=8, **sampling):
  """Greedy decoding of the chain "after token i comes i + 1", with keys that record position and
  token.
  """
  size, N = 10, len(first)
  vocabulary = Vocabulary(jnp.ones(size, bool), jnp.arange(size), end_ids, 0)

  def extend(tokens, position, valid, _prefixes):
    record = lambda x: jnp.broadcast_to(
      x.astype(jnp.float32)[None, ..., None, None], (1, N, 1, 1, 2)
    )
    return 5 * jax.nn.one_hot(tokens + 1, size), Prefix(record(position), record(tokens), valid)

  zeros = jnp.zeros((1, N, 1, 1, 2))
  return decode(
    extend,
    jnp.eye(size),
    5 * jax.nn.one_hot(jnp.array(first), size),
    100 + 10 * jnp.arange(N),
    prefixes=(Prefix(zeros, zeros, jnp.zeros((N, 1), bool)),),
    vocabulary=vocabulary,
    key=jax.random.key(0),
    cfg=SamplingConfig(max_tokens=T, **{"temperature": 0.0, **sampling}),
  )


def test_the_loop_by_hand():
  end = chain([2, 4, 5], (5,))
  np.testing.assert_array_equal(end.tokens_NT[:, :4], [[2, 3, 4, 5], [4, 5, 0, 0], [5, 0, 0, 0]])
  assert end.step == 4  # not 8: all have ended
  np.testing.assert_array_equal(end.tokens_NT[:, 4:], 0)
  np.testing.assert_array_equal(end.valid_NT.sum(1), [4, 2, 1])
  np.testing.assert_array_equal(end.done_N, True)
  logp = -np.log1p(9 * np.exp(-5))  # one logit of 5, nine of 0
  np.testing.assert_allclose(end.logp_NT[0], [logp] * 4 + [0] * 4, atol=1e-6)
  np.testing.assert_allclose(end.logp_NT[2], [logp] + [0] * 7, atol=1e-6)
  # Slot t holds what token t left behind; the last token never runs.
  np.testing.assert_array_equal(end.cache.key_YRSJh[0, 0, :, 0, 0], [100, 101, 102, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(end.cache.value_YRSJh[0, 0, :, 0, 0], [2, 3, 4, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(
    end.cache.valid_RS[:, :4],
    [[True, True, True, False], [True, True, False, False], [True, False, False, False]],
  )
  assert end.cache.key_YRSJh[0, 1, 1, 0, 0] == 111


def test_the_loop_stops_at_max_tokens_and_after_one_step_if_only_the_end_is_there():
  end = chain([1, 2], (9,), T=3)
  assert end.step == 3 and not end.done_N.any()
  np.testing.assert_array_equal(end.tokens_NT, [[1, 2, 3], [2, 3, 4]])
  assert chain([9, 9], (9,)).step == 1
  assert chain([9, 8], (7, 8, 9)).step == 1  # any of several ends


PROBABILITIES = np.array([0.05, 0.4, 0.0, 0.1, 0.25, 0.2])


def drawn(**sampling):
  """Shares of each token among 4000 draws."""
  with np.errstate(divide="ignore"):
    logits = jnp.broadcast_to(jnp.maximum(jnp.log(PROBABILITIES), -1e30), (4000, 6))
  uniform = jax.random.uniform(jax.random.key(0), (4000,))
  tokens, logp = draw(logits, uniform, SamplingConfig(max_tokens=1, **sampling))
  assert tokens.dtype == jnp.int32
  np.testing.assert_allclose(logp, np.log(PROBABILITIES[np.asarray(tokens)]), atol=1e-6)
  return np.bincount(np.asarray(tokens), minlength=6) / 4000


@pytest.mark.parametrize(
  "sampling, kept",
  [
    (dict(), [0, 1, 3, 4, 5]),
    (dict(top_k=1), [1]),
    (dict(top_k=2), [1, 4]),
    (dict(top_k=6), [0, 1, 3, 4, 5]),
    (dict(top_p=0.3), [1]),
    (dict(top_p=0.5), [1, 4]),
    (dict(top_p=0.7), [1, 4, 5]),
    (dict(top_p=0.9), [1, 3, 4, 5]),
    (dict(top_p=1e-6), [1]),
    (dict(top_k=3, top_p=0.6), [1, 4]),
    (dict(temperature=0.0), [1]),
  ],
)
def test_top_k_and_top_p_keep_what_they_should(sampling, kept):
  want = np.where(np.isin(np.arange(6), kept), PROBABILITIES, 0)
  got = drawn(**sampling)
  np.testing.assert_array_equal(np.flatnonzero(got), kept)
  np.testing.assert_allclose(got, want / want.sum(), atol=0.03)  # renormalised over what is kept


@pytest.mark.parametrize(
  "wrong, message",
  [
    (dict(max_tokens=0), "max_tokens = 0"),
    (dict(temperature=-1.0), "temperature = -1.0"),
    (dict(top_p=0.0), "top_p"),
    (dict(top_p=1.1), "top_p"),
    (dict(top_k=-1), "top_k"),
  ],
)
def test_wrong_settings_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    SamplingConfig(**{"max_tokens": 4, **wrong})
