"""Advantages and losses against TRL's own code on the same arrays, and where TRL has none, formulas
written out.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from caprl_jax.rl.advantages import AdvantageConfig, group_advantages
from caprl_jax.rl.loss import LossConfig, LossInputs, importance_weights, kl_estimate, policy_loss

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="pip install trl")
B, G, T = 3, 4, 6


@pytest.fixture(scope="module")
def case():
  rng = np.random.default_rng(1)
  logp = -rng.exponential(1, (B, G, T)).astype(np.float32)
  shifted = lambda scale: (logp + rng.normal(0, scale, logp.shape)).astype(np.float32)
  counts = np.arange(T) < rng.integers(1, T + 1, (B, G))[..., None]
  return types.SimpleNamespace(
    logp=logp,
    old=shifted(0.4),
    sampled=shifted(0.5),
    reference=shifted(0.5),
    entropy=rng.random(logp.shape).astype(np.float32),
    advantage=rng.normal(0, 1, (B, G)).astype(np.float32),
    counts=counts,
  )


class Accelerator:
  num_processes, sync_gradients = 1, True
  gather = gather_for_metrics = staticmethod(lambda x: x)
  reduce = staticmethod(lambda x, reduction: x)


def trl_loss(
  case,
  loss_type,
  level="token",
  low=0.2,
  high=0.2,
  delta=None,
  beta=0.0,
  importance=None,
  entropy=0.0,
):
  """GRPOTrainer._compute_loss on given log-probabilities: the value and its gradient by them."""
  flat = lambda x: torch.tensor(x.reshape(B * G, T))
  logp = flat(case.logp).requires_grad_()
  trainer = types.SimpleNamespace(
    args=types.SimpleNamespace(delta=delta, use_bias_correction_kl=False),
    beta=beta,
    loss_type=loss_type,
    importance_sampling_level=level,
    epsilon_low=low,
    epsilon_high=high,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    use_vllm=importance is not None,
    vllm_importance_sampling_correction=True,
    _entropy_bonus_enabled=entropy > 0,
    use_adaptive_entropy=False,
    entropy_coef=entropy,
    entropy_coef_delta=0,
    aux_loss_enabled=False,
    max_completion_length=T,
    current_gradient_accumulation_steps=1,
    model=types.SimpleNamespace(training=False),
    accelerator=Accelerator,
    _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    _get_per_token_logps_and_entropies=lambda *_, **__: (logp, flat(case.entropy), None),
  )
  mask = flat(case.counts.astype(np.float32))
  ids = torch.zeros(B * G, T, dtype=torch.long)
  inputs = dict(
    prompt_ids=ids[:, :1],
    prompt_mask=ids[:, :1],
    completion_ids=ids,
    completion_mask=mask,
    advantages=torch.tensor(case.advantage.reshape(-1)),
    old_per_token_logps=flat(case.old),
    ref_per_token_logps=flat(case.reference),
    num_items_in_batch=mask.sum(),
  )
  if importance is not None:
    inputs["importance_sampling_ratio"] = importance
  loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
  loss.backward()
  return loss.item(), logp.grad.numpy().reshape(B, G, T)


def our_loss(case, cfg, sampled=None):
  """With `cfg.importance` the old log-probabilities are the update's own; without, the sampler's:
  here `case.old`.
  """

  def loss(logp):
    old, recorded = (None, case.old) if sampled is None else (case.old, sampled)
    given = LossInputs(
      recorded, case.advantage, jnp.asarray(case.counts), old, case.reference if cfg.kl else None
    )
    out = policy_loss(logp, case.entropy, given, cfg)
    return out.total / out.count

  value, grad = jax.value_and_grad(loss)(jnp.asarray(case.logp))
  return float(value), np.asarray(grad)


def assert_same_loss(ours, theirs):
  np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-5)
  np.testing.assert_allclose(ours[1], theirs[1], rtol=2e-4, atol=1e-6)
  assert np.abs(theirs[1]).max() > 1e-3


@pytest.mark.parametrize(
  "aggregation, loss_type",
  [
    ("sequence_mean", "grpo"),
    ("token_mean", "bnpo"),
    ("token_mean", "dapo"),
    ("constant", "dr_grpo"),
  ],
)
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.5)])
def test_clipped_surrogate_and_aggregations(case, aggregation, loss_type, low, high):
  assert_same_loss(
    our_loss(case, LossConfig(clip_low=low, clip_high=high, aggregation=aggregation)),
    trl_loss(case, loss_type, low=low, high=high),
  )


def test_dual_clip_is_trls_two_sided_clipping(case):
  plain = our_loss(case, LossConfig())
  ours = our_loss(case, LossConfig(dual_clip=1.3))
  assert_same_loss(ours, trl_loss(case, "bnpo", delta=1.3))
  assert ours[0] != plain[0]


def test_gspo(case):
  assert_same_loss(
    our_loss(
      case, LossConfig(surrogate="gspo", clip_low=0.05, clip_high=0.05, aggregation="sequence_mean")
    ),
    trl_loss(case, "grpo", level="sequence", low=0.05, high=0.05),
  )


def test_cispo(case):
  # TRL's epsilon_high is the largest weight itself, and it has no lower bound.
  assert_same_loss(
    our_loss(case, LossConfig(surrogate="cispo", clip_low=1.0, clip_high=0.3)),
    trl_loss(case, "cispo", high=1.3),
  )


def test_reinforce_is_minus_advantage_times_logp(case):
  value, grad = our_loss(case, LossConfig(surrogate="reinforce"))
  tokens = case.counts.sum()
  np.testing.assert_allclose(
    value, -(case.advantage[..., None] * case.logp * case.counts).sum() / tokens, rtol=1e-5
  )
  np.testing.assert_allclose(grad, -case.advantage[..., None] * case.counts / tokens, rtol=1e-5)


@pytest.mark.parametrize(
  "aggregation, loss_type", [("sequence_mean", "grpo"), ("token_mean", "bnpo")]
)
def test_k3_in_the_loss(case, aggregation, loss_type):
  assert_same_loss(
    our_loss(case, LossConfig(kl=0.3, aggregation=aggregation)), trl_loss(case, loss_type, beta=0.3)
  )


def test_entropy_bonus(case):
  assert_same_loss(our_loss(case, LossConfig(entropy=0.7)), trl_loss(case, "bnpo", entropy=0.7))


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights(case, mode, level):
  """TRL's correction, as `_generate_and_score_completions` computes it, on the trainer's and the
  sampler's numbers.
  """
  old, sampled, mask = (
    torch.tensor(x.reshape(B * G, T)) for x in (case.old, case.sampled, case.counts)
  )
  difference = (old - sampled) * mask
  ratio = torch.exp(difference.sum(-1, keepdim=True) if level == "sequence" else difference)
  cap = 1.4
  ratio = ratio.clamp(max=cap) if mode == "truncate" else ratio.masked_fill(ratio > cap, 0.0)
  cfg = LossConfig(importance=mode, importance_level=level, importance_cap=cap)
  weights = importance_weights(case.old, case.sampled, jnp.asarray(case.counts), cfg)
  np.testing.assert_allclose(weights.reshape(B * G, -1), ratio, rtol=1e-5)
  assert (weights == (cap if mode == "truncate" else 0)).any()
  assert_same_loss(our_loss(case, cfg, case.sampled), trl_loss(case, "bnpo", importance=ratio))


def test_one_update_with_importance_weights_takes_its_own_pass_as_the_old_policy(case):
  cfg = LossConfig(importance="truncate")
  own = types.SimpleNamespace(**{**vars(case), "old": case.logp})
  assert_same_loss(our_loss(case, cfg), our_loss(own, cfg, sampled=case.old))


def test_kl_estimators():
  """verl's names: kl, mse, low_var_kl, and k3+ (the value of k3, the gradient of k2)."""
  rng = np.random.default_rng(0)
  p, q = torch.tensor(rng.normal(0, 1, 50), requires_grad=True), torch.tensor(rng.normal(0, 1, 50))
  d = q - p
  literal = {
    "k1": -d,
    "k2": 0.5 * d**2,
    "k3": torch.exp(d) - d - 1,
    "k3_clamped": (torch.exp(d) - d - 1).clamp(-10, 10),
  }
  literal["k3_k2"] = literal["k2"] - literal["k2"].detach() + literal["k3"].detach()
  for name, value in literal.items():
    (grad,) = torch.autograd.grad(value.sum(), p, retain_graph=True)
    ours, pull = jax.vjp(
      lambda x, name=name: kl_estimate(x, jnp.asarray(q.numpy()), name),
      jnp.asarray(p.detach().numpy()),
    )
    np.testing.assert_allclose(ours, value.detach(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones(50))[0], grad, rtol=1e-4, atol=1e-5)
  assert kl_estimate(jnp.zeros(1), jnp.full(1, 30.0), "k3_clamped") == 10


