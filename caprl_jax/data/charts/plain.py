"""Slices of plain charts -> questions and descriptions in words of their own: what colours say."""

import numpy as np

from caprl_jax.data.charts import drawing as chart_drawing
from caprl_jax.data.charts.questions import CHART_TYPES, MAX_QUESTIONS, Asked, counts, mixed
from caprl_jax.data.charts.trends import mean, tendency
from caprl_jax.data.charts.views import Slice

# by kind: the noun, what the most and the least of them are called, and the question word's verb
_PLAIN = {
  "bar": ("bar", "tallest", "shortest", "taller"),
  "pie": ("slice", "largest", "smallest", "larger"),
  "line": ("line", "highest at the end", "lowest at the end", "higher at the end"),
  "scatter": ("color", "highest", "lowest", "higher"),
}


def _plain_ranked(found: Slice) -> list[chart_drawing.Mark]:
  value = {"line": lambda mark: mark.y[-1], "scatter": lambda mark: mean(mark.y)}
  return sorted(
    found.chart.marks, key=value.get(found.chart.kind, lambda mark: mark.y[0]), reverse=True
  )


def plain_direction(found: Slice, mark: chart_drawing.Mark) -> str:
  """ "rises" or "falls"; "" or "shows no clear trend" for points that do neither."""
  if found.chart.kind == "scatter":
    return tendency((mark,))
  return "rises" if mark.y[-1] > mark.y[0] else "falls"


def plain_questions(found: Slice, generator: np.random.Generator) -> list[Asked]:
  """Of colours, counts and directions; nothing that a text would say."""
  kind = found.chart.kind
  noun, most, least, more = _PLAIN[kind]
  ranked = _plain_ranked(found)
  shown = [mark.color for mark in ranked]
  spare = mixed(sorted(set(chart_drawing.PLAIN_COLORS) - set(shown)), generator)
  asked = [
    (
      "chart/type",
      "what kind of chart is this?",
      CHART_TYPES[kind],
      [t for t in CHART_TYPES.values() if t != CHART_TYPES[kind]],
    ),
    ("count", f"how many {noun}s are there?", *counts(len(ranked), 1, generator)),
  ]
  if len(ranked) > 1:
    for word, order in ((most, shown), (least, shown[::-1])):
      asked.append(("extreme", f"which {noun} is {word}?", order[0], order[1:] + spare))
    first, second = sorted(generator.permutation(len(ranked))[:2])
    pair = mixed([shown[first], shown[second]], generator)
    asked.append(
      ("compare", f"which is {more}, {pair[0]} or {pair[1]}?", shown[first], [shown[second]])
    )
  else:
    asked.append(
      (
        "color",
        f"what color {'are the dots' if kind == 'scatter' else 'is the line'}?",
        shown[0],
        spare,
      )
    )
  if kind == "line" or len(ranked) == 1:
    mark = ranked[generator.integers(len(ranked))]
    goes = plain_direction(found, mark)
    what = f"does the {mark.color} line" if kind == "line" else "do the dots"
    asked.append(
      ("trend", f"{what} rise or fall?", goes, ["falls" if goes == "rises" else "rises"])
    )
  if len(asked) > MAX_QUESTIONS:  # several lines: drop one of the two extremes
    asked.pop(int(generator.integers(2, 4)))
  return asked


def plain_description(found: Slice) -> str:
  """Few and always the same words."""
  kind = found.chart.kind
  noun, most, least, _ = _PLAIN[kind]
  ranked = _plain_ranked(found)
  shown = [mark.color for mark in ranked]
  said = [f"{CHART_TYPES[kind]} with {len(ranked)} {noun}{'s' if len(ranked) > 1 else ''}"]
  if len(ranked) == 1:
    return f"{said[0]}: {shown[0]}. {shown[0]} {plain_direction(found, ranked[0])}."
  said.append(f"from {most} to {least}: {', '.join(shown)}")
  said += [f"{mark.color} {plain_direction(found, mark)}" for mark in ranked if kind == "line"]
  return ". ".join([*said, f"{shown[0]} is {most}", f"{shown[-1]} is {least}"]) + "."
