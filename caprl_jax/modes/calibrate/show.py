"""Figures of a calibration -> the table of the log, and a picture."""

import pathlib
import string
from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import numpy as np

from caprl_jax.modes.calibrate.trials import CONDITIONS


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
  if figures.get("questions_failed"):
    lines.append(f"left out: {figures['questions_failed']} questions to which an answer failed")
  lines += _reward_lines(figures)
  pmi = figures["readings"].get("option_pmi")
  if pmi:
    best = f"   <- judge.margin={pmi['margin']:g} would be best"
    lines += [
      "",
      "option_pmi by judge.margin: right with ideal captions / abstains with generic, "
      "shuffled, empty ones",
    ]
    lines += [
      f"  {r['margin']:6.3f}  {r['ideal_accuracy']:.3f} / {r['generic_abstained']:.3f} "
      f"{r['shuffled_abstained']:.3f} {r['empty_abstained']:.3f}"
      f"{best if r['margin'] == pmi['margin'] else ''}"
      for r in pmi["margins"]
    ]
  return "\n".join(lines)


def _reward_lines(figures: Mapping[str, Any]) -> list[str]:
  """How stable rewards are and what they are made of, one row per reading."""
  lines = [
    "",
    f"{'rewards':14} {'reliability of 1, 4, 8 questions':>32} {'turned':>7} {'reworded':>8} "
    f"{'caption':>8} {'guess':>6} {'never separate':>15} {'saves':>6}",
  ]
  shown = lambda value: f"{value:.2f}" if value is not None and np.isfinite(value) else "-"
  for reading, row in figures["readings"].items():
    reward = row["reward"]
    at, asked = reward["reliability"]["at"], reward["questions"]
    never = f"{len(asked['never'])} of {figures['questions']}"
    lines.append(
      f"{reading:14} {' '.join(shown(at[k]) for k in ('1', '4', '8')):>32} "
      f"{shown(reward.get('turned', {}).get('rewards')):>7} "
      f"{shown(reward.get('paraphrased', {}).get('rewards')):>8} "
      f"{reward['caption']['beyond_other']['mean']:8.3f} "
      f"{shown(reward['caption']['guess_share']):>6} {never:>15} {100 * asked['saves']:5.0f}%"
    )
  return lines + [
    "reliability: correlation with the reward by other questions; turned, reworded: with that by "
    "turned options and other prompts; caption: right beyond another image's caption; guess: share "
    "of what is right with none; never separate: the same verdict from every caption"
  ]


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
