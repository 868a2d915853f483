"""Attention by kernels, interpreted, beside one plain softmax; and those for GPUs beside those for
TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caprl_jax.models.attention import OwnTokens, attend
from caprl_jax.models.kernels import gpu, tpu
from caprl_jax.models.kernels.piece import UNSEEN, Piece

# branches, rows and slots of each prefix, slots in front, new tokens, query heads, key heads, width
SHAPES = {
  "captions": (4, ((1, 130), (2, 200)), 20, 130, 4, 2, 16, jnp.float32),
  "patches": (2, (), 0, 300, 1, 1, 8, jnp.bfloat16),
}


def draw_case(kind: str, seed: int, holes: float, segments: int):
  """Queries, keys and values; what may be seen; slots in front, and whether later ones are hidden.
  Segments need not be in order."""
  N, prefixes, E, L, H, J, h, dtype = SHAPES[kind]
  rng = np.random.default_rng(seed)
  normal = lambda *sizes: jnp.asarray(rng.normal(size=sizes), dtype)
  q, own = normal(N, L, H, h), (normal(N, E + L, J, h), normal(N, E + L, J, h))
  before = tuple((normal(R, S, J, h), normal(R, S, J, h)) for R, S in prefixes)
  some = lambda *sizes: jnp.asarray(rng.random(sizes) >= holes)
  segment = rng.integers(0, segments, (N, E + L))
  segment = jnp.asarray(segment if seed % 2 else np.sort(segment))
  masks = some(N, E + L), segment, tuple(some(R, S) for R, S in prefixes)
  return (q, own, before), masks, E, kind == "captions"


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def outcome(attention, moving, masks, earlier, causal):
  """Output and gradients."""

  def run(moving):
    out = attention(*moving, *masks, earlier, causal)
    weight = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return (out.astype(jnp.float32) * weight).sum(), out

  gradients, out = jax.grad(run, has_aux=True)(moving)
  return out, gradients


def by_kernels(q, own, before, own_valid, segment, valid, earlier, causal):
  tokens = OwnTokens(own_valid, segment, causal=causal, earlier=earlier)
  return attend(q, own, tokens, tuple((*kv, v) for kv, v in zip(before, valid)), "interpreted")


def plain(q, own, before, own_valid, segment, valid, earlier, causal):
  """Rows tiled, pieces joined, heads repeated, one softmax; zero where nothing is seen."""
  N, L, H, _ = q.shape
  tile = lambda x: jnp.repeat(x, N // x.shape[0], axis=0)
  key, value = (
    jnp.repeat(jnp.concatenate([tile(kv[i]) for kv in (*before, own)], 1), H // own[0].shape[2], 2)
    for i in range(2)
  )
  slot = jnp.arange(own_valid.shape[1])
  seen = (segment[:, earlier:, None] == segment[:, None]) & own_valid[:, None]
  if causal:
    seen &= slot[earlier:, None] >= slot
  everybody = [jnp.broadcast_to(tile(v)[:, None], (N, L, v.shape[1])) for v in valid]
  mask = jnp.concatenate([*everybody, seen], axis=-1)[:, :, None]
  score = jnp.einsum("nlhd,nshd->nlhs", *(x.astype(jnp.float32) for x in (q, key)))
  share = jax.nn.softmax(jnp.where(mask, score * q.shape[-1] ** -0.5, -1e30)) * mask
  return jnp.einsum("nlhs,nshd->nlhd", share, value.astype(jnp.float32)).astype(q.dtype)


@pytest.fixture
def small_blocks(monkeypatch):
  """Several blocks of queries and of keys."""
  monkeypatch.setattr(tpu, "QUERY_BLOCK", 128)
  monkeypatch.setattr(tpu, "KEY_BLOCK", 128)


@settings(
  max_examples=16,
  deadline=None,
  derandomize=True,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  kind=st.sampled_from(sorted(SHAPES)),
  seed=st.integers(0, 2**31),
  holes=st.sampled_from([0.0, 0.4, 0.98, 1.0]),
  segments=st.integers(1, 5),
)
def test_values_and_gradients_are_those_of_one_softmax(small_blocks, kind, seed, holes, segments):
  moving, *seen = draw_case(kind, seed, holes, segments)
  got, want = (outcome(attention, moving, *seen) for attention in (by_kernels, plain))
  atol = 2e-5 if kind == "captions" else 0.02
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=atol)


def test_blocks_that_do_not_meet_are_left_out():
  """Two segments of a block each, later tokens hidden."""
  low = jnp.repeat(jnp.array([0, 1 << 16]), 128)[None]
  code = low + jnp.arange(256)
  none = jnp.zeros((1, 1, 256, 8))
  piece = Piece(none, none, code.at[:, 200:].set(UNSEEN), low, code)
  np.testing.assert_array_equal(piece.meet(128, 128)[0], [[1, 0], [0, 1]])
  first, last = piece.seen_keys(64, 128)
  np.testing.assert_array_equal([first, last], [[0, 0, 1, 1], [0, 0, 1, 1]])
  first, last = piece.replace(high_NL=low - 1).seeing_queries(128, 128)
  np.testing.assert_array_equal([first, last], [[0, 0], [-1, -1]])


def test_the_gpus_kernels_give_what_the_tpus_give():
  """Interpreted; the heads are made as wide as Triton takes them."""
  N, R, J, M, L, S, h = 4, 2, 1, 2, 128, 128, 20
  rng = np.random.default_rng(0)
  normal = lambda *sizes: jnp.asarray(rng.normal(size=sizes), jnp.float32)
  low = jnp.asarray(rng.integers(0, 3, (N, L)) * 100, jnp.int32)
  code = jnp.asarray(np.where(rng.random((R, S)) < 0.3, UNSEEN, rng.integers(0, 300, (R, S))))
  key, value = normal(R, J, S, h), normal(R, J, S, h)
  piece = Piece(key, value, code.astype(jnp.int32), low, low.at[:, :70].add(50))
  q, slope = normal(N, J, M, L, h), normal(N, J, M, L, h)

  def run(kernels):
    out, lse = kernels.attend(q, piece, jnp.float32, interpret=True)
    dot = (out * slope).sum(-1)
    return out, lse, *kernels.gradients(q, piece, lse, slope, dot, interpret=True)

  for got, want in zip(jax.jit(lambda: run(gpu))(), jax.jit(lambda: run(tpu))()):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_gpus_kernels_become_tritons():
  """There need be no GPU for that."""
  struct = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  own, prefix = struct(4, 256, 2, 80), struct(2, 300, 2, 80)
  flags = struct(2, 300, dtype=bool), struct(4, 256, dtype=bool)

  def run(q, key, value, before, valid, own_valid):
    tokens = OwnTokens(own_valid)
    return attend(q, (key, value), tokens, ((before, before, valid),), "gpu").astype(float).sum()

  traced = jax.jit(jax.grad(run, argnums=range(4))).trace(
    struct(4, 256, 4, 80), own, own, prefix, *flags
  )
  assert traced.lower(lowering_platforms=("cuda",)).as_text().count("xla.gpu.triton") == 6
