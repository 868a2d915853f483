"""The clipped surrogate against the formula written out caption by caption, token by token."""

import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from caprl_jax.rl.loss import (
  LossConfig,
  LossInputs,
  kl_estimate,
  loss_count,
  policy_loss,
  set_tokens,
  token_loss,
)

k3_kl = lambda logp, reference: kl_estimate(logp, reference, "k3")

B, G, T = 2, 3, 5


@pytest.fixture
def case():
  rng = np.random.default_rng(0)
  logp = -rng.exponential(1, (B, G, T)).astype(np.float32)
  old = logp + rng.normal(0, 0.4, logp.shape).astype(np.float32)
  reference = logp + rng.normal(0, 0.4, logp.shape).astype(np.float32)
  entropy = rng.random(logp.shape).astype(np.float32)
  advantage = rng.normal(0, 1, (B, G)).astype(np.float32)
  counts = np.arange(T) < np.array([[5, 2, 3], [1, 0, 4]])[..., None]  # one caption counts nothing
  return logp, old, reference, entropy, advantage, counts


def literal(logp, old, reference, entropy, advantage, counts, cfg):
  """In torch, with a Python loop a token: mean loss, gradient by logp, metrics."""
  logp = torch.tensor(logp.astype(np.float64), requires_grad=True)
  captions, clip, kls, ratios = [], 0, [], []
  for b in range(B):
    for g in range(G):
      tokens = []
      for t in range(T):
        if counts[b, g, t]:
          A = float(advantage[b, g])
          r = torch.exp(logp[b, g, t] - float(old[b, g, t]))
          clipped = r.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
          token = -torch.minimum(r * A, clipped * A)
          clip += clipped.item() * A < r.item() * A
          ratios.append(r.item())
          if reference is not None:
            d = float(reference[b, g, t]) - logp[b, g, t]
            kls.append((torch.exp(d) - d - 1).item())
            token = token + cfg.kl * (torch.exp(d) - d - 1)
          tokens.append(token)
      if tokens:
        captions.append(tokens)
  if cfg.aggregation == "token_mean":
    loss = torch.stack([t for tokens in captions for t in tokens]).mean()
  else:
    loss = torch.stack([torch.stack(tokens).mean() for tokens in captions]).mean()
  loss.backward()
  return (
    loss.item(),
    logp.grad.numpy(),
    dict(clip=clip, kl=sum(kls), top=max(ratios), low=min(ratios)),
  )


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("high", [0.2, 0.5])
def test_loss_gradient_and_metrics_match_the_formula(case, aggregation, kl, high):
  cfg = LossConfig(clip_low=0.2, clip_high=high, aggregation=aggregation, kl=kl)
  logp, old, reference, entropy, advantage, counts = case
  reference = reference if kl else None
  want, want_grad, want_metrics = literal(logp, old, reference, entropy, advantage, counts, cfg)

  def mean(logp):
    given = LossInputs(old, advantage, jnp.asarray(counts), reference_logp_BGT=reference)
    loss = policy_loss(logp, entropy, given, cfg)
    return loss.total / loss.count, loss.numbers

  (got, metrics), grad = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(logp))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(grad, want_grad, atol=1e-6)
  assert metrics.sums["clip_fraction"] == want_metrics["clip"] > 0
  np.testing.assert_allclose(metrics.sums["entropy"], entropy[counts].sum(), rtol=1e-6)
  np.testing.assert_allclose(
    metrics.sums["logp_difference"], np.abs(logp - old)[counts].sum(), rtol=1e-5
  )
  np.testing.assert_allclose(
    [metrics.maxima["ratio"], metrics.minima["ratio"]],
    [want_metrics["top"], want_metrics["low"]],
    rtol=1e-5,
  )
  assert ("kl" in metrics.sums) == bool(kl)
  if kl:
    np.testing.assert_allclose(metrics.sums["kl"], want_metrics["kl"], rtol=1e-5)


