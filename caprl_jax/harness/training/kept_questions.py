"""Which questions of a run were kept when it began -> the same ones at every later start.

The judge that chooses them is asked once: asked again on another machine, or after an update of
jax, it may answer one question otherwise, and the stream of batches would shift without a word.
"""

import dataclasses
import json
import logging
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from caprl_jax.atomic_files import write_text
from caprl_jax.config.schema import to_plain
from caprl_jax.data.rows import QARow
from caprl_jax.harness.process.first import from_first
from caprl_jax.json_files import read_record

log = logging.getLogger("caprl_jax.harness.training.kept_questions")

FILE = "kept_questions.json"


@dataclasses.dataclass(frozen=True)
class Split:
  """Rows of one source. digests: of each row with all of its questions (`row_digests`)."""

  rows: Sequence[QARow]
  digests: Sequence[str]


class KeptQuestions:
  """kept_questions.json in a workdir. All processes call its methods, the first one reads and
  writes.

  Args:
    settings: all that decides about questions, for JSON; a file of others does not count.
    goes_on: the run has made steps with what the file says. Then it holds for the rows that it
      knows, and others have no questions; else it must know all rows.

  Raises ValueError, with the path, for a file that is damaged.
  """

  def __init__(self, workdir: pathlib.Path, settings: Any, goes_on: bool):
    self.path, self.settings, self.goes_on = workdir / FILE, to_plain(settings), goes_on
    self.held = from_first(lambda: self._read() if self.path.exists() else None)

  def recall(self, splits: Sequence[Split]) -> tuple[list[list[QARow]], dict[str, int]] | None:
    """The rows of each split with the questions that were kept, and the counts that were made
    then; None where they have to be chosen anew."""
    if self.held is None or len(self.held["splits"]) != len(splits):
      return None
    known = [dict(split) for split in self.held["splits"]]
    new = sum(
      digest not in places
      for split, places in zip(splits, known, strict=True)
      for digest in split.digests
    )
    if new and not self.goes_on:
      return None
    if new:
      log.warning("%d rows are new since the questions were chosen, and are left out", new)
    log.info("the questions are those that %s names; the judge is not asked again", self.path)
    return [
      [
        dataclasses.replace(row, questions=tuple(row.questions[i] for i in places[digest]))
        for row, digest in zip(split.rows, split.digests, strict=True)
        if places.get(digest)
      ]
      for split, places in zip(splits, known, strict=True)
    ], self.held["counts"]

  def keep(
    self, splits: Sequence[Split], kept: Sequence[Sequence[QARow]], counts: dict[str, int]
  ) -> None:
    """Writes what was chosen.

    Args:
      kept: of each split the rows of which questions are left, in order, with these.
    """
    if jax.process_index() > 0:
      return
    found = {
      "settings": self.settings,
      "counts": counts,
      "splits": [_places(split, rows) for split, rows in zip(splits, kept, strict=True)],
    }
    write_text(self.path, json.dumps(found) + "\n")

  def _read(self) -> dict[str, Any] | None:
    held = read_record(self.path)
    try:
      if held["settings"] != self.settings:
        return None
      whole = all(
        isinstance(digest, str) and all(type(i) is int and i >= 0 for i in places)
        for split in held["splits"]
        for digest, places in split.items()
      ) and all(type(number) is int for number in held["counts"].values())
    except (KeyError, TypeError, AttributeError):
      whole = False
    if not whole:
      raise ValueError(
        f"{self.path} is damaged: it must name settings, counts and splits; restore it, or use "
        "another --workdir"
      )
    return held


def _places(split: Split, kept: Sequence[QARow]) -> dict[str, list[int]]:
  """Digest of a row -> the numbers of its questions that were kept; of every row of the split."""
  left = list(kept)
  places: dict[str, list[int]] = {}
  for row, digest in zip(split.rows, split.digests, strict=True):
    if left and left[0].image == row.image and left[0].name == row.name and _part(left[0], row):
      places[digest] = _numbers(row.questions, left.pop(0).questions)
    else:
      places.setdefault(digest, [])
  assert not left, left[0].name
  return places


def _part(kept: QARow, row: QARow) -> bool:
  return not Counter(kept.questions) - Counter(row.questions)


def _numbers(all_of: Sequence[Any], some: Sequence[Any]) -> list[int]:
  """Where `some`, which stand in order in `all_of`, stand there."""
  found, start = [], 0
  for one in some:
    start = all_of.index(one, start) + 1
    found.append(start - 1)
  return found
