"""Answers of Prism -> scores, means with intervals, comparisons. Arrays are [rows, captions]; a row
is a question.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from caprl_jax.atomic_files import write_text
from caprl_jax.data.readers.benchmarks.row import QUESTIONS, BenchmarkRow
from caprl_jax.data.rows import CaptionRow
from caprl_jax.scoring import answers as scoring
from caprl_jax.scoring import extraction, intervals
from caprl_jax.scoring.mathematics import has_math_verify
from caprl_jax.scoring.official import official_score

BLIND = "blind"
# CaptionQA (arXiv 2511.21025, section 3.4): "cannot answer" earns this over guessing among the
# options
ABSTAIN_CREDIT = 0.05
# Those of arXiv 2509.22647, table 3, whose average the paper reports; VisuLogic is not among them.
PAPER_BENCHMARKS = (
  "ChartQA",
  "ChartQAPro",
  "InfoVQA",
  "MMMU-Pro",
  "MathVerse",
  "CharXiv",
  "WeMath",
  "MathVision",
  "MMStar",
  "SEED",
  "MMMU",
)


def score_answers(rows: Sequence[BenchmarkRow], answers: np.ndarray) -> dict[str, np.ndarray]:
  """Scores of written texts (object arrays) or read options (int arrays), each [rows, captions],
  float:

    ours       0..1 by the benchmark's metric
    official   as the released scorer has it; only for texts about the release's files (it wants an
               <answer> that plain questions do not ask for), and where math-verify is installed
    abstained  no answer: the judge abstained, none could be read in the text, or it says that
               there is none
    misled     a wrong answer was given
    captionqa  1 for a right answer, 1 / options + 0.05 for none, 0 for a wrong one; NaN where there
               are no options, and not there where no row has any
  """
  found: dict[str, list[list[float]]] = {name: [] for name in ("ours", "abstained", "official")}
  written = answers.dtype == object
  official = written and has_math_verify() and all(row.benchmark != QUESTIONS for row in rows)
  for row, given in zip(rows, answers, strict=True):
    ours, none, theirs = [], [], []
    for answer in given:
      if written:
        read = extraction.extract_answer(answer, _options_asked(row), "ours")
        ours.append(scoring.score(read, row.gold, row.benchmark, row.options, row.years).value)
        none.append(float(not ours[-1] and (read is None or extraction.refuses(read))))
        if official:
          theirs.append(
            official_score(
              extraction.extract_answer(answer, len(row.options) or None, "official"),
              row.gold,
              row.benchmark,
            )
          )
      else:
        ours.append(float(answer >= 0 and "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[answer] == row.gold.strip()))
        none.append(float(answer < 0))
    found["ours"].append(ours), found["abstained"].append(none)
    if official:
      found["official"].append(theirs)
  made = {name: np.array(values, np.float64) for name, values in found.items() if values}
  made["misled"] = (1 - made["ours"]) * (1 - made["abstained"])
  if any(row.options for row in rows):
    credit = np.array(
      [1 / len(row.options) + ABSTAIN_CREDIT if row.options else np.nan for row in rows]
    )[:, None]
    # NaN times 0 is NaN
    made["captionqa"] = made["ours"] + made["abstained"] * np.minimum(credit, 1.0)
  return made


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


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What was asked, from which captions, and what was answered.

  rows: benchmark -> its questions. digests: benchmark -> the hash of each question's image.
  shown: benchmark -> the key of what each question's captions were written of.
  images: such a key -> image.
  captions: captioner -> key -> what it wrote, each with caption, tokens, finish.
  answered: benchmark -> captioner, and `BLIND` for no caption -> texts, or options as read
    [rows, captions].
  left_out: benchmark -> its questions that could not be asked.
  """

  rows: Mapping[str, Sequence[BenchmarkRow]]
  digests: Mapping[str, Sequence[str]]
  shown: Mapping[str, Sequence[str]]
  images: Mapping[str, CaptionRow]
  captions: Mapping[str, Mapping[str, list]]
  answered: Mapping[str, Mapping[str, np.ndarray]]
  left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

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


def summarise(evaluation: Evaluation, cfg: Any, seed: int) -> dict[str, Any]:
  """All figures, by benchmark and captioner, and the average over benchmarks, which weighs them
  alike. cfg: as `section.PrismConfig`. seed: of the intervals."""
  captions, digests = evaluation.captions, evaluation.digests
  names, first = list(captions), next(iter(captions))
  result: dict[str, Any] = {
    "captioners": cfg.captioners,
    "answers": cfg.answers,
    "captions": cfg.captions,
    "level": cfg.intervals,
    "benchmarks": {},
  }
  for benchmark, rows in evaluation.rows.items():
    scores = evaluation.scored[benchmark]
    values = {who: per_image(found["ours"], digests[benchmark]) for who, found in scores.items()}
    entry: dict[str, Any] = {
      "questions": len(rows),
      "images": len(set(digests[benchmark])),
      "captioners": {},
    }
    if evaluation.left_out.get(benchmark):
      entry["left_out"] = evaluation.left_out[benchmark]
    if BLIND in scores:
      entry[BLIND] = {name: float(np.nanmean(found)) for name, found in scores[BLIND].items()}
    for who in names:
      figures = _one(scores[who], values[who], rows, cfg, seed)
      keys = dict.fromkeys(evaluation.shown[benchmark])
      texts = [one for key in keys for one in captions[who][key]]
      figures |= {
        "length_tokens": float(np.mean([one["tokens"] for one in texts])),
        "cut": float(np.mean([one["finish"] == "length" for one in texts])),
      }
      if who != first:
        figures["difference"] = intervals.paired_difference(
          values[who], values[first], seed, cfg.intervals
        )._asdict()
      entry["captioners"][who] = figures
    result["benchmarks"][benchmark] = entry
  result["average"] = {
    who: {
      key: float(
        np.mean([entry["captioners"][who][key] for entry in result["benchmarks"].values()])
      )
      for key in ("mean", "best", "length_tokens")
    }
    | official_average(
      {
        evaluation.rows[name][0].benchmark: entry["captioners"][who].get("official")
        for name, entry in result["benchmarks"].items()
      }
    )
    for who in names
  }
  return result


