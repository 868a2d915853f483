"""Charts of vega_datasets as rows: answers against pandas, splits, legibility, determinism."""

import dataclasses
import decimal
import importlib.util
import io
import itertools
import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from caprl_jax.data import rows
from caprl_jax.data.charts import cells as chart_cells
from caprl_jax.data.charts import drawing as chart_drawing
from caprl_jax.data.charts import rows as charts
from caprl_jax.data.charts import views as chart_views

SMALL = (96, 72)
COUNT = 300


@pytest.fixture(scope="module")
def read():
  return {split: charts.read_charts(split, 0, COUNT) for split in charts.SPLITS}


@pytest.fixture(scope="module")
def plain():
  return charts.read_charts("train", 0, COUNT, SMALL)


@pytest.fixture(scope="module")
def local_data():
  import vega_datasets  # and with it pandas, which takes its time

  return vega_datasets.local_data


def number(text: str) -> decimal.Decimal:
  return decimal.Decimal(text.replace(",", ""))


def asked(row: rows.QARow, kind: str, start: str = "") -> list[tuple[str, str]]:
  """Stem and right option of the row's questions of a kind."""
  return [
    (q.stem, q.options[q.gold])
    for q in row.questions
    if q.kind == kind and q.stem.startswith(start)
  ]


def test_rows(read, plain):
  for found in (*read.values(), plain):
    rows.check_rows(found, "charts")
    assert {row.facts["chart"] for row in found} == set(charts.KINDS)
    for row in found:
      assert 4 <= len(row.questions) <= 5 and len({q.stem for q in row.questions}) == len(
        row.questions
      )
      assert all(re.fullmatch(r"vega_datasets/[a-z+-]+", q.provenance) for q in row.questions)
      assert len(row.facts["description"].split()) <= 120
  # Two options only where there are two things to choose from.
  sizes = [len(q.options) for row in read["train"] for q in row.questions]
  assert sizes.count(4) > 0.85 * len(sizes)
  kinds = {
    "axis",
    "chart/title",
    "chart/type",
    "color",
    "compare",
    "count",
    "extreme",
    "legend",
    "trend",
    "value",
  }
  assert set(rows.kinds(read["train"])) == kinds
  assert set(rows.kinds(plain)) == {"chart/type", "color", "compare", "count", "extreme", "trend"}


def test_gold_has_every_place_equally_often(read):
  places = [
    q.gold for row in read["train"] + read["test"] for q in row.questions if len(q.options) == 4
  ]
  for place in range(4):
    assert places.count(place) / len(places) == pytest.approx(0.25, abs=0.03)


def test_a_row_depends_on_seed_split_and_place_only(read):
  assert charts.read_charts("train", 0, 20) == read["train"][:20]
  others = charts.read_charts("train", 1, 20)
  assert all(
    a.image.chart != b.image.chart for a, b in zip(others, read["train"][:20], strict=True)
  )
  # Golden, for other processes and machines. If numpy or the draw changes it, paste the new facts
  # and say in the changelog that the charts have changed.
  assert read["train"][0].facts["title"] == "Share prices of technology companies, 2005"


@pytest.mark.parametrize("pixels", [(448, 336), (320, 240), SMALL, (113, 58)])
def test_images(pixels):
  drawn = charts.read_charts("test", 3, 8, pixels)
  for row in drawn:
    assert rows.read_image(row).size == pixels
    again = dataclasses.replace(row.image)
    assert again.read() == row.image.read()  # no clock, no state from other charts
    assert not Image.open(io.BytesIO(again.read())).info.get("Software")
    assert row.image.where.startswith("vega_datasets/") and row.name in row.image.where
  assert len({row.image.read() for row in drawn}) == len(drawn)


@pytest.mark.parametrize("pixels, count", [((448, 336), 60), ((320, 240), 40)])
def test_texts_are_whole_and_apart(pixels, count):
  for row in charts.read_charts("train", 5, count, pixels):
    figure = chart_drawing.draw(row.image.chart, row.image.look, pixels)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [
      text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()
    ]
    ticks = [t for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis) for t in _hidden(axis)]
    boxes = {t: t.get_window_extent(canvas.get_renderer()) for t in texts if t not in ticks}
    for text, box in boxes.items():
      assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= pixels[0] + 1 and box.y1 <= pixels[1] + 1, (
        row.name,
        text,
      )
    for (a, box), (b, other) in itertools.combinations(boxes.items(), 2):
      # A pixel of grace: boxes hold room for descenders.
      across = min(box.x1, other.x1) - max(box.x0, other.x0)
      up = min(box.y1, other.y1) - max(box.y0, other.y0)
      assert across <= 1 or up <= 2, (row.name, a, b)


