"""docs/configuration.md: its table is that of today, and every key has a meaning."""

import dataclasses
import re

import pytest
from helpers.paths import ROOT

from caprl_jax.config import keys, reference, registry

PAGE = ROOT / "docs" / "configuration.md"


def test_the_table_is_current():
  """`python -m caprl_jax.config.reference docs/configuration.md` writes it anew."""
  text = PAGE.read_text()
  assert reference.update(text) == text


def test_every_key_has_a_meaning():
  rows = re.findall(r"^\| `([^`]+)` \| .* \| ([^|]*) \|$", reference.table(), re.MULTILINE)
  assert len(rows) > 200
  assert [key for key, meaning in rows if not meaning.strip()] == []


def test_every_key_is_in_the_table_or_in_the_section_it_refers_to():
  shown = set(re.findall(r"^\| `([^`]+)` \|", reference.table(), re.MULTILINE))
  shown |= {re.sub(r"\.NAME|\[i\]", "", key) for key in shown}
  for key in keys.keys():
    assert key in shown, key


@dataclasses.dataclass(frozen=True)
class Inner:
  """An inner section."""

  weight: float  # of the inner one, as a | b


@dataclasses.dataclass(frozen=True)
class Outer:
  """What it is for.

  steps: how many,
    and in how many lines.
  low, high: bounds
  Not an entry: of no field. It is more of what it is for.
  """

  steps: int
  low: float = 0.5
  high: float = 1.0
  inner: Inner = Inner(2.0)
  others: dict[str, Inner] = dataclasses.field(default_factory=dict)


def test_meanings_are_entries_of_the_docstring_or_comments():
  assert reference.meanings(Outer) == {
    "steps": "how many, and in how many lines.",
    "low": "bounds",
    "high": "bounds",
  }
  assert reference.purpose(Outer).startswith("What it is for. Not an entry: of no field.")
  assert reference.meanings(Inner) == {"weight": "of the inner one, as a | b"}


def test_rows_show_types_defaults_and_inner_sections():
  assert list(reference._rows(Outer, "outer")) == [
    "| `outer.steps` | an integer | required | how many, and in how many lines. |",
    "| `outer.low` | a number | `0.5` | bounds |",
    "| `outer.high` | a number | `1.0` | bounds |",
    "| `outer.inner` | a section |  |  |",
    "| `outer.inner.weight` | a number | `2.0` | of the inner one, as a \\| b |",
    "| `outer.others` | sections by name |  |  |",
    "| `outer.others.NAME.weight` | a number | required | of the inner one, as a \\| b |",
  ]


def test_a_page_without_markers_is_refused():
  with pytest.raises(ValueError, match="the page has no lines"):
    reference.update("# A page")


def test_top_level_keys_are_in_the_table():
  for name in registry.TOP_LEVEL:
    assert f"| `{name}` |" in reference.table()
