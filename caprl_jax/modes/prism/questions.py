"""Sources of benchmarks -> the questions that can be asked, and their images, each once."""

import collections
import dataclasses
import logging
import pathlib
import string
from collections.abc import Collection, Sequence
from typing import Any

from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.image_check import ImageCheck
from caprl_jax.data.readers.benchmarks import captionqa
from caprl_jax.data.readers.benchmarks.files import from_qa_rows, read_benchmark
from caprl_jax.data.readers.benchmarks.row import BENCHMARKS, BenchmarkRow
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import CaptionRow, good_rows
from caprl_jax.data.usable_rows import Check, usable

log = logging.getLogger("caprl_jax.modes.prism.questions")


@dataclasses.dataclass(frozen=True)
class Questions:
  """What is asked.

  rows: benchmark -> its questions. digests: benchmark -> the hash of each question's image.
  shown: benchmark -> the key of what each question's captions are written of: the image, with the
    limits of pixels that the row names and, where each question has captions of its own, its place
    among those of the image.
  images: such a key -> image.
  left_out: benchmark -> how many of its questions cannot be asked, because they or their image
    cannot be used.
  """

  rows: dict[str, list[BenchmarkRow]]
  digests: dict[str, list[str]]
  shown: dict[str, list[str]]
  images: dict[str, CaptionRow]
  left_out: dict[str, int]

  def without(self, lost: Collection[str]) -> "Questions":
    """What is left without some images, by their keys. Raises ValueError for a benchmark of which
    nothing is."""
    rows, digests, shown, left_out = {}, {}, {}, {}
    for name, asked in self.rows.items():
      kept = [i for i, key in enumerate(self.shown[name]) if key not in lost]
      if not kept:
        raise ValueError(f"prism.benchmarks: no image of {name} can be captioned; see the log")
      rows[name] = [asked[i] for i in kept]
      digests[name] = [self.digests[name][i] for i in kept]
      shown[name] = [self.shown[name][i] for i in kept]
      left_out[name] = self.left_out[name] + len(asked) - len(kept)
    images = {key: row for key, row in self.images.items() if key not in lost}
    return Questions(rows, digests, shown, images, left_out)


def read_questions(
  cfg: Any, seed: int, bad: BadRowList, images: ImageCheck, checks: Sequence[Check]
) -> Questions:
  """Reads all benchmarks, and decodes every image once. `bad` takes note of what cannot be used.

  Args:
    cfg: as `section.PrismConfig`.
    checks: of the captioners.

  Raises:
    ValueError: as the readers; nothing of a benchmark is left; something cannot be used and is to
    be refused.
  """
  read, left_out = {}, {}
  try:
    for name, source in cfg.sources.items():
      before = len(bad.rows)
      read[name] = _read_rows(name, source, cfg, seed, bad)
      left_out[name] = len(bad.rows) - before
    images([row for rows in read.values() for row in rows])  # in one pass
    rows, digests, shown, found = {}, {}, {}, {}
    for name, asked in read.items():
      rows[name] = bad.check(usable(asked, images(asked), checks))
      left_out[name] += len(asked) - len(rows[name])
      digests[name] = [facts.sha256 for facts in images(rows[name])]
      shown[name] = _keys(name, rows[name], digests[name], cfg.captions_per)
      for key, row in zip(shown[name], rows[name], strict=True):
        found[key] = CaptionRow(row.image, "", row.name, limits=row.limits)
    asked = sum(map(len, rows.values())) + sum(left_out.values())
    bad.settle("questions", of=asked)
  except ValueError as error:
    if bad.rule == "drop" or not bad.rows:
      raise
    raise ValueError(
      f"{error}\n(a question that cannot be asked would count as wrong: mend it, take its rows out "
      f"of prism.benchmarks' file, or set {bad.key}=drop, and the figures say how many are missing)"
    ) from error
  return Questions(rows, digests, shown, found, left_out)


def _keys(
  name: str, rows: Sequence[BenchmarkRow], digests: Sequence[str], captions_per: str
) -> list[str]:
  """`Questions.shown` of one benchmark."""
  keys: list[str] = []
  asked = collections.Counter[str]()
  for row, digest in zip(rows, digests, strict=True):
    limits = row.limits
    key = f"{digest} {limits.min_pixels}-{limits.max_pixels}" if limits else digest
    keys.append(f"{key} {name} {asked[key]}" if captions_per == "question" else key)
    asked[key] += 1
  return keys


def _read_rows(name: str, source: str, cfg: Any, seed: int, bad: BadRowList) -> list[BenchmarkRow]:
  """The rows of one benchmark. Raises ValueError as its reader, and for no rows."""
  if pathlib.Path(source).stem in BENCHMARKS:
    if cfg.image_root is None:
      raise ValueError(
        f"prism.benchmarks: {name}={source} names images by paths: "
        "set prism.image_root to their folder or .zip"
      )
    rows = good_rows(
      read_benchmark(pathlib.Path(source).expanduser(), pathlib.Path(cfg.image_root).expanduser()),
      bad,
    )[: cfg.max_rows]
  elif source.startswith(captionqa.PREFIX):
    rows = good_rows(captionqa.read_captionqa(source), bad)[: cfg.max_rows]
  else:
    rows = from_qa_rows(read_qa_rows(source, seed, cfg.max_rows, bad))
  if cfg.answers == "read":
    readable = [row for row in rows if row.options and gold_index(row) is not None]
    if len(readable) < len(rows):
      log.warning(
        "%s: %d of %d questions have no lettered options and are left out (prism.answers = 'read')",
        name,
        len(rows) - len(readable),
        len(rows),
      )
    rows = readable
  if not rows:
    raise ValueError(f"prism.benchmarks: {name}={source} has no question that can be asked")
  return rows


def gold_index(row: BenchmarkRow) -> int | None:
  """The index of the right option, None where no letter says it."""
  gold = row.gold.strip() if isinstance(row.gold, str) else ""
  return (
    string.ascii_uppercase.index(gold)
    if len(gold) == 1 and gold in string.ascii_uppercase[: len(row.options)]
    else None
  )
