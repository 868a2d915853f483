"""Questions, their answers -> scores. Arrays are [rows, captions]; a row is a question."""

import re
import string
from collections.abc import Sequence

import numpy as np

from caprl_jax.data.readers.benchmarks.row import CAPTIONQA, QUESTIONS, BenchmarkRow
from caprl_jax.scoring import answers as scoring
from caprl_jax.scoring import captionqa, extraction
from caprl_jax.scoring.captionqa import ShownOptions, captionqa_score, chosen_option
from caprl_jax.scoring.mathematics import has_math_verify
from caprl_jax.scoring.official import official_score


def score_answers(rows: Sequence[BenchmarkRow], answers: np.ndarray) -> dict[str, np.ndarray]:
  """Scores of written texts (object arrays) or read options (int arrays), each [rows, captions],
  float:

    ours       0..1 by the benchmark's metric
    official   as the benchmark's released scorer has it: CapRL's (only for texts about the
               release's files, as it wants an <answer> that plain questions do not ask for, and
               where math-verify is installed), or CaptionQA's
    abstained  no answer: the judge abstained, none could be read in the text, or it says that
               there is none
    misled     a wrong answer was given
    captionqa  1 for a right answer, 1 / options + 0.05 for none, 0 for a wrong one; of CaptionQA's
               own questions as its authors read and score texts. NaN where there are no options,
               and not there where no row has any
  """
  written = answers.dtype == object
  ours = [
    [_ours(row, answer) for answer in given] for row, given in zip(rows, answers, strict=True)
  ]
  made = {"ours": np.array(ours, np.float64)[..., 0], "abstained": np.array(ours, float)[..., 1]}
  if written and all(map(_has_official, rows)):
    made["official"] = np.array(
      [[_official(row, answer) for answer in given] for row, given in zip(rows, answers)], float
    )
  made["misled"] = (1 - made["ours"]) * (1 - made["abstained"])
  if any(row.options for row in rows):
    made["captionqa"] = np.array(
      [
        [_captionqa(row, answer, *one) for answer, one in zip(given, pair)]
        for row, given, pair in zip(rows, answers, ours)
      ],
      np.float64,
    )
  return made


def _ours(row: BenchmarkRow, answer: str | int) -> tuple[float, float]:
  """Our score of an answer, and 1 where it is none."""
  cannot = None if row.cannot is None else string.ascii_uppercase[row.cannot]
  if not isinstance(answer, str):
    letter = string.ascii_uppercase[answer] if answer >= 0 else None
    right = letter is not None and letter == str(row.gold).strip()
    return float(right), float(letter in (None, cannot))
  read = extraction.extract_answer(answer, _options_asked(row), "ours")
  value = scoring.score(read, row.gold, row.benchmark, row.options, row.years).value
  none = read is None or extraction.refuses(read)
  if cannot is not None and not none:
    none = scoring.score(read, cannot, row.benchmark, row.options).value == 1
  return value, float(not value and none)


def _has_official(row: BenchmarkRow) -> bool:
  return row.benchmark == CAPTIONQA or (row.benchmark != QUESTIONS and has_math_verify())


def _official(row: BenchmarkRow, answer: str) -> float:
  if row.benchmark == CAPTIONQA:
    return float(chosen_option(answer, len(row.options)) == _shown(row).gold)
  read = extraction.extract_answer(answer, len(row.options) or None, "official")
  return official_score(read, row.gold, row.benchmark)


def _captionqa(row: BenchmarkRow, answer: str | int, ours: float, abstained: float) -> float:
  if not row.options:
    return float("nan")
  if row.benchmark != CAPTIONQA:
    return ours + abstained * min(1 / len(row.options) + captionqa.CREDIT, 1.0)
  if isinstance(answer, str):
    return captionqa_score(chosen_option(answer, len(row.options)), _shown(row))
  # A reading judge abstains in ways of its own; where the benchmark offers no such answer, it is
  # worth nothing.
  return captionqa_score(row.cannot if abstained else int(answer), _shown(row))


def _shown(row: BenchmarkRow) -> ShownOptions:
  gold = string.ascii_uppercase.index(str(row.gold))
  return ShownOptions(row.options, gold, row.cannot)


def _options_asked(row: BenchmarkRow) -> int | None:
  """How many letters an answer may be; a letter for a gold without listed options is one of eight,
  as where the image shows them."""
  if row.options or scoring.METRICS[row.benchmark] not in ("multiple_choice", "maths"):
    return len(row.options) or None
  gold = row.gold.strip() if isinstance(row.gold, str) else ""
  return (8 if gold <= "H" else 26) if re.fullmatch(r"[A-Z]", gold) else None


def per_image(scores: np.ndarray, digests: Sequence[str]) -> np.ndarray:
  """Scores [rows, captions] -> one value per image; the mean of these is the mean over all rows and
  captions."""
  order = {digest: i for i, digest in enumerate(dict.fromkeys(digests))}
  sums = np.bincount(
    [order[digest] for digest in digests], weights=scores.mean(1), minlength=len(order)
  )
  return sums * len(order) / len(digests)