def test_k3_k2_has_the_true_gradient_in_expectation():
  """Over all outcomes of a small distribution: the mean gradient of k2 is that of KL(p || q), of k3
  it is not.
  """
  logits, other = jnp.array([0.3, -1.0, 0.8]), jnp.array([0.0, 0.5, -0.4])
  logq = jax.nn.log_softmax(other)
  exact = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - logq)))(logits)
  weight = jax.nn.softmax(logits)  # of the samples: no gradient
  mean = lambda name: jax.grad(
    lambda x: jnp.sum(weight * kl_estimate(jax.nn.log_softmax(x), logq, name))
  )(logits)
  np.testing.assert_allclose(mean("k3_k2"), exact, atol=1e-6)
  assert np.abs(mean("k3") - exact).max() > 0.05


# ---- advantages ----


def literal_advantages(terms, weights, each_term_apart, scale=True):
  """Group by group in numpy: the weighted sum normalised, or (GDPO) each term normalised, summed,
  and the batch whitened."""
  normal = lambda x: (x - x.mean()) / ((x.std(ddof=1) if scale else 1 - 1e-4) + 1e-4)
  out = np.zeros((B, G))
  for b in range(B):
    if each_term_apart:
      out[b] = sum(w * normal(t[b].astype(np.float64)) for w, t in zip(weights, terms))
    else:
      out[b] = normal(sum(w * t[b].astype(np.float64) for w, t in zip(weights, terms)))
  return normal(out) if each_term_apart else out


