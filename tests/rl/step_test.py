"""The step on tiny real models: stages by hand, microbatches, on-policy ratios, compilations,
finiteness.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax import sharding
from caprl_jax.data.batches import train_iterator
from caprl_jax.harness.checkpoints import CheckpointConfig, Checkpoints
from caprl_jax.harness.loop import CompileCounter, run_loop
from caprl_jax.harness.metrics import read_metrics
from caprl_jax.harness.training.state import make_state
from caprl_jax.models.layers import int8_shardings, to_int8
from caprl_jax.rl.advantages import group_advantages
from caprl_jax.rl.groups import Rollout
from caprl_jax.rl.judge import Judge, JudgeIds, judge_ids
from caprl_jax.rl.optimizer import build_optimizer
from caprl_jax.rl.reward import score_captions
from caprl_jax.rl.rollout import caption_logprobs, sample_captions
from caprl_jax.rl.step import stage_keys, train_step, write_captions
from caprl_jax.rl.step_metrics import judge_metrics, update_metrics
from caprl_jax.rl.update import Learner, UpdateConfig, loss_gradients, update_policy
from caprl_jax.types import Answers

# The first step's metrics on seed 0; the failing test prints what to put here.
GOLDEN = {
  "advantage/abs": 0.607308,
  "advantage/excluded_groups": 0,
  "advantage/flat_groups": 0.25,
  "data/image_tokens": 9,
  "data/padding": 0.125,
  "judge/abstained": 0,
  "judge/accuracy": 0.453125,
  "judge/accuracy/color": 0.28125,
  "judge/accuracy/shape": 0.625,
  "judge/blind": 0.5,
  "judge/misled": 0.546875,
  "reward/accuracy": 0.453125,
  "reward/group_std": 0.252266,
  "reward/mean": 0.453125,
  "reward/misled": 0.546875,
  "reward/unscored": 0,
  "rollout/length": 5.9375,
  "rollout/tokens": 190,
  "rollout/truncated": 0.96875,
  "update/clip_fraction": 0,
  "update/entropy": 5.77701,
  "update/grad_norm": 0.723921,
  "update/grad_norm_decoder": 0.700509,
  "update/grad_norm_projector": 0.153376,
  "update/grad_norm_vision": 0.0991221,
  "update/logp_difference": 2.22106e-07,
  "update/logp_difference_max": 9.53674e-07,
  "update/loss": -0.00824405,
  "update/nonfinite": 0,
  "update/ratio": 1,
  "update/ratio_max": 1,
  "update/ratio_min": 0.999999,
}


def a_batch(tiny_run):
  return sharding.put_batch(next(train_iterator(tiny_run.train.example, 12, 8, 0)), tiny_run.mesh)


def fresh_state(tiny_run, tx):
  return make_state(
    jax.tree.map(jnp.copy, tiny_run.policy.params), tx, tiny_run.policy.shardings, 0, tiny_run.mesh
  )


_steps = {}  # compiled once for all tests


def jitted(tiny_run, cfg=None):
  cfg = cfg or tiny_run.settings.step
  if cfg not in _steps:
    _steps[cfg] = jax.jit(
      functools.partial(
        train_step,
        policy=tiny_run.policy.model,
        judge=tiny_run.judge.model,
        tx=optimizer(tiny_run),
        cfg=cfg,
        kinds=tiny_run.kinds,
      ),
      donate_argnums=0,
    )
  return _steps[cfg]


def sample(tiny_run, batch, seed):
  run = jax.jit(
    lambda p, batch, key, vocabulary: sample_captions(
      tiny_run.policy.model, p, batch, key, vocabulary, tiny_run.settings.step.rollout
    )
  )
  return run(tiny_run.policy.params, batch, jax.random.key(seed), tiny_run.frozen.vocabulary)


def optimizer(tiny_run):
  return build_optimizer(tiny_run.settings.optimizer, 4)[0]


def test_stages_by_hand_are_the_jitted_step(tiny_run):
  tx, cfg, batch = optimizer(tiny_run), tiny_run.settings.step, a_batch(tiny_run)
  state, vocabulary = fresh_state(tiny_run, tx), tiny_run.frozen.vocabulary
  keys = stage_keys(state.key, state.step)
  # Each stage a program of its own: op by op they would compile hundreds.
  captions = jax.jit(lambda *a: sample_captions(tiny_run.policy.model, *a, cfg.rollout))(
    state.params, batch, keys.rollout, vocabulary
  )
  judge = Judge(tiny_run.judge.model, tiny_run.frozen.judge, tiny_run.frozen.prompt)
  answers = jax.jit(lambda *a: judge_ids(*a, cfg.judge))(
    judge, JudgeIds.of(captions, vocabulary), batch.questions, keys.judge
  )
  scored = score_captions(answers, captions, vocabulary, cfg.reward)
  advantage = group_advantages(scored.reward_BG, scored.scored_BG, cfg.advantage)
  learner = Learner(tiny_run.policy.model, tx, cfg.update)
  by_hand, update = jax.jit(lambda *a: update_policy(learner, *a))(
    state, tiny_run.frozen, Rollout(batch, captions, scored.scored_BG, advantage)
  )
  metrics = update_metrics(update)
  together, numbers, samples = jitted(tiny_run)(fresh_state(tiny_run, tx), tiny_run.frozen, batch)
  np.testing.assert_array_equal(captions.tokens_BGT, samples.captions.tokens_BGT)
  np.testing.assert_array_equal(scored.reward_BG, samples.reward_BG)
  assert 0 < float(numbers["reward/mean"]) < 1 and float(numbers["advantage/flat_groups"]) < 1
  for name, value in metrics.items():
    np.testing.assert_allclose(value, numbers[name], rtol=1e-3, atol=1e-5, err_msg=name)
  for a, b in zip(jax.tree.leaves(by_hand.params), jax.tree.leaves(together.params), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-5)


def test_the_first_update_is_on_policy(tiny_run):
  _, numbers, _ = jitted(tiny_run)(
    fresh_state(tiny_run, optimizer(tiny_run)), tiny_run.frozen, a_batch(tiny_run)
  )
  assert (
    abs(float(numbers["update/ratio_max"]) - 1) < 1e-4
    and abs(float(numbers["update/ratio_min"]) - 1) < 1e-4
  )
  # measured, not assumed
  assert float(numbers["update/ratio_max"]) != float(numbers["update/ratio_min"])


@pytest.mark.parametrize(
  "aggregation, counts",
  [("token_mean", (1, 2)), ("sequence_mean", (1, 8)), ("set_token_mean", (1, 8, 2))],
)
def test_gradients_do_not_depend_on_microbatches(tiny_run, aggregation, counts):
  batch = a_batch(tiny_run)
  captions = sample(tiny_run, batch, 1)
  rng = np.random.default_rng(0)
  advantage = jnp.asarray(rng.normal(size=captions.ended_BG.shape), jnp.float32)
  scored = jnp.asarray(rng.random(captions.ended_BG.shape) < 0.8)
  loss = dataclasses.replace(tiny_run.settings.step.update.loss, aggregation=aggregation)
  # All arrays are arguments: XLA would spend minutes on folding constants.
  results = [
    jax.jit(
      functools.partial(
        loss_gradients, Learner(tiny_run.policy.model, None, UpdateConfig(loss, microbatches=m))
      )
    )(tiny_run.policy.params, tiny_run.frozen, Rollout(batch, captions, scored, advantage))
    for m in counts
  ]
  first = results[0]
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(first.grads))
  assert scale > 1e-3
  for other in results[1:]:
    for a, b in zip(jax.tree.leaves(first.grads), jax.tree.leaves(other.grads), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-5 * scale)
    np.testing.assert_allclose(first.value, other.value, rtol=1e-4, atol=1e-6)
    for a, b in zip(jax.tree.leaves(first.numbers), jax.tree.leaves(other.numbers), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_sampled_logprobs_are_teacher_forced_and_unshared_ones(tiny_run):
  """sampled = teacher-forced with the shared prefix = every caption alone in a batch of its own
  image.
  """
  batch, vocabulary = a_batch(tiny_run), tiny_run.frozen.vocabulary
  captions = sample(tiny_run, batch, 2)
  score = jax.jit(
    lambda p, batch, captions: caption_logprobs(
      tiny_run.policy.model, p, batch, captions, vocabulary=vocabulary, temperature=1.0
    )[0]
  )
  valid = np.asarray(captions.valid_BGT)
  shared = np.asarray(score(tiny_run.policy.params, batch, captions))
  np.testing.assert_allclose(np.asarray(captions.logp_BGT)[valid], shared[valid], atol=1e-4)
  for g in range(captions.tokens_BGT.shape[1]):
    alone = jax.tree.map(lambda x: x[:, g : g + 1], captions)
    single = np.asarray(score(tiny_run.policy.params, batch, alone))[:, 0]
    np.testing.assert_allclose(single[valid[:, g]], shared[:, g][valid[:, g]], atol=1e-4)
  allowed = np.asarray(vocabulary.allowed_V)
  assert allowed[np.asarray(captions.tokens_BGT)[valid]].all() and not allowed.all()
  ends = np.isin(np.asarray(captions.tokens_BGT), vocabulary.end_ids) & valid
  assert (ends.sum(-1) <= 1).all() and (ends.any(-1) == np.asarray(captions.ended_BG)).all()


def test_a_rounded_captioner_writes_captions_and_records_its_own_logprobs(tiny_run):
  batch, vocabulary = a_batch(tiny_run), tiny_run.frozen.vocabulary
  rollout = dataclasses.replace(tiny_run.settings.step.rollout, weights="int8")
  cfg = dataclasses.replace(tiny_run.settings.step, rollout=rollout)
  model, params = tiny_run.policy.model, tiny_run.policy.params
  write = jax.jit(functools.partial(write_captions, policy=model, cfg=cfg))
  captions = write(fresh_state(tiny_run, optimizer(tiny_run)), tiny_run.frozen, batch)
  score = jax.jit(
    lambda p, batch, captions: caption_logprobs(
      model, p, batch, captions, vocabulary=vocabulary, temperature=1.0
    )[0]
  )
  small = {**params, "language_model": to_int8(params["language_model"])}
  valid, recorded = np.asarray(captions.valid_BGT), np.asarray(captions.logp_BGT)
  own, whole = (np.asarray(score(p, batch, captions)) for p in (small, params))
  np.testing.assert_allclose(recorded[valid], own[valid], atol=1e-4)
  assert 1e-3 < np.abs(recorded - whole)[valid].max() < 0.5
  # Where the scales lie on a mesh, there are scales.
  places = int8_shardings(tiny_run.policy.shardings["language_model"])
  assert jax.tree.structure(places) == jax.tree.structure(small["language_model"])
  for place, x in zip(jax.tree.leaves(places), jax.tree.leaves(small["language_model"])):
    assert len(place.spec) <= x.ndim


def test_nothing_compiles_after_the_first_step_and_the_state_is_donated(tiny_run):
  tx = optimizer(tiny_run)
  step, state = jitted(tiny_run), fresh_state(tiny_run, tx)
  iterator = train_iterator(tiny_run.train.example, 12, 8, 0)
  old = state
  state, metrics, _ = step(
    state, tiny_run.frozen, sharding.put_batch(next(iterator), tiny_run.mesh)
  )
  jax.block_until_ready(metrics)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
  with CompileCounter() as compiles:
    for _ in range(3):
      state, metrics, _ = step(
        state, tiny_run.frozen, sharding.put_batch(next(iterator), tiny_run.mesh)
      )
      jax.block_until_ready(metrics)
  assert compiles.count == 0
  with CompileCounter() as compiles:  # the counter does count
    jax.jit(lambda x: x * 3 + 1.5)(jnp.arange(7.0))
  assert compiles.count > 0


def test_the_metrics_of_the_first_step_are_what_they_were(tiny_run):
  _, numbers, _ = jitted(tiny_run)(
    fresh_state(tiny_run, optimizer(tiny_run)), tiny_run.frozen, a_batch(tiny_run)
  )
  got = {name: float(value) for name, value in sorted(numbers.items())}
  shown = ",\n".join(f"    {name!r}: {value:.6g}" for name, value in got.items())
  how = f"if the step was meant to change, say why in the commit and make GOLDEN\n{{\n{shown}}}"
  assert got.keys() == GOLDEN.keys(), how
  for name, value in got.items():
    np.testing.assert_allclose(value, GOLDEN[name], rtol=5e-3, atol=5e-5, err_msg=f"{name}; {how}")


def test_a_kl_term_pulls_towards_the_reference(tiny_run):
  loss = dataclasses.replace(tiny_run.settings.step.update.loss, kl=0.5)
  cfg = dataclasses.replace(tiny_run.settings.step, update=UpdateConfig(loss))
  policy, tx = tiny_run.policy.params, optimizer(tiny_run)
  results = []
  for reference in (jax.tree.map(jnp.copy, policy), jax.tree.map(lambda x: x * 1.5, policy)):
    frozen = tiny_run.frozen.replace(reference=reference)
    _, numbers, _ = jitted(tiny_run, cfg)(fresh_state(tiny_run, tx), frozen, a_batch(tiny_run))
    results.append({name: float(value) for name, value in numbers.items()})
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(reference))
  at_itself, elsewhere = results
  assert abs(at_itself["update/kl"]) < 1e-5 < 1e-3 < elsewhere["update/kl"]
  # The same samples and advantages: the losses differ by what the term adds.
  np.testing.assert_allclose(
    elsewhere["update/loss"] - at_itself["update/loss"],
    0.5 * (elsewhere["update/kl"] - at_itself["update/kl"]),
    rtol=1e-3,
  )
  assert "update/kl" not in GOLDEN and tiny_run.frozen.reference is None


def infinite_reward(tiny_run):
  reward = dataclasses.replace(tiny_run.settings.step.reward, accuracy=float("inf"))
  return jitted(tiny_run, dataclasses.replace(tiny_run.settings.step, reward=reward))


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(tiny_run):
  state = fresh_state(tiny_run, optimizer(tiny_run))
  before = jax.tree.map(np.array, (state.params, state.opt_state))
  state, numbers, _ = infinite_reward(tiny_run)(state, tiny_run.frozen, a_batch(tiny_run))
  assert float(numbers["update/nonfinite"]) == 1 and int(state.step) == 1
  for a, b in zip(
    jax.tree.leaves(before), jax.tree.leaves((state.params, state.opt_state)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_a_loss_that_is_not_finite_stops_the_run_with_good_parameters(tiny_run, tmp_path):
  tx, frozen = optimizer(tiny_run), tiny_run.frozen

  def step(state, batch):  # the second batch's pixels are fine; its advantages are not
    return (infinite_reward(tiny_run) if int(state.step) == 1 else jitted(tiny_run))(
      state, frozen, batch
    )

  checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=100))
  with pytest.raises(
    FloatingPointError, match="step 2: .*not finite; .*checkpoint of step 3"
  ) as caught:
    run_loop(
      step,
      fresh_state(tiny_run, tx),
      train_iterator(tiny_run.train.example, 12, 8, 0),
      steps=4,
      mesh=tiny_run.mesh,
      checkpoints=checkpoints,
      config={},
      workdir=tmp_path,
      what="test",
      reward_name="reward/mean",
    )
  assert f"checkpoint of step {checkpoints.latest_step()} " in str(caught.value)
  assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
  state, _ = checkpoints.restore(fresh_state(tiny_run, tx))
  checkpoints.close()
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))


def test_a_kind_that_the_batch_does_not_ask_about_has_no_accuracy():
  correct = jnp.array([[[True, False]], [[True, True]]])
  valid = jnp.array([[[True, True]], [[True, False]]])
  question = jnp.broadcast_to(jnp.arange(2), valid.shape)
  answers = Answers(jnp.zeros((2, 1, 2), int), correct, None, None, valid, valid, question, None)
  numbers = judge_metrics(answers, jnp.array([[0, 1], [0, 2]]), ("color", "shape", "size"))
  assert numbers["judge/accuracy/color"] == 1 and numbers["judge/accuracy/shape"] == 0
  assert np.isnan(numbers["judge/accuracy/size"])  # its only question is not valid
  np.testing.assert_allclose(numbers["judge/accuracy"], 2 / 3, rtol=1e-6)
