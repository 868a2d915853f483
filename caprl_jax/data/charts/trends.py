"""Numbers of a chart -> their mean, and whether they rise or fall."""

import decimal
from collections.abc import Iterable, Sequence

import numpy as np

from caprl_jax.data.charts import drawing as chart_drawing

Decimal = decimal.Decimal


def mean(values: Sequence[Decimal]) -> Decimal:
  return sum(values) / len(values)


def rank_correlation(x: Iterable, y: Iterable) -> float:
  return _correlation(
    *([sum(b < a for b in v) + sum(b == a for b in v) / 2 for a in v] for v in (list(x), list(y)))
  )


def _correlation(x: Iterable, y: Iterable) -> float:
  x, y = [np.asarray(list(map(float, v))) - np.mean(list(map(float, v))) for v in (x, y)]
  norm = float(np.sqrt((x @ x) * (y @ y)))
  return float(x @ y) / norm if norm else 0.0


def tendency(marks: tuple[chart_drawing.Mark, ...]) -> str:
  """Whether y rises or falls with x over all points, "" when that is a matter of taste.

  Values and ranks must agree: one far point or a bend is no trend.
  """
  x, y = (
    [value for mark in marks for value in mark.x],
    [value for mark in marks for value in mark.y],
  )
  both = (_correlation(x, y), rank_correlation(x, y))
  if min(map(abs, both)) >= 0.7:
    return "rises" if both[0] > 0 else "falls"
  return "shows no clear trend" if max(map(abs, both)) <= 0.2 else ""
