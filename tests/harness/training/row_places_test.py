"""A run that goes on has the rows in the places that they had when it was begun."""

import json
import logging

import numpy as np
import pytest

from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.batches import ImageShape, train_iterator
from caprl_jax.data.rows import QARow
from caprl_jax.data.shapes.buckets import ShapeBuckets
from caprl_jax.data.usable_rows import NextUsable
from caprl_jax.harness.training.row_places import RowPlaces, row_places


def rows(*names):
  return [QARow(b"", (), name) for name in names]


def names_of(batches):
  return [[str(name) for name in batch] for batch in batches]


def stream(some, places, broken=()):
  """Batches of the names of rows, of which the `broken` cannot be read."""

  def example(index, rng):
    rng.random()
    if some[index].name in broken:
      raise ValueError(f"row {some[index].name!r}: disk error")
    return np.array(some[index].name)

  made = NextUsable(example, some, BadRowList("drop", None), places=places.rows)
  return train_iterator(made, places.parts, 4, 0)


@pytest.mark.parametrize("weights", [(None, None), (0.7, 0.3)])
def test_a_row_that_fails_and_is_dropped_at_the_next_start_changes_no_batch(
  tmp_path, weights, caplog
):
  path, some = tmp_path / "train_rows.json", rows(*"abcdefgh")
  parts = [(5, weights[0]), (3, weights[1])]
  begun = row_places(path, some, parts, goes_on=False)
  assert begun == RowPlaces(list(range(8)), parts)
  iterator = stream(some, begun, broken=("c", "d", "h"))
  first = [next(iterator) for _ in range(3)]
  state = iterator.get_state()
  want = names_of(next(iterator) for _ in range(6))
  assert first and "e" in sum(want, [])
  # the next start drops them, and finds one that was bad before
  left = rows(*"abefgx")
  caplog.set_level(logging.WARNING)
  places = row_places(path, left, [(3, weights[0]), (3, weights[1])], goes_on=True)
  assert places == RowPlaces([0, 1, -1, -1, 2, 3, 4, -1], parts)
  assert "begun with 8 rows: 3 of them cannot be used any more" in caplog.text
  assert "1 rows are new and not used" in caplog.text
  again = stream(left, places)
  again.set_state(state)
  assert names_of(next(again) for _ in range(6)) == want


def test_rows_of_one_name_keep_their_places(tmp_path):
  path = tmp_path / "train_rows.json"
  row_places(path, rows("a", "a", "b"), [(3, None)], goes_on=False)
  assert row_places(path, rows("b", "a", "a"), [(3, None)], goes_on=True).rows == [1, 2, 0]


def test_a_new_run_forgets_and_an_old_one_without_the_file_goes_on(tmp_path):
  path = tmp_path / "train_rows.json"
  assert row_places(path, rows("a", "b"), [(2, None)], goes_on=True).rows == [0, 1]
  assert not path.exists()
  row_places(path, rows("a", "b"), [(2, None)], goes_on=False)
  assert row_places(path, rows("c"), [(1, None)], goes_on=False).rows == [0]
  with pytest.raises(ValueError, match="none of the 1 rows that this run was begun with"):
    row_places(path, rows("a"), [(1, None)], goes_on=True)
  path.write_text("[]")
  with pytest.raises(ValueError, match="is damaged"):
    row_places(path, rows("a"), [(1, None)], goes_on=True)


def test_rows_are_known_by_their_contents_wherever_they_lie(tmp_path):
  path, some = tmp_path / "train_rows.json", rows("a", "b", "c", "b")
  places = lambda rows, digests: row_places(path, rows, [(4, None)], True, digests).rows
  row_places(path, some, [(4, None)], False, ["1", "2", "3", "2"])
  moved = [QARow(b"", (), row.name, where="elsewhere:1") for row in some]
  assert places(moved[::-1], ["2", "3", "2", "1"]) == [3, 0, 1, 2]
  assert places(moved[1:], ["2", "3", "2"]) == [-1, 0, 1, 2]  # lost
  with pytest.raises(ValueError, match="1 of the 4 rows have other questions.*such as row 'c'"):
    places(some, ["1", "2", "4", "2"])
  with pytest.raises(ValueError, match="is damaged"):
    path.write_text('{"parts": [[4, null]], "rows": ["x"], "digests": ["1", "2"]}')
    places(some, ["1", "2", "3", "2"])


def test_buckets_are_those_of_the_first_start(tmp_path, caplog):
  caplog.set_level(logging.INFO, "caprl_jax")
  small, large = (ImageShape(64, 16),), (ImageShape(256, 64),)
  begun = ShapeBuckets((small, large), [0, 1, 0, 1])
  path, some, parts = tmp_path / "train_rows.json", rows(*"abcd"), [(4, None)]
  open_ = lambda some, goes_on, choose: row_places(path, some, parts, goes_on, choose=choose)
  assert open_(some, False, lambda: begun) == RowPlaces([0, 1, 2, 3], parts, begun)
  assert "images in 2 buckets of shapes: 50.0% of up to 16 tokens" in caplog.text
  # two rows are lost, and the others would be in other buckets now
  again = open_(rows("d", "x", "a"), True, lambda: ShapeBuckets((large,), [0, 0, 0]))
  assert again == RowPlaces([2, -1, -1, 0], parts, begun)
  assert again.row_buckets([large, small, small]) == ShapeBuckets((small, large), [1, -1, 0])
  # a run that was begun without buckets goes on without
  open_(some, False, None)
  assert open_(some, True, lambda: begun).buckets is None
  path.unlink()
  plain = open_(some, True, lambda: begun)
  assert plain.buckets is None and plain.row_buckets([small] * 4) is None
  open_(some, False, lambda: begun)
  held = json.loads(path.read_text())
  for key, value in (("buckets", [0, 1]), ("buckets", [0, 1, 0, 2]), ("shapes", 3)):
    path.write_text(json.dumps({**held, key: value}))
    with pytest.raises(ValueError, match="is damaged"):
      open_(some, True, None)