def _hidden(axis) -> list[Text]:
  """Labels of ticks outside the view, which are never drawn."""
  low, high = sorted(axis.get_view_interval())
  grace = 1e-9 * (high - low)
  return [
    tick.label1
    for tick in axis.get_major_ticks()
    if not low - grace <= tick.get_loc() <= high + grace
  ] + [tick.label2 for tick in axis.get_major_ticks()]


def test_splits_share_no_number():
  views = chart_views.read_views(chart_views.data_root())
  train, test = (chart_views.split_views(views, split) for split in charts.SPLITS)
  assert len(train) + len(test) == len(views)
  keys = [{(view.source.files, view.key) for view in found} for found in (train, test)]
  assert not keys[0] & keys[1]
  files = [{view.source.files for view in found} for found in (train, test)]
  assert files[0] == files[1]  # every table is in both
  assert 0.1 < len(test) / len(views) < 0.4


def test_charts_come_from_their_split(read):
  titles = [{row.facts["title"] for row in read[split]} for split in charts.SPLITS]
  assert not titles[0] & titles[1]
  # Iowa's years stand for numbers of one key each: a chart of 2008 and one of 2007 to 2012 share
  # some.
  years = [
    {
      int(y)
      for row in found
      if "Iowa" in row.facts["title"]
      for y in re.findall(r"\d{4}", row.facts["title"])
    }
    for found in read.values()
  ]
  assert not years[0] & years[1]


def _expected(row, local_data):
  """Recomputes with pandas what a chart shows: value by name; None for tables that are not looked
  at here.
  """
  title = row.facts["title"]
  if m := re.fullmatch(r"Mean (fuel economy|horsepower|weight) by make, (\d{4}) cars", title):
    cars = local_data.cars()
    cars = cars[cars.Year.dt.year == int(m[2])]
    column = {
      "fuel economy": "Miles_per_Gallon",
      "horsepower": "Horsepower",
      "weight": "Weight_in_lbs",
    }[m[1]]
    means = cars.groupby(cars.Name.str.split().str[0])[column].mean()
    return {
      chart_cells.MAKES[make]: mean for make, mean in means.items() if make in chart_cells.MAKES
    }
  if m := re.fullmatch(r"Share price of (\w+) by month, (\d{4})", title):
    symbol = {name: symbol for symbol, name in chart_cells.COMPANIES.items()}[m[1]]
    stocks = local_data.stocks()
    stocks = stocks[(stocks.symbol == symbol) & (stocks.date.dt.year == int(m[2]))]
    return dict(zip(stocks.date.dt.strftime("%b"), stocks.price, strict=True))
  if m := re.fullmatch(r"Precipitation in Seattle by month, (\d{4})", title):
    weather = local_data.seattle_weather()
    weather = weather[weather.date.dt.year == int(m[1])]
    return weather.groupby(weather.date.dt.strftime("%b")).precipitation.sum().to_dict()
  if m := re.fullmatch(r"Electricity generation in Iowa by source, (\d{4})", title):
    iowa = local_data.iowa_electricity()
    iowa = iowa[iowa.year.dt.year == int(m[1])]
    return {
      source.lower(): net / 1000
      for source, net in zip(iowa.source, iowa.net_generation, strict=True)
    }
  if m := re.fullmatch(
    r"Mean (petal|sepal) (length|width) of iris species, flowers (\d+) to (\d+)", title
  ):
    iris = local_data.iris()
    iris = iris[(iris.index % 50 >= int(m[3]) - 1) & (iris.index % 50 < int(m[4]))]
    return iris.groupby("species")[m[1] + m[2].capitalize()].mean().to_dict()
  if title.startswith("Airports by state in"):
    states = local_data.airports().state.value_counts()
    return {name: states[code] for code, (_, name) in chart_cells.STATES.items()}
  return None


