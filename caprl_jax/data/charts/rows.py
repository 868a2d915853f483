"""The tables of the PyPI package vega_datasets -> rows: charts of them, with questions made from
the numbers.

A chart shows one slice of one table: bars of a few categories, lines over a window of time, slices
of a whole, points in groups. Its numbers are rounded first, so label, question and description say
the same, and the answers are exact. Charts too small for text (`drawing.PLAIN_BELOW`) show
colours only, and their questions ask for nothing else.
"""

import decimal
import hashlib

import numpy as np

from caprl_jax.data import rows
from caprl_jax.data.charts import drawing as chart_drawing
from caprl_jax.data.charts import questions as chart_questions
from caprl_jax.data.charts import trends
from caprl_jax.data.charts import views as chart_views
from caprl_jax.data.charts.cells import Cloud, capital
from caprl_jax.data.charts.descriptions import describe
from caprl_jax.data.charts.plain import plain_description, plain_direction, plain_questions
from caprl_jax.data.charts.views import Slice, View

SPLITS = ("train", "test")
KINDS = ("bar", "line", "scatter", "pie")

_MIN_PIXELS = 32
_MAX_MARKS = 8
_PLAIN_MARKS = {"bar": (2, 5), "line": (1, 3), "scatter": (1, 3), "pie": (2, 4)}  # fewest, most
_DRAWS = 5000  # slices tried for one chart; a few are enough but where `plain` is strict

Decimal = decimal.Decimal


def read_charts(
  split: str,
  seed: int,
  count: int = 1000,
  pixels: tuple[int, int] = (448, 336),
  kinds: tuple[str, ...] = KINDS,
) -> list[rows.QARow]:
  """`count` charts of `pixels` (width, height), drawn as PNG when they are read.

  Row i depends on `seed`, the split, i, `pixels` and `kinds`, never on `count`. No number is shown
  in both splits. `facts` hold "chart", "title" and "description", from which every question can be
  answered. Charts below `drawing.PLAIN_BELOW` have no text, and "title" is "" there.

  Raises:
    ValueError: an unknown split or kind, a count or size that makes no charts, or vega_datasets or
      matplotlib not installed.
  """
  if split not in SPLITS:
    raise ValueError(f"charts have no split {split!r}; use one of {', '.join(SPLITS)}")
  if isinstance(count, bool) or not isinstance(count, int) or count < 1:
    raise ValueError(f"count is {count!r}; ask for at least 1 chart")
  if not kinds or set(kinds) - set(KINDS):
    raise ValueError(f"kinds is {kinds!r}; name at least one, and only of {', '.join(KINDS)}")
  if len(pixels) != 2 or min(pixels) < _MIN_PIXELS:
    raise ValueError(f"pixels is {pixels!r}; give width and height of at least {_MIN_PIXELS}")
  views = chart_views.read_views(chart_views.data_root())
  titles: dict[str, set[str]] = {}
  for view in views:
    titles.setdefault(view.template, set()).add(view.title)
  mine = chart_views.split_views(views, split)
  pools = {kind: chart_views.pools_of(mine, kind) for kind in kinds}
  result = [_row(f"{split}/charts/{i}.png", seed, pixels, pools, titles) for i in range(count)]
  rows.check_rows(result, "vega_datasets")
  return result


# Views -> slices.


def _row(
  name: str,
  seed: int,
  pixels: tuple[int, int],
  pools: dict[str, list[list[list[View]]]],
  titles: dict[str, set[str]],
) -> rows.QARow:
  generator = np.random.default_rng(
    int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest(), "big")
  )
  kind = list(pools)[generator.integers(len(pools))]
  look = _look(generator)
  plain = pixels[0] < chart_drawing.PLAIN_BELOW[0] or pixels[1] < chart_drawing.PLAIN_BELOW[1]
  found = _find(kind, pools[kind], plain, look, pixels, generator)
  if plain:
    asked, description = (
      plain_questions(found, generator),
      plain_description(found),
    )
  else:
    others = chart_questions.other_titles(found.view, titles, generator)
    asked, description = (
      chart_questions.questions(found, others, generator),
      describe(found),
    )
  provenance = "vega_datasets/" + "+".join(file.split(".")[0] for file in found.view.source.files)
  questions = []
  for kind_of, stem, gold, wrong in asked:
    options = [gold, *wrong[: chart_questions.MAX_OPTIONS - 1]]
    options = tuple(options[i] for i in generator.permutation(len(options)))
    questions.append(rows.Question(stem, options, options.index(gold), kind_of, provenance))
  image = chart_drawing.ChartImage(f"{provenance}, chart {name}", found.chart, look, pixels)
  facts = {"chart": kind, "title": "" if plain else found.chart.title, "description": description}
  return rows.QARow(image, tuple(questions), name, facts)


