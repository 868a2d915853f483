"""Verdicts on captions of known worth -> how stable a judge's rewards are, and what of them is
caption.

`right` is bool [conditions, trials] throughout: whether the judge was right, by `CONDITIONS`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from caprl_jax.data.judge_prompts import paraphrases, template_for
from caprl_jax.data.rows import Question
from caprl_jax.modes.calibrate.judges import AnyJudge, Judges, ask, size_of
from caprl_jax.modes.calibrate.trials import CONDITIONS, Trial, by_image, rotated
from caprl_jax.rl.judge_protocol import JudgeConfig
from caprl_jax.scoring import intervals, reliability

AT = (1, 2, 4, 8)  # questions per image, at which the reliability is told


def reward_figures(
  right: np.ndarray, trials: Sequence[Trial], host_judge: AnyJudge, seed: int
) -> dict[str, Any]:
  """Of rewards made of these verdicts: `reliability`, what of them is `caption`, and which
  `questions` never tell captions apart."""
  images = by_image(trials)
  found = reliability.split_half([right[:, places] for places in images], seed)
  return {
    "reliability": found._asdict() | {"at": {str(k): found.at(k) for k in AT}},
    "caption": caption_share(right, images, seed),
    "questions": never_separate(right, trials, host_judge),
  }


def caption_share(right: np.ndarray, images: Sequence[list[int]], seed: int) -> dict[str, Any]:
  """How much of the accuracy with true captions the captions have earned: what is beyond the
  accuracy with none, and with another image's, paired over images with their intervals; and the
  share of it that none has too, which is guessed."""
  accuracy = dict(zip(CONDITIONS, right.mean(1).tolist(), strict=True))
  # An image counts as often as it has questions.
  weight = np.array([len(places) for places in images]) * len(images) / right.shape[1]
  of_image = lambda name: (
    weight * np.array([right[CONDITIONS.index(name), places].mean() for places in images])
  )
  ideal = accuracy["ideal"]
  return {
    "beyond_none": intervals.paired_difference(
      of_image("ideal"), of_image("empty"), seed
    )._asdict(),
    "beyond_other": intervals.paired_difference(
      of_image("ideal"), of_image("shuffled"), seed
    )._asdict(),
    "guess_share": accuracy["empty"] / ideal if ideal else float("nan"),
  }


def never_separate(
  right: np.ndarray, trials: Sequence[Trial], host_judge: AnyJudge
) -> dict[str, Any]:
  """Questions with the same verdict from every caption. They move no reward against another, and
  `saves` is their share of all question tokens that the judge reads."""
  images = by_image(trials)
  found = reliability.separation([right[:, places] for places in images])
  order = [place for places in images for place in places]
  size = np.array([size_of(host_judge, trials[place].question) for place in order])
  listed = [
    {
      "image": trials[place].image,
      "stem": trials[place].question.stem,
      "kind": trials[place].question.kind,
      "always": "right" if found.always_right[n] else "wrong",
    }
    for n, place in enumerate(order)
    if not found.separates[n]
  ]
  return {
    "separate": int(found.separates.sum()),
    "always_right": int(found.always_right.sum()),
    "always_wrong": int(found.always_wrong.sum()),
    "saves": float(size[~found.separates].sum() / size.sum()),
    "never": listed,
  }


def turned(
  host_judge: AnyJudge, trials: Sequence[Trial], right: np.ndarray, what: str
) -> dict[str, float]:
  """How far verdicts and rewards agree when the options are shown in another order, rotated by one
  place."""
  again, answered = _right(host_judge, trials, [rotated(t.question, 1) for t in trials], what)
  return _agreement([right, again], trials, answered)


def paraphrased(
  judges: Judges,
  cfg: JudgeConfig,
  trials: Sequence[Trial],
  right: np.ndarray,
  count: int,
) -> dict[str, Any]:
  """How far verdicts and rewards agree when the prompt is worded in other ways, and the accuracy
  with true captions under each, ours first."""
  ways, answered = [right], np.ones(len(trials), bool)
  questions = [trial.question for trial in trials]
  for template in paraphrases(template_for(cfg.reading, cfg.prompt))[:count]:
    what = f"{cfg.reading}, {template.name}"
    again, there = _right(judges(cfg, template), trials, questions, what)
    ways.append(again)
    answered &= there
  agreement = _agreement(ways, trials, answered)
  if not agreement:
    return {}
  return agreement | {"ideal_accuracy": [float(way[0, answered].mean()) for way in ways]}


def _right(
  host_judge: AnyJudge, trials: Sequence[Trial], questions: Sequence[Question], what: str
) -> tuple[np.ndarray, np.ndarray]:
  """Whether each question is answered right, bool [conditions, trials], and which trials were
  answered in all conditions."""
  rows = [[(t.captions[c], q) for t, q in zip(trials, questions, strict=True)] for c in CONDITIONS]
  choice, answered = ask(host_judge, rows, what)
  return choice == np.array([q.gold for q in questions]), answered


def _agreement(
  ways: Sequence[np.ndarray], trials: Sequence[Trial], answered: np.ndarray
) -> dict[str, float]:
  """Over what was answered in every way; empty where nothing was."""
  every = np.stack(ways)[:, :, answered]
  left = [trial for trial, there in zip(trials, answered) if there]
  if not left:
    return {}
  return reliability.agreement([every[:, :, places] for places in by_image(left)])._asdict()
