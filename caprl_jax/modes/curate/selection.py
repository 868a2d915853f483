"""Answered questions -> those to keep, and a funnel of what fell out where and why."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from caprl_jax.data.readers.jsonl import parse_question
from caprl_jax.data.rows import QARow, Question
from caprl_jax.harness.row_shards import RowResult
from caprl_jax.inference.vqa import VqaAnswer
from caprl_jax.modes.curate import generated
from caprl_jax.modes.curate.section import CurateConfig


@dataclasses.dataclass
class Selected:
  """What is left of one image, and what is not: (question, verdict or None, reason)."""

  row: QARow
  kept: list[tuple[Question, VqaAnswer]]
  dropped: list[tuple[Question, VqaAnswer | None, str]]


def select(item: RowResult[QARow], cfg: CurateConfig) -> Selected:
  """Applies the thresholds to one image's questions, then leaves out those that ask what one kept
  asks.
  """
  kept: list[tuple[Question, VqaAnswer]] = []
  dropped: list[tuple[Question, VqaAnswer | None, str]] = []
  row = item.source
  questions = [
    parse_question(q, f"{row.name}: question {i}") for i, q in enumerate(item.row["questions"])
  ]
  if item.row["error"]:
    dropped += [(question, None, "not asked") for question in questions]
    questions = []
  R = cfg.answers.permutations
  for question, found in zip(
    questions, [VqaAnswer(**v) for v in item.row["verdicts"]], strict=True
  ):
    if found.error:
      dropped.append((question, found, "not asked"))
    elif cfg.min_visual is not None and found.visual <= cfg.min_visual:
      dropped.append((question, found, "not answered with the image"))
    elif cfg.max_blind is not None and found.blind >= cfg.max_blind:
      dropped.append((question, found, "answered without the image"))
    else:
      shares = f"visual {round(found.visual * R)}/{R}, blind {round(found.blind * R)}/{R}"
      kept.append(
        (
          dataclasses.replace(question, provenance=f"{question.provenance}; {shares}".lstrip("; ")),
          found,
        )
      )
  if cfg.similar_questions is not None:
    stay, similar_ones = generated.drop_similar_questions(
      [question for question, _ in kept], cfg.similar_questions
    )
    verdicts = {question: found for question, found in kept}
    dropped += [(question, verdicts[question], "asks nearly the same") for question in similar_ones]
    kept = [(question, verdicts[question]) for question in stay]
  left = tuple(question for question, _ in kept)
  return Selected(QARow(row.image, left, row.name, row.facts), kept, dropped)


def funnel(
  images: int, gone: Counter, items: Iterable[tuple[RowResult, Selected]], kept_images: int
) -> dict[str, Any]:
  """What came in, what fell out at which stage and why, what is left; counts of images, then of
  questions.
  """
  reasons, failures, grid = Counter(), Counter(), Counter()
  asked = parsed = kept = rows = replies = 0
  for item, selected in items:
    replies += not any(failure["reason"] == "no reply" for failure in item.row["failures"])
    failures.update(_class(failure["reason"]) for failure in item.row["failures"])
    parsed += len(item.row["questions"])
    reasons.update(reason for _, _, reason in selected.dropped)
    kept += len(selected.kept)
    rows += bool(selected.kept)
    for found in item.row["verdicts"]:
      if not found["error"]:
        asked += 1
        grid[f"{found['visual']:.2f}/{found['blind']:.2f}"] += 1
  return {
    "images": {
      "found": images,
      "left out": dict(gone),
      "kept": kept_images,
      "with a reply": replies,
      "with questions kept": rows,
    },
    "questions": {
      "not parsed": dict(failures.most_common()),
      "parsed": parsed,
      "asked": asked,
      "dropped": dict(reasons.most_common()),
      "kept": kept,
    },
    "visual/blind": dict(sorted(grid.items())),
  }


def _class(reason: str) -> str:
  """A failure's reason without what is particular to it."""
  return reason.partition(": ")[0].partition(" '")[0].partition(' "')[0][:80]


def funnel_text(figures: dict[str, Any]) -> str:
  """The funnel, as the log has it."""
  images, questions = figures["images"], figures["questions"]
  lines = [f"images      {images['found']:,} found"]
  lines += [f"              - {count:,} {reason}" for reason, count in images["left out"].items()]
  lines += [
    f"            {images['kept']:,} kept, {images['with a reply']:,} with a reply",
    f"questions   {questions['parsed']:,} parsed",
  ]
  lines += [
    f"              ({count:,} not: {reason})" for reason, count in questions["not parsed"].items()
  ]
  lines += [f"              - {count:,} {reason}" for reason, count in questions["dropped"].items()]
  lines += [f"            {questions['kept']:,} kept, of {images['with questions kept']:,} images"]
  return "\n".join(lines)