def official_average(
  by_benchmark: Mapping[str, Mapping[str, float] | None],
) -> dict[str, dict[str, float]]:
  """The released scorer's mean and best by benchmark -> {"official": their averages over those of
  `PAPER_BENCHMARKS` that were asked, and how many these are}; empty for none."""
  found = [by_benchmark[name] for name in PAPER_BENCHMARKS if by_benchmark.get(name)]
  if not found:
    return {}
  averages = {key: float(np.mean([one[key] for one in found if one])) for key in ("mean", "best")}
  return {"official": averages | {"benchmarks": len(found)}}


def _mean_and_best(scores: np.ndarray) -> dict[str, float]:
  return dict(zip(("mean", "best"), intervals.mean_and_best(scores), strict=True))


def _one(
  scores: Mapping[str, np.ndarray],
  values: np.ndarray,
  rows: Sequence[BenchmarkRow],
  cfg: Any,
  seed: int,
) -> dict[str, Any]:
  ours = scores["ours"]
  figures: dict[str, Any] = {
    **_mean_and_best(ours),
    "interval": list(intervals.bootstrap_interval(values, seed, cfg.intervals)),
  }
  figures |= {
    name: float(np.nanmean(scores[name]))
    for name in ("abstained", "misled", "captionqa")
    if name in scores
  }
  if "official" in scores:
    figures["official"] = _mean_and_best(scores["official"])
  kinds = np.array([row.kind for row in rows])
  if len(set(kinds.tolist())) > 1:
    figures["kinds"] = {
      kind: float(ours[kinds == kind].mean()) for kind in sorted(set(kinds.tolist()))
    }
  return figures


def difference_text(versus: Mapping[str, float]) -> str:
  """A paired difference with its interval, in percent, and how likely chance makes one as large."""
  p = f"p = {versus['p']:.3f}" if versus["p"] >= 0.001 else "p < 0.001"
  return (
    f"{100 * versus['mean']:+.1f} [{100 * versus['low']:+.1f}, {100 * versus['high']:+.1f}], {p}"
  )


def official_text(one: Mapping[str, Any], share: Callable[[float | None], str]) -> str:
  """The released scorer's mean and best."""
  return (
    f"{share(one['official']['mean'])} / {share(one['official']['best'])}"
    if "official" in one
    else share(None)
  )


def table_text(figures: Mapping[str, Any]) -> str:
  """The figures in percent, as the log has them."""
  lines = [
    f"{'benchmark':<14}{'captioner':<18}{'mean':>6}  "
    f"{'interval':<13}{'best':>6}{'official':>13}{'blind':>7}"
    f"{'misled':>8}{'CaptionQA':>11}{'tokens':>8}   against the first"
  ]
  share = lambda value: "-" if value is None else f"{100 * value:.1f}"
  for benchmark, entry in figures["benchmarks"].items():
    for who, one in entry["captioners"].items():
      low, high = one["interval"]
      versus = one.get("difference")
      difference = f"   {difference_text(versus)}" if versus else ""
      lines.append(
        f"{benchmark[:13]:<14}{who[:17]:<18}{share(one['mean']):>6}  "
        f"{f'[{share(low)}, {share(high)}]':<13}"
        f"{share(one['best']):>6}{official_text(one, share):>13}"
        f"{share(entry.get(BLIND, {}).get('ours')):>7}{share(one['misled']):>8}"
        f"{share(one.get('captionqa')):>11}{one['length_tokens']:>8.1f}{difference}"
      )
  if len(figures["benchmarks"]) > 1:
    lines += [
      f"{'average':<14}{who[:17]:<18}{share(one['mean']):>6}  "
      f"{'':<13}{share(one['best']):>6}"
      f"{official_text(one, share):>13}{'':>26}{one['length_tokens']:>8.1f}"
      for who, one in figures["average"].items()
    ]
  lines += [left_out_text(name, entry) for name, entry in figures["benchmarks"].items()]
  return "\n".join(filter(None, lines))


def left_out_text(benchmark: str, entry: Mapping[str, Any]) -> str:
  """How many questions a benchmark's figures leave out; empty for none."""
  left_out = entry.get("left_out", 0)
  asked = f"of {entry['questions'] + left_out} questions cannot be used"
  return f"{benchmark}: {left_out} {asked} and are left out" if left_out else ""


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
