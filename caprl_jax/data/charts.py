"""The tables of the PyPI package vega_datasets -> rows: charts of them, with questions made from the numbers.

A chart shows one slice of one table: bars of a few categories, lines over a window of time, slices
of a whole, points in groups. Its numbers are rounded first, so label, question and description say
the same, and the answers are exact. Charts too small for text (`chart_drawing.PLAIN_BELOW`) show
colours only, and their questions ask for nothing else.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import csv
import dataclasses
import decimal
import hashlib
import importlib.util
import json
import pathlib

import numpy as np

from caprl_jax.data import chart_drawing, rows

SPLITS = ("train", "test")
KINDS = ("bar", "line", "scatter", "pie")

_TYPES = {"bar": "a bar chart", "line": "a line chart", "scatter": "a scatter plot", "pie": "a pie chart"}
_MARKS = {"bar": "bar", "line": "line", "scatter": "group of points", "pie": "slice"}
_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
_LONG_MONTHS = "January February March April May June July August September October November December".split()
_MIN_PIXELS = 32
_MAX_MARKS = 8
_PLAIN_MARKS = {"bar": (2, 5), "line": (1, 3), "scatter": (1, 3), "pie": (2, 4)}  # fewest, most
_MAX_QUESTIONS = 5
_MAX_OPTIONS = 4
_DRAWS = 5000  # slices tried for one chart; a few are enough but where `plain` is strict

Decimal = decimal.Decimal
Record = dict[str, str | None]


@dataclasses.dataclass(frozen=True)
class _Grid:
  """A table as categories by columns. `cells` turns a record into (key, category, column, number or None).

  Numbers of the same cell are averaged, or summed where they are parts of a `total`. Charts never
  mix keys, and a key belongs to one split. The titles are those of a chart of all categories at one
  column, of one category along the columns, and of several; "" where that makes no chart.
  """
  files: tuple[str, ...]
  cells: Callable[[str, int, Record], Iterable[tuple[str, str, str, str | Decimal | None]]]
  measure: str
  unit: str
  places: int
  noun: str  # of a category
  across: str = ""
  along: str = ""
  together: str = ""
  column: str = ""  # noun of a column
  total: bool = False


@dataclasses.dataclass(frozen=True)
class _Cloud:
  """A table as points in groups. `points` turns a record into (key, group, x, y)."""
  files: tuple[str, ...]
  points: Callable[[str, int, Record], Iterable[tuple[str, str, str | None, str | None]]]
  x: str
  y: str
  noun: str  # of a group
  title: str


_COMPANIES = {"MSFT": "Microsoft", "AMZN": "Amazon", "IBM": "IBM", "GOOG": "Google", "AAPL": "Apple"}
_MAKES = {
  "ford": "Ford", "chevrolet": "Chevrolet", "plymouth": "Plymouth", "dodge": "Dodge", "amc": "AMC", "toyota": "Toyota",
  "datsun": "Datsun", "buick": "Buick", "pontiac": "Pontiac", "volkswagen": "Volkswagen", "honda": "Honda",
  "mercury": "Mercury", "mazda": "Mazda", "oldsmobile": "Oldsmobile", "fiat": "Fiat", "peugeot": "Peugeot",
  "audi": "Audi", "volvo": "Volvo", "saab": "Saab", "subaru": "Subaru", "opel": "Opel",
}  # fmt: skip
_INDUSTRIES = {
  "construction": "construction", "manufacturing": "manufacturing", "retail_trade": "retail",
  "wholesale_trade": "wholesale", "transportation_and_warehousing": "transport", "information": "information",
  "financial_activities": "finance", "professional_and_business_services": "business services",
  "education_and_health_services": "education and health", "leisure_and_hospitality": "leisure",
  "government": "government", "mining_and_logging": "mining and logging",
}  # fmt: skip
_REGIONS = {
  "New England": "CT Connecticut,ME Maine,MA Massachusetts,NH New Hampshire,RI Rhode Island,VT Vermont",
  "the Middle Atlantic and Maryland": "NJ New Jersey,NY New York,PA Pennsylvania,DE Delaware,MD Maryland",
  "the South Atlantic": "FL Florida,GA Georgia,NC North Carolina,SC South Carolina,VA Virginia,WV West Virginia",
  "the South Central states": "AL Alabama,KY Kentucky,MS Mississippi,TN Tennessee,AR Arkansas,LA Louisiana,OK Oklahoma,"
                              "TX Texas",
  "the Great Lakes": "IL Illinois,IN Indiana,MI Michigan,OH Ohio,WI Wisconsin,MN Minnesota",
  "the Plains": "IA Iowa,KS Kansas,MO Missouri,NE Nebraska,ND North Dakota,SD South Dakota",
  "the Mountain states": "AZ Arizona,CO Colorado,ID Idaho,MT Montana,NV Nevada,NM New Mexico,UT Utah,WY Wyoming",
  "the Pacific states": "AK Alaska,CA California,HI Hawaii,OR Oregon,WA Washington",
}
_STATES = {
  state[:2]: (region, state[3:]) for region, states in _REGIONS.items() for state in states.split(",")
}


def _block(year: str | None, first: int, size: int, last: int) -> str:
  start = first + size * ((int(year[:4]) - first) // size)
  return f"{start} to {min(start + size - 1, last)}"


def _thousandth(number: str | None) -> Decimal:
  return Decimal(number) / 1000


def _month(date: str) -> str:
  return _MONTHS[int(date[5:7]) - 1]


def _weather(column: str) -> Callable:
  return lambda file, i, r: [(r["date"][:4], "all", _month(r["date"]), r[column])]


def _temperatures(file: str, i: int, r: Record):
  hour = int(r["date"][11:13])
  if hour % 3 == 0:
    city = {"sf-temps.csv": "San Francisco", "seattle-temps.csv": "Seattle"}[file]
    yield _LONG_MONTHS[int(r["date"][5:7]) - 1], city, f"{hour}:00", r["temp"]


def _car(column: str | None) -> Callable:
  def cells(file, i, r):
    make = _MAKES.get(r["Name"].split()[0])
    return [(r["Year"][:4], make, "", r[column] if column else "1")] if make else []
  return cells


def _flower(i: int) -> str:
  return f"flowers {i % 50 // 10 * 10 + 1} to {i % 50 // 10 * 10 + 10}"  # the file has 50 of each species in a row


def _iris(part: str, size: str) -> _Grid:
  return _Grid(
    ("iris.json",), lambda file, i, r: [(_flower(i), r["species"], "", r[part + size])], f"mean {part} {size.lower()}",
    "cm", 2, "species", across=f"Mean {part} {size.lower()} of iris species, {{key}}",
  )  # fmt: skip


def _season(file: str, i: int, r: Record):
  month = int(r["date"][5:7])
  if month % 3 == 1:
    yield r["date"][:4], _LONG_MONTHS[month - 1], r["temp_min"], r["temp_max"]


_CARS = ("cars.json",)
_SEATTLE = ("seattle-weather.csv",)
_GRIDS = (
  _Grid(("stocks.csv",), lambda file, i, r: [(r["date"][-4:], _COMPANIES[r["symbol"]], r["date"][:3], r["price"])],
        "share price", "US dollars", 1, "company", "Share prices of technology companies, {column} {key}",
        "Share price of {row} by month, {key}", "Share prices of technology companies, {key}", "month"),
  _Grid(_SEATTLE, lambda file, i, r: [(r["date"][:4], row, _month(r["date"]), r[column]) for row, column in
                                      (("daily high", "temp_max"), ("daily low", "temp_min"))],
        "mean temperature", "°C", 1, "line", "", "Mean {row} in Seattle by month, {key}",
        "Temperatures in Seattle by month, {key}", "month"),
  _Grid(_SEATTLE, _weather("precipitation"), "precipitation", "mm", 0, "", "",
        "Precipitation in Seattle by month, {key}", column="month", total=True),
  _Grid(_SEATTLE, _weather("wind"), "mean wind speed", "m/s", 2, "", "", "Mean wind speed in Seattle by month, {key}",
        column="month"),
  _Grid(_SEATTLE, lambda file, i, r: [(r["date"][:4], r["weather"], _month(r["date"]), "1")],
        "number of days", "", 0, "weather", "Weather in Seattle, {column} {key}",
        "Days of {row} in Seattle by month, {key}", "", "month", total=True),
  _Grid(("sf-temps.csv", "seattle-temps.csv"), _temperatures, "mean temperature", "°F", 1, "city", "",
        "Mean temperature in {row} by hour, {key} 2010", "Mean temperature by hour, {key} 2010", "hour"),
  _Grid(_CARS, _car("Miles_per_Gallon"), "mean fuel economy", "miles per gallon", 1, "make",
        "Mean fuel economy by make, {key} cars"),
  _Grid(_CARS, _car("Horsepower"), "mean horsepower", "", 1, "make", "Mean horsepower by make, {key} cars"),
  _Grid(_CARS, _car("Weight_in_lbs"), "mean weight", "pounds", 0, "make", "Mean weight by make, {key} cars"),
  _Grid(_CARS, _car("Acceleration"), "mean acceleration time", "seconds", 1, "make",
        "Mean acceleration time by make, {key} cars"),
  _Grid(_CARS, _car(None), "number of models", "", 0, "make", "Number of car models by make, {key}", total=True),
  _Grid(_CARS, lambda file, i, r: [(r["Year"][:4], r["Origin"], "", "1")], "number of models", "", 0, "origin",
        "Number of car models by origin, {key}", total=True),
  *(_iris(part, size) for part in ("petal", "sepal") for size in ("Length", "Width")),
  _Grid(("barley.json",), lambda file, i, r: [(f"{r['site']} {r['year']}", r["variety"], "", r["yield"])],
        "barley yield", "bushels per acre", 1, "variety", "Barley yield by variety, {key}"),
  _Grid(("wheat.json",), lambda file, i, r: [(_block(r["year"], 1565, 40, 1821), "all", r["year"], r["wheat"])],
        "wheat price", "shillings per quarter", 1, "", "", "Price of wheat in England, {key}", column="year"),
  _Grid(("wheat.json",), lambda file, i, r: [(_block(r["year"], 1565, 40, 1821), "all", r["year"], r.get("wages"))],
        "weekly wage", "shillings", 2, "", "", "Weekly wage of a mechanic in England, {key}", column="year"),
  _Grid(("us-employment.csv",), lambda file, i, r: [(r["month"][:4], name, _month(r["month"]), _thousandth(r[column]))
                                                    for column, name in _INDUSTRIES.items()],
        "number of jobs", "millions", 2, "industry", "US jobs by industry, {column} {key}",
        "US jobs in {row} by month, {key}", "US jobs by industry and month, {key}", "month", total=True),
  _Grid(("iowa-electricity.csv",), lambda file, i, r: [(_block(r["year"], 2001, 6, 2017), r["source"].lower(),
                                                        r["year"][:4], _thousandth(r["net_generation"]))],
        "electricity generation", "million MWh", 1, "source", "Electricity generation in Iowa by source, {column}",
        "Electricity from {row} in Iowa, {key}", "Electricity generation in Iowa, {key}", "year", total=True),
  _Grid(("airports.csv",), lambda file, i, r: [(*_STATES[r["state"]], "", "1")] if r["state"] in _STATES else [],
        "number of airports", "", 0, "state", "Airports by state in {key}", total=True),
  _Grid(("driving.json",), lambda file, i, r: [(_block(r["year"], 1956, 11, 2010), "all", r["year"], r["miles"])],
        "distance driven per person", "miles", 0, "", "", "Miles driven per person in the US, {key}", column="year"),
  _Grid(("driving.json",), lambda file, i, r: [(_block(r["year"], 1956, 11, 2010), "all", r["year"], r["gas"])],
        "gasoline price", "dollars per gallon", 2, "", "", "Price of gasoline in the US, {key}", column="year"),
)  # fmt: skip
_CLOUDS = (
  _Cloud(_CARS, lambda file, i, r: [(r["Year"][:4], r["Origin"], r["Horsepower"], r["Miles_per_Gallon"])],
         "Horsepower", "Miles per gallon", "origin", "Horsepower and fuel economy of {key} cars"),
  _Cloud(_CARS, lambda file, i, r: [(r["Year"][:4], r["Origin"], r["Weight_in_lbs"], r["Acceleration"])],
         "Weight (pounds)", "Acceleration time (seconds)", "origin", "Weight and acceleration of {key} cars"),
  _Cloud(_CARS, lambda file, i, r: [(r["Year"][:4], f"{r['Cylinders']} cylinders", r["Displacement"],
                                     r["Weight_in_lbs"])],
         "Displacement (cubic inches)", "Weight (pounds)", "number of cylinders",
         "Displacement and weight of {key} cars"),
  _Cloud(("iris.json",), lambda file, i, r: [(_flower(i), r["species"], r["petalLength"], r["petalWidth"])],
         "Petal length (cm)", "Petal width (cm)", "species", "Petals of three iris species, {key}"),
  _Cloud(("iris.json",), lambda file, i, r: [(_flower(i), r["species"], r["sepalLength"], r["petalLength"])],
         "Sepal length (cm)", "Petal length (cm)", "species", "Sepals and petals of three iris species, {key}"),
  _Cloud(_SEATTLE, _season, "Daily low (°C)", "Daily high (°C)", "month", "Daily temperatures in Seattle, {key}"),
  _Cloud(("driving.json",), lambda file, i, r: [(_block(r["year"], 1956, 11, 2010), "all", r["gas"], r["miles"])],
         "Gasoline price (dollars per gallon)", "Miles driven per person", "", "Gasoline price and driving, {key}"),
  _Cloud(("anscombe.json",), lambda file, i, r: [(r["Series"], "all", r["X"], r["Y"])],
         "First variable", "Second variable", "", "Anscombe's quartet, series {key}"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _View:
  """One way to show one key's numbers; what is left to draw is which categories or which window of columns.

  `shape` is across, along, together (titles of `_Grid`) or cloud; `fixed` the column of an `across`
  view, the category of an `along` view. `numbers` are a grid's by category and column, a cloud's
  points by group.
  """
  source: _Grid | _Cloud
  key: str
  shape: str
  fixed: str
  numbers: dict

  @property
  def title(self) -> str:
    template = self.source.title if isinstance(self.source, _Cloud) else getattr(self.source, self.shape)
    return template.format(key=self.key, row=self.fixed, column=self.fixed)


@dataclasses.dataclass(frozen=True)
class _Slice:
  """A chart and what its questions need beside it.

  `items` are (name, value, label) of what can be compared: bars, slices, the points of a single
  line, the ends of several, a group's highest point. `noun` is theirs, `at` says where they stand
  (" in Dec"). `spare` names belong to the same table but are not shown.
  """
  chart: chart_drawing.Chart
  view: _View
  measure: str
  noun: str
  at: str
  items: tuple[tuple[str, Decimal, str], ...]
  spare: tuple[str, ...]


def data_root() -> pathlib.Path:
  """The folder of the package's tables. Raises ValueError when it, or matplotlib, is not installed."""
  for package in ("matplotlib", "vega_datasets"):
    # Found, not imported: vega_datasets would import pandas.
    spec = importlib.util.find_spec(package)
    if spec is None:
      raise ValueError(f"charts need the package {package}, which is not installed; run `pip install {package}`")
  root = pathlib.Path(spec.submodule_search_locations[0]) / "_data"
  if not root.is_dir():
    raise ValueError(f"vega_datasets has no folder {root}; run `pip install --force-reinstall vega_datasets`")
  return root


