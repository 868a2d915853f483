"""Shared-prefix attention against plain softmax attention over all pieces, tiled and joined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.models import attention
from caprl_jax.models.attention import (
  OwnTokens,
  Rounded,
  attend,
  attend_part,
  causal_mask,
  merge_parts,
)

N, L, H, J, h = 12, 5, 4, 2, 8
# rows, slots
PREFIXES = {"none": (), "one": ((1, 6),), "fan-out": ((4, 7),), "judge": ((1, 3), (4, 6), (12, 2))}


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def case(sizes):
  """Queries, own keys and values, prefixes, masks with holes in them; every query sees
  something.
  """
  rng = np.random.default_rng(len(sizes))
  q, own = 2 * normal(0, N, L, H, h), (normal(1, N, L, J, h), normal(2, N, L, J, h))
  prefixes = tuple(
    (normal(10 + i, R, S, J, h), normal(20 + i, R, S, J, h)) for i, (R, S) in enumerate(sizes)
  )
  valid = tuple(jnp.asarray(rng.random((R, S)) < 0.7) for R, S in sizes)
  own_valid = jnp.asarray(rng.random((N, L)) < 0.7).at[:, 0].set(True)
  return q, own, prefixes, valid, own_valid


@jax.jit
def shared(q, own, prefixes, valid, own_valid):
  return attend(q, own, OwnTokens(own_valid), tuple((*kv, v) for kv, v in zip(prefixes, valid)))


@jax.jit
def plain(q, own, prefixes, valid, own_valid):
  """Rows tiled to branches, pieces concatenated, heads repeated, one softmax."""
  tile = lambda x: jnp.repeat(x, N // x.shape[0], axis=0)
  key, value = (jnp.concatenate([tile(p[i]) for p in (*prefixes, own)], axis=1) for i in range(2))
  key, value = (jnp.repeat(x, H // J, axis=2) for x in (key, value))
  seen = [jnp.broadcast_to(tile(v)[:, None], (N, L, v.shape[1])) for v in valid]
  causal = jnp.tril(jnp.ones((L, L), bool))[None] & own_valid[:, None]
  mask = jnp.concatenate([*seen, causal], axis=-1)
  score = jnp.where(mask[:, :, None], jnp.einsum("nlhd,nshd->nlhs", q, key) / h**0.5, -1e30)
  return jnp.einsum("nlhs,nshd->nlhd", jax.nn.softmax(score), value)


@pytest.mark.parametrize("sizes", PREFIXES.values(), ids=PREFIXES)
def test_equals_plain_attention_over_tiled_prefixes(sizes):
  arguments = case(sizes)
  np.testing.assert_allclose(shared(*arguments), plain(*arguments), atol=1e-5)


def test_int8_prefixes_are_their_dequantised_selves():
  """A scale for each token and head; a token of zeros stays one."""
  q, own, prefixes, valid, own_valid = case(PREFIXES["judge"])
  prefixes = tuple((k.at[:, 1].set(0.0), v.at[0, 0, 1].mul(50.0)) for k, v in prefixes)
  small = jax.tree.map(Rounded.of, prefixes)
  wide = jax.tree.map(lambda x: x.values * x.scale, small, is_leaf=lambda x: isinstance(x, Rounded))
  got = shared(q, own, small, valid, own_valid)
  np.testing.assert_allclose(got, shared(q, own, wide, valid, own_valid), rtol=1e-5, atol=1e-5)
  assert 1e-3 < np.abs(got - shared(q, own, prefixes, valid, own_valid)).max() < 1.0
  for one, was in zip(jax.tree.leaves(wide), jax.tree.leaves(prefixes), strict=True):
    np.testing.assert_allclose(one, was, atol=float(np.abs(was).max()) / 254 + 1e-6)
    level = np.abs(was).max(-1, keepdims=True) / 127
    assert (np.abs(one - was) <= level / 2 + 1e-6).all()
  assert small[0][0].values.dtype == jnp.int8 and small[0][0].scale.shape == (1, 3, J, 1)


@pytest.mark.parametrize("sizes", PREFIXES.values(), ids=PREFIXES)
def test_gradients_equal_too(sizes):
  q, own, prefixes, valid, own_valid = case(sizes)
  weight = normal(3, N, L, H, h)
  grads = [
    jax.jit(jax.grad(lambda x: jnp.sum(weight * f(*x, valid, own_valid))))((q, own, prefixes))
    for f in (shared, plain)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *grads)
  assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(grads[0]))


def test_queries_that_see_nothing_give_zeros_and_finite_gradients():
  q, own, prefixes, valid, own_valid = case(PREFIXES["judge"])
  valid = (jnp.zeros((1, 3), bool), valid[1].at[2].set(False), valid[2].at[6:9].set(False))
  # branch 7 reads row 2 of the second prefix, row 7 of the third
  own_valid = own_valid.at[7, :3].set(False)
  out = shared(q, own, prefixes, valid, own_valid)
  np.testing.assert_array_equal(out[7, :3], 0)
  visible = np.ones((N, L), bool)
  visible[7, :3] = False
  np.testing.assert_allclose(
    out[visible], plain(q, own, prefixes, valid, own_valid)[visible], atol=1e-5
  )
  grad = jax.jit(jax.grad(lambda x: jnp.sum(shared(*x, valid, own_valid) ** 2)))((q, own, prefixes))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grad))
  np.testing.assert_array_equal(grad[0][7, :3], 0)


def test_everything_masked_is_zero():
  q, own, prefixes, valid, own_valid = case(PREFIXES["judge"])
  nothing = jax.tree.map(jnp.zeros_like, (valid, own_valid))
  run = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.abs(shared(*x, *nothing)))))
  value, grad = run((q, own, prefixes))
  assert value == 0
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), grad)


def test_masked_slots_may_hold_large_numbers_but_are_not_seen():
  q, own, prefixes, valid, own_valid = case(PREFIXES["fan-out"])
  want = shared(q, own, prefixes, valid, own_valid)
  hole = ~valid[0][..., None, None]
  dirty = tuple(jnp.where(hole, 1e4, x) for x in prefixes[0])
  np.testing.assert_allclose(shared(q, own, (dirty,), valid, own_valid), want, atol=1e-6)


def test_large_scores_do_not_overflow_and_order_of_pieces_does_not_matter():
  q, own, prefixes, valid, own_valid = case(PREFIXES["judge"])
  q = 100 * q
  got = shared(q, own, prefixes, valid, own_valid)
  np.testing.assert_allclose(got, plain(q, own, prefixes, valid, own_valid), atol=1e-3)
  parts = [attend_part(q, *kv, v) for kv, v in zip(prefixes, valid)] + [
    attend_part(q, *own, causal_mask(own_valid))
  ]
  np.testing.assert_allclose(merge_parts(parts[::-1]), got, atol=1e-4)


def test_bfloat16_keeps_its_dtype_and_stays_close():
  q, own, prefixes, valid, own_valid = case(PREFIXES["judge"])
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (q, own, prefixes))
  got = shared(*half, valid, own_valid)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    got.astype(jnp.float32), plain(q, own, prefixes, valid, own_valid), atol=0.1
  )


def test_causal_mask():
  got = causal_mask(jnp.array([[True, False, True]]))
  np.testing.assert_array_equal(got, [[[1, 0, 0], [1, 0, 0], [1, 0, 1]]])


def test_rows_that_do_not_divide_the_branches_are_refused():
  with pytest.raises(AssertionError):
    attend_part(
      normal(0, 4, 1, H, h), normal(1, 3, 2, J, h), normal(2, 3, 2, J, h), jnp.ones((3, 2), bool)
    )


@pytest.mark.parametrize("kind", ["causal", "both ways", "segments"])
@pytest.mark.parametrize("length", [9, 12])
def test_queries_in_chunks_give_the_same(length, kind, monkeypatch):
  """Values and gradients; the last chunk is not full for one of the lengths. Segments of three
  tokens reach back two, so most keys are not even looked at."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, key, value = draw(4, length, 4, 8), draw(4, length, 2, 8), draw(4, length, 2, 8)
  valid = jnp.asarray(rng.random((4, length)) < 0.8)
  own = OwnTokens(valid, causal=kind == "causal")
  if kind == "segments":
    own = OwnTokens(valid, jnp.broadcast_to(jnp.arange(length) // 3, (4, length)), reach=2)
  prefix = (draw(2, 5, 2, 8), draw(2, 5, 2, 8), jnp.asarray(rng.random((2, 5)) < 0.7))

  def run(q, key, value):
    out = attention.attend(q, (key, value), own, (prefix,))
    return (out * jnp.arange(out.size).reshape(out.shape) / out.size).sum(), out

  def gradients():
    return jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(q, key, value)

  whole = gradients()
  monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
  cut = gradients()
  assert "scan" in str(jax.make_jaxpr(run)(q, key, value))
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_keys_that_no_query_sees_cost_nothing(monkeypatch):
  """Of a row of segments, eight keys at a time; values and gradients are those of one piece."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  E, L = 37, 6
  q, key, value = draw(2, L, 4, 8), draw(2, E + L, 2, 8), draw(2, E + L, 2, 8)
  valid = jnp.asarray(rng.random((2, E + L)) < 0.8)
  # The new tokens go on with a segment that has begun at slot 30, or at 34.
  segment = jnp.asarray((np.arange(E + L) >= 30).astype(np.int32) + [[0], [0]])
  segment = segment.at[1].set(jnp.arange(E + L) >= 34)
  own = OwnTokens(valid, segment, reach=12, earlier=E)

  def run(q, key, value):
    out = attention.attend(q, (key, value), own)
    return (out * jnp.arange(out.size).reshape(out.shape) / out.size).sum(), out

  def gradients():
    return jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(q, key, value)

  whole = gradients()
  ran = []

  def counted(*arguments):
    jax.debug.callback(lambda: ran.append(1))
    return attend_part(*arguments)

  monkeypatch.setattr(attention, "KEY_CHUNK", 8)
  cut = gradients()
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  monkeypatch.setattr(attention, "attend_part", counted)
  jax.block_until_ready(jax.jit(run)(q, key, value))
  jax.effects_barrier()
  assert len(ran) == 3  # of six: slots 24 to 47