@pytest.fixture(scope="module")
def terms():
  rng = np.random.default_rng(5)
  return [
    rng.integers(0, 9, (B, G)).astype(np.float32) / 8,
    rng.random((B, G)).astype(np.float32) * 10,
  ]


ALL = jnp.ones((B, G), bool)


@pytest.mark.parametrize("estimator, scale", [("grpo", True), ("dr_grpo", False)])
def test_grpo_and_dr_grpo(terms, estimator, scale):
  reward = terms[0] + 0.5 * terms[1]
  ours = group_advantages(jnp.asarray(reward), ALL, AdvantageConfig(estimator))
  np.testing.assert_allclose(
    ours, literal_advantages(terms, [1.0, 0.5], False, scale), rtol=1e-4, atol=1e-5
  )


def test_gdpo_normalises_each_term_before_the_sum(terms):
  weighted = [(1.0, jnp.asarray(terms[0])), (-0.5, jnp.asarray(terms[1]))]
  reward = terms[0] - 0.5 * terms[1]
  ours = group_advantages(
    jnp.asarray(reward), ALL, AdvantageConfig("gdpo", whiten="captions"), weighted
  )
  np.testing.assert_allclose(
    ours, literal_advantages(terms, [1.0, -0.5], True), rtol=1e-4, atol=1e-5
  )
  # A term that is flat in a group leaves the other one whole there, and one on another scale drowns
  # nothing.
  flat = weighted[0][1].at[1].set(0.5)
  ours = group_advantages(
    jnp.asarray(reward), ALL, AdvantageConfig("gdpo"), [(1.0, flat), weighted[1]]
  )
  alone = group_advantages(jnp.asarray(terms[1]), ALL, AdvantageConfig("grpo"))
  np.testing.assert_allclose(ours[1], -0.5 * alone[1], rtol=1e-5)
  scaled = group_advantages(
    jnp.asarray(reward),
    ALL,
    AdvantageConfig("gdpo", epsilon=1e-9),
    [weighted[0], (-0.5, 100 * weighted[1][1])],
  )
  same = group_advantages(jnp.asarray(reward), ALL, AdvantageConfig("gdpo", epsilon=1e-9), weighted)
  np.testing.assert_allclose(scaled, same, rtol=1e-4)


def released_whitening(advantage, tokens):
  """OpenRLHF's NaiveReplayBuffer.normalize on one advantage a token."""
  flat = np.concatenate(
    [np.full(n, a, np.float64) for a, n in zip(advantage.ravel(), tokens.ravel())]
  )
  mean = flat.mean()
  variance = ((flat - mean) ** 2).mean()
  return (advantage - mean) / np.sqrt(max(variance, 1e-8))


def test_the_released_codes_whitening(terms):
  reward = terms[0].copy()
  reward[2] = 0.25  # a flat group
  rloo = reward - (reward.sum(1, keepdims=True) - reward) / (G - 1)
  tokens = np.random.default_rng(0).integers(1, 50, (B, G))
  ours = group_advantages(
    jnp.asarray(reward),
    ALL,
    AdvantageConfig("rloo", whiten="released"),
    tokens_BG=jnp.asarray(tokens),
  )
  np.testing.assert_allclose(ours, released_whitening(rloo, tokens), rtol=1e-4, atol=1e-5)
  assert (np.asarray(ours)[2] != 0).all()  # as released
  kept = group_advantages(jnp.asarray(reward), ALL, AdvantageConfig("rloo", whiten="captions"))
  assert (np.asarray(kept)[2] == 0).all() and np.asarray(kept)[:2].any()


@pytest.mark.parametrize(
  "cfg",
  [
    AdvantageConfig("grpo"),
    AdvantageConfig("rloo", whiten="released"),
    AdvantageConfig("gdpo", whiten="captions"),
    AdvantageConfig("dr_grpo", whiten="captions"),
  ],
  ids=lambda c: f"{c.estimator}-{c.whiten}",
)
def test_unscored_captions_change_nobodys_advantage(terms, cfg):
  scored = np.ones((B, G), bool)
  scored[0, 1] = scored[2, 3] = False
  tokens = jnp.full((B, G), 7)

  def advantages(fill):
    values = [jnp.where(scored, t, fill) for t in terms]
    return np.asarray(
      group_advantages(
        values[0] + values[1], jnp.asarray(scored), cfg, [(1.0, v) for v in values], tokens
      )
    )

  np.testing.assert_array_equal(advantages(0.0), advantages(1e6))
  assert (advantages(0.0)[~scored] == 0).all() and advantages(0.0)[scored].any()
