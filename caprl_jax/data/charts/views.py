"""The tables -> views, each one way to show one key's numbers; split into train and test."""

import csv
import dataclasses
import decimal
import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Iterator, Sequence

from caprl_jax.data.charts import drawing as chart_drawing
from caprl_jax.data.charts.cells import Cloud, Grid, Record
from caprl_jax.data.charts.tables import CLOUDS, GRIDS

Decimal = decimal.Decimal


@dataclasses.dataclass(frozen=True)
class View:
  """One way to show one key's numbers; what is left to draw is which categories or which window of
  columns.

  `shape` is across, along, together (titles of `Grid`) or cloud; `fixed` the column of an `across`
  view, the category of an `along` view. `numbers` are a grid's by category and column, a cloud's
  points by group.
  """

  source: Grid | Cloud
  key: str
  shape: str
  fixed: str
  numbers: dict

  @property
  def template(self) -> str:
    return self.source.title if isinstance(self.source, Cloud) else getattr(self.source, self.shape)

  @property
  def title(self) -> str:
    return self.template.format(key=self.key, row=self.fixed, column=self.fixed)


@dataclasses.dataclass(frozen=True)
class Slice:
  """A chart and what its questions need beside it.

  `items` are (name, value, label) of what can be compared: bars, slices, the points of a single
  line, the ends of several, a group's highest point. `noun` is theirs, `at` says where they stand
  (" in Dec"). `spare` names belong to the same table but are not shown.
  """

  chart: chart_drawing.Chart
  view: View
  measure: str
  noun: str
  at: str
  items: tuple[tuple[str, Decimal, str], ...]
  spare: tuple[str, ...]


def data_root() -> pathlib.Path:
  """The folder of the package's tables. Raises ValueError when it, or matplotlib, is not
  installed.
  """
  for package in ("matplotlib", "vega_datasets"):
    # Found, not imported: vega_datasets would import pandas.
    spec = importlib.util.find_spec(package)
    if spec is None:
      raise ValueError(
        f"charts need the package {package}, which is not installed; run `pip install {package}`"
      )
  root = pathlib.Path(spec.submodule_search_locations[0]) / "_data"
  if not root.is_dir():
    raise ValueError(
      f"vega_datasets has no folder {root}; run `pip install --force-reinstall vega_datasets`"
    )
  return root


def read_views(root: pathlib.Path) -> list[View]:
  """Every view of every table."""
  files = {name: _records(root / name) for source in (*GRIDS, *CLOUDS) for name in source.files}
  found = []
  for cloud in CLOUDS:
    clouds: dict[str, dict[str, list]] = {}
    for name, i, record in _each(cloud, files):
      for key, group, x, y in cloud.points(name, i, record):
        if x is not None and y is not None:
          clouds.setdefault(key, {}).setdefault(group, []).append((Decimal(x), Decimal(y)))
    found += [View(cloud, key, "cloud", "", groups) for key, groups in clouds.items()]
  for grid in GRIDS:
    keys: dict[str, dict[str, dict[str, list]]] = {}
    for name, i, record in _each(grid, files):
      for key, row, column, number in grid.cells(name, i, record):
        if number is not None:
          keys.setdefault(key, {}).setdefault(row, {}).setdefault(column, []).append(
            Decimal(number)
          )
    for key, cells in keys.items():
      numbers = {
        row: {column: _number(cell, grid) for column, cell in line.items()}
        for row, line in cells.items()
      }
      found += _grid_views(grid, key, numbers)
  return found


def _records(file: pathlib.Path) -> list[Record]:
  """Numbers stay as they are written, so that sums and means are exact."""
  if file.suffix == ".json":
    return json.loads(file.read_text("utf-8"), parse_float=str, parse_int=str)
  with file.open(encoding="utf-8", newline="") as lines:
    return list(csv.DictReader(lines))


def _each(
  source: Grid | Cloud, files: dict[str, list[Record]]
) -> Iterator[tuple[str, int, Record]]:
  return ((name, i, record) for name in source.files for i, record in enumerate(files[name]))


def _number(cell: list[Decimal], grid: Grid) -> Decimal:
  return round(sum(cell) if grid.total else sum(cell) / len(cell), grid.places)


def _grid_views(grid: Grid, key: str, numbers: dict[str, dict[str, Decimal]]) -> list[View]:
  columns = dict.fromkeys(column for line in numbers.values() for column in line)
  found = [View(grid, key, "across", column, numbers) for column in columns] if grid.across else []
  found += [View(grid, key, "along", row, numbers) for row in numbers] if grid.along else []
  return found + ([View(grid, key, "together", "", numbers)] if grid.together else [])


def split_views(views: Sequence[View], split: str) -> list[View]:
  """A quarter of each table's keys, those of smallest hash, are for tests. Views of two keys share
  no number.
  """
  keys: dict[str, set[str]] = {}
  for view in views:
    keys.setdefault(view.source.files[0], set()).add(view.key)
  test = set()
  for file, found in keys.items():
    # Not hash(): it differs from process to process.
    ranked = sorted(
      found, key=lambda key, file=file: hashlib.sha256(f"{file}/{key}".encode()).digest()
    )
    test |= {(file, key) for key in ranked[: max(1, len(ranked) // 4)]}
  return [view for view in views if ((view.source.files[0], view.key) in test) == (split == "test")]


def pools_of(views: list[View], kind: str) -> list[list[list[View]]]:
  """The views that make charts of a kind, by source (each is drawn equally often); single lines and
  several apart.
  """
  shapes = {
    "bar": [("across", "along")],
    "line": [("along",), ("together",)],
    "scatter": [("cloud",)],
    "pie": [("across",)],
  }
  found = []
  for allowed in shapes[kind]:
    sources: dict[int, list[View]] = {}
    for view in views:
      if view.shape in allowed and (kind != "pie" or view.source.total):
        sources.setdefault(id(view.source), []).append(view)
    found.append(list(sources.values()))
  return found
