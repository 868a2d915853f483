"""What Prism asked and what was answered: kept together, scored, and written as JSON lines."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from caprl_jax.atomic_files import write_text
from caprl_jax.data.readers.benchmarks.row import BenchmarkRow
from caprl_jax.data.rows import CaptionRow
from caprl_jax.modes.prism.scores import score_answers

BLIND = "blind"  # who answers without a caption
FAILED = -2  # in the place of an option as read: there was no answer; in that of a text stands None


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What was asked, from which captions, and what was answered.

  rows: benchmark -> its questions. digests: benchmark -> the hash of each question's image.
  shown: benchmark -> the key of what each question's captions were written of.
  images: such a key -> image.
  captions: captioner -> key -> what it wrote, each with caption, tokens, finish.
  answered: benchmark -> captioner, and `BLIND` for no caption -> texts, or options as read
    [rows, captions].
  left_out: benchmark -> its questions that could not be asked. failed: benchmark -> its questions
    to which an answer failed.
  """

  rows: Mapping[str, Sequence[BenchmarkRow]]
  digests: Mapping[str, Sequence[str]]
  shown: Mapping[str, Sequence[str]]
  images: Mapping[str, CaptionRow]
  captions: Mapping[str, Mapping[str, list]]
  answered: Mapping[str, Mapping[str, np.ndarray]]
  left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
  failed: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def answered_in_full(self) -> "Evaluation":
    """Without the questions to which an answer failed, of whichever captioner: all are compared on
    the others. Raises ValueError for a benchmark of which nothing is left."""
    whole = {name: _whole(list(of.values())) for name, of in self.answered.items()}
    failed = {name: int((~kept).sum()) for name, kept in whole.items() if not kept.all()}
    if not failed:
      return self
    for name, kept in whole.items():
      if not kept.any():
        raise ValueError(
          f"{name}: the judge's server answered none of {len(kept)} questions from all captions; "
          "the log has its reasons, and the same command asks again what failed"
        )
    some = lambda of: {
      name: [one for one, keep in zip(values, whole[name], strict=True) if keep]
      for name, values in of.items()
    }
    answered = {
      name: {who: found[whole[name]] for who, found in of.items()}
      for name, of in self.answered.items()
    }
    return dataclasses.replace(
      self,
      rows=some(self.rows),
      digests=some(self.digests),
      shown=some(self.shown),
      answered=answered,
      failed=failed,
    )

  @functools.cached_property
  def scored(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """benchmark -> captioner -> as `score_answers` has it."""
    return {
      name: {who: score_answers(self.rows[name], found) for who, found in by_captioner.items()}
      for name, by_captioner in self.answered.items()
    }

  def caption(self, benchmark: str, who: str, row: int, number: int) -> str:
    """What an answer was given from; empty without a caption."""
    if who == BLIND:
      return ""
    return self.captions[who][self.shown[benchmark][row]][number]["caption"]


def _whole(answers: Sequence[np.ndarray]) -> np.ndarray:
  """Which rows have no answer that failed, bool [rows]. answers: [rows, captions] of each
  captioner."""
  lost = lambda found: np.equal(found, None) if found.dtype == object else found == FAILED
  return ~np.any([np.any(lost(found), axis=1) for found in answers], axis=0)


def write_answers(path: pathlib.Path, evaluation: Evaluation) -> None:
  """A JSON line for each question, captioner and caption: what was said, answered and scored."""
  lines = []
  for benchmark, rows in evaluation.rows.items():
    for who, found in evaluation.answered[benchmark].items():
      for i, row in enumerate(rows):
        for n, answer in enumerate(found[i]):
          lines.append(
            json.dumps(
              {
                "benchmark": benchmark,
                "row": row.name,
                "captioner": who,
                "caption": evaluation.caption(benchmark, who, i, n),
                "answer": answer if isinstance(answer, str) else int(answer),
                "gold": row.gold,
                **{
                  name: float(value[i, n])
                  for name, value in evaluation.scored[benchmark][who].items()
                  if not np.isnan(value[i, n])
                },
              },
              ensure_ascii=False,
            )
          )
  write_text(path, "\n".join(lines) + "\n")
