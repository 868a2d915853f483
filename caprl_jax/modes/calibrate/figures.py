"""A judge, questions with captions of known worth -> every figure of its calibration."""

import logging
from collections.abc import Sequence

import numpy as np

from caprl_jax.inference.judge import Ask, HostJudge, JudgeSection
from caprl_jax.modes.calibrate.judges import AnyJudge, Judges, ask
from caprl_jax.modes.calibrate.section import CalibrateConfig
from caprl_jax.modes.calibrate.stability import paraphrased, reward_figures, turned
from caprl_jax.modes.calibrate.trials import CONDITIONS, Trial, rotated
from caprl_jax.rl.judge_protocol import JudgeConfig, answer_by_margin

log = logging.getLogger("caprl_jax.modes.calibrate.figures")

MARGINS = (0.001, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def reading_config(reading: str, judge: JudgeSection, chat: bool) -> JudgeConfig:
  """A reading as it is compared: in the order given, able to abstain, with the config's prompt or,
  where that is plain and the judge knows chats, the official one."""
  if reading == "option_pmi":
    return JudgeConfig(reading=reading, margin=judge.margin if judge.reading == reading else 1e-3)
  prompt = "official" if judge.prompt == "plain" and chat else judge.prompt
  return JudgeConfig(
    reading=reading,
    prompt=prompt,
    abstain="last",
    abstain_letter=judge.abstain_letter,
    shuffle=False,
    temperature=judge.temperature,
    max_tokens=judge.max_tokens,
  )


def calibrate(
  judges: Judges, trials: Sequence[Trial], section: JudgeSection, cfg: CalibrateConfig, seed: int
) -> dict:
  """All figures: see `run`. A question that a judge behind an endpoint left unanswered in one
  condition is in none of them.

  Raises ValueError where no question was answered in all conditions."""
  # reading -> option of each condition and trial, as the dataset numbers them
  choices: dict[str, np.ndarray] = {}
  figures: dict = {
    "questions": len(trials),
    "options": float(np.mean([len(t.question.options) for t in trials])),
    "prompt": "official" if judges.chat else section.prompt if section.endpoint else "plain",
    "readings": {},
  }
  for reading in cfg.readings:
    asked = reading_config(reading, section, judges.chat)
    host_judge = judges(asked)
    rows = [[(t.captions[condition], t.question) for t in trials] for condition in CONDITIONS]
    choice, answered = ask(host_judge, rows, reading)
    if not answered.all():
      trials, choice = _answered(trials, choice, answered)
      figures["questions_failed"] = figures["questions"] - len(trials)
      figures["questions"] = len(trials)
    choices[reading] = choice
    gold = np.array([t.question.gold for t in trials])
    right = choice == gold
    row = {
      condition: {
        "accuracy": float(right[i].mean()),
        "abstained": float((choice[i] < 0).mean()),
        "misled": float((~right[i] & (choice[i] >= 0)).mean()),
      }
      for i, condition in enumerate(CONDITIONS)
    }
    if reading == "option_pmi":
      assert isinstance(host_judge, HostJudge), "a server answers in words"
      row["margins"] = margins(host_judge, [one for row in rows for one in row], trials)
      row["margin"] = best_margin(row["margins"])
    else:
      row["position"] = position_bias(host_judge, trials, cfg.turns, reading)
    row["reward"] = reward_figures(right, trials, host_judge, seed)
    if reading != "option_pmi":
      row["reward"]["turned"] = turned(host_judge, trials, right, reading)
    if reading == section.reading and cfg.paraphrases:
      row["reward"]["paraphrased"] = paraphrased(judges, asked, trials, right, cfg.paraphrases)
    figures["readings"][reading] = row
    log.info("%s: %s", reading, ", ".join(f"{c} {row[c]['accuracy']:.3f}" for c in CONDITIONS))
  figures["agreement"] = {
    a: {b: float((choices[a] == choices[b]).mean()) for b in choices} for a in choices
  }
  return figures


def _answered(
  trials: Sequence[Trial], choice: np.ndarray, answered: np.ndarray
) -> tuple[list[Trial], np.ndarray]:
  """The trials that were answered in all conditions, and the choices of these."""
  failed = int((~answered).sum())
  if failed == len(trials):
    raise ValueError(
      f"the judge's server answered none of {failed} questions in all conditions; the log has its "
      "reasons"
    )
  log.warning("%d of %d questions are left out: an answer to them failed", failed, len(trials))
  return [t for t, there in zip(trials, answered) if there], choice[:, answered]


def margins(
  host_judge: HostJudge, asks: Sequence[Ask], trials: Sequence[Trial]
) -> list[dict[str, float]]:
  """For each of `MARGINS`: accuracy with ideal captions, and abstention with each of the others
  (`option_pmi`).
  """
  found = [host_judge.best_of(ask) for ask in asks]
  best, lead = (np.array(x).reshape(len(CONDITIONS), len(trials)) for x in zip(*found))
  gold = np.array([q.gold for _, q in asks]).reshape(best.shape)
  rows = []
  for margin in MARGINS:
    answer = answer_by_margin(best, lead, margin)
    row = {"margin": margin, "ideal_accuracy": float((answer[0] == gold[0]).mean())}
    for name, answers in zip(CONDITIONS[1:], answer[1:], strict=True):
      row[f"{name}_abstained"] = float((answers < 0).mean())
    rows.append(row)
  return rows


def best_margin(table: Sequence[dict[str, float]]) -> float:
  """The margin that tells best what a caption says from what it does not: most answered right from
  true captions and abstained on from the one that says nothing, in sum; the smallest of equals."""
  worth = [row["ideal_accuracy"] + row["generic_abstained"] for row in table]
  return table[int(np.argmax(worth))]["margin"]


def position_bias(host_judge: AnyJudge, trials: Sequence[Trial], turns: int, what: str) -> dict:
  """With true captions: accuracy by the slot of the right option, how often each slot is chosen,
  and how often the same option is chosen in two orders in a row."""
  slots = max(len(t.question.options) for t in trials)
  asked = [[rotated(t.question, by) for t in trials] for by in range(turns)]
  rows = [[(t.captions["ideal"], q) for t, q in zip(trials, row)] for row in asked]
  choice, answered = ask(host_judge, rows, what)
  choice = choice[:, answered]
  asked = [[q for q, there in zip(row, answered) if there] for row in asked]
  gold = np.array([[q.gold for q in row] for row in asked])
  chosen = [
    [q.options[c] if c >= 0 else None for q, c in zip(row, picks)]
    for row, picks in zip(asked, choice)
  ]
  same = [a == b for first, second in zip(chosen, chosen[1:]) for a, b in zip(first, second)]
  rate = lambda mask, of: float(mask[of].mean()) if of.any() else float("nan")
  return {
    "accuracy_by_gold_slot": [rate(choice == gold, gold == s) for s in range(slots)],
    "chosen_by_slot": [rate(choice == s, np.ones(choice.shape, bool)) for s in range(slots)],
    "same_option_when_turned": float(np.mean(same)) if same else float("nan"),
  }
