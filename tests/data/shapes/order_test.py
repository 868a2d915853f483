"""Batches of one bucket each: every row once an epoch, in the order drawn, resumed exactly."""

import concurrent.futures
import json

import numpy as np
import pytest

from caprl_jax.data.batches import index_stream, train_iterator
from caprl_jax.data.shapes.order import BatchOrder

# Of 110 rows. (Grain draws the more slowly, the fewer rows there are.)
BUCKETS = [0, 1, 0, 0, 2, 0, 1, 0, 0, 0, 1] * 10


def light(index, rng):
  """A row without its image: what the iterator draws."""
  return dict(row=np.int32(index), noise=rng.integers(0, 1 << 30))


def begin(buckets=BUCKETS, parts=None, seed=0, share=None):
  return train_iterator(light, parts or 110, 4, seed, share, buckets=buckets)


def same(a, b):
  return all(np.array_equal(a[name], b[name]) for name in a)


def test_one_bucket_is_the_order_without_buckets():
  for parts in (110, [(60, 0.25), (50, 0.75)]):
    plain, one = train_iterator(light, parts, 4, 3), begin([0] * 110, parts, 3)
    assert all(same(next(plain), next(one)) for _ in range(9))


def test_a_batch_is_of_one_bucket_and_every_row_comes_once_an_epoch():
  iterator = begin()
  batches = [next(iterator) for _ in range(110)]  # 4 epochs
  seen = np.array([batch["row"] for batch in batches])
  of = np.array(BUCKETS)[seen]
  assert (of == of[:, :1]).all()
  counts = np.bincount(seen.ravel(), minlength=110)
  assert abs(counts - 4).max() <= 1 and (counts != 4).sum() <= 2 * 3 * 3  # some wait
  # in each bucket, all of its rows before any comes again
  for bucket in range(3):
    rows = seen[of == bucket]
    size = BUCKETS.count(bucket)
    rounds = rows[: len(rows) // size * size].reshape(-1, size)
    assert (np.sort(rounds) == np.flatnonzero(np.array(BUCKETS) == bucket)).all()
  assert len(np.unique([batch["noise"] for batch in batches])) == seen.size


def test_what_is_drawn_for_a_row_is_what_would_be_without_buckets():
  """The same rows in the same epochs with the same noise; only their batches differ."""
  pairs = lambda iterator, count: {
    (int(r), int(n))
    for batch in (next(iterator) for _ in range(count))
    for r, n in zip(batch["row"], batch["noise"])
  }
  assert len(pairs(begin(), 50) & pairs(train_iterator(light, 110, 4, 0), 53)) == 200


def test_buckets_come_as_often_as_their_rows_all_along():
  buckets = [int(i % 5 == 0) for i in range(1000)]  # a fifth
  order = BatchOrder(index_stream([(1000, None)], 7), buckets, 10)
  stream = index_stream([(1000, None)], 7)
  large = np.array([buckets[int(stream[int(order(n)[0])])] for n in range(400)])
  for quarter in large.reshape(4, 100):
    assert 10 <= quarter.sum() <= 30
  # and a row waits only until its batch is full
  last = np.array([order(n)[-1] for n in range(400)])
  assert (np.diff(last) > 0).all() and last[-1] <= 4000 + 2 * 9


def test_a_mixture_keeps_its_weights():
  iterator = begin(parts=[(60, 0.75), (50, 0.25)], seed=2)
  rows = np.concatenate([next(iterator)["row"] for _ in range(100)])
  assert abs((rows < 60).mean() - 0.75) < 0.02


@pytest.mark.parametrize("done", [0, 1, 4, 9])
def test_resumes_exactly_with_any_number_of_processes(done):
  iterator = begin()
  for _ in range(done):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  want = [next(iterator) for _ in range(4)]
  shares = ([0, 1, 2, 3], [0, 2], [1, 3])
  for share in shares:
    fresh = begin(share=share)
    next(fresh)  # where it stood does not matter
    fresh.set_state(state)
    for batch in want:
      part = next(fresh)
      assert all(np.array_equal(part[name], batch[name][share]) for name in batch)


def test_threads_find_one_order():
  order = BatchOrder(index_stream([(110, None)], 5), BUCKETS, 4)
  numbers = np.random.default_rng(0).permutation(200).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = dict(zip(numbers, pool.map(order, numbers), strict=True))
  again = BatchOrder(index_stream([(110, None)], 5), BUCKETS, 4)
  assert all(np.array_equal(again(n), found[n]) for n in range(200))
  places = np.concatenate([found[n] for n in range(200)])
  assert len(np.unique(places)) == 800 and places.max() < 800 + 3 * 3
