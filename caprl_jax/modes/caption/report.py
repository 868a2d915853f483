"""Finished rows -> statistics, and a page of samples to browse."""

import collections
import hashlib
import heapq
import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from caprl_jax.data.rows import CaptionRow, read_image
from caprl_jax.harness.row_shards import RowResult
from caprl_jax.pages import markup as markup

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
  """Counts rows as they pass, in memory that does not grow with their number but for 8 bytes a
  distinct caption; keeps some for the page: random ones, the longest and shortest, cut and failed
  ones.

  samples: rows on the page, about. seed: of those picked at random.
  """

  def __init__(self, hosts: int, shard_rows: int, samples: int, seed: int):
    self.hosts, self.shard_rows = hosts, shard_rows
    self.images, self.cut, self.loops = 0, 0, 0
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

  def add(self, item: RowResult) -> None:
    number, row, about = item
    self.images += 1
    if "error" in row:
      self.reasons[about.get("reason", "other")] += 1
      self.failures.add(number, row)
      return
    length, cut = len(row["tokens"]), row["finish"] == "length"
    self.lengths[length] += 1
    self.cut += cut
    self.loops += has_loop(row["tokens"])
    self.distinct.add(
      hashlib.blake2b(row["caption"].encode("utf-8", "surrogatepass"), digest_size=8).digest()
    )
    self.buckets[about["bucket"]] += 1
    spent = self.secs.setdefault(number // self.shard_rows % self.hosts, [0, 0.0])
    spent[0] += 1
    spent[1] += about["secs"]
    self.random.add(number, row)
    self.longest.add(length, number, row)
    self.shortest.add(-length, number, row)
    if cut:
      self.cuts.add(number, row)

  def figures(self) -> dict[str, Any]:
    """What stats.json says. Shares are of captioned images; None where there is none.

    images_per_sec: the sum of the hosts' rates over the time in which they captioned; loading, and
      what kills undid, are not in it.
    """
    captioned = self.lengths.total()
    share = lambda count: count / captioned if captioned else None
    tokens = None
    if captioned:
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
      "captioned": captioned,
      "failed": self.reasons.total(),
      "failed_by_reason": dict(self.reasons.most_common()),
      "cut_share": share(self.cut),
      "caption_tokens": tokens,
      "distinct_captions": len(self.distinct),
      "repeat_share": share(captioned - len(self.distinct)),
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
    self.kept: list[tuple[int, dict]] = []

  def add(self, number: int, row: dict) -> None:
    self.seen += 1
    if len(self.kept) < self.count:
      self.kept.append((number, row))
    elif (place := int(self.rng.integers(self.seen))) < self.count:
      self.kept[place] = number, row

  def rows(self) -> list[tuple[int, dict]]:
    return sorted(self.kept, key=lambda item: item[0])


class _Best:
  """Those of the highest score, of equals the first."""

  def __init__(self, count: int):
    self.count, self.heap = count, []

  def add(self, score: float, number: int, row: dict) -> None:
    if len(self.heap) < self.count:
      heapq.heappush(self.heap, (score, -number, row))
    elif self.heap and score > self.heap[0][0]:
      heapq.heapreplace(self.heap, (score, -number, row))

  def rows(self) -> list[tuple[int, dict]]:
    return [
      (-number, row) for _, number, row in sorted(self.heap, key=lambda item: (-item[0], -item[1]))
    ]


def samples_page(
  name: str, statistics: Statistics, settings: dict[str, Any], inputs: Sequence[CaptionRow]
) -> str:
  """The page: figures, then samples with their pictures. It needs no network and runs no script."""
  figures = statistics.figures()
  shown: set[int] = set()  # a row stands once: where it is most telling
  groups = []
  for title, about, found in (
    ("Failed", "No caption, and why.", statistics.failures.rows()),
    (
      "Cut",
      f"At the limit of {settings['max_tokens']} tokens, before the caption had ended.",
      statistics.cuts.rows(),
    ),
    ("Longest", "", statistics.longest.rows()),
    ("Shortest", "", statistics.shortest.rows()),
    ("Random", "", statistics.random.rows()),
  ):
    found = [(number, row) for number, row in found if number not in shown]
    shown.update(number for number, _ in found)
    groups.append((title, about, found))
  groups.insert(0, groups.pop())  # what is typical comes first
  return markup.page(
    name,
    [
      _headline(figures),
      _tables(figures),
      *(_samples(*group, inputs) for group in groups if group[2]),
      _settings(settings),
    ],
  )


def _headline(figures: dict[str, Any]) -> str:
  tokens = figures["caption_tokens"] or {}
  cards = [
    markup.card(
      "Images captioned", markup.show(figures["captioned"]), f"of {figures['images']:,}", "wide"
    ),
    markup.card("Caption length", markup.show(tokens.get("mean"), "tenths"), "tokens, mean"),
    markup.card("Cut", markup.show(figures["cut_share"], "percent"), "at the token limit"),
    markup.card("Images a second", markup.show(figures["images_per_sec"], "tenths"), "all hosts"),
    markup.card(
      "Distinct captions",
      markup.show(figures["distinct_captions"]),
      f"{markup.show(figures['repeat_share'], 'percent')} repeat another",
    ),
    markup.card(
      "Failed",
      markup.show(figures["failed"]),
      "mostly: " + markup.text(next(iter(figures["failed_by_reason"])))
      if figures["failed"]
      else "none",
    ),
    markup.card(
      "Loops", markup.show(figures["loop_share"], "percent"), "of captions repeat a run of tokens"
    ),
  ]
  return f"<section><div class=cards>{''.join(cards)}</div></section>"


def _tables(figures: dict[str, Any]) -> str:
  tables = []
  if figures["caption_tokens"]:
    tables.append(
      markup.table(
        ["tokens a caption", ""],
        [
          [label, markup.show(figures["caption_tokens"][key])]
          for label, key in (
            ("5% have at most", "p5"),
            ("half have at most", "p50"),
            ("95% have at most", "p95"),
            ("longest", "max"),
          )
        ],
      )
    )
  if figures["images_by_bucket"]:
    tables.append(
      markup.table(
        ["patches x image tokens", "images"],
        [
          [markup.text(bucket.replace("x", " x ")), markup.show(count)]
          for bucket, count in figures["images_by_bucket"].items()
        ],
      )
    )
  if figures["failed_by_reason"]:
    tables.append(
      markup.table(
        ["failed", "images"],
        [
          [markup.text(reason), markup.show(count)]
          for reason, count in figures["failed_by_reason"].items()
        ],
      )
    )
  return (
    f"<section><h2>In numbers</h2><div class=side>{''.join(tables)}</div></section>"
    if tables
    else ""
  )


def _samples(
  title: str, about: str, found: Iterable[tuple[int, dict]], inputs: Sequence[CaptionRow]
) -> str:
  cards = "".join(_sample(row, inputs[number]) for number, row in found)
  about = f"<p class=soft>{about}</p>" if about else ""
  return (
    f"<section><h2>{title}</h2>{about}"
    '<div class=samples style="grid-template-columns:'
    'repeat(auto-fill,minmax(min(500px,100%),1fr))">'
    f"{cards}</div></section>"
  )


def _sample(row: dict[str, Any], source: CaptionRow) -> str:
  if "error" in row:
    words = (
      '<p class=marks><span class="answer wrong"><b>✗</b> failed</span></p>'
      f"<p>{markup.text(row['error'])}</p>"
    )
  else:
    caption = markup.text(row["caption"]) if row["caption"].strip() else "<i class=soft>(empty)</i>"
    cut = ' <span class="answer wrong">cut</span>' if row["finish"] == "length" else ""
    words = (
      f"<p class=text>{caption}</p><p class=marks><span class=soft>{len(row['tokens'])} "
      f"tokens</span>{cut}</p>"
    )
  return (
    f"<article class=sample><div class=picture>{_picture(source)}"
    f'<div class="soft file">{markup.text(row["image"])}</div></div>'
    f"<div class=words>{words}</div></article>"
  )


def _picture(source: CaptionRow) -> str:
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "picture.png"
    try:
      image = read_image(source)
    except ValueError:
      return '<div class="absent soft">no picture can be shown</div>'
    image.thumbnail((markup.MAX_IMAGE_PIXELS, markup.MAX_IMAGE_PIXELS))
    image.save(path)
    return markup.picture(path, source.name)


def _settings(settings: dict[str, Any]) -> str:
  rows = [[markup.text(key), markup.text(value)] for key, value in settings.items()]
  return (
    "<section><h2>Settings</h2><details><summary>Show</summary>"
    f"{markup.table(['', ''], rows)}</details></section>"
  )
