"""Schedules by hand; what adamw and muon do to which parameter."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from caprl_jax.rl.optimizer import OptimizerConfig, build_optimizer, learning_rate_schedule, warmup

# optax.contrib.muon runs its Adam with Nesterov momentum: with b1 = 0.9 the first step is
# 0.9 * 0.1 / (1 - 0.9 ** 2) + 1 times the sign.
NESTEROV_FIRST_STEP = 28 / 19


def rates(cfg, peak, steps, count):
  schedule = learning_rate_schedule(cfg, peak, steps)
  return [float(schedule(i)) for i in range(count)]


def test_constant_with_warmup():
  np.testing.assert_allclose(
    rates(OptimizerConfig(warmup_steps=4), 2.0, 100, 7), [0.5, 1, 1.5, 2, 2, 2, 2]
  )
  np.testing.assert_allclose(rates(OptimizerConfig(), 2.0, 100, 3), [2, 2, 2])
  np.testing.assert_allclose(rates(OptimizerConfig(warmup_steps=1), 2.0, 100, 3), [2, 2, 2])


def test_cosine_after_warmup():
  cfg = OptimizerConfig(schedule="cosine", warmup_steps=2, final_fraction=0.1)
  got = rates(cfg, 1.0, 10, 13)
  # 8 steps from 1 to 0.1; half way at step 6
  want = (
    [0.5, 1.0] + [0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)] + [0.1, 0.1]
  )
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose([got[2], got[6], got[10]], [1, 0.55, 0.1], rtol=1e-6)


def test_a_schedule_may_be_longer_than_the_run():
  """CapRL-3B: a cosine over 17,640 steps, stopped at 1,800; transformers' scheduler is the oracle,
  cosine_with_min_lr, which OpenRLHF uses."""
  parameter = torch.nn.Parameter(torch.zeros(1))
  adam = torch.optim.AdamW([parameter], lr=1e-6)
  theirs = transformers.get_scheduler(
    "cosine_with_min_lr",
    adam,
    num_warmup_steps=20,
    num_training_steps=17_640,
    scheduler_specific_kwargs={"min_lr": 1e-7},
  )
  want = []
  for _ in range(1_801):
    want.append(adam.param_groups[0]["lr"])
    adam.step()
    theirs.step()
  cfg = OptimizerConfig(
    schedule="cosine", schedule_steps=17_640, warmup_steps=20, warmup_from_zero=True
  )
  _, schedule = build_optimizer(cfg, 1_800)
  got = np.asarray(schedule(jnp.arange(1_801)))
  np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-13)
  assert got[0] == 0 and got[20] == np.float32(1e-6) and round(float(got[1_800]) / 1e-6, 3) == 0.978


def test_a_schedule_shorter_than_its_warmup_is_refused():
  with pytest.raises(ValueError, match="schedule_steps = 20 must be above warmup_steps = 20"):
    OptimizerConfig(schedule_steps=20, warmup_steps=20)


def test_a_run_shorter_than_its_warmup_still_reaches_the_peak():
  got = rates(OptimizerConfig(schedule="cosine", warmup_steps=50), 1.0, 3, 3)
  np.testing.assert_allclose(got, [0.5, 1.0, 1.0], rtol=1e-6)
  assert np.isfinite(rates(OptimizerConfig(schedule="cosine", warmup_steps=5), 1.0, 1, 2)).all()


def test_a_warmup_may_be_a_share_of_the_steps():
  for steps, count in ((200, 6), (10, 0), (20, 1), (1, 0)):
    cfg = OptimizerConfig(schedule="cosine", warmup_fraction=0.03)
    assert warmup(cfg, steps) == count
    fixed = OptimizerConfig(schedule="cosine", warmup_steps=count)
    assert rates(cfg, 1.0, steps, steps) == rates(fixed, 1.0, steps, steps)
  assert (
    warmup(OptimizerConfig(warmup_fraction=0.9), 2) == 1
    and warmup(OptimizerConfig(warmup_steps=9), 3) == 2
  )
  assert warmup(OptimizerConfig(warmup_steps=9, warmup_fraction=0.0), 20) == 9


def params():
  key = jax.random.key(0)
  normal = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
  return {
    "embed_tokens": {"embedding": normal(0, 12, 6)},
    "norm": {"scale": jnp.ones(6)},
    # stacked over 3 layers
    "layers": {"mlp": {"kernel": normal(1, 3, 6, 8), "bias": jnp.zeros((3, 8))}},
    "out": {"kernel": normal(2, 6, 6)},
  }


def away_from_zero(tree):
  return jax.tree.map(lambda p: jnp.where(p < 0, p - 0.1, p + 0.1), tree)


def update(cfg, gradient, steps=10):
  rule, _ = build_optimizer(cfg, steps)
  tree = params()
  state = rule.init(tree)
  return jax.jit(rule.update)(gradient, state, tree)[0]


def test_adamw_first_step_is_the_learning_rate_times_the_sign():
  gradient = away_from_zero(params())
  got = update(OptimizerConfig(learning_rate=0.01), gradient)
  jax.tree.map(
    lambda u, g: np.testing.assert_allclose(u, -0.01 * np.sign(g), rtol=1e-3), got, gradient
  )
  decayed = update(OptimizerConfig(learning_rate=0.01, weight_decay=0.5), gradient)
  jax.tree.map(
    lambda u, g, p: np.testing.assert_allclose(
      u, -0.01 * (np.sign(g) + 0.5 * p), rtol=1e-3, atol=1e-6
    ),
    decayed,
    gradient,
    params(),
  )


def test_muon_takes_the_kernels_and_leaves_the_rest_to_adam():
  gradient = away_from_zero(params())
  got = update(OptimizerConfig(name="muon", learning_rate=0.02, adam_learning_rate=0.001), gradient)
  for path in (("embed_tokens", "embedding"), ("norm", "scale"), ("layers", "mlp", "bias")):
    u, g = got, gradient
    for name in path:
      u, g = u[name], g[name]
    np.testing.assert_allclose(u, -0.001 * NESTEROV_FIRST_STEP * np.sign(g), rtol=1e-3)
  # An orthogonalised update has singular values near one (Newton-Schulz leaves 0.7 .. 1.2), each
  # layer its own.
  for kernel in (*got["layers"]["mlp"]["kernel"], got["out"]["kernel"]):
    singular = np.linalg.svd(np.asarray(kernel), compute_uv=False)
    assert singular.max() / singular.min() < 3
    assert 0.01 < singular.min() and singular.max() < 0.04
  original = np.linalg.svd(np.asarray(gradient["out"]["kernel"]), compute_uv=False)
  assert original.max() / original.min() > 3  # which the gradient itself has not


def test_muon_rest_defaults_to_the_same_rate():
  gradient = jax.tree.map(jnp.ones_like, params())
  got = update(OptimizerConfig(name="muon", learning_rate=0.02), gradient)
  np.testing.assert_allclose(
    got["embed_tokens"]["embedding"], -0.02 * NESTEROV_FIRST_STEP, rtol=1e-3
  )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_are_clipped_by_their_joint_norm(name):
  # Adam's first step ignores the scale of a gradient, so look at the second: a huge one must not
  # drown the first.
  rule, _ = build_optimizer(OptimizerConfig(name=name, learning_rate=0.1, clip_norm=1.0), 10)
  tree = params()
  ones = jax.tree.map(jnp.ones_like, tree)
  unit = jax.tree.map(lambda g: g / optax.tree.norm(ones), ones)
  ways = []
  for scale in (1.0, 1e6):
    state = rule.init(tree)
    for gradient in (
      jax.tree.map(lambda g: scale * g, unit),
      jax.tree.map(lambda g: -0.5 * g, unit),
    ):
      step, state = jax.jit(rule.update)(gradient, state, tree)
    ways.append(step)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *ways)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_descends(name):
  rule, schedule = build_optimizer(
    OptimizerConfig(name=name, learning_rate=0.2, schedule="cosine"), 60
  )
  target, tree = jax.tree.map(jnp.zeros_like, params()), params()
  loss = lambda p: sum(
    jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(target))
  )

  @jax.jit
  def step(p, state):
    updates, state = rule.update(jax.grad(loss)(p), state, p)
    return optax.apply_updates(p, updates), state

  state, first = rule.init(tree), loss(tree)
  for _ in range(60):
    tree, state = step(tree, state)
  assert loss(tree) < 0.1 * first
  assert float(schedule(0)) == pytest.approx(0.2)


@pytest.mark.parametrize(
  "wrong, message",
  [
    (dict(learning_rate=0.0), "learning_rate = 0.0"),
    (dict(clip_norm=-1.0), "clip_norm = -1.0"),
    (dict(warmup_steps=-1), "warmup_steps = -1"),
    (dict(warmup_fraction=1.0), "warmup_fraction = 1.0 must be from 0"),
    (
      dict(warmup_steps=5, warmup_fraction=0.1),
      "warmup_steps = 5 and warmup_fraction = 0.1: set one of them",
    ),
  ],
)
def test_wrong_settings_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    OptimizerConfig(**wrong)
