"""Questions, the judge -> the questions that can teach: answered with a caption of the image, not
without.

CapRL's curation rule (arXiv 2509.22647, section 3; thresholds of its released code) in small: where
a dataset knows true captions, the judge itself is the filter. Informed presentations are true
captions of the image, blind ones are the empty caption and true captions of images that share no
fact with it: a question answered right from those needs no caption of this image.
"""

import collections
import dataclasses
import itertools
import logging
import zlib
from collections.abc import Sequence

import numpy as np

from caprl_jax.data.readers.conversations import check_kinds, of_kinds
from caprl_jax.data.rows import QARow, Question
from caprl_jax.inference.endpoint_judge import EndpointJudge
from caprl_jax.inference.judge import HostJudge

log = logging.getLogger("caprl_jax.harness.question_filter")

_TAKE_ALL = "; --config.question_filter.kinds='()' takes all"


@dataclasses.dataclass(frozen=True)
class QuestionFilterConfig:
  """Which questions can teach. A question is kept when the share of informed presentations
  answered right is above `min_informed` and that of blind ones (the empty caption and
  `mismatched` others) is below `max_blind`.

  kinds: of questions that are used; the others are left out, unasked. Empty: all.
  informed: templates of true captions with {fact} places; none: no question is asked, and all of
    these kinds are kept.
  mismatched: true captions of other images that count as blind.
  min_informed: least share answered right when informed, exclusive; CapRL's.
  max_blind: greatest share answered right when blind, exclusive; CapRL's.
  """

  kinds: tuple[str, ...] = ()
  informed: tuple[str, ...] = ()
  mismatched: int = 4
  min_informed: float = 0.75
  max_blind: float = 0.25


def mismatched_facts(
  row: QARow, pool: list[dict[str, str]], count: int, seed: int
) -> list[dict[str, str]]:
  """Up to `count` fact sets from `pool` that share no value with the row's, the same for the same
  facts.

  An empty value, such as the title of a chart without one, is nothing to share.
  """
  facts = _facts(row)
  own = {(key, value) for key, value in facts.items() if value}
  others = [other for other in pool if not own & set(other.items())]
  rng = np.random.default_rng([seed, *"".join(sorted(facts.values())).encode()])
  return [others[i] for i in rng.permutation(len(others))[:count]]


def fixed_subset(rows: Sequence[QARow], count: int, seed: int) -> list[QARow]:
  """The rows with at most `count` of their questions each, drawn once: the same for a seed, the
  row's name and its questions, whatever the other rows are."""
  kept = []
  for row in rows:
    rng = np.random.default_rng([seed, zlib.crc32(row.name.encode("utf-8", "surrogateescape"))])
    places = sorted(rng.permutation(len(row.questions))[:count].tolist())
    kept.append(dataclasses.replace(row, questions=tuple(row.questions[i] for i in places)))
  return kept


def _facts(row: QARow) -> dict[str, str]:
  assert row.facts is not None, row.name  # `_knows` lets only rows with facts pass
  return row.facts


def filter_questions(
  splits: Sequence[tuple[str, list[QARow]]],
  host_judge: HostJudge | EndpointJudge | None,
  cfg: QuestionFilterConfig,
  seed: int,
) -> list[tuple[list[QARow], dict[str, int]]]:
  """Applies the rule to all splits at once, which asks what they share only once.

  Args:
    splits: (where the rows come from, for messages; the rows).
    host_judge: None only where nothing is asked.

  Returns:
    Per split: the rows with the questions kept (rows without any are left out),
    and counts `kept/<kind>`, `dropped/<kind>`, `left out/<kind>`.

  Raises:
    ValueError: nothing is left of a split; a kind that no row has.
  """
  all_rows = [row for _, rows in splits for row in rows]
  check_kinds(all_rows, cfg.kinds, "question_filter.kinds", _TAKE_ALL)
  left_out = [_left_out(rows, cfg.kinds) for _, rows in splits]
  for (where, rows), counts in zip(splits, left_out, strict=True):
    if rows and cfg.kinds and sum(counts.values()) == sum(len(row.questions) for row in rows):
      raise ValueError(f"{where}: no question is of question_filter.kinds = {cfg.kinds}{_TAKE_ALL}")
  splits = [(where, of_kinds(rows, cfg.kinds or None)) for where, rows in splits]
  if not cfg.informed:
    return [(rows, counts) for (_, rows), counts in zip(splits, left_out, strict=True)]
  assert host_judge is not None, "checked with the settings"
  known = [
    [(row, q) for row in rows for q in row.questions if _knows(row, cfg)] for _, rows in splits
  ]
  alive = _judge(list(itertools.chain(*known)), host_judge, cfg, seed)
  ends = np.cumsum([len(pairs) for pairs in known])[:-1]
  return [
    _collect(rows, pairs, kept, where, counts)
    for (where, rows), pairs, kept, counts in zip(
      splits, known, np.split(alive, ends), left_out, strict=True
    )
  ]


