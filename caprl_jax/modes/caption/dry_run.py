"""What a job would do, without doing it: images, shapes, time, disk."""

import collections
import dataclasses
import json
import logging
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from caprl_jax.data.batches import ImageShape
from caprl_jax.data.readers.inputs.fetch import WebImage
from caprl_jax.data.rows import CaptionRow, image_bytes
from caprl_jax.inference.host_batches import HostPipeline, NumberedRow
from caprl_jax.json_files import read_record
from caprl_jax.modes.caption.captioning import Captioning, Captions
from caprl_jax.modes.caption.formats.output import Output
from caprl_jax.modes.caption.formats.texts import text_path
from caprl_jax.modes.caption.inputs import own_caption
from caprl_jax.modes.caption.section import CaptionConfig
from caprl_jax.progress import duration

log = logging.getLogger("caprl_jax.modes.caption.dry_run")

LOOKED_AT = 10_000  # images whose headers are read; of more, a sample
FETCHED = 64  # images of the web
BATCHES = 2  # that are timed, after one that compiles
_BLOCK = 4096  # bytes: a small file takes one of such
_SAME = ("checkpoint_sha256", "dtype", "int8", "prompt", "max_tokens", "captions")


@dataclasses.dataclass(frozen=True)
class DryRun:
  """sizes: the captioner's, without its weights. captioners: as a job opens them. settings: of the
  job. pace: what a rate depends on besides these.
  """

  sizes: Callable[[], Any]
  captioners: Callable[[], AbstractContextManager[Callable[[str], Captions]]]
  settings: dict[str, Any]
  pace: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rate:
  """per_sec: captions a second; compile_secs: of one shape; source: where both come from;
  row_bytes: of a row of the output.
  """

  per_sec: float
  compile_secs: float
  row_bytes: float
  source: str


def dry_run(
  cfg: CaptionConfig, output: Output, rows: Sequence[CaptionRow], job: DryRun
) -> dict[str, Any]:
  """Says what a job would do, and writes nothing.

  Returns:
    What it says: images, existing, units (captions by prompt) to write, shapes (images by patches x
    image tokens), failed (of the images looked at), secs (None: nothing to caption), disk_bytes,
    rate_from.
  """
  todo, there = _to_do(output, rows)
  picked = _sample(todo, cfg)
  with HostPipeline(job.sizes(), cfg.batch_size) as host:
    buckets, failed = host.bucket([(i, row) for i, (row, _) in enumerate(picked)])
  scale = len(todo) / max(len(picked), 1)
  shapes = {
    f"{shape.slots}x{shape.tokens}": round(len(members) * scale)
    for shape, members in buckets.items()
  }
  good = sum(shapes.values())
  rate = _rate(cfg, output, job, picked, buckets) if buckets else None
  secs = good / rate.per_sec + len(buckets) * rate.compile_secs if rate else None
  disk = _disk(output, buckets, good, rate) if rate else 0
  found = {
    "images": len(rows),
    "existing": there,
    "units": len(todo),
    "shapes": shapes,
    "failed": round(len(failed) * scale),
    "secs": secs,
    "disk_bytes": disk,
    "rate_from": rate.source if rate else None,
  }
  _say(found, output, rate, len(picked) < len(todo))
  return found


def _to_do(output: Output, rows: Sequence[CaptionRow]) -> tuple[list[tuple[CaptionRow, int]], int]:
  """Rows with the number of a column that are to be captioned, and how many have a caption."""
  found, there = [], 0
  for row in rows:
    for at, column in enumerate(output.columns):
      if output.kind == "txt":
        exists = text_path(output, row, column).exists()
      else:
        exists = output.existing is not None and own_caption(row, column) is not None
      there += exists
      if not (exists and output.existing == "skip"):
        found.append((row, at))
  return found, there


def _sample(
  todo: Sequence[tuple[CaptionRow, int]], cfg: CaptionConfig
) -> list[tuple[CaptionRow, int]]:
  """Those that are looked at: all, or some at random, the same every time."""
  on_the_web = any(isinstance(row.image, WebImage) for row, _ in todo)
  most = FETCHED if on_the_web else max(LOOKED_AT, (BATCHES + 1) * cfg.batch_size)
  if len(todo) <= most:
    return list(todo)
  picked = np.random.default_rng(0).choice(len(todo), most, replace=False)
  return [todo[i] for i in sorted(picked)]


