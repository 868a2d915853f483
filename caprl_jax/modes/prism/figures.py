"""Scores of Prism -> means with intervals, what a word carries, comparisons. Arrays are [rows,
captions]; a row is a question.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from caprl_jax.data.readers.benchmarks.row import CAPTIONQA, BenchmarkRow
from caprl_jax.modes.prism.evaluation import BLIND, Evaluation
from caprl_jax.modes.prism.scores import per_image
from caprl_jax.modes.prism.tradeoffs import facts_said, judged_said
from caprl_jax.scoring import intervals
from caprl_jax.scoring.captions import tradeoff
from caprl_jax.scoring.captions.words import words_of

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


def summarise(evaluation: Evaluation, cfg: Any, seed: int) -> dict[str, Any]:
  """All figures, by benchmark and captioner, and the average over benchmarks, which weighs them
  alike. cfg: as `section.PrismConfig`. seed: of the intervals."""
  names = list(evaluation.captions)
  result: dict[str, Any] = {
    "captioners": cfg.captioners,
    "answers": cfg.answers,
    "captions": cfg.captions,
    "level": cfg.intervals,
    "benchmarks": {name: _benchmark(evaluation, name, cfg, seed) for name in evaluation.rows},
  }
  result["average"] = {
    who: {
      key: float(
        np.mean([entry["captioners"][who][key] for entry in result["benchmarks"].values()])
      )
      for key in ("mean", "best", "length_words", "length_tokens")
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


def _benchmark(evaluation: Evaluation, benchmark: str, cfg: Any, seed: int) -> dict[str, Any]:
  """The figures of one benchmark."""
  rows, digests = evaluation.rows[benchmark], evaluation.digests[benchmark]
  scores = evaluation.scored[benchmark]
  entry: dict[str, Any] = {
    "questions": len(rows),
    "images": len(set(digests)),
    "captioners": {},
  }
  if evaluation.left_out.get(benchmark):
    entry["left_out"] = evaluation.left_out[benchmark]
  if evaluation.failed.get(benchmark):
    entry["failed"] = evaluation.failed[benchmark]
  blind = None
  if BLIND in scores:
    entry[BLIND] = {name: float(np.nanmean(found)) for name, found in scores[BLIND].items()}
    blind = per_image(scores[BLIND]["ours"], digests)
  compared: dict[str, dict[str, np.ndarray]] = {}  # of each captioner, values per image
  for who in evaluation.captions:
    values = {
      name: per_image(found, digests)
      for name, found in scores[who].items()
      if not np.isnan(found).any()
    }
    lengths = _lengths(evaluation, benchmark, who)
    figures = _one(scores[who], values["ours"], rows, cfg, seed)
    figures |= _told(evaluation, benchmark, who, values, cfg, seed)
    figures |= {f"length_{unit}": float(lengths[unit].mean()) for unit in ("words", "tokens")}
    figures |= {"cut": float(lengths["cut"].mean())}
    figures |= _per_length(values["ours"], blind, lengths, cfg, seed)
    compared[who] = values | {"words": lengths["words"]}
    first = next(iter(compared))
    if who != first:
      differences = {
        name: intervals.paired_difference(mine, compared[first][name], seed, cfg.intervals)
        for name, mine in compared[who].items()
        if name in compared[first]
      }
      figures["difference"] = differences.pop("ours")._asdict()
      figures["differences"] = {name: one._asdict() for name, one in differences.items()}
    entry["captioners"][who] = figures
  return entry


def _lengths(evaluation: Evaluation, benchmark: str, who: str) -> dict[str, np.ndarray]:
  """Words, tokens and the share that was cut, of each image; their means are those of all
  captions."""
  images = dict(zip(evaluation.shown[benchmark], evaluation.digests[benchmark], strict=True))
  order = {digest: place for place, digest in enumerate(dict.fromkeys(images.values()))}
  captions = [
    (order[digest], one) for key, digest in images.items() for one in evaluation.captions[who][key]
  ]
  places = [place for place, _ in captions]
  sums = lambda numbers: np.bincount(places, weights=numbers) * len(order) / len(captions)
  return {
    "words": sums([len(words_of(one["caption"])) for _, one in captions]),
    "tokens": sums([one["tokens"] for _, one in captions]),
    "cut": sums([one["finish"] == "length" for _, one in captions]),
  }


def _per_length(
  right_B: np.ndarray,
  blind_B: np.ndarray | None,
  lengths: Mapping[str, np.ndarray],
  cfg: Any,
  seed: int,
) -> dict[str, Any]:
  """What 100 words and 100 tokens carry: of right answers and, where it was asked without a caption
  too, of those beyond it. Empty for captions without a word."""
  figures = {}
  for unit in ("words", "tokens"):
    if not lengths[unit].any():
      continue
    for name, above_B in (
      ("accuracy", right_B),
      ("gain", None if blind_B is None else right_B - blind_B),
    ):
      if above_B is not None:
        low, high = intervals.ratio_interval(above_B, lengths[unit], seed, cfg.intervals)
        value = above_B.mean() / lengths[unit].mean()
        figures[f"{name}_per_100_{unit}"] = {
          "value": float(100 * value),
          "interval": [100 * low, 100 * high],
        }
  return figures


def _told(
  evaluation: Evaluation,
  benchmark: str,
  who: str,
  values: dict[str, np.ndarray],
  cfg: Any,
  seed: int,
) -> dict[str, Any]:
  """Right against wrong answers, and facts told against false statements where facts are known;
  these are added to `values`, per image."""
  found = {
    "judged": tradeoff.tradeoff(judged_said(evaluation, benchmark, who), seed, cfg.intervals)
  }
  said = facts_said(evaluation, benchmark, who)
  if said is not None:
    found["facts"] = tradeoff.tradeoff(said, seed, cfg.intervals)
    count = tradeoff.sums_by(np.ones_like(said.told), said.image)
    for name in ("told", "false"):
      values[f"facts_{name}"] = tradeoff.sums_by(getattr(said, name), said.image) / count
  return found


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
  names = sorted(set(kinds.tolist()))
  if len(names) > 1:
    figures["kinds"] = {kind: float(ours[kinds == kind].mean()) for kind in names}
    if rows[0].benchmark == CAPTIONQA:
      figures["captionqa_kinds"] = {
        kind: float(scores["captionqa"][kinds == kind].mean()) for kind in names
      }
  return figures
