"""A judge, questions with captions of known worth -> every figure of its calibration."""

import logging
from collections.abc import Sequence

import numpy as np

from caprl_jax.data.judge_prompts import OFFICIAL
from caprl_jax.data.rows import QARow, kinds
from caprl_jax.hub.load import Loaded
from caprl_jax.inference.judge import Ask, HostJudge, JudgeSection
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
  judge: Loaded, trials: Sequence[Trial], section: JudgeSection, cfg: CalibrateConfig, seed: int
) -> dict:
  """All figures: see `run`."""
  names = kinds([QARow(b"", tuple(t.question for t in trials), "")])
  chat = all(judge.tokenizer.backend.token_to_id(token) is not None for token in OFFICIAL.specials)
  # reading -> option of each condition and trial, as the dataset numbers them
  choices: dict[str, np.ndarray] = {}
  figures: dict = {
    "questions": len(trials),
    "options": float(np.mean([len(t.question.options) for t in trials])),
    "prompt": "official" if chat else "plain",
    "readings": {},
  }
  gold = np.array([t.question.gold for t in trials])
  for reading in cfg.readings:
    asked = reading_config(reading, section, chat)
    host_judge = HostJudge(judge, asked, kinds=names, seed=seed)
    asks = [(t.captions[condition], t.question) for condition in CONDITIONS for t in trials]
    choice = host_judge.choices(asks, reading).reshape(len(CONDITIONS), len(trials))
    choices[reading] = choice
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
      row["margins"] = margins(host_judge, asks, trials)
      row["margin"] = best_margin(row["margins"])
    else:
      row["position"] = position_bias(host_judge, trials, cfg.turns, reading)
    row["reward"] = reward_figures(right, trials, host_judge, seed)
    if reading != "option_pmi":
      row["reward"]["turned"] = turned(host_judge, trials, right, reading)
    if reading == section.reading and cfg.paraphrases:
      row["reward"]["paraphrased"] = paraphrased(judge, asked, trials, right, cfg.paraphrases, seed)
    figures["readings"][reading] = row
    log.info("%s: %s", reading, ", ".join(f"{c} {row[c]['accuracy']:.3f}" for c in CONDITIONS))
  figures["agreement"] = {
    a: {b: float((choices[a] == choices[b]).mean()) for b in choices} for a in choices
  }
  return figures


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


def position_bias(host_judge: HostJudge, trials: Sequence[Trial], turns: int, what: str) -> dict:
  """With true captions: accuracy by the slot of the right option, how often each slot is chosen,
  and how often the same option is chosen in two orders in a row."""
  slots = max(len(t.question.options) for t in trials)
  asked = [[rotated(t.question, by) for t in trials] for by in range(turns)]
  choice = np.stack(
    [
      host_judge.choices([(t.captions["ideal"], q) for t, q in zip(trials, row)], what)
      for row in asked
    ]
  )
  gold = np.array([[q.gold for q in row] for row in asked])
  chosen = [
    [q.options[c] if c >= 0 else None for q, c in zip(row, picks)]
    for row, picks in zip(asked, choice)
  ]
  same = [a == b for first, second in zip(chosen, chosen[1:]) for a, b in zip(first, second)]
  rate = lambda mask, of: float(mask[of].mean()) if of.any() else float("nan")
  return {
    "accuracy_by_gold_slot": [rate(choice == gold, gold == s) for s in range(slots)],
    "chosen_by_slot": [float((choice == s).mean()) for s in range(slots)],
    "same_option_when_turned": float(np.mean(same)) if same else float("nan"),
  }
