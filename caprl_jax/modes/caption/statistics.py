"""Captioned images -> statistics, and the ones worth showing."""

import collections
import hashlib
import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from caprl_jax.data.readers.image_folders import PassedOver
from caprl_jax.data.rows import CaptionRow
from caprl_jax.harness.row_shards import RowResult
from caprl_jax.modes.caption.columns import EXISTING, ONE, SHORTENED, Column, written

LOOP_REPEATS, LOOP_TOKENS, LOOP_PERIOD = 3, 12, 32


def has_loop(tokens: Sequence[int]) -> bool:
  """Whether a run of up to 32 tokens stands three times or more in a row, over 12 tokens or
  more.
  """
  # Cheap first: a loop repeats its own 4-grams.
  windows = len(tokens) - 3
  if (
    len(tokens) < LOOP_TOKENS
    or len(set(zip(tokens, tokens[1:], tokens[2:], tokens[3:]))) == windows
  ):
    return False
  ids = np.asarray(tokens)
  for period in range(1, min(LOOP_PERIOD, len(ids) // LOOP_REPEATS) + 1):
    # where it breaks
    same = np.flatnonzero(np.concatenate([[True], ids[period:] != ids[:-period], [True]]))
    longest = int(np.diff(same).max()) - 1
    if longest + period >= max(LOOP_TOKENS, LOOP_REPEATS * period):
      return True
  return False


class Statistics:
  """Counts rows as they pass, in memory that does not grow with their number but for 8 bytes per
  distinct caption; keeps some for the page: random ones, the longest and shortest, cut and failed
  ones.

  samples: rows on the page, about. seed: of those picked at random. passed_over: files and members
  that are no rows, as `image_sources.list_images` counted them. columns: of captions in a row.
  """

  def __init__(
    self,
    hosts: int,
    shard_rows: int,
    samples: int,
    seed: int,
    passed_over: PassedOver | None = None,
    columns: Sequence[Column] = ONE,
  ):
    self.columns = columns
    self.passed_over = passed_over or PassedOver()
    self.hosts, self.shard_rows = hosts, shard_rows
    self.images = self.captioned = self.cut = self.loops = self.existing = self.shortened = 0
    self.lengths: collections.Counter[int] = collections.Counter()
    self.reasons: collections.Counter[str] = collections.Counter()
    self.buckets: collections.Counter[str] = collections.Counter()
    self.secs: dict[int, list[float]] = {}  # of a host: rows and the seconds they took
    self.distinct: set[bytes] = set()
    few = samples // 8
    self.longest, self.shortest = _Best(few), _Best(few)
    self.random, self.cuts, self.failures = (
      _Random(count, seed) for count in (samples - 4 * few, few, few)
    )

  def add(self, item: RowResult[CaptionRow]) -> None:
    row, about = item.row, item.about
    self.images += 1
    if "error" in row:
      self.reasons[about.get("reason", "other")] += 1
      self.failures.add(item)
      return
    new = [one for one in written(row, self.columns) if one.finish != EXISTING]
    if not new:
      self.existing += 1
      return
    self.captioned += 1
    for one in new:
      self.lengths[len(one.tokens)] += 1
      self.cut += one.finish == "length"
      self.shortened += one.finish == SHORTENED
      self.loops += has_loop(one.tokens)
      text = one.text.encode("utf-8", "surrogatepass")
      self.distinct.add(hashlib.blake2b(text, digest_size=8).digest())
    if "bucket" in about:  # not of what was read back from an output
      self.buckets[about["bucket"]] += 1
      spent = self.secs.setdefault(item.number // self.shard_rows % self.hosts, [0, 0.0])
      spent[0] += 1
      spent[1] += about["secs"]
    self.random.add(item)
    self.longest.add(max(len(one.tokens) for one in new), item)
    self.shortest.add(-min(len(one.tokens) for one in new), item)
    if any(one.finish == "length" for one in new):
      self.cuts.add(item)

  def figures(self) -> dict[str, Any]:
    """What stats.json says. Shares are of captions; None where there is none.

    images_per_sec: the sum of the hosts' rates over the time in which they captioned; loading, and
      what kills undid, are not in it.
    """
    captions = self.lengths.total()
    share = lambda count: count / captions if captions else None
    tokens = None
    if captions:
      values = np.repeat(sorted(self.lengths), [self.lengths[n] for n in sorted(self.lengths)])
      at = lambda percent: int(np.percentile(values, percent, method="inverted_cdf"))
      tokens = {
        "mean": float(values.mean()),
        "p5": at(5),
        "p50": at(50),
        "p95": at(95),
        "max": int(values[-1]),
      }
    rates = [rows / secs for rows, secs in self.secs.values() if secs]
    return {
      "images": self.images,
      "captioned": self.captioned,
      **({"captions": captions} if captions != self.captioned else {}),
      **({"existing": self.existing} if self.existing else {}),
      **({"shortened": self.shortened} if self.shortened else {}),
      "failed": self.reasons.total(),
      "failed_by_reason": dict(self.reasons.most_common()),
      "passed_over": self.passed_over.figures(),
      "cut_share": share(self.cut),
      "caption_tokens": tokens,
      "distinct_captions": len(self.distinct),
      "repeat_share": share(captions - len(self.distinct)),
      "loop_share": share(self.loops),
      "images_per_sec": sum(rates) if rates else None,
      "images_by_bucket": dict(
        sorted(self.buckets.items(), key=lambda item: [*map(int, item[0].split("x"))])
      ),
    }


class _Random:
  """A uniform sample of what passes by, the same for the same seed (reservoir sampling)."""

  def __init__(self, count: int, seed: int):
    self.count, self.seen, self.rng = count, 0, np.random.default_rng(seed)
    self.kept: list[RowResult[CaptionRow]] = []

  def add(self, item: RowResult[CaptionRow]) -> None:
    self.seen += 1
    if len(self.kept) < self.count:
      self.kept.append(item)
    elif (place := int(self.rng.integers(self.seen))) < self.count:
      self.kept[place] = item

  def rows(self) -> list[RowResult[CaptionRow]]:
    return sorted(self.kept, key=lambda item: item.number)


class _Best:
  """Those of the highest score, of equals the first."""

  def __init__(self, count: int):
    self.count = count
    # score, -number, item; numbers differ, so that items are never compared
    self.heap: list[tuple[float, int, RowResult[CaptionRow]]] = []

  def add(self, score: float, item: RowResult[CaptionRow]) -> None:
    if len(self.heap) < self.count:
      heapq.heappush(self.heap, (score, -item.number, item))
    elif self.heap and score > self.heap[0][0]:
      heapq.heapreplace(self.heap, (score, -item.number, item))

  def rows(self) -> list[RowResult[CaptionRow]]:
    return [item for _, _, item in sorted(self.heap, key=lambda kept: (-kept[0], -kept[1]))]
