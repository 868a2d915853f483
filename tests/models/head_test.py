"""Log-probabilities, entropies and losses from the head: chunked, of allowed tokens, gradients, a
mesh."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import ROOT

from benchmarks.parts.executed import executed
from caprl_jax.models.head import (
  chunk_rows,
  scaled_logits,
  token_kl,
  token_logprobs,
  token_loss,
)

M, D, V, X = 11, 6, 17, 3
HIDDEN = jax.random.normal(jax.random.key(0), (M, D))
HEAD = jax.random.normal(jax.random.key(1), (V, D))
ALLOWED = jnp.arange(V) % 3 != 1
TARGET = jax.random.randint(jax.random.key(2), (M, X), 0, V // 3) * 3  # multiples of 3 are allowed


def by_hand(hidden, head, target, allowed, temperature):
  logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / temperature
  p = np.exp(logits) * (1.0 if allowed is None else np.asarray(allowed))
  p /= p.sum(1, keepdims=True)
  entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
  return np.log(np.take_along_axis(p, np.asarray(target), 1)), entropy


@pytest.mark.parametrize("allowed", [None, ALLOWED], ids=["all", "allowed"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 4, 11, 1024])
def test_against_numpy_at_every_chunk_size(allowed, temperature, chunk):
  logp, entropy = token_logprobs(
    HIDDEN,
    HEAD,
    TARGET,
    allowed_V=allowed,
    temperature=temperature,
    chunk_tokens=chunk,
    entropy="figure",
  )
  want_logp, want_entropy = by_hand(HIDDEN, HEAD, TARGET, allowed, temperature)
  assert (
    logp.shape == (M, X) and entropy.shape == (M,) and logp.dtype == entropy.dtype == jnp.float32
  )
  np.testing.assert_allclose(logp, want_logp, atol=1e-5)
  np.testing.assert_allclose(entropy, want_entropy, atol=1e-5)


@pytest.mark.parametrize("allowed", [None, ALLOWED], ids=["all", "allowed"])
def test_gradients_do_not_depend_on_chunks(allowed):
  def f(hidden, head, chunk):
    logp, entropy = token_logprobs(
      hidden,
      head,
      TARGET,
      allowed_V=allowed,
      temperature=0.7,
      chunk_tokens=chunk,
      entropy="differentiable",
    )
    return jnp.sum(logp * jnp.arange(1.0, X + 1)) + jnp.sum(entropy * jnp.arange(M))

  def whole(hidden, head):
    logits = hidden @ head.T / 0.7
    if allowed is not None:
      logits = jnp.where(allowed, logits, -1e30)
    logp = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.where(jnp.exp(logp) > 0, jnp.exp(logp) * logp, 0), -1)
    return jnp.sum(jnp.take_along_axis(logp, TARGET, 1) * jnp.arange(1.0, X + 1)) + jnp.sum(
      entropy * jnp.arange(M)
    )

  want = jax.grad(whole, (0, 1))(HIDDEN, HEAD)
  for chunk in (4, 1024):
    got = jax.grad(f, (0, 1))(HIDDEN, HEAD, chunk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, want)
  if allowed is not None:
    np.testing.assert_array_equal(got[1][~np.asarray(allowed)], 0)


SCATTERED = jnp.isin(jnp.arange(M), jnp.array([1, 6, 10]))


def test_tokens_that_are_not_wanted_cost_nothing_and_change_nothing():
  def f(hidden, head, wanted, chunk=2):
    logp, entropy = token_logprobs(
      hidden, head, TARGET, wanted_M=wanted, chunk_tokens=chunk, entropy="differentiable"
    )
    each = (logp * jnp.arange(1.0, X + 1)).sum(1) + entropy
    return jnp.sum(jnp.where(SCATTERED, each * jnp.arange(M), 0))

  grad = jax.value_and_grad(f, (0, 1))
  want, got = grad(HIDDEN, HEAD, None, 1024), grad(HIDDEN, HEAD, SCATTERED)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)

  # Three of eleven tokens lie apart, and fill two chunks of two.
  all_of_them, _ = executed(grad, HIDDEN, HEAD, jnp.ones(M, bool))
  some, _ = executed(grad, HIDDEN, HEAD, SCATTERED)
  assert some == all_of_them * 2 / 6


GIVEN = jax.random.normal(jax.random.key(4), (M, X))


def curved(logp, entropy, given):
  """A loss whose slopes depend on the log-probabilities."""
  return given * (jnp.sin(logp) + 0.3 * entropy[:, None] ** 2)


def in_two_passes(hidden, head, given, wanted=None, **settings):
  logp, entropy = token_logprobs(hidden, head, TARGET, wanted_M=wanted, **settings)
  return curved(logp, entropy, given).sum(), (logp, entropy)


@pytest.mark.parametrize("wanted", [None, SCATTERED], ids=["all", "some"])
@pytest.mark.parametrize("allowed", [None, ALLOWED], ids=["any", "allowed"])
@pytest.mark.parametrize("chunk", [2, 4, 1024])
def test_a_loss_has_the_gradient_of_two_passes(chunk, allowed, wanted):
  settings = dict(allowed_V=allowed, temperature=0.7, entropy="differentiable")
  given = GIVEN if wanted is None else jnp.where(wanted[:, None], GIVEN, 0.0)

  def loss(hidden, head):
    total, *measured = token_loss(
      hidden, head, TARGET, GIVEN, curved, wanted_M=wanted, chunk_tokens=chunk, **settings
    )
    return total, measured

  run = functools.partial(jax.value_and_grad, has_aux=True)
  (got, measured), slopes = run(loss, (0, 1))(HIDDEN, HEAD)
  (want, expected), wanted_slopes = run(in_two_passes, (0, 1))(HIDDEN, HEAD, given, **settings)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(slopes, wanted_slopes, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
  rows = jnp.arange(M) if wanted is None else jnp.flatnonzero(wanted)
  for a, b in zip(measured, expected, strict=True):
    np.testing.assert_allclose(a[rows], b[rows], atol=1e-5)
  np.testing.assert_allclose(loss(HIDDEN, HEAD)[0], want, rtol=1e-5)  # without a gradient
  # A multiple of the loss has the same multiple of its gradient.
  thrice = jax.grad(lambda h: 3 * loss(h, HEAD)[0])(HIDDEN)
  np.testing.assert_allclose(thrice, 3 * slopes[0], rtol=1e-6)


def test_what_fills_a_chunk_up_adds_nothing():
  loss = lambda hidden: token_loss(
    hidden, HEAD, TARGET, None, lambda logp, *_: 1.0 - logp, chunk_tokens=4
  )[0]
  value, slope = jax.value_and_grad(loss)(HIDDEN)
  logp, _ = by_hand(HIDDEN, HEAD, TARGET, None, 1.0)
  np.testing.assert_allclose(value, (1 - logp).sum(), rtol=1e-5)
  np.testing.assert_allclose(loss(HIDDEN), value, rtol=1e-6)
  assert jnp.isfinite(slope).all()


@pytest.mark.parametrize(
  "tokens, most, size, rows",
  [
    (100, 1024, 10**7, 100),
    (1024, 4096, 10**7, 192),
    (4080, 4096, 10**7, 192),
    (16_376, 4096, 10**7, 192),
    (4080, 4096, 10**8, 512),
    (16_376, 4096, 10**8, 683),
    (100_000, 1024, 10**8, 1024),
  ],
)
def test_chunks_are_small_where_the_unembedding_is(tokens, most, size, rows):
  assert chunk_rows(tokens, most, size) == rows


def test_a_loss_costs_three_products_and_two_where_the_head_is_not_trained():
  def loss(hidden, head):
    return token_loss(hidden, head, TARGET, GIVEN, curved, chunk_tokens=4)[0]

  def two_passes(hidden, head):
    return in_two_passes(hidden, head, GIVEN, chunk_tokens=4)[0]

  one = 2 * 12 * D * V  # three chunks of four
  flops = lambda function, which: executed(jax.grad(function, which), HIDDEN, HEAD)[0]
  assert flops(loss, (0, 1)) == 3 * one and flops(loss, 0) == 2 * one
  assert flops(two_passes, (0, 1)) == 4 * one
  only, _ = executed(loss, HIDDEN, HEAD)
  assert only == one


def test_a_loss_in_bfloat16_has_a_float32_sum_and_gradients_of_its_arguments():
  half = HIDDEN.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16)
  loss = lambda *arrays: token_loss(arrays[0], arrays[1], TARGET, GIVEN, curved, chunk_tokens=4)[0]
  value, slopes = jax.value_and_grad(loss, (0, 1))(*half)
  assert value.dtype == jnp.float32 and all(x.dtype == jnp.bfloat16 for x in slopes)
  want = jax.grad(lambda *arrays: in_two_passes(*arrays, GIVEN)[0], (0, 1))(HIDDEN, HEAD)
  for a, b in zip(slopes, want, strict=True):
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.03 * float(jnp.abs(b).max()))


def test_many_slots_of_which_few_are_wanted():
  slots = 4096
  hidden = jax.random.normal(jax.random.key(3), (slots, D))
  target = jnp.zeros((slots, 1), int)

  def f(wanted):
    return token_logprobs(hidden, HEAD, target, wanted_M=wanted, chunk_tokens=slots)[0].sum()

  flops, _ = executed(f, jnp.arange(slots) < 560)
  assert flops < 1.1 * 2 * 560 * D * V


def test_a_divergence_costs_what_is_wanted_of_it():
  other = HIDDEN[::-1] * 0.5

  def f(hidden, wanted):
    kl = token_kl(hidden, HEAD, other, HEAD, wanted_M=wanted, chunk_tokens=2)
    return jnp.sum(jnp.where(SCATTERED, kl * jnp.arange(M), 0))

  grad = jax.value_and_grad(f)
  want, got = grad(HIDDEN, None), grad(HIDDEN, SCATTERED)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
  all_of_them, _ = executed(grad, HIDDEN, jnp.ones(M, bool))
  assert executed(grad, HIDDEN, SCATTERED)[0] == all_of_them * 2 / 6


def test_an_entropy_that_is_a_figure_has_no_gradient():
  def f(head, entropy):
    logp, nats = token_logprobs(HIDDEN, head, TARGET, allowed_V=ALLOWED, entropy=entropy)
    return logp.sum() + nats.sum()

  figure, none, whole = (jax.grad(f)(HEAD, kind) for kind in ("figure", "none", "differentiable"))
  np.testing.assert_array_equal(figure, none)
  assert float(jnp.abs(whole - none).max()) > 0.1


def test_entropy_of_a_uniform_and_of_a_certain_distribution():
  _, entropy = token_logprobs(
    jnp.zeros((2, D)), HEAD, TARGET[:2], allowed_V=ALLOWED, entropy="figure"
  )
  np.testing.assert_allclose(entropy, np.log(int(ALLOWED.sum())), rtol=1e-6)
  only = jnp.arange(V) == 3
  logp, entropy = token_logprobs(
    HIDDEN, HEAD, jnp.full((M, 1), 3), allowed_V=only, entropy="figure"
  )
  np.testing.assert_allclose(logp, 0, atol=1e-6)
  np.testing.assert_allclose(entropy, 0, atol=1e-6)


def test_logits_are_float32_from_bfloat16():
  logits = scaled_logits(HIDDEN.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16), ALLOWED, 2.0)
  assert logits.dtype == jnp.float32
  want = (
    np.asarray(HIDDEN.astype(jnp.bfloat16), np.float32)
    @ np.asarray(HEAD.astype(jnp.bfloat16), np.float32).T
    / 2
  )
  np.testing.assert_allclose(logits[:, ALLOWED], want[:, ALLOWED], rtol=1e-5, atol=1e-5)
  assert (logits[:, ~ALLOWED] < -1e29).all()


# In a process of its own, since the number of CPU devices is set before jax starts.
PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
from helpers.programs import hlo
from caprl_jax import sharding
from caprl_jax.models.head import token_kl, token_logprobs, token_loss

B, L, D, V = 8, 90, 16, 50
rng = np.random.default_rng(0)
arrays = [rng.normal(size=size).astype(np.float32) for size in ((B, L, D), (V, D), (B, L, D))]
arrays.append(rng.integers(0, V, (B, L, 1)))

def f(hidden, head, other, target):
  flat = lambda x: x.reshape(-1, x.shape[-1])
  wanted = flat(target)[:, 0] > V // 4
  logp, entropy = token_logprobs(
    flat(hidden), head, flat(target), wanted_M=wanted, chunk_tokens=32, entropy="differentiable"
  )
  kl = token_kl(flat(hidden), head, flat(other), head, wanted_M=wanted, chunk_tokens=32)
  weight = jnp.where(wanted, jnp.arange(B * L), 0)
  total, _, _ = token_loss(
    flat(hidden), head, flat(target), weight[:, None],
    lambda logp, _, weight: weight * jnp.cos(logp), wanted_M=wanted, chunk_tokens=32,
  )
  return jnp.where(wanted, logp.sum(1) + entropy + kl, 0) @ jnp.arange(B * L) + total

found = {}
meshes = dict(
  one=None, data4=dict(data=4), fsdp4=dict(data=1, fsdp=4), both=dict(data=2, fsdp=2)
)
for name, sizes in meshes.items():
  devices = jax.devices() if sizes else jax.devices()[:1]
  mesh = sharding.make_mesh(sharding.MeshConfig(**(sizes or {})), devices)
  batch, head = sharding.batch_sharding(mesh), jax.NamedSharding(mesh, jax.P("tensor", "fsdp"))
  with jax.set_mesh(mesh):
    places = (batch, head, batch, batch)
    grad = jax.value_and_grad(f, (0, 1, 2))
    step = jax.jit(grad, in_shardings=places, out_shardings=(None, places[:3]))
    compiled = step.lower(*arrays).compile()
    value, grads = jax.block_until_ready(compiled(*map(jax.device_put, arrays, places)))
  text = compiled.as_text()
  sums = [line for line in text.splitlines() if " all-reduce(" in line and f",{V}]" in line]
  grads = [np.asarray(g).tolist() for g in grads]
  found[name] = dict(flops=hlo.dot_flops(text), value=float(value), grads=grads, sums=sums)
print(json.dumps(found))
"""


def test_on_a_mesh_each_device_computes_its_own_tokens():
  """Chunks cut straight through the tokens were computed by all devices, and logits summed over
  them.
  """
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    capture_output=True,
    text=True,
    timeout=300,
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout)
  one = found.pop("one")
  for name, got in found.items():
    assert got["flops"] <= 1.1 * one["flops"] / 4, name  # 90 tokens a row are 96 in chunks of 32
    assert not got["sums"], name
    np.testing.assert_allclose(got["value"], one["value"], rtol=1e-5, err_msg=name)
    for a, b in zip(got["grads"], one["grads"], strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), err_msg=name)
