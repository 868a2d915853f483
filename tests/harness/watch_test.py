"""Rules over a run's numbers, and the word on a run that stands still."""

import logging
import time

import pytest

from caprl_jax.harness.watch import ADVICE, STOP_IF, WARN_IF, Heartbeat, StoppedByRuleError, Watch


def test_a_rule_stops_when_it_has_held_for_its_steps():
  watch = Watch(("reward/unscored > 0.5 for 3",), ())
  for step, value in enumerate([0.6, 0.6, 0.5, 0.6, 0.6], 1):  # broken once
    watch.see(step, {"reward/unscored": value})
  watch.see(6, {"reward/mean": 1.0})  # says nothing of it
  with pytest.raises(
    StoppedByRuleError, match=r"step 7: reward/unscored is 0.7 .*judge.dtype=float32"
  ):
    watch.see(7, {"reward/unscored": 0.7})


def test_a_rule_warns_once_until_it_is_broken(caplog):
  watch = Watch((), ("update/entropy<1e-2", "reward/mean >= 2 for 1"))
  for step, value in enumerate([0.009, 0.001, 0.5, 0.0], 1):
    watch.see(step, {"update/entropy": value, "reward/mean": 1.9})
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == 2 and said[0].startswith("step 1: update/entropy is 0.009")
  assert said[1].startswith("step 4:") and ADVICE["update/entropy"] in said[1]


def seen(watch, caplog, count, **last):
  """Steps that are like each other, then one with `last`; the warnings of the latter."""
  for step in range(1, count + 1):
    watch.see(step, {"reward/mean": 0.5 + 0.01 * (step % 2), "judge/accuracy": 0.4})
  caplog.clear()
  watch.see(count + 1, {name.replace("__", "/"): value for name, value in last.items()})
  return [record.getMessage() for record in caplog.records]


def test_a_reward_that_jumps_is_said(caplog):
  assert not seen(Watch(), caplog, 60, reward__mean=0.52)
  (said,) = seen(Watch(), caplog, 60, reward__mean=0.9)
  assert "step 61: watch/reward_jump is" in said and "short cut" in said
  assert not seen(Watch(), caplog, 15, reward__mean=0.9)  # nobody knows yet what is usual
  assert not seen(Watch(), caplog, 60, reward__mean=float("nan"))


@pytest.mark.parametrize("accuracy, blind, warns", [(0.3, 0.3, 1), (0.3, 0.0, 0), (-0.1, 0.3, 0)])
def test_a_judge_that_needs_no_caption_is_said(caplog, accuracy, blind, warns):
  """Both rise over 200 steps by so much."""
  watch = Watch((), ("watch/blind_rise > 0.1 for 20",))
  for step in range(1, 201):
    part = step / 200
    watch.see(step, {"judge/accuracy": 0.4 + accuracy * part, "judge/blind": 0.3 + blind * part})
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == warns and all("question_filter.max_blind" in text for text in said)


@pytest.mark.parametrize(
  "rule, message",
  [
    ("reward/unscored", "is no rule; write one as 'reward/unscored > 0.5 for 20'"),
    ("reward/unscored > much", "is no rule"),
    ("reward/unscored > 1.2.3", "is no rule"),
    ("reward/unscored = 1", "is no rule"),
    ("reward/unscored > 1 for 0", "is no rule"),
    ("time/step_secs > 9", "differ between processes"),
  ],
)
def test_what_is_no_rule_is_refused(rule, message):
  with pytest.raises(ValueError, match=f"train.stop_if: .*{message}"):
    Watch((rule,), ())
  with pytest.raises(ValueError, match="train.warn_if: "):
    Watch((), (rule,))


def test_the_default_rules_are_about_metrics_with_advice():
  assert {rule.metric for rule, _ in Watch(STOP_IF, WARN_IF).rules} == set(ADVICE)


def test_a_run_that_stands_still_shows_its_stacks(caplog):
  heart = Heartbeat(least_secs=0.2, factor=2.0)
  try:
    with caplog.at_level(logging.WARNING):
      heart.beat()
      for _ in range(3):
        time.sleep(0.01)
        heart.beat()
      heart.pause()
      time.sleep(0.6)
      assert not caplog.records  # an evaluation is no step
      heart.beat()
      deadline = time.monotonic() + 20
      while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.05)
      time.sleep(0.3)
    [record] = caplog.records  # said once
    said = record.getMessage()
    assert "no step has ended for" in said and "thread MainThread:" in said
    assert "test_a_run_that_stands_still" in said
  finally:
    heart.close()