@pytest.mark.parametrize(
  "ratio, advantage, loss, slope",
  [
    (1.25, 1.0, -1.25, -1.25),  # inside [0.8, 1.28]
    (1.5, 1.0, -1.28, 0.0),  # clipped at 1 + high
    (0.5, 1.0, -0.5, -0.5),  # worse than it was: never clipped
    (0.5, -1.0, 0.8, 0.0),  # clipped at 1 - low
    (1.5, -1.0, 1.5, 1.5),
  ],
)
def test_clip_higher_by_hand(ratio, advantage, loss, slope):
  cfg = LossConfig(clip_low=0.2, clip_high=0.28)

  def f(logp):
    one = jnp.ones((1, 1, 1), bool)
    given = LossInputs(jnp.zeros((1, 1, 1)), jnp.full((1, 1), advantage), one)
    return policy_loss(logp, jnp.zeros((1, 1, 1)), given, cfg).total

  got, grad = jax.value_and_grad(f)(jnp.full((1, 1, 1), math.log(ratio)))
  np.testing.assert_allclose([got, grad[0, 0, 0]], [loss, slope], rtol=1e-6)


def test_k3_by_hand_and_never_negative():
  # d = log(ref / policy) = log 2: 2 - log 2 - 1; d = -log 2: 1/2 + log 2 - 1
  np.testing.assert_allclose(
    k3_kl(jnp.log(jnp.array([0.25, 0.5, 0.3])), jnp.log(jnp.array([0.5, 0.25, 0.3]))),
    [1 - math.log(2), math.log(2) - 0.5, 0],
    atol=1e-6,
  )
  a, b = np.random.default_rng(0).normal(0, 2, (2, 1000)).astype(np.float32)
  assert (k3_kl(jnp.asarray(a), jnp.asarray(b)) >= 0).all()


def test_k3_estimates_the_divergence():
  p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
  np.testing.assert_allclose(
    (p * np.asarray(k3_kl(jnp.log(p), jnp.log(q)))).sum(), (p * np.log(p / q)).sum(), rtol=1e-5
  )


def test_a_token_mean_within_sets(case):
  """As OpenRLHF averages: a loop over micro-batches, each with its own token mean."""
  logp, old, _, entropy, advantage, counts = case

  def mean(aggregation, captions=1):
    cfg = LossConfig(surrogate="reinforce", aggregation=aggregation, set_captions=captions)
    loss = policy_loss(
      jnp.asarray(logp), entropy, LossInputs(old, advantage, jnp.asarray(counts)), cfg
    )
    return float(loss.total / loss.count)

  token = -advantage[..., None] * logp
  of_sets = [  # two images, one caption of each
    token[:, g][counts[:, g]].mean() for g in range(G)
  ]
  np.testing.assert_allclose(mean("set_token_mean", B), np.mean(of_sets), rtol=1e-5)
  assert abs(np.mean(of_sets) - mean("token_mean")) > 0.01
  np.testing.assert_allclose(mean("set_token_mean", B * G), mean("token_mean"), rtol=1e-5)
  np.testing.assert_allclose(mean("set_token_mean", 1), mean("sequence_mean"), rtol=1e-5)


