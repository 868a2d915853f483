"""Which images share a shape: the fewest patches, and no bucket that is too small."""

import itertools
import logging

import numpy as np
import pytest

from caprl_jax.data.batches import ImageShape, shape_bucket
from caprl_jax.data.shapes.buckets import (
  ShapeBuckets,
  bucket_text,
  choose_buckets,
  saved,
  shares,
)

MULTIPLE = 16


def shape(tokens, more=0):
  return (ImageShape(4 * tokens + more, tokens),)


def choose(shapes, batch_size=4, most=None, parts=None):
  return choose_buckets(shapes, parts or [(len(shapes), None)], batch_size, most, MULTIPLE)


def test_two_sizes_are_two_buckets_each_as_large_as_its_largest():
  rows = [shape(64), shape(512), shape(60, more=4), shape(508, more=48)] * 20
  found = choose(rows)
  # the largest in slots and in tokens need not be one image
  assert found.shapes == ((ImageShape(256, 64),), (ImageShape(2080, 512),))
  assert list(found.of_row) == [0, 1, 0, 1] * 20 and found.of(2) == found.shapes[0]
  parts = [(80, None)]
  assert shares(found, parts) == pytest.approx([0.5, 0.5])
  assert saved(found, parts) == pytest.approx(1 - (256 + 2080) / 2 / 2080)
  assert bucket_text(found, parts) == (
    "images in 2 buckets of shapes: 50.0% of up to 64 tokens, 50.0% of up to 512 tokens; each "
    "batch is of one, which saves 43.8% of the patches"
  )


def test_one_shape_is_none():
  assert choose([]) is choose([shape(64)] * 80) is None
  assert choose([shape(64), shape(60)] * 40) is None  # alike
  assert choose([shape(64)] * 80, most=3) is None
  # an epoch of the smaller ones is 7 batches; asked for, one is enough
  assert choose([shape(64)] * 28 + [shape(512)] * 80) is None
  assert choose([shape(64)] * 4 + [shape(512)] * 80, most=4) is not None
  assert choose([shape(64)] * 3 + [shape(512)] * 80, most=4) is None


def test_one_shape_can_be_had_and_the_log_says_what_it_costs(caplog):
  caplog.set_level(logging.INFO, "caprl_jax")
  assert choose([shape(64), shape(512)] * 40, most=1) is None
  assert "shape_buckets = 1 pads all images to one shape; None saves 43.7%" in caplog.text


def test_a_bucket_more_must_save_a_tenth():
  small, large = [shape(64)] * 64, [shape(512)] * 64
  assert len(choose(small + large + [shape(320)] * 64).shapes) == 3
  rare = small + large + [shape(448)] * 40  # saves 3%
  assert len(choose(rare).shapes) == 2 and len(choose(rare, most=3).shapes) == 3
  many = [shape(n) for n in (16, 64, 128, 256, 512, 1024) for _ in range(64)]
  assert len(choose(many).shapes) <= 4 and len(choose(many, most=6).shapes) == 6


def test_a_source_counts_by_its_weight():
  rows = [shape(64)] * 80 + [shape(512)] * 80
  assert len(choose(rows, parts=[(80, 0.5), (80, 0.5)]).shapes) == 2
  assert choose(rows, parts=[(80, 0.02), (80, 0.98)]) is None  # saves too little
  found = choose(rows, parts=[(80, 3.0), (80, 1.0)])
  assert shares(found, [(80, 3.0), (80, 1.0)]) == pytest.approx([0.75, 0.25])
  assert saved(found, [(80, 3.0), (80, 1.0), (0, 1.0)][:2]) == pytest.approx(0.75 * 7 / 8)


def test_a_judge_that_sees_the_image_has_shapes_too():
  rows = [(*shape(64), *shape(32)), (*shape(512), *shape(400))] * 40
  assert choose(rows).shapes == ((*shape(64), *shape(32)), (*shape(512), *shape(400)))


@pytest.mark.parametrize("seed", range(6))
def test_no_other_cut_leaves_fewer_patches(seed):
  rng = np.random.default_rng(seed)
  rows = [shape(int(n)) for n in np.exp(rng.normal(5, 0.8, 120)) + 4]
  most, batch, parts = 3, 12, [(120, None)]
  found = choose(rows, batch, most)
  kinds = sorted({shape_bucket(one[0], MULTIPLE) for one in rows}, key=lambda k: k.slots)
  kind_of = [kinds.index(shape_bucket(one[0], MULTIPLE)) for one in rows]
  best = 0.0
  for cuts in itertools.combinations(range(1, len(kinds)), most - 1):
    of_row = np.searchsorted(cuts, kind_of, side="right").tolist()
    if min(of_row.count(b) for b in range(most)) >= batch:
      begun = [next(s for s, b in zip(rows, of_row) if b == bucket) for bucket in range(most)]
      best = max(best, saved(ShapeBuckets(tuple(begun), of_row).moved(of_row, rows), parts))
  assert saved(found, parts) >= best - 1e-9 > 0
  assert all(found.of_row.count(bucket) >= batch for bucket in range(len(found.shapes)))
  assert all(one[0].tokens <= found.of(i)[0].tokens for i, one in enumerate(rows))


def test_rows_that_moved_keep_their_bucket_which_grows_where_it_must():
  begun = ShapeBuckets((shape(64), shape(512)), [0, 1, 0])
  moved = begun.moved([1, 0, -1], [shape(400), shape(80), shape(9000)])
  assert moved == ShapeBuckets((shape(80), shape(512)), [1, 0, -1])