def _find(
  kind: str,
  pools: list[list[list[View]]],
  plain: bool,
  look: chart_drawing.Look,
  pixels: tuple[int, int],
  generator: np.random.Generator,
) -> Slice:
  """Draws views and slices of them until one makes a good chart."""
  for draw in range(_DRAWS):
    if draw % (_DRAWS // 10) == 0:
      # Wanted first, then looked for: the fewest marks, single lines and rising ones are clear most
      # often.
      size = (
        int(generator.integers(_PLAIN_MARKS[kind][0], _PLAIN_MARKS[kind][1] + 1)) if plain else 0
      )
      pool = pools[-1 if (size > 1 if plain else generator.random() < 0.4) else 0]
      direction = str(generator.choice(["rises", "falls"])) if plain and kind == "line" else ""
    views = pool[generator.integers(len(pool))]
    found = _slice(views[generator.integers(len(views))], kind, size, look, pixels, generator)
    if found is not None and (
      not direction or plain_direction(found, found.chart.marks[0]) == direction
    ):
      return found
  raise ValueError(
    f"no table makes a {kind} chart of {pixels} pixels; ask for another kind or size"
  )


def _look(generator: np.random.Generator) -> chart_drawing.Look:
  return chart_drawing.Look(
    palette=int(generator.integers(len(chart_drawing.PALETTES))),
    text=int(generator.integers(11, 14)),
    serif=bool(generator.random() < 0.25),
    grid=bool(generator.random() < 0.6),
    frame=bool(generator.random() < 0.4),
    legend_right=bool(generator.random() < 0.5),
    marker=str(generator.choice(["o", "s", "^", "D"])),
    width=float(generator.uniform(0.5, 0.85)),
    start=int(generator.integers(0, 360)),
  )


def _slice(
  view: View,
  kind: str,
  size: int,
  look: chart_drawing.Look,
  pixels: tuple[int, int],
  generator: np.random.Generator,
) -> Slice | None:
  """Draws a slice of the view; None when it makes no legible chart of this kind with clear answers.

  `size` is the number of marks of a plain chart, 0 asks for one that is not.
  """
  plain = size > 0
  marks = _marks(view, kind, size, generator)
  if not marks or not (
    _plainly_clear(kind, marks) if plain else _legible(kind, marks, look, pixels)
  ):
    return None
  source, shown = view.source, {mark.name for mark in marks}
  if isinstance(source, Cloud):
    return _cloud_slice(view, source, kind, marks, plain)
  line, several = kind == "line", len(marks) > 1
  if line and not several:
    items = tuple(zip(marks[0].x, marks[0].y, marks[0].labels, strict=True))
  else:
    items = tuple((mark.name, mark.y[-1], mark.labels[-1]) for mark in marks)
  noun = source.column if view.shape == "along" or (line and not several) else source.noun
  at = f" {'at' if source.column == 'hour' else 'in'} {marks[0].x[-1]}" if line and several else ""
  horizontal = (
    kind == "bar"
    and not plain
    and (
      chart_drawing.wrapped([mark.name for mark in marks], look, pixels) is None
      or bool(generator.random() < 0.3)
    )
  )
  legend = line and several or kind == "pie" and bool(generator.random() < 0.5)
  along = capital(source.column if line else noun)
  chart = chart_drawing.Chart(
    kind,
    view.title,
    x_label=along,
    y_label=source.axis,
    marks=marks,
    horizontal=horizontal,
    legend=legend,
    plain=plain,
  )
  spare = () if view.shape == "along" else tuple(sorted(set(view.numbers) - shown))
  return Slice(chart, view, source.measure, noun, at, items, spare)


def _cloud_slice(
  view: View, source: Cloud, kind: str, marks: tuple[chart_drawing.Mark, ...], plain: bool
) -> Slice:
  """A slice of points."""
  chart = chart_drawing.Chart(
    kind,
    view.title,
    x_label=source.x,
    y_label=source.y,
    marks=marks,
    legend=len(marks) > 1,
    plain=plain,
  )
  items = tuple((mark.name, max(mark.y), "") for mark in marks)
  return Slice(chart, view, source.y, source.noun, "", items, ())


def _marks(
  view: View, kind: str, size: int, generator: np.random.Generator
) -> tuple[chart_drawing.Mark, ...]:
  """A random choice of the view's numbers as marks; empty when there are too few."""
  least, most = (size, size) if size else (3, 6 if kind == "pie" else _MAX_MARKS)
  if view.shape == "cloud":
    return _groups(view, size, generator)
  if kind == "line":
    names = (
      [view.fixed]
      if view.shape == "along"
      else _chosen(list(view.numbers), size or 2, size or 3, generator)
    )
    if size not in (0, len(names)) or not names:
      return ()
    lines = [view.numbers[name] for name in names]
    columns = _window(
      [column for column in lines[0] if all(column in line for line in lines)], 4, 8, generator
    )
    values = [[line[column] for column in columns] for line in lines] if columns else []
  elif view.shape == "along":
    line = view.numbers[view.fixed]
    names = columns = _window(list(line), least, most, generator)
    values = [[line[name]] for name in names]
  else:
    line = {
      name: numbers[view.fixed] for name, numbers in view.numbers.items() if view.fixed in numbers
    }
    names = _chosen(list(line), least, most, generator)
    values = [[line[name]] for name in names]
  if not names or not values:
    return ()
  colors = _colors(len(names), size > 0, generator)
  if kind == "bar" and not size and generator.random() < 0.6:
    colors = colors[:1] * len(names)
  marks = []
  for name, color, ys in zip(names, colors, values, strict=True):
    labels = [
      f"{y:,}" if i in (0, len(ys) - 1) or len(names) == 1 else "" for i, y in enumerate(ys)
    ]
    marks.append(
      chart_drawing.Mark(
        name, color, tuple(ys), tuple(labels), tuple(columns) if kind == "line" else ()
      )
    )
  return tuple(marks)


def _groups(
  view: View, size: int, generator: np.random.Generator
) -> tuple[chart_drawing.Mark, ...]:
  """Up to 8 points per group; labelled are the highest and the lowest of all, where there is one of
  each.
  """
  groups = {name: sorted(set(points)) for name, points in view.numbers.items() if len(points) > 3}
  names = _chosen(list(groups), size or min(4, len(groups)), size or 4, generator)
  points = {}
  for name in names:
    kept = generator.permutation(len(groups[name]))[: 8 if len(groups) > 1 else 16]
    points[name] = [groups[name][i] for i in kept]
  # The table writes 18 and 18.5; labels have the same places.
  places = max((-y.as_tuple().exponent for found in points.values() for _, y in found), default=0)
  ys = sorted(y for found in points.values() for _, y in found)
  colors = _colors(len(names), size > 0, generator)
  marks = []
  for name, color in zip(names, colors, strict=True):
    x, y = zip(*points[name], strict=True)
    labels = tuple(f"{round(value, places):,}" if value in (ys[0], ys[-1]) else "" for value in y)
    marks.append(
      chart_drawing.Mark(name, color, tuple(round(value, places) for value in y), labels, x)
    )
  return tuple(marks) if ys and ys[0] < ys[1] and ys[-2] < ys[-1] else ()


def _chosen(names: list[str], least: int, most: int, generator: np.random.Generator) -> list[str]:
  """`least` to `most` of the names, in their order or mixed."""
  if len(names) < least:
    return []
  size = int(generator.integers(least, min(most, len(names)) + 1))
  places = generator.permutation(len(names))[:size]
  return [names[i] for i in (sorted(places) if generator.random() < 0.5 else places)]


def _window(names: list[str], least: int, most: int, generator: np.random.Generator) -> list[str]:
  if len(names) < least:
    return []
  size = int(generator.integers(least, min(most, len(names)) + 1))
  start = int(generator.integers(len(names) - size + 1))
  return names[start : start + size]


def _colors(count: int, plain: bool, generator: np.random.Generator) -> list[str]:
  names = list(chart_drawing.PLAIN_COLORS if plain else chart_drawing.PALETTES[0])
  return [names[i] for i in generator.permutation(len(names))[:count]]


def _legible(
  kind: str,
  marks: tuple[chart_drawing.Mark, ...],
  look: chart_drawing.Look,
  pixels: tuple[int, int],
) -> bool:
  """Whether no labels would lie on each other."""
  values = [value for mark in marks for value in mark.y]
  if kind == "bar":
    return min(values) >= 0 and max(values) > 0
  if kind == "pie":
    return min(values) > 0 and min(values) >= sum(values) * Decimal("0.08")
  if kind == "scatter":
    return len(values) >= 6
  if not chart_drawing.lines_fit(marks, look, pixels) or max(values) == min(values):
    return False
  ends = [sorted(mark.y[end] for mark in marks) for end in (0, -1)]
  return _smallest_gap(ends) >= (max(values) - min(values)) / 8


def _plainly_clear(kind: str, marks: tuple[chart_drawing.Mark, ...]) -> bool:
  """Whether a small picture without numbers shows every answer."""
  values = [value for mark in marks for value in mark.y]
  span = max(values) - min(values)
  if kind in ("bar", "pie"):
    whole = max(values) if kind == "bar" else sum(values)
    return min(_smallest_gap([sorted(values)]), min(values)) >= whole / (
      10 if kind == "bar" else 16
    )
  if kind == "line":
    steady = all(
      abs(mark.y[-1] - mark.y[0]) >= span / (2 if len(marks) == 1 else 8)
      and abs(trends.rank_correlation(range(len(mark.y)), mark.y)) > 0.7
      for mark in marks
    )
    return steady and _smallest_gap([sorted(mark.y[-1] for mark in marks)]) >= span / 8
  if len(marks) == 1:
    return trends.tendency(marks) in ("rises", "falls")
  return _smallest_gap([sorted(trends.mean(mark.y) for mark in marks)]) >= span / 5


def _smallest_gap(columns: list[list[Decimal]]) -> Decimal:
  return min(
    (b - a for column in columns for a, b in zip(column, column[1:])), default=Decimal("Infinity")
  )
