"""Slices of views -> questions with their answers; `plain.py` has those of plain charts."""

import decimal
from collections.abc import Sequence

import numpy as np

from caprl_jax.data.charts import drawing as chart_drawing
from caprl_jax.data.charts.tables import CLOUDS, GRIDS
from caprl_jax.data.charts.trends import tendency
from caprl_jax.data.charts.views import Slice, View

MAX_OPTIONS = 4

CHART_TYPES = {
  "bar": "a bar chart",
  "line": "a line chart",
  "scatter": "a scatter plot",
  "pie": "a pie chart",
}
MAX_QUESTIONS = 5

Decimal = decimal.Decimal
Asked = tuple[str, str, str, list[str]]  # kind, stem, right answer, wrong answers


def questions(found: Slice, titles: list[str], generator: np.random.Generator) -> list[Asked]:
  """At most one of a kind; two or three of what the chart shows, the rest of what it is."""
  about_data = [
    asked
    for make in (_value, _extreme, _compare, _trend, _color)
    for asked in make(found, generator)
  ]
  gold = CHART_TYPES[found.chart.kind]
  about_chart = [
    (
      "chart/type",
      "What kind of chart is this?",
      gold,
      [other for other in CHART_TYPES.values() if other != gold],
    ),
    ("chart/title", "What is the title of the chart?", found.chart.title, titles),
    *_axes(found, generator),
    *_count(found, generator),
  ]
  chosen: list[Asked] = []
  for about, most in ((about_data, 3), (about_chart, MAX_QUESTIONS)):
    for i in generator.permutation(len(about)):
      if len(chosen) < most and about[i][0] not in [question[0] for question in chosen]:
        chosen.append(about[i])
  return chosen


def _value(found: Slice, generator: np.random.Generator) -> list[Asked]:
  if found.chart.kind == "scatter":
    values = sorted(value for mark in found.chart.marks for value in mark.y)
    return [
      ("value", f"What number labels the {word} point?", *_numbers(gold, values, generator))
      for word, gold in (("highest", values[-1]), ("lowest", values[0]))
    ]
  name, value, _ = found.items[generator.integers(len(found.items))]
  return [
    (
      "value",
      f"What is the {found.measure} {_of(found, name)}?",
      *_numbers(value, [value for _, value, _ in found.items], generator),
    )
  ]


def _extreme(found: Slice, generator: np.random.Generator) -> list[Asked]:
  """The wrong answers are the next in order."""
  asked = []
  scatter = found.chart.kind == "scatter"
  if len(found.items) < 2:
    return []
  for word, sign in (("highest", -1), ("lowest", 1)):
    ranked = sorted(found.items, key=lambda item, sign=sign: sign * item[1])
    if scatter and word == "lowest":
      continue
    stem = (
      f"Which {found.noun} has the highest point?"
      if scatter
      else f"Which {found.noun} has the {word} {found.measure}{found.at}?"
    )
    if ranked[0][1] != ranked[1][1]:
      asked.append(
        (
          "extreme",
          stem,
          ranked[0][0],
          [item[0] for item in ranked[1:]] + mixed(found.spare, generator),
        )
      )
  return asked


def _compare(found: Slice, generator: np.random.Generator) -> list[Asked]:
  """A difference of two, and of five or more the highest of four that are not the highest of
  all.
  """
  if found.chart.kind == "scatter":
    return []
  asked = []
  pairs = [(a, b) for a in found.items for b in found.items if a[1] > b[1]]
  if pairs:
    high, low = pairs[generator.integers(len(pairs))]
    stem = (
      f"By how much is the {found.measure} {_of(found, high[0])} higher than "
      f"{_of(found, low[0], short=True)}?"
    )
    asked.append(
      ("compare", stem, *_numbers(high[1] - low[1], [a[1] - b[1] for a, b in pairs], generator))
    )
  ranked = sorted(found.items, key=lambda item: -item[1])
  if len(ranked) > 4:
    four = [ranked[1:][i] for i in sorted(generator.permutation(len(ranked) - 1)[:4])]
    if four[0][1] > four[1][1]:
      asked.append(
        (
          "compare",
          f"Which of these has the highest {found.measure}{found.at}?",
          four[0][0],
          [item[0] for item in four[1:]],
        )
      )
  return asked


def _trend(found: Slice, generator: np.random.Generator) -> list[Asked]:
  chart = found.chart
  if chart.kind == "scatter":
    goes = tendency(chart.marks)
    options = ["it rises", "it falls", "it shows no clear trend"]
    stem = f'How does "{chart.y_label}" change as "{chart.x_label}" rises?'
    return (
      [("trend", stem, f"it {goes}", [o for o in options if o != f"it {goes}"])] if goes else []
    )
  if chart.kind != "line":
    return []
  mark = chart.marks[generator.integers(len(chart.marks))]
  change = mark.y[-1] - mark.y[0]
  if not change:
    return []
  gold, others = _numbers(
    abs(change), [abs(a - b) for m in chart.marks for a in m.y for b in m.y], generator
  )
  # Each amount with both directions, so that neither gives the other away.
  words = ("rises", "falls") if change > 0 else ("falls", "rises")
  options = [
    f"it {words[1]} by {gold}",
    f"it {words[0]} by {others[0]}",
    f"it {words[1]} by {others[0]}",
  ]
  name = f" of {mark.name}" if len(chart.marks) > 1 else ""
  return [
    (
      "trend",
      f"How does the {found.measure}{name} change from {mark.x[0]} to {mark.x[-1]}?",
      f"it {words[0]} by {gold}",
      options,
    )
  ]


