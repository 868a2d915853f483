"""Numbers of steps -> warnings, and the end of a run that spends its time on nothing."""

import collections
import dataclasses
import logging
import math
import operator
import re
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

from caprl_jax.json_files import shown

log = logging.getLogger("caprl_jax.harness.watch")

STOP_IF = ("reward/unscored > 0.5 for 20",)
WARN_IF = (
  "advantage/flat_groups > 0.95 for 50",
  "rollout/truncated > 0.9 for 20",
  "update/entropy < 0.01 for 20",
  "watch/reward_jump > 8",
  "watch/blind_rise > 0.1 for 20",
)

# What to try where a rule about a metric holds.
ADVICE = {
  "reward/unscored": "the judge's numbers are not finite, images have no questions, or "
  "reward.custom gives none: look at samples/, and try judge.dtype=float32",
  "advantage/flat_groups": "all captions of an image earn the same, which teaches nothing: raise "
  "rollout.oversample or data.questions, or bring harder questions",
  "rollout/truncated": "captions do not end: raise rollout.sampling.max_tokens, or charge for "
  "length (reward.length, reward.truncated)",
  "update/entropy": "the captioner hardly varies what it writes: lower optimizer.learning_rate, or "
  "set policy_update.loss.kl or entropy",
  "watch/reward_jump": "the reward left what it was in the steps before: look at the captions of "
  "this step in samples/, where they may have found a short cut, and lower optimizer.learning_rate",
  "watch/blind_rise": "the judge answers more without a caption, too, which a caption then earns "
  "for nothing: drop such questions (question_filter.max_blind), or take another judge",
}
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_RULE = re.compile(
  r"\s*(?P<metric>[\w/.-]+)\s*(?P<sign><=|>=|<|>)\s*(?P<bound>[-+]?[\d.]+(?:[eE][-+]?\d+)?)"
  r"(?:\s+for\s+(?P<steps>\d+))?\s*"
)


class StoppedByRuleError(FloatingPointError):
  """A rule of `train.stop_if` holds: the run is saved and ends, as where numbers are not finite."""


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a metric is compared with, and for how many steps in a row it has to hold."""

  text: str
  metric: str
  holds: Callable[[float], bool]
  steps: int


def read_rule(text: str, key: str) -> Rule:
  """A rule such as "reward/unscored > 0.5 for 20"; without "for N" one step is enough.

  Args:
    key: of the config, for messages.

  Raises:
    ValueError: it is none.
  """
  match = _RULE.fullmatch(text) if isinstance(text, str) else None
  try:
    if match is None:
      raise ValueError
    bound, steps = float(match["bound"]), int(match["steps"] or 1)
    if steps < 1:
      raise ValueError
  except ValueError as error:
    raise ValueError(
      f"{key}: {shown(text)} is no rule; write one as 'reward/unscored > 0.5 for 20' (metric, <, "
      "<=, > or >=, number, and in how many steps in a row)"
    ) from error
  if match["metric"].startswith("time/"):
    raise ValueError(
      f"{key}: {shown(text)}: seconds differ between processes, which must all stop together; "
      "use a metric that is no time/..."
    )
  compare = _COMPARE[match["sign"]]
  return Rule(text.strip(), match["metric"], lambda value: compare(value, bound), steps)


class Trends:
  """The numbers of steps -> numbers about their course since this start:

  watch/reward_jump: how far `reward/mean` is from its mean over the last 50 steps, in their
    standard deviations; once there are 20.
  watch/blind_rise: how much `judge/blind` is above what it was in the first 20 steps, over the last
    20; where `judge/accuracy` is above what it was, too. With `judge.blind` only.
  """

  def __init__(self):
    self._rewards = collections.deque[float](maxlen=50)
    self._begun: list[tuple[float, float]] = []  # accuracy, blind
    self._last = collections.deque[tuple[float, float]](maxlen=20)

  def of(self, numbers: Mapping[str, float]) -> dict[str, float]:
    """A step's numbers; what can be said of them."""
    found = {}
    reward = numbers.get("reward/mean", math.nan)
    if math.isfinite(reward):
      if len(self._rewards) >= 20:
        spread = max(statistics.pstdev(self._rewards), 1e-3)
        found["watch/reward_jump"] = abs(reward - statistics.fmean(self._rewards)) / spread
      self._rewards.append(reward)
    pair = numbers.get("judge/accuracy", math.nan), numbers.get("judge/blind", math.nan)
    if all(map(math.isfinite, pair)):
      if len(self._begun) < 20:
        self._begun.append(pair)
      self._last.append(pair)
      (accuracy, blind), (accuracy_then, blind_then) = (
        tuple(map(statistics.fmean, zip(*some, strict=True))) for some in (self._last, self._begun)
      )
      found["watch/blind_rise"] = blind - blind_then if accuracy > accuracy_then else 0.0
    return found


