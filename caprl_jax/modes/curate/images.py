"""Mode `curate`, stage 1: every image is looked at; which of them go on."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.readers.image_sources import find_images
from caprl_jax.data.rows import BadRow, CaptionRow, QARow, failure_reason, read_image
from caprl_jax.data.usable_rows import Check, ImageFacts, bad_row, usable
from caprl_jax.harness.row_shards import RowResult, ShardedJob
from caprl_jax.modes.curate import perceptual_hash
from caprl_jax.modes.curate.section import CurateConfig
from caprl_jax.progress import counted, going_on

LOOKED_AT_ONCE = 256  # images that a kill may lose the work on
Numbered = Sequence[tuple[int, CaptionRow | QARow]]


def look_at(numbered: tuple[int, CaptionRow | QARow]) -> RowResult:
  """An image's size and perceptual signature, or why it cannot be read."""
  number, row = numbered
  try:
    image = read_image(row)
  except ValueError as error:
    about = {"reason": failure_reason(error)}
    return RowResult(number, row, {"image": row.name, "error": str(error)}, about)
  signature = perceptual_hash.to_json(perceptual_hash.signature_of(image))
  found = {"image": row.name, "size": list(image.size), "signature": signature}
  return RowResult(number, row, found, {})


def look(_, rows: Numbered) -> Iterator[list[RowResult]]:
  """The work of the stage, in threads; it needs no worker."""
  with futures.ThreadPoolExecutor() as pool:
    for start in range(0, len(rows), LOOKED_AT_ONCE):
      yield list(pool.map(look_at, rows[start : start + LOOKED_AT_ONCE]))


def _unusable(item: RowResult, cfg: CurateConfig, checks: Sequence[Check]) -> BadRow | None:
  """Why an image that was looked at can be given to no model."""
  found = item.row
  if "error" in found:
    error = ValueError(found["error"])
    return bad_row(item.source, error, item.about.get("reason", ""))
  width, height = found["size"]
  if min(width, height) < cfg.min_side:  # left out by choice
    return None
  (row,) = usable([item.source], [ImageFacts(width=width, height=height)], checks)
  return row if isinstance(row, BadRow) else None


def choose_images(
  parts: ShardedJob,
  benchmark: Sequence[Any],
  cfg: CurateConfig,
  checks: Sequence[Check],
  bad: BadRowList,
) -> tuple[list[CaptionRow | QARow], Counter, list[dict]]:
  """The rows to go on with; counts of the others by reason; each of the others with its reason.

  Args:
    checks: of the models that will be shown the images.
    bad: takes note of what can be given to no model. Where such is refused, an image that could not
      be read is looked at once more: it may have been mended since.

  Raises:
    ValueError: images that cannot be used and are to be refused.
  """
  rows, signatures, out = [], [], []
  for looked in parts.read():
    again = "error" in looked.row and bad.rule == "refuse"
    item = look_at((looked.number, looked.source)) if again else looked
    row, problem = item.row, _unusable(item, cfg, checks)
    if problem is not None:
      bad.note([problem])
      reason = "unreadable" if "error" in row else problem.reason
      out.append(
        {"image": row["image"], "reason": reason, "why": row.get("error", problem.message)}
      )
    elif min(row["size"]) < cfg.min_side:
      out.append(
        {
          "image": row["image"],
          "reason": "too small",
          "why": f"{row['size'][0]}x{row['size'][1]} pixels",
        }
      )
    else:
      rows.append(item.source)
      signatures.append(perceptual_hash.from_json(row["signature"]))
  bad.settle("images", of=parts.count)
  gone: dict[int, tuple[str, str]] = {}
  if cfg.similar_bits is not None:
    with going_on(f"comparing {len(rows):,} images"):
      for i, first in perceptual_hash.near_duplicates(signatures, cfg.similar_bits):
        gone[i] = "repeated", f"like {rows[first].name}"
      for i, which in perceptual_hash.like_benchmark(signatures, benchmark, cfg.similar_bits):
        gone[i] = "like a benchmark's", f"like its image number {which}"
  out += [
    {"image": rows[i].name, "reason": reason, "why": why} for i, (reason, why) in gone.items()
  ]
  kept = [row for i, row in enumerate(rows) if i not in gone]
  return kept, Counter(item["reason"] for item in out), out


def benchmark_signatures(cfg: CurateConfig, bad: BadRowList) -> list[Any]:
  """Of the benchmarks' images that can be read; `bad` takes note of the others."""
  found = []
  for source in cfg.benchmarks:
    rows = find_images(source, "curate.benchmarks")
    for row in counted(rows, "looking at a benchmark", "image"):
      try:
        found.append(perceptual_hash.signature_of(read_image(row)))
      except ValueError as error:
        bad.note([bad_row(row, error)])
  return found