@pytest.mark.parametrize("split", charts.SPLITS)
def test_answers_against_the_tables(read, local_data, split):
  """Labels are the table's numbers, rounded; answers follow from the labels."""
  seen = {"bar": 0, "line": 0, "pie": 0}
  for row in read[split]:
    expected = _expected(row, local_data)
    if expected is None:
      continue
    seen[row.facts["chart"]] += 1
    chart = row.image.chart
    if chart.kind == "line":
      shown = dict(zip(chart.marks[0].x, chart.marks[0].labels, strict=True))
    else:
      shown = {mark.name: mark.labels[0] for mark in chart.marks}
    for name, label in shown.items():
      step = 10.0 ** -len(label.partition(".")[2])
      assert float(number(label)) == pytest.approx(float(expected[name]), abs=0.5 * step + 1e-9)
    values = {name: number(label) for name, label in shown.items()}
    ranked = sorted(values, key=values.get)
    for stem, gold in asked(row, "value"):
      [name] = [name for name in values if re.search(rf" (for|in) {re.escape(name)}\?$", stem)]
      assert gold == shown[name]
    for stem, gold in asked(row, "extreme"):
      assert gold == ranked[-1 if "highest" in stem else 0]
      assert list(values.values()).count(values[gold]) == 1
    for stem, gold in asked(row, "compare", "By how much"):
      pairs = [
        (a, b)
        for a, b in itertools.permutations(values, 2)
        if re.search(rf" (for|in) {re.escape(a)} higher than (for|in) {re.escape(b)}\?$", stem)
      ]
      [(high, low)] = pairs
      assert number(gold) == values[high] - values[low]
    for stem, gold in asked(row, "count"):
      above = re.search(r"above ([\d.,]+)\?", stem)
      count = sum(value > number(above[1]) for value in values.values()) if above else len(values)
      assert int(gold) == count
  assert all(seen.values()), seen


def test_the_highest_of_four_is_one(read):
  seen = 0
  for row in read["train"] + read["test"] + charts.read_charts("train", 9, 400, kinds=("bar",)):
    marks = row.image.chart.marks
    if len(marks) == 1:
      values = dict(zip(marks[0].x, marks[0].y, strict=True))
    else:
      values = {mark.name: mark.y[-1] for mark in marks}
    for question in row.questions:
      if question.kind == "compare" and question.stem.startswith("Which of these"):
        shown = sorted((values[option] for option in question.options), reverse=True)
        assert values[question.options[question.gold]] == shown[0] > shown[1]
        assert shown[0] < max(values.values()) or list(values.values()).count(shown[0]) > 1
        seen += 1
  assert seen > 100


def test_scatter_answers_against_the_table(read, local_data):
  cars = local_data.cars()
  seen = 0
  for row in read["train"] + read["test"]:
    if not (m := re.fullmatch(r"Horsepower and fuel economy of (\d{4}) cars", row.facts["title"])):
      continue
    seen += 1
    year = cars[cars.Year.dt.year == int(m[1])]
    known = set(zip(year.Origin, year.Horsepower, year.Miles_per_Gallon, strict=True))
    points = [
      (mark.name, float(x), float(y))
      for mark in row.image.chart.marks
      for x, y in zip(mark.x, mark.y, strict=True)
    ]
    assert set(points) <= known
    highest, lowest = max(points, key=lambda p: p[2]), min(points, key=lambda p: p[2])
    for stem, gold in asked(row, "value"):
      assert float(gold) == (highest if "highest" in stem else lowest)[2]
    for _, gold in asked(row, "extreme"):
      assert gold == highest[0]
    for _, gold in asked(row, "trend"):
      assert gold != "it rises"  # more power never saves fuel in these years
  assert seen


def test_lines_answers(read):
  seen = set()
  for row in read["train"] + read["test"]:
    chart = row.image.chart
    if chart.kind != "line":
      continue
    lines = {mark.name: mark for mark in chart.marks}
    for stem, gold in asked(row, "trend"):
      mark = (
        chart.marks[0]
        if len(lines) == 1
        else next(m for n, m in lines.items() if f" of {n} change" in stem)
      )
      change = number(mark.labels[-1]) - number(mark.labels[0])
      assert gold == f"it {'rises' if change > 0 else 'falls'} by {abs(change):,}"
      seen.add(len(lines) > 1)
    for stem, gold in asked(row, "legend"):
      assert (
        stem == f"What color stands for {next(n for n, m in lines.items() if m.color == gold)}?"
      )
  assert seen == {True, False}


def test_wrong_options_are_wrong(read):
  """No two options are the same number, and near ones do not point at the right one."""
  near = right = 0
  for row in read["train"] + read["test"]:
    for question in row.questions:
      if question.kind == "value":
        values = [number(option) for option in question.options]
        assert len(set(values)) == len(values)
        # All are written alike.
        assert len({len(option.partition(".")[2]) for option in question.options}) == 1
        a, b = min(
          itertools.combinations(range(len(values)), 2),
          key=lambda p: abs(values[p[0]] - values[p[1]]),
        )
        near += 1
        right += question.gold in (a, b)
      if question.kind == "extreme":
        assert question.options[question.gold] in row.facts["description"]
  assert near > 200 and right / near == pytest.approx(0.5, abs=0.1)


