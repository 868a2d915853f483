"""Several updates per rollout, importance weights, KL, oversampling, a step in three programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from caprl_jax import sharding
from caprl_jax.data.batches import train_iterator
from caprl_jax.harness.training.programs import build_step
from caprl_jax.harness.training.state import make_state
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.head import token_kl
from caprl_jax.rl import rollout as rollout_module
from caprl_jax.rl.advantages import flat_groups, group_advantages
from caprl_jax.rl.groups import Rollout
from caprl_jax.rl.loss import LossConfig
from caprl_jax.rl.rollout import caption_logprobs, caption_states, sample_captions
from caprl_jax.rl.step import train_step
from caprl_jax.rl.step_metrics import update_metrics
from caprl_jax.rl.update import (
  Learner,
  UpdateConfig,
  check_microbatches,
  logprobs_in_pieces,
  loss_gradients,
  optimizer_step,
  update_policy,
)

TX = optax.sgd(0.5)


@pytest.fixture(scope="module")
def rollout(tiny_run):
  batch = sharding.put_batch(next(train_iterator(tiny_run.train.example, 12, 8, 0)), tiny_run.mesh)
  run = jax.jit(
    lambda p, batch, vocabulary: sample_captions(
      tiny_run.policy.model, p, batch, jax.random.key(1), vocabulary, tiny_run.settings.step.rollout
    )
  )
  captions = run(tiny_run.policy.params, batch, tiny_run.frozen.vocabulary)
  rng = np.random.default_rng(0)
  shape = captions.ended_BG.shape
  captions = captions.replace(ended_BG=jnp.asarray(rng.random(shape) < 0.5))
  return Rollout(
    batch,
    captions,
    jnp.asarray(rng.random(shape) < 0.9),
    jnp.asarray(rng.normal(size=shape), jnp.float32),
  )


def state_of(tiny_run, tx=TX, memory="device"):
  params = jax.tree.map(jnp.copy, tiny_run.policy.params)
  return make_state(params, tx, tiny_run.policy.shardings, 0, tiny_run.mesh, memory)


@functools.cache
def update_of(model, cfg):
  """The jitted update of a setting, which several tests need."""
  return jax.jit(functools.partial(update_policy, Learner(model, TX, cfg)))


def update(tiny_run, rollout, cfg, frozen=None, memory="device"):
  run = update_of(tiny_run.policy.model, cfg)
  state, numbers = run(state_of(tiny_run, memory=memory), frozen or tiny_run.frozen, rollout)
  return state, update_metrics(numbers)


def close(a, b, atol=2e-5):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=atol)


@pytest.mark.parametrize("importance", ["none", "truncate"])
def test_minibatches_and_epochs_are_optimizer_steps_in_a_row(tiny_run, rollout, importance):
  cfg = UpdateConfig(
    LossConfig(importance=importance, aggregation="sequence_mean"),
    minibatches=2,
    epochs=2,
    microbatches=2,
  )
  # The loop over steps carries moments of the host's memory, too.
  memory = "host" if importance == "none" else "device"
  state, metrics = update(tiny_run, rollout, cfg, memory=memory)
  learner = Learner(tiny_run.policy.model, TX, cfg)
  params, opt_state = tiny_run.policy.params, TX.init(tiny_run.policy.params)
  if importance != "none":
    old = jax.jit(
      lambda p, r: logprobs_in_pieces(learner, p, tiny_run.frozen, r.batch, r.captions)
    )(params, rollout)
    rollout = dataclasses.replace(rollout, old_logp_BGT=old)
  one = jax.jit(lambda p, o, part: optimizer_step(learner, p, o, tiny_run.frozen, part))
  ratios, losses = [], []
  for number in (0, 1, 0, 1):
    part = jax.tree.map(lambda x: x[number::2], rollout)
    params, opt_state, numbers = one(params, opt_state, part)
    ratios.append(float(numbers.maxima["ratio"]))
    losses.append(float(numbers.means["loss"]))
  close(state.params, params)
  np.testing.assert_allclose(metrics["update/loss"], np.mean(losses), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(metrics["update/ratio_max"], max(ratios), rtol=1e-4)
  # the first is on-policy, the second pass is not
  assert abs(ratios[0] - 1) < 1e-4 < 1e-3 < ratios[2] - 1
  assert int(state.step) == 1


def test_importance_weights_correct_what_the_sampler_says(tiny_run, rollout):
  """A sampler whose log-probabilities are off by 0.3: the weights are exp(-0.3), the ratio stays
  1.
  """
  off = dataclasses.replace(
    rollout, captions=rollout.captions.replace(logp_BGT=rollout.captions.logp_BGT + 0.3)
  )
  _, plain = update(tiny_run, rollout, UpdateConfig(LossConfig()))
  _, metrics = update(tiny_run, off, UpdateConfig(LossConfig(importance="truncate")))
  np.testing.assert_allclose(metrics["update/importance"], np.exp(-0.3), rtol=1e-4)
  np.testing.assert_allclose(metrics["update/importance_max"], np.exp(-0.3), rtol=1e-3)
  assert float(metrics["update/importance_cut"]) == 0
  np.testing.assert_allclose(metrics["update/logp_difference"], 0.3, rtol=1e-4)
  np.testing.assert_allclose(metrics["update/ratio_max"], 1, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["update/grad_norm"], np.exp(-0.3) * plain["update/grad_norm"], rtol=1e-3
  )


def test_truncated_captions_can_stay_out_of_the_loss(tiny_run, rollout):
  _, masked = update(tiny_run, rollout, UpdateConfig(LossConfig(mask_truncated=True)))
  ended = dataclasses.replace(rollout, scored_BG=rollout.scored_BG & rollout.captions.ended_BG)
  _, by_hand = update(tiny_run, ended, UpdateConfig(LossConfig()))
  np.testing.assert_allclose(masked["update/grad_norm"], by_hand["update/grad_norm"], rtol=1e-5)
  _, everything = update(tiny_run, rollout, UpdateConfig(LossConfig()))
  assert abs(float(everything["update/grad_norm"] - masked["update/grad_norm"])) > 1e-4


def test_the_gradient_of_each_part_adds_up(tiny_run, rollout):
  _, metrics = update(tiny_run, rollout, UpdateConfig(LossConfig()))
  parts = [
    float(metrics[f"update/grad_norm_{part}"]) for part in ("vision", "projector", "decoder")
  ]
  np.testing.assert_allclose(
    np.sqrt(np.sum(np.square(parts))), metrics["update/grad_norm"], rtol=1e-5
  )
  assert min(parts) > 0


def test_rows_of_other_lengths_give_the_same(tiny_run, rollout, monkeypatch):
  """Microbatches of one image each, sorted by length, each in as many blocks as it needs, of which
  the unembedding skips what holds no token. With means of sequences, since each then has a weight
  of its own."""
  loss = LossConfig(aggregation="sequence_mean", kl=0.1)
  frozen = tiny_run.frozen.replace(
    reference=jax.tree.map(lambda x: x * 1.1, tiny_run.policy.params)
  )
  B, _, T = rollout.captions.tokens_BGT.shape
  short = jnp.arange(T) < jnp.minimum(T, 2 + 2 * jnp.arange(B))[:, None, None]
  captions = rollout.captions.replace(valid_BGT=rollout.captions.valid_BGT & short)
  rollout = dataclasses.replace(rollout, captions=captions)

  def gradients(**changes):
    cfg = UpdateConfig(loss, microbatches=B, **changes)

    @jax.jit
    def run(params, frozen, rollout):
      learner = Learner(tiny_run.policy.model, TX, cfg)
      logp = logprobs_in_pieces(learner, frozen.reference, frozen, rollout.batch, rollout.captions)
      given = dataclasses.replace(rollout, reference_logp_BGT=logp)
      return loss_gradients(learner, params, frozen, given)

    return run(tiny_run.policy.params, frozen, rollout)

  one = gradients()
  monkeypatch.setattr(rollout_module, "SMALLEST_BLOCK", 4)
  monkeypatch.setattr(rollout_module, "FEWEST_TOKENS", 4)
  several = gradients(chunk_tokens=3)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
  "loss",
  [
    LossConfig(),
    LossConfig(surrogate="reinforce", aggregation="sequence_mean", entropy=0.01),
    LossConfig(surrogate="cispo", aggregation="set_token_mean", set_captions=2),
    LossConfig(dual_clip=3.0, aggregation="constant", kl=0.2, kl_estimator="k3_k2"),
    LossConfig(importance="truncate", mask_truncated=True),
  ],
  ids=["clip", "reinforce", "cispo", "dual clip and kl", "importance"],
)
def test_a_loss_of_tokens_is_that_of_two_passes(tiny_run, rollout, loss, monkeypatch):
  """The gradient that is made while the logits are there, and that of autodiff through
  log-probabilities; off the policy, so that ratios matter."""
  noise = 0.2 * jax.random.normal(jax.random.key(5), rollout.captions.logp_BGT.shape)
  captions = rollout.captions.replace(logp_BGT=rollout.captions.logp_BGT + noise)
  rollout = dataclasses.replace(
    rollout, captions=captions, reference_logp_BGT=captions.logp_BGT if loss.has_kl else None
  )

  def gradients():
    learner = Learner(tiny_run.policy.model, TX, UpdateConfig(loss))
    run = jax.jit(functools.partial(loss_gradients, learner))
    return run(tiny_run.policy.params, tiny_run.frozen, rollout)

  assert loss.by_token
  one = gradients()
  monkeypatch.setattr(LossConfig, "by_token", False)
  two = gradients()
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(two.grads)) > 1e-4
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
  "loss",
  [
    LossConfig(surrogate="gspo"),
    LossConfig(importance="mask", importance_level="sequence"),
    LossConfig(kl=0.1, kl_estimator="full"),
  ],
)
def test_losses_of_whole_captions_take_two_passes(loss):
  assert not loss.by_token


def test_an_entropy_bonus_raises_entropy(tiny_run, rollout):
  flat = dataclasses.replace(rollout, advantage_BG=jnp.zeros(rollout.scored_BG.shape))
  _, before = update(tiny_run, flat, UpdateConfig(LossConfig()))
  state, _ = update(tiny_run, flat, UpdateConfig(LossConfig(entropy=1.0)))
  score = jax.jit(
    lambda p, r: caption_logprobs(
      tiny_run.policy.model,
      p,
      r.batch,
      r.captions,
      vocabulary=tiny_run.frozen.vocabulary,
      temperature=1.0,
      entropy="figure",
    )[1]
  )
  counts = rollout.captions.valid_BGT & rollout.scored_BG[..., None]
  after = float((score(state.params, rollout) * counts).sum() / counts.sum())
  assert after > float(before["update/entropy"]) + 1e-4


def test_exact_kl_is_the_sum_over_the_vocabulary(tiny_run, rollout):
  other = jax.tree.map(lambda x: x * 1.3, tiny_run.policy.params)

  @jax.jit
  def both(p, q, r):
    states = [caption_states(tiny_run.policy.model, x, r.batch, r.captions) for x in (p, q)]
    flat = lambda x: x.reshape(-1, x.shape[-1])
    hidden, far = (jnp.concatenate([x.first_BD, flat(x.rest_BRD)]) for x in states)
    head = lambda x: head_matrix(tiny_run.policy.model.cfg.text, x["language_model"])
    allowed = tiny_run.frozen.vocabulary.allowed_V
    logits = [jnp.where(allowed, h @ head(x).T, -1e30) for h, x in ((hidden, p), (far, q))]
    return (hidden, head(p), far, head(q)), [jax.nn.log_softmax(x) for x in logits], states[0]

  arrays, (logp, logq), states = both(tiny_run.policy.params, other, rollout)
  want = (np.exp(logp) * (logp - logq)).sum(-1)
  for chunk in (1024, 7):
    got = token_kl(*arrays, allowed_V=tiny_run.frozen.vocabulary.allowed_V, chunk_tokens=chunk)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  frozen = tiny_run.frozen.replace(reference=other)
  cfg = UpdateConfig(LossConfig(kl=0.5, kl_estimator="full"), microbatches=2)
  _, metrics = update(tiny_run, rollout, cfg, frozen)
  counts = np.asarray(rollout.captions.valid_BGT & rollout.scored_BG[..., None]).ravel()
  B, R, _ = states.rest_BRD.shape
  want_BGT = states.by_caption(jnp.asarray(want[:B]), jnp.asarray(want[B:]).reshape(B, R))
  np.testing.assert_allclose(
    metrics["update/kl"], np.asarray(want_BGT).ravel()[counts].mean(), rtol=1e-3
  )
  assert want.min() > 1e-4
  itself = jax.tree.map(jnp.copy, tiny_run.policy.params)
  none = update(tiny_run, rollout, cfg, tiny_run.frozen.replace(reference=itself))[1]
  assert abs(float(none["update/kl"])) < 1e-6


def step_with(tiny_run, **changes):
  cfg = dataclasses.replace(tiny_run.settings.step, **changes)
  return jax.jit(
    functools.partial(
      train_step,
      policy=tiny_run.policy.model,
      judge=tiny_run.judge.model,
      tx=TX,
      cfg=cfg,
      kinds=tiny_run.kinds,
      schedule=lambda count: 0.1 * count,
    )
  )


def batch_of(tiny_run, count=8):
  return sharding.put_batch(
    next(train_iterator(tiny_run.train.example, 12, count, 0)), tiny_run.mesh
  )


def test_kl_in_the_reward_is_taken_from_each_captions_own(tiny_run):
  other = jax.tree.map(lambda x: x * 1.3, tiny_run.policy.params)
  frozen, batch = tiny_run.frozen.replace(reference=other), batch_of(tiny_run)
  loss = LossConfig(kl=0.2, kl_in="reward", kl_estimator="k1")
  cfg = dataclasses.replace(tiny_run.settings.step.advantage, estimator="rloo")
  _, metrics, samples = step_with(tiny_run, update=UpdateConfig(loss), advantage=cfg)(
    state_of(tiny_run), frozen, batch
  )
  captions, reward, scored = samples.captions, samples.reward_BG, samples.scored_BG
  score = jax.jit(
    lambda p, b, c: caption_logprobs(
      tiny_run.policy.model, p, b, c, vocabulary=tiny_run.frozen.vocabulary, temperature=1.0
    )[0]
  )
  kl = ((captions.logp_BGT - score(other, batch, captions)) * captions.valid_BGT).sum(-1)
  want = group_advantages(reward - 0.2 * kl, scored, cfg)
  np.testing.assert_allclose(samples.advantage_BG, want, atol=1e-4)
  assert np.abs(want - group_advantages(reward, scored, cfg)).max() > 1e-2
  assert float(metrics["update/kl"]) != 0 and float(metrics["update/learning_rate"]) == 0


def test_oversampling_learns_from_the_groups_that_carry_signal(tiny_run):
  batch = batch_of(tiny_run)
  one = dataclasses.replace(tiny_run.settings.step.rollout, oversample=2)
  _, metrics, samples = step_with(tiny_run, rollout=one)(state_of(tiny_run), tiny_run.frozen, batch)
  captions, reward, scored = samples.captions, samples.reward_BG, samples.scored_BG
  advantage = samples.advantage_BG
  flat = np.asarray(flat_groups(reward, scored))
  chosen = np.argsort(flat, stable=True)[:4]
  assert reward.shape == (8, 4) and flat.any() and not flat[chosen].any()
  assert float(metrics["advantage/flat_groups_used"]) == 0 < float(metrics["advantage/flat_groups"])
  assert (np.abs(advantage).sum(1) > 0).tolist() == [b in chosen for b in range(8)]
  # The same update as on these images alone.
  take = lambda tree: jax.tree.map(lambda x: x[chosen], tree)
  alone = Rollout(
    take(batch),
    take(captions),
    take(scored),
    group_advantages(reward[chosen], scored[chosen], tiny_run.settings.step.advantage),
  )
  _, by_hand = update(tiny_run, alone, tiny_run.settings.step.update)
  np.testing.assert_allclose(metrics["update/grad_norm"], by_hand["update/grad_norm"], rtol=1e-4)


def test_the_step_in_three_programs_is_the_fused_one(tiny_run):
  batch = batch_of(tiny_run)
  fused, numbers, _ = build_step(tiny_run, TX)(state_of(tiny_run), batch)
  apart = dataclasses.replace(
    tiny_run,
    settings=dataclasses.replace(
      tiny_run.settings, train=dataclasses.replace(tiny_run.settings.train, fused=False)
    ),
  )
  state, metrics, _ = build_step(apart, TX)(state_of(tiny_run), batch)
  close(fused.params, state.params, atol=1e-4)
  times = {f"time/{stage}_secs" for stage in ("rollout", "judge", "update")}
  assert set(metrics) - set(numbers) == times and all(metrics[name] > 0 for name in times)
  for name in numbers:
    np.testing.assert_allclose(metrics[name], numbers[name], rtol=2e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
  "cfg, message",
  [
    (
      dict(minibatches=3),
      "policy_update.minibatches = 3 does not divide data.batch_size = 8 images; "
      "use one of .1, 2, 4, 8",
    ),
    (
      dict(minibatches=2, microbatches=8),
      "microbatches = 8 does not divide data.batch_size / policy_update.minibatches = 4",
    ),
    (dict(epochs=0), "epochs = 0"),
    (
      dict(minibatches=4, loss=LossConfig(aggregation="set_token_mean", set_captions=3)),
      "set_captions = 3 does not divide the 8 captions of an optimizer step",
    ),
  ],
)
def test_parts_that_do_not_divide_are_refused(cfg, message):
  with pytest.raises(ValueError, match=message):
    check_microbatches(8, 4, UpdateConfig(**cfg))
