"""One list of bad rows: refused all at once, or dropped and counted."""

import json

import jax
import pytest

from caprl_jax.data.bad_rows import SHOWN, BadRowList
from caprl_jax.data.rows import BadRow, good_rows


def bad(i, reason="damaged image") -> BadRow:
  return BadRow(f"rows.jsonl:{i}", f"rows.jsonl:{i}: it is bad", reason)


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_dropped_ones_are_counted_by_reason_and_listed(tmp_path, caplog):
  path = tmp_path / "work" / "bad_rows.jsonl"
  some = BadRowList("drop", path, "--config.data.bad_rows")
  assert good_rows(["a", bad(2), "b", "c"], some) == ["a", "b", "c"]
  # a second split of the same file, and a check of rows that were counted
  assert good_rows(["a", bad(2)], some) == ["a"]
  assert some.check(["a", bad(4, "too narrow"), "c"]) == ["a", "c"]
  some.settle()
  said = caplog.messages[-1]
  assert said.startswith("dropped 3 of 6 rows (damaged image: 2, too narrow: 1); all are in ")
  assert said.endswith("bad_rows.jsonl (--config.data.bad_rows=drop)")
  assert caplog.text.count("dropped: rows.jsonl:2: it is bad") == 1
  assert read(path) == [
    {"where": "rows.jsonl:2", "message": "rows.jsonl:2: it is bad", "reason": "damaged image"},
    {"where": "rows.jsonl:4", "message": "rows.jsonl:4: it is bad", "reason": "too narrow"},
  ]
  before = len(caplog.messages)
  some.settle()
  assert len(caplog.messages) == before  # nothing new


def test_refused_ones_are_shown_together(tmp_path):
  path = tmp_path / "bad_rows.jsonl"
  some = BadRowList("refuse", path)
  some.keep(["a", *(bad(i) for i in range(SHOWN + 5))])
  with pytest.raises(ValueError, match=r"25 bad rows of 26 \(bad_rows=drop leaves") as raised:
    some.settle()
  said = str(raised.value)
  assert said.count("it is bad") == SHOWN and "and 5 more" in said and str(path) in said
  assert len(read(path)) == SHOWN + 5
  one = BadRowList("refuse", None)
  one.keep(["a", bad(1)])
  with pytest.raises(ValueError, match="^rows.jsonl:1: it is bad .bad_rows=drop leaves it out.$"):
    one.settle()


@pytest.mark.parametrize("rule", ["refuse", "drop"])
def test_none_left_is_said_with_the_reasons(rule, tmp_path):
  some = BadRowList(rule, tmp_path / "bad_rows.jsonl")
  with pytest.raises(
    ValueError, match="none of 2 rows can be used: damaged image: 2\n  rows.jsonl:1"
  ):
    some.keep([bad(1), bad(2)])
  assert len(read(tmp_path / "bad_rows.jsonl")) == 2


def test_no_file_where_no_row_is_bad(tmp_path):
  path = tmp_path / "bad_rows.jsonl"
  path.write_text("of an earlier start\n")
  some = BadRowList("refuse", path)
  assert some.keep(["a"]) == ["a"]
  some.settle()
  assert not path.exists()


def test_each_process_lists_what_failed_there(tmp_path, monkeypatch):
  path, late = tmp_path / "bad_rows.jsonl", tmp_path / "bad_rows.1.jsonl"
  monkeypatch.setattr(jax, "process_count", lambda: 2)

  def process(number):
    monkeypatch.setattr(jax, "process_index", lambda: number)
    some = BadRowList("drop", path)
    some.keep(["a", bad(2)])
    some.settle()
    return some

  process(1).late(bad(7))
  process(0)
  assert [row["where"] for row in read(path)] == ["rows.jsonl:2"]
  assert [row["where"] for row in read(late)] == ["rows.jsonl:7"]
  process(1)  # of a run that begins: nothing has failed
  assert not late.exists()
  process(1).another("drop", "other").late(bad(8))
  monkeypatch.setattr(jax, "process_count", lambda: 1)
  process(0)  # a run of one process leaves no file of another's
  assert [one.name for one in tmp_path.iterdir()] == ["bad_rows.jsonl"]