class Watch:
  """Follows the numbers of steps, and their `Trends`, by rules; the same numbers lead to the same
  end in all processes."""

  def __init__(self, stop_if: Sequence[str] = STOP_IF, warn_if: Sequence[str] = WARN_IF):
    self.rules = [(read_rule(text, "train.stop_if"), True) for text in stop_if]
    self.rules += [(read_rule(text, "train.warn_if"), False) for text in warn_if]
    self._held = dict.fromkeys((rule.text for rule, _ in self.rules), 0)
    self._trends = Trends()

  def see(self, step: int, numbers: Mapping[str, float]) -> None:
    """A step's numbers. A rule without its metric among them neither holds nor is broken.

    Raises:
      StoppedByRuleError: a rule of `stop_if` has held for as long as it says.
    """
    trends = self._trends.of(numbers)
    for rule, stops in self.rules:
      value = numbers.get(rule.metric, trends.get(rule.metric))
      if value is None:
        continue
      self._held[rule.text] = self._held[rule.text] + 1 if rule.holds(value) else 0
      if self._held[rule.text] != rule.steps:  # said once, until it is broken
        continue
      advice = ADVICE.get(rule.metric, "look at report.html and samples/")
      said = f"step {step}: {rule.metric} is {value:.4g} (rule {rule.text!r}): {advice}"
      if stops:
        raise StoppedByRuleError(
          f"{said}. The rule is train.stop_if's; the last checkpoint is usable"
        )
      log.warning("%s", said)


class Heartbeat:
  """Writes the stacks of all threads to the log where no step ends for much longer than steps take:
  a collective that waits for a dead process, an iterator that waits for its thread.

  Args:
    least_secs: shorter waits are nothing.
    factor: of the median step.
  """

  def __init__(self, least_secs: float = 300.0, factor: float = 10.0):
    self.least_secs, self.factor = least_secs, factor
    self._secs: list[float] = []
    self._last: float | None = None  # None: nothing is waited for
    self._said = False
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
    self._thread.start()

  def beat(self) -> None:
    """A step has ended."""
    now = time.monotonic()
    if self._last is not None:
      self._secs = [*self._secs[-99:], now - self._last]
    self._last, self._said = now, False

  def pause(self) -> None:
    """Something else than steps is done until the next `beat`."""
    self._last = None

  def close(self) -> None:
    self._closed.set()
    self._thread.join()

  def _run(self) -> None:
    while not self._closed.wait(min(1.0, self.least_secs / 4)):
      last, secs = self._last, self._secs
      if last is None or not secs or self._said:
        continue
      waited, usual = time.monotonic() - last, statistics.median(secs)
      if waited > max(self.least_secs, self.factor * usual):
        self._said = True
        log.warning(
          "no step has ended for %.0f s, where one takes %.1f s; what every thread is at:\n%s",
          waited,
          usual,
          _stacks(),
        )


def _stacks() -> str:
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  return "\n".join(
    f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
    for ident, frame in sys._current_frames().items()
  )
