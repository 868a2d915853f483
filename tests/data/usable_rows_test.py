"""What a check says of a row is what the maker of its batch does with it."""

import numpy as np
import pytest
from helpers.bad_images import BAD, GOOD, encoded, noise

from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.batches import ImageShape, eval_batches, image_shape, train_iterator
from caprl_jax.data.rows import BadRow, QARow, read_image
from caprl_jax.data.usable_rows import NextUsable, bad_row, fits, look_at, shape_of, usable
from caprl_jax.models.image_processor import SmartResize, Tiles

PIXELS = SmartResize(patch_size=8, merge_size=2, min_pixels=256, max_pixels=64 * 64, window_units=2)


def row(image, name="one") -> QARow:
  return QARow(image, (), name, where="rows.jsonl:3")


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_cannot_be_decoded_says_what_reading_it_says(kind, on_disk, tmp_path):
  data, reason = BAD[kind]
  if on_disk:
    (tmp_path / "image").write_bytes(data)
  one = row(tmp_path / "image" if on_disk else data)
  with pytest.raises(ValueError, match="cannot read its image") as raised:
    read_image(one)
  (found,) = usable([one], [look_at(data)])
  assert found == BadRow("rows.jsonl:3", f"rows.jsonl:3: {raised.value}", reason)
  assert found.message.count("'one'") == 1 and "0x" not in found.message


@pytest.mark.parametrize("kind", GOOD)
def test_what_can_be_decoded_has_the_size_that_batches_see(kind):
  one = row(GOOD[kind])
  facts = look_at(one.image)
  assert (facts.width, facts.height) == read_image(one).size and not facts.problem
  assert list(usable([one], [facts], [fits(PIXELS)])) == [one]
  # as the headers have it
  cfg = type("Cfg", (), {"vision": type("Vision", (), {"pixels": PIXELS})})
  assert shape_of([facts], PIXELS) == image_shape([one], cfg)


@pytest.mark.parametrize("size", [(2, 500), (500, 2), (1, 201), (1, 1), (3, 600)])
@pytest.mark.parametrize(
  "pixels", [PIXELS, Tiles(32, 8, 2), SmartResize(8, 2, 0, 4096)], ids=["qwen", "tiles", "no least"]
)
def test_sizes_are_refused_where_cutting_them_is(size, pixels):
  image = noise(size)
  one = row(encoded(image))
  (found,) = usable([one], [look_at(one.image)], [fits(pixels)])
  try:
    patches = pixels.patchify(image)
  except ValueError as error:
    assert str(error) in found.message and found.reason in ("too narrow", "too small")
    assert found.message.startswith("rows.jsonl:3: row 'one' (")
  else:
    assert found == one and pixels.shape(*size[::-1]) == (len(patches.valid_S), patches.num_tokens)


def test_the_shape_of_nothing_is_empty():
  assert shape_of([], PIXELS) == ImageShape(0, 0)


def test_a_row_is_named_once_and_has_its_place():
  assert bad_row(row(b""), ValueError("row 'one': no")).message == "rows.jsonl:3: row 'one': no"
  assert bad_row(row(b""), ValueError("no")).message == "rows.jsonl:3: row 'one': no"
  said = bad_row(row(b""), ValueError("rows.jsonl:3: row 'one': no"))
  assert said.message == "rows.jsonl:3: row 'one': no" and said.where == "rows.jsonl:3"
  nameless = bad_row(QARow(b"", (), "two"), ValueError("no"))
  assert (nameless.where, nameless.message) == ("row 'two'", "row 'two': no")


# ---- what fails after the check ----


class Disk:
  """Makes examples; those of rows that fail now cannot be made."""

  def __init__(self, *failing):
    self.failing = set(failing)

  def __call__(self, index, rng):
    noise = rng.integers(1 << 30)
    if index in self.failing:
      raise ValueError(f"row 'r{index}': cannot read its image: disk error")
    return {"row": np.int32(index), "noise": noise}


ROWS = [QARow(b"", (), f"r{i}") for i in range(7)]


def stream(rule="drop", failing=(2, 3, 6), path=None):
  bad = BadRowList(rule, path)
  return train_iterator(NextUsable(Disk(*failing), ROWS, bad), len(ROWS), 4, 0, threads=3), bad


def test_the_next_row_stands_in_and_only_there(tmp_path, caplog):
  path = tmp_path / "bad_rows.jsonl"
  iterator, bad = stream(path=path)
  whole = train_iterator(Disk(), len(ROWS), 4, 0)
  stands_in = {2: 4, 3: 4, 6: 0}
  for _ in range(6):
    got, want = next(iterator), next(whole)
    np.testing.assert_array_equal(got["row"], [stands_in.get(i, i) for i in want["row"].tolist()])
    same = got["row"] == want["row"]
    np.testing.assert_array_equal(got["noise"][same], want["noise"][same])
  # each once, in the log and in the file
  assert len(bad.rows) == 3 and caplog.text.count("dropped, though") == 3
  assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("done", [1, 3])
def test_a_run_that_goes_on_makes_the_same_batches(done):
  iterator, _ = stream()
  for _ in range(done):
    next(iterator)
  state = iterator.get_state()
  want = [next(iterator) for _ in range(4)]
  again, _ = stream()
  again.set_state(state)
  for batch in want:
    got = next(again)
    for name in batch:
      np.testing.assert_array_equal(got[name], batch[name])


def test_refused_or_none_left():
  iterator, _ = stream("refuse")
  with pytest.raises(ValueError, match="row 'r.': cannot read.*disk error .bad_rows=drop"):
    for _ in range(4):
      next(iterator)
  iterator, _ = stream(failing=range(7))
  with pytest.raises(ValueError, match="none of 7 rows can be read any more"):
    next(iterator)


def test_an_evaluation_knows_which_stand_in():
  mark = lambda made: made | {"row": np.int32(-1)}
  example = NextUsable(Disk(2, 3), ROWS, BadRowList("drop", None), mark)
  rows = np.concatenate([batch["row"][:real] for batch, real in eval_batches(example, 7, 4, 0)])
  np.testing.assert_array_equal(rows, [0, 1, -1, -1, 4, 5, 6])


def test_only_a_row_of_its_bucket_stands_in():
  bad, buckets = BadRowList("drop", None), [0, 1, 0, 1, 1, 0, 1]
  example = NextUsable(Disk(2, 3, 6), ROWS, bad, buckets=buckets)
  rng = np.random.default_rng(0)
  assert [int(example(i, rng)["row"]) for i in range(7)] == [0, 1, 5, 4, 4, 5, 1]
  alone = NextUsable(Disk(0, 2, 5), ROWS, bad, buckets=buckets)
  assert alone(1, rng)["row"] == 1
  with pytest.raises(ValueError, match="none of the rows of a bucket of image shapes can be read"):
    alone(0, rng)
  # places, of which two are lost
  moved = NextUsable(Disk(), ROWS, bad, places=[3, -1, 1, -1], buckets=[0, 1, 1, 0])
  assert [int(moved(i, rng)["row"]) for i in range(4)] == [3, 1, 1, 3]