@pytest.mark.parametrize("aggregation", typing.get_args(LossConfig.__annotations__["aggregation"]))
@pytest.mark.parametrize(
  "changes",
  [
    dict(kl=0.3, kl_estimator="k1"),
    dict(kl=0.3, kl_estimator="k2", surrogate="reinforce", entropy=0.1),
    dict(kl=0.3, kl_in="reward", surrogate="cispo"),
    dict(importance="mask", importance_cap=1.1, dual_clip=2.0),
    dict(importance="truncate", kl=0.1, kl_estimator="k3_clamped"),
  ],
  ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_tokens_one_by_one_add_up_to_the_loss(case, aggregation, changes):
  logp, old, reference, entropy, advantage, counts = case
  counts = jnp.asarray(counts)
  odd = lambda x: jnp.where(counts, x, jnp.nan)  # where nothing counts there may be anything
  cfg = LossConfig(aggregation=aggregation, set_captions=3, **changes)
  given = LossInputs(
    odd(old), advantage, counts, odd(old) if "importance" in changes else None, odd(reference)
  )

  def whole(logp):
    return policy_loss(odd(logp), odd(entropy), given, cfg).total

  def apart(logp):
    flat = lambda x: x.reshape(B * G, T)  # a hidden state each, as it were, with T targets
    inputs = jax.tree.map(flat, given.of_tokens(cfg))
    terms = [
      token_loss(
        flat(odd(logp))[:, t : t + 1],
        flat(odd(entropy))[:, t],
        jax.tree.map(lambda x, t=t: x[:, t : t + 1], inputs),
        cfg,
      )
      for t in range(T)
    ]
    return sum(term.sum() for term in terms)

  assert cfg.by_token
  (want, want_slope), (got, slope) = (
    jax.value_and_grad(f)(jnp.asarray(logp)) for f in (whole, apart)
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(slope, want_slope, atol=1e-6)
  assert np.isfinite(want) and float(jnp.abs(want_slope).max()) > 1e-3


def test_counts():
  counts = jnp.array([[[True, True, False], [False] * 3], [[True, False, False], [True] * 3]])
  assert loss_count(counts, LossConfig(aggregation="token_mean")) == 6
  assert loss_count(counts, LossConfig(aggregation="sequence_mean")) == 3


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_garbage_that_does_not_count_changes_nothing(case, aggregation, garbage):
  cfg = LossConfig(aggregation=aggregation, kl=0.1)
  logp, old, reference, entropy, advantage, counts = case
  dirty = lambda x: np.where(counts, x, garbage)

  def f(logp, old, reference, entropy):
    given = LossInputs(old, advantage, jnp.asarray(counts), reference_logp_BGT=reference)
    loss = policy_loss(logp, entropy, given, cfg)
    return loss.total / loss.count, loss.numbers

  run = jax.value_and_grad(f, has_aux=True)
  want = run(jnp.asarray(logp), old, reference, entropy)
  got = run(jnp.asarray(dirty(logp)), dirty(old), dirty(reference), dirty(entropy))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert np.isfinite(got[0][0])
  assert (np.asarray(got[1])[~counts] == 0).all()


def test_on_policy_the_gradient_is_minus_the_advantage(case):
  logp, _, _, entropy, advantage, counts = case
  given = LossInputs(logp, advantage, jnp.asarray(counts))
  total = lambda x: policy_loss(x, entropy, given, LossConfig()).total
  np.testing.assert_allclose(
    jax.grad(total)(jnp.asarray(logp)), -advantage[..., None] * counts, rtol=1e-6
  )


@pytest.mark.parametrize("aggregation", ["sequence_mean", "set_token_mean"])
def test_microbatches_add_up(case, aggregation):
  cfg = LossConfig(aggregation=aggregation, kl=0.1, set_captions=B)
  logp, old, reference, entropy, advantage, counts = (jnp.asarray(x) for x in case)

  sets_BG = set_tokens(counts, cfg)

  def loss(rows):
    given = LossInputs(
      old[rows],
      advantage[rows],
      counts[rows],
      reference_logp_BGT=reference[rows],
      set_tokens_BG=sets_BG[rows],
    )
    return policy_loss(logp[rows], entropy[rows], given, cfg)

  whole, parts = loss(slice(None)), [loss(slice(b, b + 1)) for b in range(B)]
  joined = functools.reduce(lambda a, b: a.joined(b), parts)
  np.testing.assert_allclose(joined.count, whole.count, rtol=1e-6)
  assert joined.numbers.tokens == counts.sum()
  for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "wrong",
  [
    dict(clip_low=-0.1),
    dict(clip_low=1.0),
    dict(clip_high=-0.1),
    dict(kl=-1.0),
    dict(dual_clip=1.1),
    dict(dual_clip=3.0, surrogate="cispo"),
    dict(importance_cap=0.0),
    dict(kl_in="reward", kl_estimator="full"),
  ],
)
def test_wrong_settings_are_refused(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    LossConfig(**wrong)