def _left_out(rows: Sequence[QARow], kinds: Sequence[str]) -> dict[str, int]:
  """How many questions are of other kinds, `left out/<kind>`."""
  asked = [question for row in rows for question in row.questions] if kinds else []
  return dict(
    collections.Counter(f"left out/{q.kind or 'question'}" for q in asked if q.kind not in kinds)
  )


def _judge(
  pairs: list[tuple[QARow, Question]],
  host_judge: HostJudge | EndpointJudge,
  cfg: QuestionFilterConfig,
  seed: int,
) -> np.ndarray:
  """Which questions pass, bool [len(pairs)]. What has failed too often to pass is not asked again,
  nor is what an endpoint does not answer.
  """
  pool = [dict(items) for items in sorted({tuple(sorted(_facts(row).items())) for row, _ in pairs})]
  alive = np.ones(len(pairs), bool)
  right, hits = np.zeros(len(pairs)), np.zeros(len(pairs))

  def inform(number: int, template: str) -> None:
    live = np.flatnonzero(alive)
    asks = [(template.format(**_facts(pairs[i][0])), pairs[i][1]) for i in live]
    right[live] += host_judge.correct(asks, "informed")
    alive[live] &= host_judge.answered(asks)
    alive[:] &= 1 - (number - right) / len(cfg.informed) > cfg.min_informed

  # The blind presentations mostly repeat captions of the first template, which the judge remembers,
  # and drop much: they come before the other templates.
  inform(1, cfg.informed[0])
  others = [mismatched_facts(row, pool, cfg.mismatched, seed) for row, _ in pairs]
  total = np.array([1 + len(facts) for facts in others])
  for number in range(1 + cfg.mismatched):
    live = np.flatnonzero(alive & (number < total))
    asks = [
      ("" if number == 0 else cfg.informed[0].format(**others[i][number - 1]), pairs[i][1])
      for i in live
    ]
    hits[live] += host_judge.correct(asks, "blind")
    alive[live] &= host_judge.answered(asks)
    alive &= hits / total < cfg.max_blind
  for number, template in enumerate(cfg.informed[1:], 2):
    inform(number, template)
  return alive


def _knows(row: QARow, cfg: QuestionFilterConfig) -> bool:
  try:
    for template in cfg.informed:
      template.format(**(row.facts or {}))
  except KeyError:
    return False
  return True


def _collect(
  rows: list[QARow],
  pairs: list[tuple[QARow, Question]],
  alive: np.ndarray,
  where: str,
  left_out: dict[str, int],
) -> tuple[list[QARow], dict[str, int]]:
  kept: dict[int, list[Question]] = {}  # by row: two may have one name
  counts = dict(left_out)
  for (row, question), keep in zip(pairs, alive):
    kind = question.kind or "question"
    for verdict in ("kept", "dropped"):
      counts.setdefault(f"{verdict}/{kind}", 0)
    counts[f"{'kept' if keep else 'dropped'}/{kind}"] += 1
    if keep:
      kept.setdefault(id(row), []).append(question)
  unknown = sum(len(r.questions) for r in rows) - len(pairs)
  if unknown:
    counts["dropped/without facts"] = unknown
  if not kept:
    raise ValueError(
      f"{where}: the question filter left none of {len(pairs)} questions: the judge answers "
      "none of them from a true caption and fails it without one. Counts: "
      f"{counts}. Use a stronger judge (judge.source), another judge.reading, or "
      "other question_filter thresholds"
    )
  rows = [
    dataclasses.replace(row, questions=tuple(kept[id(row)])) for row in rows if id(row) in kept
  ]
  log.info(
    "%s: %d images kept, %s",
    where,
    len(rows),
    ", ".join(f"{k} {v}" for k, v in sorted(counts.items())),
  )
  return rows, counts
