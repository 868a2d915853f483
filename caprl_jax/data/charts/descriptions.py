"""Slices of views -> descriptions from which all questions about them can be answered."""

from caprl_jax.data.charts import drawing as chart_drawing
from caprl_jax.data.charts.cells import capital
from caprl_jax.data.charts.questions import CHART_TYPES
from caprl_jax.data.charts.trends import tendency
from caprl_jax.data.charts.views import Slice


def describe(found: Slice) -> str:
  """What the chart shows, all its labels and its extremes."""
  chart, marks = found.chart, found.chart.marks
  form = ("horizontal " if chart.horizontal else "vertical ") if chart.kind == "bar" else ""
  said = [f'{capital(CHART_TYPES[chart.kind]).replace("A ", f"A {form}")} titled "{chart.title}".']
  if chart.kind == "pie":
    said.append(f'Its {len(marks)} slices show "{chart.y_label}".')
  else:
    x, y = (chart.y_label, chart.x_label) if chart.horizontal else (chart.x_label, chart.y_label)
    said.append(f'The x axis shows "{x}", the y axis "{y}".')
  colors = {mark.color for mark in marks}
  if chart.kind == "scatter":
    said += _cloud_description(found)
  elif chart.kind == "line" and len(marks) > 1:
    said.append(f"There are {len(marks)} lines from {marks[0].x[0]} to {marks[0].x[-1]}.")
    for mark in marks:
      said.append(
        f"{mark.name} ({mark.color}) {_change(mark)}, from {mark.labels[0]} to {mark.labels[-1]}."
      )
  else:
    if chart.kind == "line":
      said.append(
        f"The {marks[0].color} line has {len(found.items)} points and "
        f"{_change(marks[0])} from {marks[0].x[0]} to {marks[0].x[-1]}."
      )
    elif chart.kind == "bar":
      said.append(f"There are {len(marks)} {marks[0].color + ' ' if len(colors) == 1 else ''}bars.")
    shade = {mark.name: f" ({mark.color})" if chart.legend else "" for mark in marks}
    said.append(
      "; ".join(f"{name}{shade.get(name, '')} {label}" for name, _, label in found.items) + "."
    )
  if chart.kind != "scatter":
    said += [f"{capital(word)}{found.at}: {name}." for word, name in _ends(found)]
  return " ".join(said)


def _cloud_description(found: Slice) -> list[str]:
  chart, marks = found.chart, found.chart.marks
  if len(marks) > 1:
    said = [
      f"Its {len(marks)} groups: "
      + ", ".join(f"{mark.name} ({mark.color})" for mark in marks)
      + "."
    ]
  else:
    said = [f"It has {len(marks[0].y)} {marks[0].color} points."]
  for word, pick in (("highest", max), ("lowest", min)):
    value, name = pick((value, mark.name) for mark in marks for value in mark.y)
    said.append(f"The {word} point is labelled {value:,}{f' ({name})' if len(marks) > 1 else ''}.")
  goes = tendency(marks)
  return said + ([f'"{chart.y_label}" {goes} as "{chart.x_label}" rises.'] if goes else [])


def _change(mark: chart_drawing.Mark) -> str:
  change = mark.y[-1] - mark.y[0]
  return (
    f"{'rises' if change > 0 else 'falls'} by {abs(change):,}" if change else "ends where it starts"
  )


def _ends(found: Slice) -> list[tuple[str, str]]:
  ranked = sorted(found.items, key=lambda item: item[1])
  ends = [("highest", ranked[-1][0])] if ranked[-1][1] > ranked[-2][1] else []
  return ends + ([("lowest", ranked[0][0])] if ranked[0][1] < ranked[1][1] else [])
