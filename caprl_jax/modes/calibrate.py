"""Mode `calibrate`: whether a judge can be trusted, before it is: a table, a plot and the margin to
abstain by.

Held-out questions are asked with captions whose worth is known: true ones, one that says nothing,
another image's, and none. A judge that can teach answers right from the first and abstains, or is
at chance, with the others. Every reading is asked, over rotated options, and compared with the
official sampled protocol.
"""

import dataclasses
import logging
import pathlib
import string
from collections.abc import Sequence
from typing import Literal

import jax
import matplotlib.figure
import numpy as np

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.config import schema as configuration
from caprl_jax.data.judge_prompts import OFFICIAL
from caprl_jax.data.readers.qa_sources import read_caption_rows, read_qa_rows
from caprl_jax.data.rows import QARow, Question, kinds
from caprl_jax.harness.sections import DataSection, GateSection
from caprl_jax.hub.load import Loaded
from caprl_jax.inference.judge import Ask, HostJudge, JudgeSection, check_blind
from caprl_jax.rl.judge_protocol import JudgeConfig, answer_by_margin

log = logging.getLogger("caprl_jax.modes.calibrate")

CONDITIONS = ("ideal", "generic", "shuffled", "empty")
MARGINS = (0.001, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


@dataclasses.dataclass(frozen=True)
class CalibrateConfig:
  """The section `calibrate`.

  readings: those to compare; agreement is measured with the last one (`generate` is CapRL's own).
  ideal: template of a true caption with {fact} places; None: that of `gate.ideal`.
  captions: a JSON lines file of trusted captions by image, in place of `ideal`, for data without
    facts.
  generic: a caption that says nothing about the image; None: that of `gate.generic`.
  kinds: kinds of questions that are asked; empty: all.
  max_questions: held-out questions that are asked.
  turns: orders of the options that each letter reading is shown, each rotated by one place.
  """

  readings: tuple[
    Literal["option_pmi", "letter_argmax", "letter_prob", "letter_sample", "generate"], ...
  ] = ("option_pmi", "letter_argmax", "letter_sample", "generate")
  ideal: str | None = None
  captions: str | None = None
  generic: str | None = None
  kinds: tuple[str, ...] = ()
  max_questions: int = 100
  turns: int = 4

  def __post_init__(self):
    if self.max_questions < 2 or self.turns < 1 or not self.readings:
      raise ValueError(
        f"max_questions = {self.max_questions} must be at least 2, turns = "
        f"{self.turns} at least 1, and readings = {self.readings} not empty"
      )


@dataclasses.dataclass(frozen=True)
class Trial:
  """One question with the captions of each condition."""

  question: Question
  captions: dict[str, str]


def make_trials(
  rows: Sequence[QARow], cfg: CalibrateConfig, gate: GateSection, seed: int
) -> list[Trial]:
  """Questions of rows whose true captions are known. Raises ValueError where there are none."""
  ideal = {row.name: row.caption for row in read_caption_rows(cfg.captions)} if cfg.captions else {}
  template = cfg.ideal or gate.ideal

  def true_caption(row: QARow) -> str | None:
    if cfg.captions:
      return ideal.get(row.name)
    try:
      return template.format(**(row.facts or {})) if template else None
    except KeyError:
      return None

  known = [(row, caption) for row in rows if (caption := true_caption(row))]
  if len(known) < len(rows):
    log.info(
      "%d of %d held-out images have no true caption that is known, and are not asked about",
      len(rows) - len(known),
      len(rows),
    )
  rng = np.random.default_rng(seed)
  known = [known[i] for i in rng.permutation(len(known))]
  if len({caption for _, caption in known}) < 2:
    raise ValueError(
      "calibration needs images with different true captions: set calibrate.ideal "
      "to a template of the data's facts, or calibrate.captions to a JSON lines "
      "file of trusted captions of data.eval"
    )
  trials = []
  for i, (row, caption) in enumerate(known):
    other = next(
      c for c in [known[(i + j) % len(known)][1] for j in range(1, len(known) + 1)] if c != caption
    )
    said = {
      "ideal": caption,
      "generic": cfg.generic or gate.generic,
      "shuffled": other,
      "empty": "",
    }
    trials += [Trial(q, said) for q in row.questions if not cfg.kinds or q.kind in cfg.kinds]
  if not trials:
    raise ValueError(
      f"calibrate.kinds = {cfg.kinds} leaves no question; the data has "
      f"{kinds(row for row, _ in known)}"
    )
  return trials[: cfg.max_questions]


def rotated(question: Question, by: int) -> Question:
  """The same question with its options rotated by some places."""
  count = len(question.options)
  order = [(i + by) % count for i in range(count)]
  return dataclasses.replace(
    question, options=tuple(question.options[i] for i in order), gold=order.index(question.gold)
  )


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


def table(figures: dict, yardstick: str) -> str:
  """The figures as text, one row per reading."""
  lines = [
    f"{'reading':14} "
    + " ".join(f"{c:>9}" for c in CONDITIONS)
    + f" {'abstains*':>9} {'by slot':>13} {'agrees':>7}"
  ]
  for reading, row in figures["readings"].items():
    by_slot = [
      x for x in row.get("position", {}).get("accuracy_by_gold_slot", []) if np.isfinite(x)
    ]
    spread = f"{min(by_slot):.2f} to {max(by_slot):.2f}" if by_slot else "-"
    lines.append(
      f"{reading:14} "
      + " ".join(f"{row[c]['accuracy']:9.3f}" for c in CONDITIONS)
      + f" {row['generic']['abstained']:9.3f} {spread:>13} "
      f"{figures['agreement'][reading][yardstick]:7.3f}"
    )
  lines.append(
    "* with the caption that says nothing; by slot: accuracy by the right option's "
    f"place; agrees: with {yardstick}"
  )
  pmi = figures["readings"].get("option_pmi")
  if pmi:
    lines += [
      "",
      "option_pmi by judge.margin: right with ideal captions / abstains with generic, "
      "shuffled, empty ones",
    ]
    lines += [
      f"  {r['margin']:6.3f}  {r['ideal_accuracy']:.3f} / {r['generic_abstained']:.3f} "
      f"{r['shuffled_abstained']:.3f} {r['empty_abstained']:.3f}"
      f"{'   <- judge.margin' if r['margin'] == pmi['margin'] else ''}"
      for r in pmi["margins"]
    ]
  return "\n".join(lines)


def draw(figures: dict, path: pathlib.Path) -> None:
  """Accuracy by condition and reading, accuracy by slot, and what a margin does, as a picture."""
  readings = figures["readings"]
  figure = matplotlib.figure.Figure(figsize=(12, 3.6), layout="constrained")
  bars, slots, sweep = figure.subplots(1, 3)
  width = 0.8 / len(readings)
  for i, (reading, row) in enumerate(readings.items()):
    bars.bar(
      np.arange(len(CONDITIONS)) + (i - (len(readings) - 1) / 2) * width,
      [row[c]["accuracy"] for c in CONDITIONS],
      width,
      label=reading,
    )
    if "position" in row:
      values = row["position"]["accuracy_by_gold_slot"]
      slots.plot(
        list(string.ascii_uppercase[: len(values)]),
        values,
        marker="o",
        label=reading,
        color=f"C{i}",
      )
    if "margins" in row:
      for name, label in (
        ("ideal_accuracy", "right, ideal captions"),
        ("generic_abstained", "abstains, generic"),
        ("shuffled_abstained", "abstains, another image's"),
        ("empty_abstained", "abstains, empty"),
      ):
        sweep.plot(
          [r["margin"] for r in row["margins"]],
          [r[name] for r in row["margins"]],
          marker=".",
          label=label,
        )
      sweep.axvline(
        row["margin"], color="gray", linestyle=":", label=f"judge.margin = {row['margin']}"
      )
  bars.axhline(1 / figures["options"], color="gray", linestyle=":")
  bars.set_xticks(range(len(CONDITIONS)), CONDITIONS)
  bars.set(title="Judge accuracy by caption (dotted: chance)", ylim=(0, 1.02))
  slots.set(title="Accuracy by the right option's letter", xlabel="letter", ylim=(0, 1.02))
  sweep.set(title="option_pmi: what a margin does", xlabel="margin, nats", ylim=(0, 1.02))
  for axes in (bars, slots, sweep):
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=7)
  figure.savefig(path, dpi=110)


def run(config, workdir: pathlib.Path) -> None:
  """Writes calibration.json and calibration.png, and prints the table."""
  cfg = configuration.load_section(config, "calibrate", CalibrateConfig)
  section = configuration.load_section(config, "judge", JudgeSection)
  check_blind(section)
  data, gate = (
    configuration.load_section(config, *x) for x in (("data", DataSection), ("gate", GateSection))
  )
  seed = config.get("seed", 0)
  trials = make_trials(read_qa_rows(data.eval, seed, data.max_eval_rows), cfg, gate, seed)
  mesh = sharding.make_mesh(configuration.load_section(config, "mesh", sharding.MeshConfig))
  with jax.set_mesh(mesh):
    figures = calibrate(section.load(mesh), trials, section, cfg, seed)
  if jax.process_index() == 0:
    write_json(workdir / "calibration.json", {"judge": section.source, **figures})
    draw(figures, workdir / "calibration.png")
    log.info(
      "judge %s, %d held-out questions:\n%s",
      section.source,
      len(trials),
      table(figures, cfg.readings[-1]),
    )
    log.info("plot: %s", workdir / "calibration.png")
