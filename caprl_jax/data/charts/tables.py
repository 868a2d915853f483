"""Tables of vega_datasets: what is in each, and what its charts may show."""

import dataclasses
import decimal
from collections.abc import Callable, Iterable

_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
_LONG_MONTHS = (
  "January February March April May June July August September October November December".split()
)

Decimal = decimal.Decimal
Record = dict[str, str | None]


def capital(text: str) -> str:
  return text[:1].upper() + text[1:]


@dataclasses.dataclass(frozen=True)
class Grid:
  """A table as categories by columns. `cells` turns a record into (key, category, column, number or
  None).

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

  @property
  def axis(self) -> str:
    return capital(self.measure) + (f" ({self.unit})" if self.unit else "")


@dataclasses.dataclass(frozen=True)
class Cloud:
  """A table as points in groups. `points` turns a record into (key, group, x, y)."""

  files: tuple[str, ...]
  points: Callable[[str, int, Record], Iterable[tuple[str, str, str | None, str | None]]]
  x: str
  y: str
  noun: str  # of a group
  title: str


_COMPANIES = {
  "MSFT": "Microsoft",
  "AMZN": "Amazon",
  "IBM": "IBM",
  "GOOG": "Google",
  "AAPL": "Apple",
}
_MAKES = {
  "ford": "Ford",
  "chevrolet": "Chevrolet",
  "plymouth": "Plymouth",
  "dodge": "Dodge",
  "amc": "AMC",
  "toyota": "Toyota",
  "datsun": "Datsun",
  "buick": "Buick",
  "pontiac": "Pontiac",
  "volkswagen": "Volkswagen",
  "honda": "Honda",
  "mercury": "Mercury",
  "mazda": "Mazda",
  "oldsmobile": "Oldsmobile",
  "fiat": "Fiat",
  "peugeot": "Peugeot",
  "audi": "Audi",
  "volvo": "Volvo",
  "saab": "Saab",
  "subaru": "Subaru",
  "opel": "Opel",
}
_INDUSTRIES = {
  "construction": "construction",
  "manufacturing": "manufacturing",
  "retail_trade": "retail",
  "wholesale_trade": "wholesale",
  "transportation_and_warehousing": "transport",
  "information": "information",
  "financial_activities": "finance",
  "professional_and_business_services": "business services",
  "education_and_health_services": "education and health",
  "leisure_and_hospitality": "leisure",
  "government": "government",
  "mining_and_logging": "mining and logging",
}
_REGIONS = {
  "New England": "CT Connecticut,ME Maine,MA Massachusetts,NH New Hampshire,RI Rhode Island,VT "
  "Vermont",
  "the Middle Atlantic and Maryland": "NJ New Jersey,NY New York,PA Pennsylvania,DE Delaware,MD "
  "Maryland",
  "the South Atlantic": "FL Florida,GA Georgia,NC North Carolina,SC South Carolina,VA Virginia,WV "
  "West Virginia",
  "the South Central states": "AL Alabama,KY Kentucky,MS Mississippi,TN Tennessee,AR Arkansas,LA "
  "Louisiana,OK Oklahoma,TX Texas",
  "the Great Lakes": "IL Illinois,IN Indiana,MI Michigan,OH Ohio,WI Wisconsin,MN Minnesota",
  "the Plains": "IA Iowa,KS Kansas,MO Missouri,NE Nebraska,ND North Dakota,SD South Dakota",
  "the Mountain states": "AZ Arizona,CO Colorado,ID Idaho,MT Montana,NV Nevada,NM New Mexico,UT "
  "Utah,WY Wyoming",
  "the Pacific states": "AK Alaska,CA California,HI Hawaii,OR Oregon,WA Washington",
}
_STATES = {
  state[:2]: (region, state[3:])
  for region, states in _REGIONS.items()
  for state in states.split(",")
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
  # the file has 50 of each species in a row
  return f"flowers {i % 50 // 10 * 10 + 1} to {i % 50 // 10 * 10 + 10}"


def _iris(part: str, size: str) -> Grid:
  return Grid(
    ("iris.json",),
    lambda file, i, r: [(_flower(i), r["species"], "", r[part + size])],
    f"mean {part} {size.lower()}",
    "cm",
    2,
    "species",
    across=f"Mean {part} {size.lower()} of iris species, {{key}}",
  )


def _season(file: str, i: int, r: Record):
  month = int(r["date"][5:7])
  if month % 3 == 1:
    yield r["date"][:4], _LONG_MONTHS[month - 1], r["temp_min"], r["temp_max"]


_CARS = ("cars.json",)
_SEATTLE = ("seattle-weather.csv",)
GRIDS = (
  Grid(
    ("stocks.csv",),
    lambda file, i, r: [(r["date"][-4:], _COMPANIES[r["symbol"]], r["date"][:3], r["price"])],
    "share price",
    "US dollars",
    1,
    "company",
    "Share prices of technology companies, {column} {key}",
    "Share price of {row} by month, {key}",
    "Share prices of technology companies, {key}",
    "month",
  ),
  Grid(
    _SEATTLE,
    lambda file, i, r: [
      (r["date"][:4], row, _month(r["date"]), r[column])
      for row, column in (("daily high", "temp_max"), ("daily low", "temp_min"))
    ],
    "mean temperature",
    "°C",
    1,
    "line",
    "",
    "Mean {row} in Seattle by month, {key}",
    "Temperatures in Seattle by month, {key}",
    "month",
  ),
  Grid(
    _SEATTLE,
    _weather("precipitation"),
    "precipitation",
    "mm",
    0,
    "",
    "",
    "Precipitation in Seattle by month, {key}",
    column="month",
    total=True,
  ),
  Grid(
    _SEATTLE,
    _weather("wind"),
    "mean wind speed",
    "m/s",
    2,
    "",
    "",
    "Mean wind speed in Seattle by month, {key}",
    column="month",
  ),
  Grid(
    _SEATTLE,
    lambda file, i, r: [(r["date"][:4], r["weather"], _month(r["date"]), "1")],
    "number of days",
    "",
    0,
    "weather",
    "Weather in Seattle, {column} {key}",
    "Days of {row} in Seattle by month, {key}",
    "",
    "month",
    total=True,
  ),
  Grid(
    ("sf-temps.csv", "seattle-temps.csv"),
    _temperatures,
    "mean temperature",
    "°F",
    1,
    "city",
    "",
    "Mean temperature in {row} by hour, {key} 2010",
    "Mean temperature by hour, {key} 2010",
    "hour",
  ),
  Grid(
    _CARS,
    _car("Miles_per_Gallon"),
    "mean fuel economy",
    "miles per gallon",
    1,
    "make",
    "Mean fuel economy by make, {key} cars",
  ),
  Grid(
    _CARS,
    _car("Horsepower"),
    "mean horsepower",
    "",
    1,
    "make",
    "Mean horsepower by make, {key} cars",
  ),
  Grid(
    _CARS,
    _car("Weight_in_lbs"),
    "mean weight",
    "pounds",
    0,
    "make",
    "Mean weight by make, {key} cars",
  ),
  Grid(
    _CARS,
    _car("Acceleration"),
    "mean acceleration time",
    "seconds",
    1,
    "make",
    "Mean acceleration time by make, {key} cars",
  ),
  Grid(
    _CARS,
    _car(None),
    "number of models",
    "",
    0,
    "make",
    "Number of car models by make, {key}",
    total=True,
  ),
  Grid(
    _CARS,
    lambda file, i, r: [(r["Year"][:4], r["Origin"], "", "1")],
    "number of models",
    "",
    0,
    "origin",
    "Number of car models by origin, {key}",
    total=True,
  ),
  *(_iris(part, size) for part in ("petal", "sepal") for size in ("Length", "Width")),
  Grid(
    ("barley.json",),
    lambda file, i, r: [(f"{r['site']} {r['year']}", r["variety"], "", r["yield"])],
    "barley yield",
    "bushels per acre",
    1,
    "variety",
    "Barley yield by variety, {key}",
  ),
  Grid(
    ("wheat.json",),
    lambda file, i, r: [(_block(r["year"], 1565, 40, 1821), "all", r["year"], r["wheat"])],
    "wheat price",
    "shillings per quarter",
    1,
    "",
    "",
    "Price of wheat in England, {key}",
    column="year",
  ),
  Grid(
    ("wheat.json",),
    lambda file, i, r: [(_block(r["year"], 1565, 40, 1821), "all", r["year"], r.get("wages"))],
    "weekly wage",
    "shillings",
    2,
    "",
    "",
    "Weekly wage of a mechanic in England, {key}",
    column="year",
  ),
  Grid(
    ("us-employment.csv",),
    lambda file, i, r: [
      (r["month"][:4], name, _month(r["month"]), _thousandth(r[column]))
      for column, name in _INDUSTRIES.items()
    ],
    "number of jobs",
    "millions",
    2,
    "industry",
    "US jobs by industry, {column} {key}",
    "US jobs in {row} by month, {key}",
    "US jobs by industry and month, {key}",
    "month",
    total=True,
  ),
  Grid(
    ("iowa-electricity.csv",),
    lambda file, i, r: [
      (
        _block(r["year"], 2001, 6, 2017),
        r["source"].lower(),
        r["year"][:4],
        _thousandth(r["net_generation"]),
      )
    ],
    "electricity generation",
    "million MWh",
    1,
    "source",
    "Electricity generation in Iowa by source, {column}",
    "Electricity from {row} in Iowa, {key}",
    "Electricity generation in Iowa, {key}",
    "year",
    total=True,
  ),
  Grid(
    ("airports.csv",),
    lambda file, i, r: [(*_STATES[r["state"]], "", "1")] if r["state"] in _STATES else [],
    "number of airports",
    "",
    0,
    "state",
    "Airports by state in {key}",
    total=True,
  ),
  Grid(
    ("driving.json",),
    lambda file, i, r: [(_block(r["year"], 1956, 11, 2010), "all", r["year"], r["miles"])],
    "distance driven per person",
    "miles",
    0,
    "",
    "",
    "Miles driven per person in the US, {key}",
    column="year",
  ),
  Grid(
    ("driving.json",),
    lambda file, i, r: [(_block(r["year"], 1956, 11, 2010), "all", r["year"], r["gas"])],
    "gasoline price",
    "dollars per gallon",
    2,
    "",
    "",
    "Price of gasoline in the US, {key}",
    column="year",
  ),
)
CLOUDS = (
  Cloud(
    _CARS,
    lambda file, i, r: [(r["Year"][:4], r["Origin"], r["Horsepower"], r["Miles_per_Gallon"])],
    "Horsepower",
    "Miles per gallon",
    "origin",
    "Horsepower and fuel economy of {key} cars",
  ),
  Cloud(
    _CARS,
    lambda file, i, r: [(r["Year"][:4], r["Origin"], r["Weight_in_lbs"], r["Acceleration"])],
    "Weight (pounds)",
    "Acceleration time (seconds)",
    "origin",
    "Weight and acceleration of {key} cars",
  ),
  Cloud(
    _CARS,
    lambda file, i, r: [
      (r["Year"][:4], f"{r['Cylinders']} cylinders", r["Displacement"], r["Weight_in_lbs"])
    ],
    "Displacement (cubic inches)",
    "Weight (pounds)",
    "number of cylinders",
    "Displacement and weight of {key} cars",
  ),
  Cloud(
    ("iris.json",),
    lambda file, i, r: [(_flower(i), r["species"], r["petalLength"], r["petalWidth"])],
    "Petal length (cm)",
    "Petal width (cm)",
    "species",
    "Petals of three iris species, {key}",
  ),
  Cloud(
    ("iris.json",),
    lambda file, i, r: [(_flower(i), r["species"], r["sepalLength"], r["petalLength"])],
    "Sepal length (cm)",
    "Petal length (cm)",
    "species",
    "Sepals and petals of three iris species, {key}",
  ),
  Cloud(
    _SEATTLE,
    _season,
    "Daily low (°C)",
    "Daily high (°C)",
    "month",
    "Daily temperatures in Seattle, {key}",
  ),
  Cloud(
    ("driving.json",),
    lambda file, i, r: [(_block(r["year"], 1956, 11, 2010), "all", r["gas"], r["miles"])],
    "Gasoline price (dollars per gallon)",
    "Miles driven per person",
    "",
    "Gasoline price and driving, {key}",
  ),
  Cloud(
    ("anscombe.json",),
    lambda file, i, r: [(r["Series"], "all", r["X"], r["Y"])],
    "First variable",
    "Second variable",
    "",
    "Anscombe's quartet, series {key}",
  ),
)