def read_charts(split: str, seed: int, count: int = 1000, pixels: tuple[int, int] = (448, 336),
                kinds: tuple[str, ...] = KINDS) -> list[rows.QARow]:
  """`count` charts of `pixels` (width, height), drawn as PNG when they are read.

  Row i depends on `seed`, the split, i, `pixels` and `kinds`, never on `count`. No number is shown
  in both splits. `facts` hold "chart", "title" and "description", from which every question can be
  answered. Charts below `chart_drawing.PLAIN_BELOW` have no text, and "title" is "" there.

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
  views = read_views(data_root())
  titles: dict[str, set[str]] = {}
  for view in views:
    titles.setdefault(_template(view), set()).add(view.title)
  mine = split_views(views, split)
  pools = {kind: _pools(mine, kind) for kind in kinds}
  result = [_row(f"{split}/charts/{i}.png", seed, pixels, pools, titles) for i in range(count)]
  rows.check_rows(result, "vega_datasets")
  return result


# Tables -> views.


def read_views(root: pathlib.Path) -> list[_View]:
  """Every view of every table."""
  files = {name: _records(root / name) for source in (*_GRIDS, *_CLOUDS) for name in source.files}
  found = []
  for cloud in _CLOUDS:
    clouds: dict[str, dict[str, list]] = {}
    for name, i, record in _each(cloud, files):
      for key, group, x, y in cloud.points(name, i, record):
        if x is not None and y is not None:
          clouds.setdefault(key, {}).setdefault(group, []).append((Decimal(x), Decimal(y)))
    found += [_View(cloud, key, "cloud", "", groups) for key, groups in clouds.items()]
  for grid in _GRIDS:
    keys: dict[str, dict[str, dict[str, list]]] = {}
    for name, i, record in _each(grid, files):
      for key, row, column, number in grid.cells(name, i, record):
        if number is not None:
          keys.setdefault(key, {}).setdefault(row, {}).setdefault(column, []).append(Decimal(number))
    for key, cells in keys.items():
      numbers = {row: {column: _number(cell, grid) for column, cell in line.items()} for row, line in cells.items()}
      found += _grid_views(grid, key, numbers)
  return found


def _records(file: pathlib.Path) -> list[Record]:
  """Numbers stay as they are written, so that sums and means are exact."""
  if file.suffix == ".json":
    return json.loads(file.read_text("utf-8"), parse_float=str, parse_int=str)
  with file.open(encoding="utf-8", newline="") as lines:
    return list(csv.DictReader(lines))


def _each(source: _Grid | _Cloud, files: dict[str, list[Record]]) -> Iterator[tuple[str, int, Record]]:
  return ((name, i, record) for name in source.files for i, record in enumerate(files[name]))


def _number(cell: list[Decimal], grid: _Grid) -> Decimal:
  return round(sum(cell) if grid.total else sum(cell) / len(cell), grid.places)


def _grid_views(grid: _Grid, key: str, numbers: dict[str, dict[str, Decimal]]) -> list[_View]:
  columns = dict.fromkeys(column for line in numbers.values() for column in line)
  found = [_View(grid, key, "across", column, numbers) for column in columns] if grid.across else []
  found += [_View(grid, key, "along", row, numbers) for row in numbers] if grid.along else []
  return found + ([_View(grid, key, "together", "", numbers)] if grid.together else [])


def split_views(views: Sequence[_View], split: str) -> list[_View]:
  """A quarter of each table's keys, those of smallest hash, are for tests. Views of two keys share no number."""
  keys: dict[str, set[str]] = {}
  for view in views:
    keys.setdefault(view.source.files[0], set()).add(view.key)
  test = set()
  for file, found in keys.items():
    # Not hash(): it differs from process to process.
    ranked = sorted(found, key=lambda key, file=file: hashlib.sha256(f"{file}/{key}".encode()).digest())
    test |= {(file, key) for key in ranked[:max(1, len(ranked) // 4)]}
  return [view for view in views if ((view.source.files[0], view.key) in test) == (split == "test")]


def _pools(views: list[_View], kind: str) -> list[list[list[_View]]]:
  """The views that make charts of a kind, by source (each is drawn equally often); single lines and several apart."""
  shapes = {
    "bar": [("across", "along")], "line": [("along",), ("together",)], "scatter": [("cloud",)], "pie": [("across",)],
  }  # fmt: skip
  found = []
  for allowed in shapes[kind]:
    sources: dict[int, list[_View]] = {}
    for view in views:
      if view.shape in allowed and (kind != "pie" or view.source.total):
        sources.setdefault(id(view.source), []).append(view)
    found.append(list(sources.values()))
  return found


def _template(view: _View) -> str:
  return f"{view.source.title if isinstance(view.source, _Cloud) else getattr(view.source, view.shape)}"


# Views -> slices.


def _row(name: str, seed: int, pixels: tuple[int, int], pools: dict[str, list[list[list[_View]]]],
         titles: dict[str, set[str]]) -> rows.QARow:
  generator = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest(), "big"))
  kind = list(pools)[generator.integers(len(pools))]
  look = _look(generator)
  plain = pixels[0] < chart_drawing.PLAIN_BELOW[0] or pixels[1] < chart_drawing.PLAIN_BELOW[1]
  found = _find(kind, pools[kind], plain, look, pixels, generator)
  if plain:
    asked, description = _plain_questions(found, generator), _plain_description(found)
  else:
    asked, description = _questions(found, _other_titles(found.view, titles, generator), generator), _description(found)
  provenance = "vega_datasets/" + "+".join(file.split(".")[0] for file in found.view.source.files)
  questions = []
  for kind_of, stem, gold, others in asked:
    options = [gold, *others[: _MAX_OPTIONS - 1]]
    options = tuple(options[i] for i in generator.permutation(len(options)))
    questions.append(rows.Question(stem, options, options.index(gold), kind_of, provenance))
  image = chart_drawing.ChartImage(f"{provenance}, chart {name}", found.chart, look, pixels)
  facts = {"chart": kind, "title": "" if plain else found.chart.title, "description": description}
  return rows.QARow(image, tuple(questions), name, facts)


def _find(kind: str, pools: list[list[list[_View]]], plain: bool, look: chart_drawing.Look, pixels: tuple[int, int],
          generator: np.random.Generator) -> _Slice:
  """Draws views and slices of them until one makes a good chart."""
  for draw in range(_DRAWS):
    if draw % (_DRAWS // 10) == 0:
      # Wanted first, then looked for: the fewest marks, single lines and rising ones are clear most often.
      size = int(generator.integers(_PLAIN_MARKS[kind][0], _PLAIN_MARKS[kind][1] + 1)) if plain else 0
      pool = pools[-1 if (size > 1 if plain else generator.random() < 0.4) else 0]
      direction = str(generator.choice(["rises", "falls"])) if plain and kind == "line" else ""
    views = pool[generator.integers(len(pool))]
    found = _slice(views[generator.integers(len(views))], kind, size, look, pixels, generator)
    if found is not None and (not direction or _plain_direction(found, found.chart.marks[0]) == direction):
      return found
  raise ValueError(f"no table makes a {kind} chart of {pixels} pixels; ask for another kind or size")


def _look(generator: np.random.Generator) -> chart_drawing.Look:
  return chart_drawing.Look(
    palette=int(generator.integers(len(chart_drawing.PALETTES))), text=int(generator.integers(11, 14)),
    serif=bool(generator.random() < 0.25), grid=bool(generator.random() < 0.6), frame=bool(generator.random() < 0.4),
    legend_right=bool(generator.random() < 0.5), marker=str(generator.choice(["o", "s", "^", "D"])),
    width=float(generator.uniform(0.5, 0.85)), start=int(generator.integers(0, 360)),
  )  # fmt: skip


def _slice(view: _View, kind: str, size: int, look: chart_drawing.Look, pixels: tuple[int, int],
           generator: np.random.Generator) -> _Slice | None:
  """Draws a slice of the view; None when it makes no legible chart of this kind with clear answers.

  `size` is the number of marks of a plain chart, 0 asks for one that is not.
  """
  plain = size > 0
  marks = _marks(view, kind, size, generator)
  if not marks or not (_plainly_clear(kind, marks) if plain else _legible(kind, marks, look, pixels)):
    return None
  source, shown = view.source, {mark.name for mark in marks}
  if isinstance(source, _Cloud):
    chart = chart_drawing.Chart(kind, view.title, source.x, source.y, marks, legend=len(marks) > 1, plain=plain)
    return _Slice(chart, view, source.y, source.noun, "", tuple((mark.name, max(mark.y), "") for mark in marks), ())
  line, several = kind == "line", len(marks) > 1
  if line and not several:
    items = tuple(zip(marks[0].x, marks[0].y, marks[0].labels, strict=True))
  else:
    items = tuple((mark.name, mark.y[-1], mark.labels[-1]) for mark in marks)
  noun = source.column if view.shape == "along" or (line and not several) else source.noun
  at = f" {'at' if source.column == 'hour' else 'in'} {marks[0].x[-1]}" if line and several else ""
  horizontal = kind == "bar" and not plain and (
    chart_drawing.wrapped([mark.name for mark in marks], look, pixels) is None or bool(generator.random() < 0.3)
  )
  legend = line and several or kind == "pie" and bool(generator.random() < 0.5)
  chart = chart_drawing.Chart(kind, view.title, _capital(source.column if line else noun), _axis(source), marks,
                              horizontal, legend, plain)
  spare = () if view.shape == "along" else tuple(sorted(set(view.numbers) - shown))
  return _Slice(chart, view, source.measure, noun, at, items, spare)


def _marks(view: _View, kind: str, size: int, generator: np.random.Generator) -> tuple[chart_drawing.Mark, ...]:
  """A random choice of the view's numbers as marks; empty when there are too few."""
  least, most = (size, size) if size else (3, 6 if kind == "pie" else _MAX_MARKS)
  if view.shape == "cloud":
    return _groups(view, size, generator)
  if kind == "line":
    names = [view.fixed] if view.shape == "along" else _chosen(list(view.numbers), size or 2, size or 3, generator)
    if size not in (0, len(names)) or not names:
      return ()
    lines = [view.numbers[name] for name in names]
    columns = _window([column for column in lines[0] if all(column in line for line in lines)], 4, 8, generator)
    values = [[line[column] for column in columns] for line in lines] if columns else []
  elif view.shape == "along":
    line = view.numbers[view.fixed]
    names = columns = _window(list(line), least, most, generator)
    values = [[line[name]] for name in names]
  else:
    line = {name: numbers[view.fixed] for name, numbers in view.numbers.items() if view.fixed in numbers}
    names = _chosen(list(line), least, most, generator)
    values = [[line[name]] for name in names]
  if not names or not values:
    return ()
  colors = _colors(len(names), size > 0, generator)
  if kind == "bar" and not size and generator.random() < 0.6:
    colors = colors[:1] * len(names)
  marks = []
  for name, color, ys in zip(names, colors, values, strict=True):
    labels = [f"{y:,}" if i in (0, len(ys) - 1) or len(names) == 1 else "" for i, y in enumerate(ys)]
    marks.append(chart_drawing.Mark(name, color, tuple(ys), tuple(labels), tuple(columns) if kind == "line" else ()))
  return tuple(marks)


def _groups(view: _View, size: int, generator: np.random.Generator) -> tuple[chart_drawing.Mark, ...]:
  """Up to 8 points a group; labelled are the highest and the lowest of all, where there is one of each."""
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
    marks.append(chart_drawing.Mark(name, color, tuple(round(value, places) for value in y), labels, x))
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
  return names[start:start + size]


def _colors(count: int, plain: bool, generator: np.random.Generator) -> list[str]:
  names = list(chart_drawing.PLAIN_COLORS if plain else chart_drawing.PALETTES[0])
  return [names[i] for i in generator.permutation(len(names))[:count]]


def _legible(kind: str, marks: tuple[chart_drawing.Mark, ...], look: chart_drawing.Look,
             pixels: tuple[int, int]) -> bool:
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
    return min(_smallest_gap([sorted(values)]), min(values)) >= whole / (10 if kind == "bar" else 16)
  if kind == "line":
    steady = all(abs(mark.y[-1] - mark.y[0]) >= span / (2 if len(marks) == 1 else 8) and
                 abs(_rank_correlation(range(len(mark.y)), mark.y)) > 0.7 for mark in marks)
    return steady and _smallest_gap([sorted(mark.y[-1] for mark in marks)]) >= span / 8
  if len(marks) == 1:
    return _tendency(marks) in ("rises", "falls")
  return _smallest_gap([sorted(_mean(mark.y) for mark in marks)]) >= span / 5


def _smallest_gap(columns: list[list[Decimal]]) -> Decimal:
  return min((b - a for column in columns for a, b in zip(column, column[1:])), default=Decimal("Infinity"))


def _mean(values: Sequence[Decimal]) -> Decimal:
  return sum(values) / len(values)


def _rank_correlation(x: Iterable, y: Iterable) -> float:
  return _correlation(*([sum(b < a for b in v) + sum(b == a for b in v) / 2 for a in v] for v in (list(x), list(y))))


def _correlation(x: Iterable, y: Iterable) -> float:
  x, y = [np.asarray(list(map(float, v))) - np.mean(list(map(float, v))) for v in (x, y)]
  norm = float(np.sqrt((x @ x) * (y @ y)))
  return float(x @ y) / norm if norm else 0.0


def _tendency(marks: tuple[chart_drawing.Mark, ...]) -> str:
  """Whether y rises or falls with x over all points, "" when that is a matter of taste.

  Values and ranks must agree: one far point or a bend is no trend.
  """
  x, y = [value for mark in marks for value in mark.x], [value for mark in marks for value in mark.y]
  both = (_correlation(x, y), _rank_correlation(x, y))
  if min(map(abs, both)) >= 0.7:
    return "rises" if both[0] > 0 else "falls"
  return "shows no clear trend" if max(map(abs, both)) <= 0.2 else ""


# Slices -> questions.

Asked = tuple[str, str, str, list[str]]  # kind, stem, right answer, wrong answers


def _questions(found: _Slice, titles: list[str], generator: np.random.Generator) -> list[Asked]:
  """At most one of a kind; two or three of what the chart shows, the rest of what it is."""
  about_data = [asked for make in (_value, _extreme, _compare, _trend, _color) for asked in make(found, generator)]
  gold = _TYPES[found.chart.kind]
  about_chart = [
    ("chart/type", "What kind of chart is this?", gold, [other for other in _TYPES.values() if other != gold]),
    ("chart/title", "What is the title of the chart?", found.chart.title, titles),
    *_axes(found, generator), *_count(found, generator),
  ]
  chosen: list[Asked] = []
  for questions, most in ((about_data, 3), (about_chart, _MAX_QUESTIONS)):
    for i in generator.permutation(len(questions)):
      if len(chosen) < most and questions[i][0] not in [question[0] for question in chosen]:
        chosen.append(questions[i])
  return chosen


def _value(found: _Slice, generator: np.random.Generator) -> list[Asked]:
  if found.chart.kind == "scatter":
    values = sorted(value for mark in found.chart.marks for value in mark.y)
    return [("value", f"What number labels the {word} point?", *_numbers(gold, values, generator))
            for word, gold in (("highest", values[-1]), ("lowest", values[0]))]
  name, value, _ = found.items[generator.integers(len(found.items))]
  return [("value", f"What is the {found.measure} {_of(found, name)}?",
           *_numbers(value, [value for _, value, _ in found.items], generator))]


def _extreme(found: _Slice, generator: np.random.Generator) -> list[Asked]:
  """The wrong answers are the next in order."""
  asked = []
  scatter = found.chart.kind == "scatter"
  if len(found.items) < 2:
    return []
  for word, sign in (("highest", -1), ("lowest", 1)):
    ranked = sorted(found.items, key=lambda item, sign=sign: sign * item[1])
    if scatter and word == "lowest":
      continue
    stem = (f"Which {found.noun} has the highest point?" if scatter else
            f"Which {found.noun} has the {word} {found.measure}{found.at}?")
    if ranked[0][1] != ranked[1][1]:
      asked.append(("extreme", stem, ranked[0][0], [item[0] for item in ranked[1:]] + _mixed(found.spare, generator)))
  return asked


def _compare(found: _Slice, generator: np.random.Generator) -> list[Asked]:
  """A difference of two, and of five or more the highest of four that are not the highest of all."""
  if found.chart.kind == "scatter":
    return []
  asked = []
  pairs = [(a, b) for a in found.items for b in found.items if a[1] > b[1]]
  if pairs:
    high, low = pairs[generator.integers(len(pairs))]
    stem = (f"By how much is the {found.measure} {_of(found, high[0])} higher than {_of(found, low[0], short=True)}?")
    asked.append(("compare", stem, *_numbers(high[1] - low[1], [a[1] - b[1] for a, b in pairs], generator)))
  ranked = sorted(found.items, key=lambda item: -item[1])
  if len(ranked) > 4:
    four = [ranked[1:][i] for i in sorted(generator.permutation(len(ranked) - 1)[:4])]
    if four[0][1] > four[1][1]:
      asked.append(("compare", f"Which of these has the highest {found.measure}{found.at}?", four[0][0],
                    [item[0] for item in four[1:]]))
  return asked


def _trend(found: _Slice, generator: np.random.Generator) -> list[Asked]:
  chart = found.chart
  if chart.kind == "scatter":
    tendency = _tendency(chart.marks)
    options = ["it rises", "it falls", "it shows no clear trend"]
    stem = f"How does \"{chart.y_label}\" change as \"{chart.x_label}\" rises?"
    return [("trend", stem, f"it {tendency}", [o for o in options if o != f"it {tendency}"])] if tendency else []
  if chart.kind != "line":
    return []
  mark = chart.marks[generator.integers(len(chart.marks))]
  change = mark.y[-1] - mark.y[0]
  if not change:
    return []
  gold, others = _numbers(abs(change), [abs(a - b) for m in chart.marks for a in m.y for b in m.y], generator)
  # Each amount with both directions, so that neither gives the other away.
  words = ("rises", "falls") if change > 0 else ("falls", "rises")
  options = [f"it {words[1]} by {gold}", f"it {words[0]} by {others[0]}", f"it {words[1]} by {others[0]}"]
  name = f" of {mark.name}" if len(chart.marks) > 1 else ""
  return [("trend", f"How does the {found.measure}{name} change from {mark.x[0]} to {mark.x[-1]}?",
           f"it {words[0]} by {gold}", options)]


def _color(found: _Slice, generator: np.random.Generator) -> list[Asked]:
  marks = found.chart.marks
  shown = [mark.color for mark in marks]
  rest = _mixed(sorted(set(chart_drawing.PALETTES[0]) - set(shown)), generator)
  if found.chart.legend:
    gold = marks[generator.integers(len(marks))]
    others = _mixed([color for color in shown if color != gold.color], generator) + rest
    return [("legend", f"What color stands for {gold.name}?", gold.color, others)]
  if len(set(shown)) == 1:
    return [("color", f"What color {_plural(found)}?", shown[0], rest)]
  return []


def _plural(found: _Slice) -> str:
  return {"bar": "are the bars", "line": "is the line", "scatter": "are the points"}[found.chart.kind]


def _axes(found: _Slice, generator: np.random.Generator) -> list[Asked]:
  chart = found.chart
  if chart.kind == "pie":
    return []
  labels = {_axis(grid) for grid in _GRIDS} | {label for cloud in _CLOUDS for label in (cloud.x, cloud.y)}
  asked = []
  for name, label, other in (("x", chart.x_label, chart.y_label), ("y", chart.y_label, chart.x_label)):
    if chart.kind == "scatter" or label == chart.y_label:
      if chart.horizontal:
        name = "x"
      others = [other] * (chart.kind == "scatter") + _mixed(sorted(labels - {label, other}), generator)
      asked.append(("axis", f"What does the {name} axis show?", label, others))
  return asked


def _count(found: _Slice, generator: np.random.Generator) -> list[Asked]:
  chart, values = found.chart, sorted(value for _, value, _ in found.items)
  if chart.kind == "scatter" and len(chart.marks) == 1:
    return [("count", "How many points are there?", *_counts(len(chart.marks[0].y), 1, generator))]
  one_line = chart.kind == "line" and len(chart.marks) == 1
  what = {"scatter": "groups of points are in the legend", "pie": "slices does the pie have", "bar": "bars are there",
          "line": "points does the line have" if one_line else "lines are there"}[chart.kind]
  size = len(chart.marks[0].y) if one_line else len(chart.marks)
  asked = [("count", f"How many {what}?", *_counts(size, 1, generator))]
  if chart.kind == "bar" or one_line:
    place = int(generator.integers(1, len(values)))
    if values[place - 1] < values[place]:
      limit = f"{values[place - 1]:,}"
      asked.append(("count", f"How many {'points' if one_line else 'bars'} are above {limit}?",
                    *_counts(len(values) - place, 0, generator)))
  return asked


def _of(found: _Slice, name: str, short: bool = False) -> str:
  """How a question says whose value it means."""
  if found.view.shape == "along":
    return f"{'at' if found.view.source.column == 'hour' else 'in'} {name}"
  return f"for {name}" + ("" if short else found.at)


def _numbers(gold: Decimal, shown: list[Decimal], generator: np.random.Generator) -> tuple[str, list[str]]:
  """The right number and three wrong ones: two of the chart (or like them) and one a few last digits off.

  That one stands by the right number in half of the questions and by one of the others in the rest,
  so that a pair of near numbers says nothing about which is right.
  """
  step = Decimal(1).scaleb(gold.as_tuple().exponent)
  others = _mixed(sorted({value for value in shown if value != gold}), generator)[:2]
  taken = [gold, *others]
  while len(taken) < 3:
    off = max(abs(gold) * Decimal(f"{generator.uniform(0.1, 0.6):.3f}"), step * int(generator.integers(1, 20)))
    value = (gold + off * int(generator.choice([-1, 1]))).quantize(step)
    if value not in taken and (value >= 0 or gold < 0):
      taken.append(value)
  base = taken[0] if generator.random() < 0.5 else taken[1 + int(generator.integers(2))]
  while len(taken) < 4:
    value = base + step * int(generator.integers(1, 10)) * int(generator.choice([-1, 1]))
    if value not in taken and (value >= 0 or base < 0):
      taken.append(value)
  texts = [f"{value:,}" for value in taken]
  return texts[0], _mixed(texts[1:], generator)


def _counts(gold: int, least: int, generator: np.random.Generator) -> tuple[str, list[str]]:
  """Four numbers in a row, the right one at any place."""
  first = max(least, gold - int(generator.integers(_MAX_OPTIONS)))
  return str(gold), [str(n) for n in range(first, first + _MAX_OPTIONS) if n != gold]


def _mixed(names: Sequence, generator: np.random.Generator) -> list:
  return [names[i] for i in generator.permutation(len(names))]


def _other_titles(view: _View, titles: dict[str, set[str]], generator: np.random.Generator) -> list[str]:
  """Titles of the same wording first."""
  alike = _mixed(sorted(titles[_template(view)] - {view.title}), generator)
  rest = {title for found in titles.values() for title in found} - titles[_template(view)]
  return alike if len(alike) >= _MAX_OPTIONS - 1 else alike + _mixed(sorted(rest), generator)


def _capital(text: str) -> str:
  return text[:1].upper() + text[1:]


def _axis(grid: _Grid) -> str:
  return _capital(grid.measure) + (f" ({grid.unit})" if grid.unit else "")


# Slices -> descriptions.


def _description(found: _Slice) -> str:
  chart, marks = found.chart, found.chart.marks
  form = ("horizontal " if chart.horizontal else "vertical ") if chart.kind == "bar" else ""
  said = [f"{_capital(_TYPES[chart.kind]).replace('A ', f'A {form}')} titled \"{chart.title}\"."]
  if chart.kind == "pie":
    said.append(f"Its {len(marks)} slices show \"{chart.y_label}\".")
  else:
    x, y = (chart.y_label, chart.x_label) if chart.horizontal else (chart.x_label, chart.y_label)
    said.append(f"The x axis shows \"{x}\", the y axis \"{y}\".")
  colors = {mark.color for mark in marks}
  if chart.kind == "scatter":
    said += _cloud_description(found)
  elif chart.kind == "line" and len(marks) > 1:
    said.append(f"There are {len(marks)} lines from {marks[0].x[0]} to {marks[0].x[-1]}.")
    for mark in marks:
      said.append(f"{mark.name} ({mark.color}) {_change(mark)}, from {mark.labels[0]} to {mark.labels[-1]}.")
  else:
    if chart.kind == "line":
      said.append(f"The {marks[0].color} line has {len(found.items)} points and {_change(marks[0])} "
                  f"from {marks[0].x[0]} to {marks[0].x[-1]}.")
    elif chart.kind == "bar":
      said.append(f"There are {len(marks)} {marks[0].color + ' ' if len(colors) == 1 else ''}bars.")
    shade = {mark.name: f" ({mark.color})" if chart.legend else "" for mark in marks}
    said.append("; ".join(f"{name}{shade.get(name, '')} {label}" for name, _, label in found.items) + ".")
  if chart.kind != "scatter":
    said += [f"{_capital(word)}{found.at}: {name}." for word, name in _ends(found)]
  return " ".join(said)


def _cloud_description(found: _Slice) -> list[str]:
  chart, marks = found.chart, found.chart.marks
  if len(marks) > 1:
    said = [f"Its {len(marks)} groups: " + ", ".join(f"{mark.name} ({mark.color})" for mark in marks) + "."]
  else:
    said = [f"It has {len(marks[0].y)} {marks[0].color} points."]
  for word, pick in (("highest", max), ("lowest", min)):
    value, name = pick((value, mark.name) for mark in marks for value in mark.y)
    said.append(f"The {word} point is labelled {value:,}{f' ({name})' if len(marks) > 1 else ''}.")
  tendency = _tendency(marks)
  return said + ([f"\"{chart.y_label}\" {tendency} as \"{chart.x_label}\" rises."] if tendency else [])


def _change(mark: chart_drawing.Mark) -> str:
  change = mark.y[-1] - mark.y[0]
  return f"{'rises' if change > 0 else 'falls'} by {abs(change):,}" if change else "ends where it starts"


def _ends(found: _Slice) -> list[tuple[str, str]]:
  ranked = sorted(found.items, key=lambda item: item[1])
  ends = [("highest", ranked[-1][0])] if ranked[-1][1] > ranked[-2][1] else []
  return ends + ([("lowest", ranked[0][0])] if ranked[0][1] < ranked[1][1] else [])


# Plain charts: what colours alone say.

_PLAIN = {  # by kind: the noun, what the most and the least of them are called, and the question word's verb
  "bar": ("bar", "tallest", "shortest", "taller"), "pie": ("slice", "largest", "smallest", "larger"),
  "line": ("line", "highest at the end", "lowest at the end", "higher at the end"),
  "scatter": ("color", "highest", "lowest", "higher"),
}  # fmt: skip


def _plain_ranked(found: _Slice) -> list[chart_drawing.Mark]:
  value = {"line": lambda mark: mark.y[-1], "scatter": lambda mark: _mean(mark.y)}
  return sorted(found.chart.marks, key=value.get(found.chart.kind, lambda mark: mark.y[0]), reverse=True)


def _plain_direction(found: _Slice, mark: chart_drawing.Mark) -> str:
  if found.chart.kind == "scatter":
    return _tendency((mark,))
  return "rises" if mark.y[-1] > mark.y[0] else "falls"


def _plain_questions(found: _Slice, generator: np.random.Generator) -> list[Asked]:
  kind = found.chart.kind
  noun, most, least, more = _PLAIN[kind]
  ranked = _plain_ranked(found)
  shown = [mark.color for mark in ranked]
  spare = _mixed(sorted(set(chart_drawing.PLAIN_COLORS) - set(shown)), generator)
  asked = [
    ("chart/type", "what kind of chart is this?", _TYPES[kind], [t for t in _TYPES.values() if t != _TYPES[kind]]),
    ("count", f"how many {noun}s are there?", *_counts(len(ranked), 1, generator)),
  ]
  if len(ranked) > 1:
    for word, order in ((most, shown), (least, shown[::-1])):
      asked.append(("extreme", f"which {noun} is {word}?", order[0], order[1:] + spare))
    first, second = sorted(generator.permutation(len(ranked))[:2])
    pair = _mixed([shown[first], shown[second]], generator)
    asked.append(("compare", f"which is {more}, {pair[0]} or {pair[1]}?", shown[first], [shown[second]]))
  else:
    asked.append(("color", f"what color {'are the dots' if kind == 'scatter' else 'is the line'}?", shown[0], spare))
  if kind == "line" or len(ranked) == 1:
    mark = ranked[generator.integers(len(ranked))]
    goes = _plain_direction(found, mark)
    what = f"does the {mark.color} line" if kind == "line" else "do the dots"
    asked.append(("trend", f"{what} rise or fall?", goes, ["falls" if goes == "rises" else "rises"]))
  if len(asked) > _MAX_QUESTIONS:  # several lines: drop one of the two extremes
    asked.pop(int(generator.integers(2, 4)))
  return asked


def _plain_description(found: _Slice) -> str:
  """Few and always the same words."""
  kind = found.chart.kind
  noun, most, least, _ = _PLAIN[kind]
  ranked = _plain_ranked(found)
  shown = [mark.color for mark in ranked]
  said = [f"{_TYPES[kind]} with {len(ranked)} {noun}{'s' if len(ranked) > 1 else ''}"]
  if len(ranked) == 1:
    return f"{said[0]}: {shown[0]}. {shown[0]} {_plain_direction(found, ranked[0])}."
  said.append(f"from {most} to {least}: {', '.join(shown)}")
  said += [f"{mark.color} {_plain_direction(found, mark)}" for mark in ranked if kind == "line"]
  return ". ".join([*said, f"{shown[0]} is {most}", f"{shown[-1]} is {least}"]) + "."
