"""Mode `train` on images of two sizes: whole batches of one, the same after a kill; the step itself
stands aside."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.faults.interrupts import interrupted_before

from caprl_jax.data.batches import train_iterator
from caprl_jax.data.shapes.buckets import Shapes
from caprl_jax.harness.metrics import read_metrics
from caprl_jax.modes.train import run as train
from caprl_jax.rl.step_metrics import batch_metrics


@pytest.fixture
def begin(tiny_run, monkeypatch):
  """(workdir, shape_buckets, steps) -> the run; gives (step, rows, shapes) of each batch."""
  seen: list[tuple] = []

  @jax.jit
  def step(state, batch):
    return state.replace(step=state.step + 1), batch_metrics(batch), None

  def build_step(*_):
    def run(state, batch):
      b, images = jax.device_get(batch), batch.images
      seen.append((int(state.step), b.row_B.tolist(), images.valid_BS.shape, b.questions.stem_BKQ))
      return step(state, batch)

    return run

  monkeypatch.setattr(train, "build_step", build_step)
  monkeypatch.setattr(train, "_sample_keeper", lambda *_: None)

  def run(workdir, buckets, steps=8):
    old = tiny_run.settings
    data = dataclasses.replace(old.data, batch_size=4, shape_buckets=buckets)
    settings = dataclasses.replace(
      old, data=data, train=dataclasses.replace(old.train, steps=steps)
    )
    seen.clear()
    train.train(dataclasses.replace(tiny_run, settings=settings), {}, workdir)
    return list(seen)

  return run


def test_batches_of_one_shape_and_after_a_kill_the_same(begin, tiny_run, tmp_path):
  whole = begin(tmp_path / "whole", 2)
  of_row: list[Shapes] = list(tiny_run.shapes)
  assert len(of_row) == 12 and len({*of_row}) == 2
  for _, rows, shape, _ in whole:
    assert {of_row[row][0].slots for row in rows} == {shape[1]}  # no row is padded here
  assert len({shape for _, _, shape, _ in whole}) == 2
  # three batches have all rows or, of each size, all but two
  counts = np.bincount(np.concatenate([rows for _, rows, _, _ in whole[:6]]), minlength=12)
  assert abs(counts - 2).max() <= 1
  numbers = read_metrics(tmp_path / "whole" / "metrics.jsonl")
  assert [row["data/image_tokens"] for row in numbers] == [
    of_row[rows[0]][0].tokens for _, rows, _, _ in whole
  ]
  assert all(row["data/padding"] == 0 for row in numbers)

  with interrupted_before(batch=6):
    begin(tmp_path / "cut", 2)
  after = begin(tmp_path / "cut", None)  # the key is not looked at any more
  assert [step for step, *_ in after] == [5, 6, 7]
  for one, other in zip(after, whole[5:], strict=True):
    assert one[:3] == other[:3]
    np.testing.assert_array_equal(one[3], other[3])


def test_a_small_data_set_has_one_shape_in_the_order_that_it_always_had(begin, tiny_run, tmp_path):
  found = [begin(tmp_path / str(buckets), buckets, 4) for buckets in (None, 1)]
  rows = [[row for _, row, _, _ in some] for some in found]
  iterator = train_iterator(tiny_run.train.example, 12, 4, tiny_run.settings.seed)
  assert rows[0] == rows[1] == [next(iterator).row_B.tolist() for _ in range(4)]
  assert {shape for some in found for _, _, shape, _ in some} == {(4, 64)}
  padding = [row["data/padding"] for row in read_metrics(tmp_path / "1" / "metrics.jsonl")]
  assert 0 < np.mean(padding) < 1 / 3 and min(padding) >= 0