def _color(found: Slice, generator: np.random.Generator) -> list[Asked]:
  marks = found.chart.marks
  shown = [mark.color for mark in marks]
  rest = mixed(sorted(set(chart_drawing.PALETTES[0]) - set(shown)), generator)
  if found.chart.legend:
    gold = marks[generator.integers(len(marks))]
    others = mixed([color for color in shown if color != gold.color], generator) + rest
    return [("legend", f"What color stands for {gold.name}?", gold.color, others)]
  if len(set(shown)) == 1:
    return [("color", f"What color {_plural(found)}?", shown[0], rest)]
  return []


def _plural(found: Slice) -> str:
  return {"bar": "are the bars", "line": "is the line", "scatter": "are the points"}[
    found.chart.kind
  ]


def _axes(found: Slice, generator: np.random.Generator) -> list[Asked]:
  chart = found.chart
  if chart.kind == "pie":
    return []
  labels = {grid.axis for grid in GRIDS} | {
    label for cloud in CLOUDS for label in (cloud.x, cloud.y)
  }
  asked = []
  for name, label, other in (
    ("x", chart.x_label, chart.y_label),
    ("y", chart.y_label, chart.x_label),
  ):
    if chart.kind == "scatter" or label == chart.y_label:
      if chart.horizontal:
        name = "x"
      others = [other] * (chart.kind == "scatter") + mixed(
        sorted(labels - {label, other}), generator
      )
      asked.append(("axis", f"What does the {name} axis show?", label, others))
  return asked


def _count(found: Slice, generator: np.random.Generator) -> list[Asked]:
  chart, values = found.chart, sorted(value for _, value, _ in found.items)
  if chart.kind == "scatter" and len(chart.marks) == 1:
    return [("count", "How many points are there?", *counts(len(chart.marks[0].y), 1, generator))]
  one_line = chart.kind == "line" and len(chart.marks) == 1
  what = {
    "scatter": "groups of points are in the legend",
    "pie": "slices does the pie have",
    "bar": "bars are there",
    "line": "points does the line have" if one_line else "lines are there",
  }[chart.kind]
  size = len(chart.marks[0].y) if one_line else len(chart.marks)
  asked = [("count", f"How many {what}?", *counts(size, 1, generator))]
  if chart.kind == "bar" or one_line:
    place = int(generator.integers(1, len(values)))
    if values[place - 1] < values[place]:
      limit = f"{values[place - 1]:,}"
      asked.append(
        (
          "count",
          f"How many {'points' if one_line else 'bars'} are above {limit}?",
          *counts(len(values) - place, 0, generator),
        )
      )
  return asked


def _of(found: Slice, name: str, short: bool = False) -> str:
  """How a question says whose value it means."""
  if found.view.shape == "along":
    return f"{'at' if found.view.source.column == 'hour' else 'in'} {name}"
  return f"for {name}" + ("" if short else found.at)


def _numbers(
  gold: Decimal, shown: list[Decimal], generator: np.random.Generator
) -> tuple[str, list[str]]:
  """The right number and three wrong ones: two of the chart (or like them) and one a few last
  digits off.

  That one stands by the right number in half of the questions and by one of the others in the rest,
  so that a pair of near numbers says nothing about which is right.
  """
  step = Decimal(1).scaleb(gold.as_tuple().exponent)
  others = mixed(sorted({value for value in shown if value != gold}), generator)[:2]
  taken = [gold, *others]
  while len(taken) < 3:
    off = max(
      abs(gold) * Decimal(f"{generator.uniform(0.1, 0.6):.3f}"),
      step * int(generator.integers(1, 20)),
    )
    value = (gold + off * int(generator.choice([-1, 1]))).quantize(step)
    if value not in taken and (value >= 0 or gold < 0):
      taken.append(value)
  base = taken[0] if generator.random() < 0.5 else taken[1 + int(generator.integers(2))]
  while len(taken) < 4:
    value = base + step * int(generator.integers(1, 10)) * int(generator.choice([-1, 1]))
    if value not in taken and (value >= 0 or base < 0):
      taken.append(value)
  texts = [f"{value:,}" for value in taken]
  return texts[0], mixed(texts[1:], generator)


def counts(gold: int, least: int, generator: np.random.Generator) -> tuple[str, list[str]]:
  """Four numbers in a row, the right one at any place."""
  first = max(least, gold - int(generator.integers(MAX_OPTIONS)))
  return str(gold), [str(n) for n in range(first, first + MAX_OPTIONS) if n != gold]


def mixed(names: Sequence, generator: np.random.Generator) -> list:
  return [names[i] for i in generator.permutation(len(names))]


def other_titles(
  view: View, titles: dict[str, set[str]], generator: np.random.Generator
) -> list[str]:
  """Titles of the same wording first."""
  alike = mixed(sorted(titles[view.template] - {view.title}), generator)
  rest = {title for found in titles.values() for title in found} - titles[view.template]
  return alike if len(alike) >= MAX_OPTIONS - 1 else alike + mixed(sorted(rest), generator)
