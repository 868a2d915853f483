"""Answered questions -> rows in the form of the released curation's third step.

A row is [sample, with the image, without it]: the sample as the release's curation writes it,
{"image_path", "qa_list"}, its questions with a last option "Can not answer based on the caption",
which the release takes away before it asks; and two flat lists with a number for each time that a
question was shown, 1 where the answer was right and 0 where it was not, the first question's before
the second's. By these its fourth step keeps a question or drops it.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from caprl_jax.atomic_files import write_text
from caprl_jax.data.readers.caprl_json import question_pair
from caprl_jax.data.readers.jsonl import parse_question
from caprl_jax.data.rows import QARow
from caprl_jax.harness.row_shards import RowResult

# Options of a question -> the line behind them. It knows the letters E and F only.
RELEASED_ABSTAIN = {
  4: "\n   - E) Can not answer based on the caption",
  5: "\n   - F) Can not answer based on the caption",
}


def released_row(item: RowResult[QARow], times: int) -> list[Any] | None:
  """One image's row; None where none of its questions was asked.

  Args:
    item: of the stage of answers.
    times: that each question was shown, with the image and without.

  Raises:
    ValueError: the stage was made before it kept single answers.
  """
  asked, visual, blind = [], [], []
  # there is no verdict where the image could not be read
  for i, (said, verdict) in enumerate(zip(item.row["questions"], item.row["verdicts"])):
    if verdict["error"]:
      continue
    seen, unseen = verdict.get("visual_right", ()), verdict.get("blind_right", ())
    if not len(seen) == len(unseen) == times:
      raise ValueError(
        f"row {item.source.name!r}: its answers were made by an older version, which kept only "
        "shares; delete the folder stages/3_answers of the workdir to ask again"
      )
    question = parse_question(said, f"{item.source.name}: question {i}")
    text, letter = question_pair(question)
    if len(question.options) in RELEASED_ABSTAIN:
      text += RELEASED_ABSTAIN[len(question.options)]
    asked.append({"question": text, "answer": letter})
    visual += seen
    blind += unseen
  if not asked:
    return None
  image = item.source.image
  path = image.as_posix() if isinstance(image, pathlib.Path) else item.source.name
  return [{"image_path": path, "qa_list": asked}, visual, blind]


def write_released_rows(path: pathlib.Path, items: Iterable[RowResult[QARow]], times: int) -> int:
  """Writes the rows, a line each for a .jsonl and else as one list; returns how many there are.
  Raises ValueError as `released_row`."""
  rows = [row for item in items if (row := released_row(item, times)) is not None]
  lines = [json.dumps(row, ensure_ascii=False) for row in rows]
  text = "\n".join(lines) if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]"
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, text + "\n")
  return len(rows)
