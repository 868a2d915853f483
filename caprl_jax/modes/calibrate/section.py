"""The section `calibrate`."""

import dataclasses
from typing import Literal


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
  paraphrases: other wordings of the judge's prompt, up to 2, with which the reading of section
    `judge` is asked everything again; 0: none.
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
  paraphrases: int = 2

  def __post_init__(self):
    if self.max_questions < 2 or self.turns < 1 or not self.readings:
      raise ValueError(
        f"max_questions = {self.max_questions} must be at least 2, turns = "
        f"{self.turns} at least 1, and readings = {self.readings} not empty"
      )
    if not 0 <= self.paraphrases <= 2:
      raise ValueError(f"paraphrases = {self.paraphrases} must be 0, 1 or 2: there are two")
