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
