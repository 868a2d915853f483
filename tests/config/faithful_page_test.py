"""docs/faithful.md: what its cells say of presets and configs is so, and its tests are there."""

import ast
import re

import pytest
from config.values import value_of
from helpers.paths import ROOT

from caprl_jax.config import presets

TEXT = (ROOT / "docs" / "faithful.md").read_text()
VALUE = re.compile(r"((?:[a-z_]+\.)+[a-z_0-9]+)=(\S+)")
CONFIG = re.compile(r"configs/([\w/]+)\.py")


def tables():
  """Each table: its header's cells, and its rows'."""
  for block in re.findall(r"(?:^\|.*\|\n)+", TEXT, re.MULTILINE):
    head, _, *rows = (
      [cell.strip() for cell in line[1:-1].split("|")] for line in block.strip().split("\n")
    )
    yield head, rows


def spans(cell):
  return re.findall(r"`([^`]+)`", cell)


def read(text):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def said():
  """(config, preset or None, key, value) of every cell."""
  for head, rows in tables():
    for row in rows:
      if "official_caprl_3b" in head:
        cell = ""
        for preset in presets.PRESETS:
          names = (preset, f"{preset} (preset)", f"{preset} (ours)")
          cell = row[max(i for i, name in enumerate(head) if name in names)] or cell
          yield from (("caprl_3b", preset, *match) for match in of_cell(cell))
        continue
      first = CONFIG.findall(row[0])
      for cell in row:
        yield from of_configs(cell, first)


def of_cell(cell):
  return [match.groups() for span in spans(cell) if (match := VALUE.fullmatch(span))]


def of_configs(cell, first):
  """Values stand before the config that they are of, or behind it where a cell or the row begins
  with it."""
  waiting, config = [], first[0] if first else None
  leads = config is not None or bool(spans(cell) and CONFIG.fullmatch(spans(cell)[0]))
  for span in spans(cell):
    if match := CONFIG.fullmatch(span):
      yield from ((match[1], None, *value) for value in waiting)
      waiting, config = [], config if first else match[1] if leads else None
    elif match := VALUE.fullmatch(span):
      if leads:
        yield (config, None, *match.groups())
      else:
        waiting.append(match.groups())
  assert not waiting, f"{cell}: which config has {waiting}?"


SAID = [*said()]


def test_the_tables_are_read():
  assert len(SAID) > 120 and {preset for _, preset, _, _ in SAID} == {None, *presets.PRESETS}


@pytest.mark.parametrize("config, preset, key, value", SAID, ids=str)
def test_a_cell_says_what_is(config, preset, key, value):
  assert value_of(config, key.removeprefix("config."), preset) == read(value)


def test_every_row_names_a_test_that_is_there():
  for head, rows in tables():
    if "tested in" in head:
      for row in rows:
        assert len(row) == len(head), row[0]
        found = spans(row[head.index("tested in")])
        assert found and all((ROOT / path).is_file() for path in found), row[0]