def _rate(
  cfg: CaptionConfig,
  output: Output,
  job: DryRun,
  picked: Sequence[tuple[CaptionRow, int]],
  buckets: dict[ImageShape, list[NumberedRow]],
) -> Rate:
  """That of a finished job beside the output with the same captioner, settings and devices, else of
  a few batches of the most frequent shape.
  """
  for path in sorted(output.path.absolute().parent.glob("*.stats.json")):
    if found := _finished_rate(path, job):
      return found
  members = max(buckets.values(), key=len)
  numbered = [(number * len(output.columns) + picked[number][1], row) for number, row in members]
  first, more = (
    numbered[: cfg.batch_size],
    numbered[cfg.batch_size : (BATCHES + 1) * cfg.batch_size],
  )
  with job.captioners() as captioner:
    caption = Captioning(output, cfg.text, captioner, skip_bad_images=True)
    began = time.monotonic()
    sizes = _row_bytes(caption, first)
    compiled = time.monotonic() - began
    timed = more or first  # again, where there are no others
    began = time.monotonic()
    sizes += _row_bytes(caption, timed)
    secs = max(time.monotonic() - began, 1e-6)
  compile_secs = max(compiled - secs * len(first) / len(timed), 0.0)
  source = f"{len(timed)} images captioned now, after {len(first)} to compile"
  return Rate(len(timed) / secs, compile_secs, statistics.fmean(sizes or [0]), source)


def _row_bytes(caption: Captioning, numbered: list[NumberedRow]) -> list[int]:
  return [len(json.dumps(item.row)) for batch in caption(numbered) for item in batch]


def _finished_rate(path: pathlib.Path, job: DryRun) -> Rate | None:
  try:
    told = read_record(path)
    then, made = told["job"], told["made_with"]
    same = all(then.get(key) == job.settings.get(key) for key in _SAME)
    if not same or any(made.get(key) != value for key, value in job.pace.items()):
      return None
    per_host = told["images_per_sec"] / made["hosts"]
    mean = told["caption_tokens"]["mean"]
  except (ValueError, KeyError, TypeError):
    return None  # another program's file, or one of a job that captioned nothing
  row_bytes = 100 + 12.0 * mean  # five characters a token, and its id
  return Rate(per_host, 0.0, row_bytes, f"{path.name}, of {told['captioned']:,} images")


def _disk(
  output: Output,
  buckets: dict[ImageShape, list[NumberedRow]],
  images: int,
  rate: Rate,
) -> int:
  """Bytes of the output, and of the shards beside it while it is made."""
  kept = rate.row_bytes
  if output.kind == "txt":
    kept = max(rate.row_bytes, _BLOCK)
  if output.kind in ("webdataset", "tfds") or (output.kind == "hf" and output.embed_images):
    some = [row for members in buckets.values() for _, row in members][:200]
    kept += statistics.fmean(_image_size(row) for row in some)
  return round(images * (kept + rate.row_bytes))


def _image_size(row: CaptionRow) -> int:
  if isinstance(row.image, pathlib.Path):
    return os.path.getsize(row.image)
  return len(image_bytes(row))


def _say(found: dict[str, Any], output: Output, rate: Rate | None, sampled: bool) -> None:
  prompts = len(output.columns)
  times = f", {prompts} prompts each" if prompts > 1 else ""
  log.info("dry run: %d images%s; %d captions to write", found["images"], times, found["units"])
  if found["existing"]:
    log.info(
      "%d have a caption already (caption.existing = %s)", found["existing"], output.existing
    )
  of = " (by a sample)" if sampled else ""
  shapes = collections.Counter(found["shapes"]).most_common()
  log.info(
    "%d shapes%s, in patches x image tokens: %s",
    len(shapes),
    of,
    ", ".join(f"{count} of {shape}" for shape, count in shapes) or "none",
  )
  if found["failed"]:
    log.warning("%d cannot be opened", found["failed"])
  if rate is None:
    log.info("nothing is to be captioned")
    return
  log.info(
    "%s on this host alone at %.2f per second (by %s)%s",
    duration(found["secs"]),
    rate.per_sec,
    rate.source,
    f", {duration(rate.compile_secs)} to compile each shape" if rate.compile_secs else "",
  )
  place = output.path.absolute()
  free = shutil.disk_usage(next(above for above in place.parents if above.exists())).free
  level = logging.WARNING if found["disk_bytes"] > free else logging.INFO
  log.log(
    level,
    "%.1f MiB of disk with the shards that are kept meanwhile; %.0f MiB are free in %s",
    found["disk_bytes"] / (1 << 20),
    free / (1 << 20),
    place.parent,
  )
