"""Records of vega_datasets' tables -> cells of a grid, points of a cloud."""

import dataclasses
import decimal
from collections.abc import Callable, Iterable

MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
LONG_MONTHS = (
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


COMPANIES = {
  "MSFT": "Microsoft",
  "AMZN": "Amazon",
  "IBM": "IBM",
  "GOOG": "Google",
  "AAPL": "Apple",
}
MAKES = {
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
INDUSTRIES = {
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
REGIONS = {
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
STATES = {
  state[:2]: (region, state[3:])
  for region, states in REGIONS.items()
  for state in states.split(",")
}


def block(year: str | None, first: int, size: int, last: int) -> str:
  start = first + size * ((int(year[:4]) - first) // size)
  return f"{start} to {min(start + size - 1, last)}"


def thousandth(number: str | None) -> Decimal:
  return Decimal(number) / 1000


def month_name(date: str) -> str:
  return MONTHS[int(date[5:7]) - 1]


def weather(column: str) -> Callable:
  return lambda file, i, r: [(r["date"][:4], "all", month_name(r["date"]), r[column])]


def temperatures(file: str, i: int, r: Record):
  hour = int(r["date"][11:13])
  if hour % 3 == 0:
    city = {"sf-temps.csv": "San Francisco", "seattle-temps.csv": "Seattle"}[file]
    yield LONG_MONTHS[int(r["date"][5:7]) - 1], city, f"{hour}:00", r["temp"]


def car(column: str | None) -> Callable:
  def cells(file, i, r):
    make = MAKES.get(r["Name"].split()[0])
    return [(r["Year"][:4], make, "", r[column] if column else "1")] if make else []

  return cells


def flower(i: int) -> str:
  # the file has 50 of each species in a row
  return f"flowers {i % 50 // 10 * 10 + 1} to {i % 50 // 10 * 10 + 10}"


def season(file: str, i: int, r: Record):
  month = int(r["date"][5:7])
  if month % 3 == 1:
    yield r["date"][:4], LONG_MONTHS[month - 1], r["temp_min"], r["temp_max"]
