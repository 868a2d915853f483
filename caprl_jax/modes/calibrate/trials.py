"""Held-out rows -> questions with captions whose worth is known."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from caprl_jax.data.readers.qa_sources import read_caption_rows
from caprl_jax.data.rows import QARow, Question, kinds
from caprl_jax.harness.sections import GateSection
from caprl_jax.modes.calibrate.section import CalibrateConfig

log = logging.getLogger("caprl_jax.modes.calibrate.trials")

CONDITIONS = ("ideal", "generic", "shuffled", "empty")


@dataclasses.dataclass(frozen=True)
class Trial:
  """One question with the captions of each condition. image: the name of its row."""

  question: Question
  captions: dict[str, str]
  image: str = ""


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
    trials += [
      Trial(q, said, row.name) for q in row.questions if not cfg.kinds or q.kind in cfg.kinds
    ]
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


def by_image(trials: Sequence[Trial]) -> list[list[int]]:
  """The places of each image's questions."""
  places: dict[str, list[int]] = {}
  for place, trial in enumerate(trials):
    places.setdefault(trial.image, []).append(place)
  return list(places.values())
