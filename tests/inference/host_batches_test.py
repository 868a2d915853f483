"""Batches of one shape: which rows are together, what fails, how far the host is ahead."""

import queue

import pytest
from helpers import tiny
from PIL import Image

from caprl_jax.data.rows import CaptionRow
from caprl_jax.inference.host_batches import BATCHES_AHEAD, HostPipeline, one_ahead
from caprl_jax.models.policy import PolicyConfig

SIZES = [(64, 64), (200, 40), (64, 64), (64, 64), (200, 40), (64, 64)]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
  folder = tiny.write_policy(tmp_path_factory.mktemp("tiny") / "policy")
  return PolicyConfig.from_hf(
    tiny.read_back(folder / "config.json"), tiny.read_back(folder / "preprocessor_config.json")
  )


def write_rows(folder) -> list[tuple[int, CaptionRow]]:
  rows = []
  for i, size in enumerate(SIZES):
    Image.new("RGB", size).save(folder / f"{i}.png")
    rows.append((10 + i, CaptionRow(folder / f"{i}.png", "", f"{i}.png")))
  return rows


def test_batches_hold_one_bucket_in_order_and_are_filled(cfg, tmp_path):
  rows = write_rows(tmp_path)
  (tmp_path / "broken.png").write_bytes(b"no image")
  broken = (3, CaptionRow(tmp_path / "broken.png", "", "broken.png"))
  with HostPipeline(cfg, batch_size=3) as host:
    buckets, failed = host.bucket([*rows[:2], broken, *rows[2:]])
    assert [item for item, _ in failed] == [broken] and "broken.png" in str(failed[0][1])
    squares, wide = [rows[i] for i in (0, 2, 3, 5)], [rows[i] for i in (1, 4)]
    assert sorted(map(str, buckets.values())) == sorted(map(str, (squares, wide)))
    assert [*buckets] == sorted(buckets, key=lambda shape: (shape.tokens, shape.slots))

    def prepare(shape, numbered):
      if numbered == rows[3]:
        raise ValueError("cannot be cut")
      return shape, numbered[0]

    batches = list(host.batches(buckets, prepare))
  found = {tuple(number for number, _ in batch.items): batch for batch in batches}
  assert found.keys() == {(10, 12), (15,), (11, 14)}
  assert [number for _, number in found[10, 12].ready] == [10, 12, 12]
  assert [number for _, number in found[15,].ready] == [15, 15, 15]
  assert [(item, str(error)) for item, error in found[10, 12].failed] == [
    (rows[3], "cannot be cut")
  ]
  assert all(shape == batch.shape for batch in batches for shape, _ in batch.ready)


def test_a_batch_of_failures_is_empty(cfg, tmp_path):
  def prepare(shape, numbered):
    raise ValueError("no")

  with HostPipeline(cfg, batch_size=4) as host:
    buckets, _ = host.bucket(write_rows(tmp_path))
    for batch in host.batches(buckets, prepare):
      assert batch.items == batch.ready == [] and len(batch.failed) in (2, 4)


def test_other_errors_are_raised(cfg, tmp_path):
  def prepare(shape, numbered):
    raise TypeError("a mistake of ours")

  with HostPipeline(cfg, batch_size=4) as host, pytest.raises(TypeError, match="of ours"):
    buckets, _ = host.bucket(write_rows(tmp_path))
    list(host.batches(buckets, prepare))


def test_the_next_batches_are_prepared_before_one_is_asked_for(cfg, tmp_path):
  begun = queue.Queue()
  prepare = lambda shape, numbered: begun.put(numbered)

  with HostPipeline(cfg, batch_size=1) as host:
    buckets, _ = host.bucket(write_rows(tmp_path))
    batches = host.batches(buckets, prepare)
    next(batches)
    for _ in range(1 + BATCHES_AHEAD):
      begun.get(timeout=60)
  assert begun.empty()  # the threads have ended, and no other batch was begun


def test_one_is_dispatched_before_the_last_is_given():
  events = []

  def batches():
    for i in range(3):
      events.append(f"batch {i}")
      yield i

  for batch, output in one_ahead(batches(), lambda i: events.append(f"dispatch {i}") or i * i):
    assert output == batch * batch
    events.append(f"fetch {batch}")
  assert events == [
    *("batch 0", "dispatch 0", "batch 1", "dispatch 1", "fetch 0"),
    *("batch 2", "dispatch 2", "fetch 1", "fetch 2"),
  ]
  assert list(one_ahead([], str)) == []