def test_the_description_answers_every_question(read):
  for row in read["train"]:
    said = row.facts["description"]
    for question in row.questions:
      gold = question.options[question.gold]
      if question.kind in ("chart/title", "axis", "value", "legend", "color"):
        assert gold in said, (question, said)
      elif question.kind == "chart/type":
        assert gold.split(" ", 1)[1] in said
      elif question.kind == "extreme":
        word = "highest" if "highest" in question.stem else "lowest"
        assert (
          re.search(rf"(?i){word}[^.]*: {re.escape(gold)}\.", said)
          or f"({gold})" in said
          or ", " in gold
        )
      elif question.kind == "trend":
        assert gold.removeprefix("it ") in said
    for mark in row.image.chart.marks:
      assert all(label in said for label in mark.labels)


def test_plain_charts_are_answered_by_their_pixels(plain):
  """Colours and sizes are measured in the image itself."""
  for channel, name in enumerate(("red", "green", "blue")):
    color = bytes.fromhex(chart_drawing.PLAIN_COLORS[name][1:])
    assert color[channel] == max(color) and sorted(color)[1] < 80
  names = {
    name: tuple(bytes.fromhex(color[1:])) for name, color in chart_drawing.PLAIN_COLORS.items()
  }
  checked = 0
  for row in plain[:120]:
    if row.facts["chart"] not in ("bar", "pie"):
      continue
    assert row.image.chart.plain and row.facts["title"] == ""
    image = rows.read_image(row)
    pixels = {}
    for x, y in itertools.product(
      range(10 if row.facts["chart"] == "bar" else 0, SMALL[0]), range(SMALL[1] - 8)
    ):
      pixels.setdefault(image.getpixel((x, y)), set()).add((x, y))
    # Height of a bar, area of a slice.
    sizes = {
      name: len({y for _, y in pixels[color]})
      if row.facts["chart"] == "bar"
      else len(pixels[color])
      for name, color in names.items()
      if len(pixels.get(color, ())) > 12
    }
    assert set(sizes) == {mark.color for mark in row.image.chart.marks}
    for question in row.questions:
      gold = question.options[question.gold]
      if question.kind == "extreme":
        best = (max if question.stem.split()[-1] in ("tallest?", "largest?") else min)(
          sizes, key=sizes.get
        )
        assert gold == best and gold in row.facts["description"]
      elif question.kind == "compare":
        assert gold == max(question.options, key=sizes.get)
      elif question.kind == "count":
        assert int(gold) == len(sizes)
    checked += 1
  assert checked > 20


def test_plain_lines_and_points(plain):
  """The words are few, and trends are those of the numbers."""
  words, marks = set(), {kind: set() for kind in charts.KINDS}
  for row in plain:
    words |= set(re.findall(r"\w+", row.facts["description"]))
    marks[row.facts["chart"]].add(len(row.image.chart.marks))
    for stem, gold in asked(row, "trend"):
      [mark] = [m for m in row.image.chart.marks if f"the {m.color} line" in stem or "dots" in stem]
      assert f"{mark.color} {gold}" in row.facts["description"]
      if row.facts["chart"] == "line":
        assert gold == ("rises" if mark.y[-1] > mark.y[0] else "falls")
  assert len(words) < 50
  assert marks == {
    kind: set(range(least, most + 1)) for kind, (least, most) in charts._PLAIN_MARKS.items()
  }


def test_where_plain_begins():
  width, height = chart_drawing.PLAIN_BELOW
  for pixels, expected in (
    ((width, height), False),
    ((width - 1, height), True),
    ((width, height - 1), True),
  ):
    assert charts.read_charts("train", 0, 1, pixels)[0].image.chart.plain == expected


def test_kinds():
  assert {row.facts["chart"] for row in charts.read_charts("test", 0, 10, SMALL, ("pie",))} == {
    "pie"
  }


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"split": "valid"}, "no split 'valid'; use one of train, test"),
    ({"count": 0}, "count is 0; ask for at least 1"),
    ({"count": True}, "count is True"),
    ({"kinds": ("bar", "donut")}, "only of bar, line, scatter, pie"),
    ({"kinds": ()}, "name at least one"),
    ({"pixels": (20, 96)}, r"pixels is \(20, 96\); give width and height of at least 32"),
  ],
)
def test_refusals(arguments, message):
  with pytest.raises(ValueError, match=message):
    charts.read_charts(**{"split": "train", "seed": 0, "count": 1} | arguments)


@pytest.mark.parametrize("missing", ["vega_datasets", "matplotlib"])
def test_a_missing_package_is_named(monkeypatch, missing):
  found = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == missing else found(name)
  )
  with pytest.raises(ValueError, match=f"`pip install {missing}`"):
    charts.read_charts("train", 0, 1)
