"""The host's account of slots: every text is written once, in order, and nothing is lost."""

import collections

import numpy as np
import pytest

from caprl_jax.inference.engine.programs import BLOCK, cache_sizes, prefix_slots
from caprl_jax.inference.engine.slots import Slots


@pytest.mark.parametrize("entries, fan, captions", [(1, 1, 1), (3, 1, 1), (4, 2, 3), (2, 3, 7)])
def test_every_text_is_written_once(entries, fan, captions):
  """A device that writes 1, 2, 3 ... as long as each text's length says."""
  rng = np.random.default_rng(0)
  lengths = {(item, c): int(rng.integers(1, 40)) for item in range(9) for c in range(captions)}
  slots, left = Slots(entries, fan, captions), list(range(9))
  run_N, owner, got = np.zeros(entries * fan, int), {}, {}
  in_entry: dict[int, int] = {}
  ended = collections.Counter()
  while True:
    while left and (entry := slots.free(range(entries))) is not None:
      assert in_entry.get(entry) not in in_entry.values() or ended[in_entry[entry]] == captions
      in_entry[entry] = left.pop(0)
      slots.put(entry, in_entry[entry], limit=100 + in_entry[entry])
    if not slots.busy:
      break
    caption_N, limit_N = slots.begin()
    for n in np.flatnonzero(caption_N >= 0):
      owner[n], run_N[n] = (in_entry[n // fan], int(caption_N[n])), 0
      assert limit_N[n] == 100 + in_entry[n // fan]
    live = [n for n, text in owner.items() if text is not None]
    assert slots.longest() == max(run_N[n] for n in live)
    tokens_NK = np.zeros((len(run_N), BLOCK), int)
    valid_NK, live_N = np.zeros(tokens_NK.shape, bool), np.zeros(len(run_N), bool)
    for n in live:
      length = lengths[owner[n]]
      tokens_NK[n] = run_N[n] + 2 + np.arange(BLOCK)
      valid_NK[n] = tokens_NK[n] <= length
      live_N[n] = run_N[n] + 1 + BLOCK < length
      run_N[n] += BLOCK
    found = list(slots.read(np.ones(len(run_N), int), tokens_NK, valid_NK, live_N))
    assert len(found) == len(live)
    for text in found:
      assert text.ids == list(range(1, len(text.ids) + 1))
      if not text.live:
        assert (text.item, text.caption) not in got
        got[text.item, text.caption] = len(text.ids)
        ended[text.item] += 1
    owner |= {n: None for n in live if not live_N[n]}
  assert got == lengths


def test_sizes():
  assert cache_sizes(512, 64) == (128, 256, 512) and cache_sizes(100, 64) == (104,)
  assert cache_sizes(24, 64) == (24,) and cache_sizes(1, 64) == (BLOCK,)
  sizes = [prefix_slots(n) for n in range(1, 5000)]
  assert all(n <= size <= max(n + 64, n * 9 / 8) for n, size in enumerate(sizes, 1))
  assert sizes == sorted(sizes) and len(set(sizes)) < 45
