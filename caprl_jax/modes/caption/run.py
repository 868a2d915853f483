"""Mode `caption`: images from wherever they lie -> captions, by all hosts at once, batched by
shape.

Greedy in float32 the ids are those of transformers' `generate` on the same directory, image and
prompt: the checkpoint's own chat template, end tokens and repetition penalty are used. The rows are
cut into shards, each host does its own (`ShardedJob`), no host waits for another, and the one
with number 0 writes the output at the end.
"""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from caprl_jax import sharding
from caprl_jax.atomic_files import write_bytes, write_json
from caprl_jax.config import schema as configuration
from caprl_jax.data.readers.image_sources import base_folder, list_images
from caprl_jax.data.rows import CaptionRow
from caprl_jax.harness.row_shards import RowResult, ShardedJob, differences, manifest
from caprl_jax.harness.sections import PolicySection
from caprl_jax.inference.captioner import (
  Captioner,
  CaptionerConfig,
  CaptionerOutput,
  open_captioner,
)
from caprl_jax.json_files import read_record
from caprl_jax.modes.caption.formats import Format, Output, kind_of
from caprl_jax.modes.caption.page import samples_page
from caprl_jax.modes.caption.statistics import Statistics

log = logging.getLogger("caprl_jax.modes.caption.run")

# What `caption.prompt` may name in place of a text of its own.
STYLES = {
  # CapRL's own: what its captioners were trained with
  "detailed": "Please describe this image in detail.",
  "medium": "Describe this image in three to five sentences.",
  "short": "Describe this image in one sentence.",
  "document": "Describe this chart, table or document in detail: its kind, its structure, and "
  "all text, labels and numbers in it.",
}
# Keys of the section `caption` that the captioner has, too.
SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
  """The section `caption`.

  input: see `readers.image_sources.list_images`: folders, lists (JSON lines, JSON, CSV, text), tar
    (WebDataset), parquet, tfds:FOLDER:SPLIT.
  output: the file, or the folder of a `txt` or `hf` one.
  prompt: a style (`detailed`, `medium`, `short`, `document`) or any other text; None asks
    `policy.instruction`. A prompt asks for a length; max_tokens cuts.
  max_tokens: longest caption.
  temperature: 0 is greedy, and a caption then depends on its image alone. Sampled ones depend on
    `seed` and on which images share a batch, so that after an interruption others are drawn.
  top_p: the likeliest tokens that have this probability together are drawn from; 1: all.
  top_k: the likeliest tokens that are drawn from; 0: all.
  repetition_penalty: None takes the checkpoint's own (generation_config.json).
  batch_size: images a program runs at once, all of one bucket of shapes; the last batch of each
    bucket in a shard is filled up, so shards should be much longer than a batch. It may be changed
    when a job goes on.
  skip_bad_images: a bad image gets a row with `error` in place of a caption; False stops at the
    first one.
  format: see `formats.Output`; None takes that of the output's suffix (.jsonl, .parquet).
  embed_images: `hf` datasets hold the images' bytes, not their names.
  image_key, caption_key: the keys of `caprl_2m`. How the released CapRL-2M spells them is not known
    to us, so these are a guess.
  shard_rows: rows that are one host's work at a time. With fewer shards than hosts some hosts
    have nothing to do.
  host: this process's number, from 0; None: jax.process_index().
  hosts: how many processes share the output's folder; None: jax.process_count(). Set both on
    machines that do not run under jax.distributed.
  samples: about how many images are on the page of samples.
  """

  input: str
  output: str
  prompt: str | None = None
  max_tokens: int = 512
  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0
  repetition_penalty: float | None = None
  batch_size: int = 8
  skip_bad_images: bool = True
  format: Format | None = None
  embed_images: bool = True
  image_key: str = "image"
  caption_key: str = "caption"
  shard_rows: int = 10_000
  host: int | None = None
  hosts: int | None = None
  samples: int = 48

  def __post_init__(self):
    if self.shard_rows < 1 or self.batch_size < 1:
      raise ValueError(
        f"caption.shard_rows = {self.shard_rows} and batch_size = {self.batch_size} "
        "must be at least 1"
      )
    if (self.host is None) != (self.hosts is None):
      raise ValueError(
        f"caption.host = {self.host} and caption.hosts = {self.hosts}: set both or neither"
      )
    if self.hosts is not None and not 0 <= self.host < self.hosts:
      raise ValueError(
        f"caption.host = {self.host} must be from 0 to caption.hosts - 1 = {self.hosts - 1}"
      )
    if self.image_key == self.caption_key:
      raise ValueError(
        f"caption.image_key and caption.caption_key are both {self.image_key!r}; they must differ"
      )


def instruction_of(prompt: str | None, default: str) -> str:
  """What the captioner is asked. Raises ValueError for one word that looks like a style
  misspelt.
  """
  if not prompt:
    return default
  if (
    prompt not in STYLES
    and " " not in prompt.strip()
    and (hint := configuration.did_you_mean(prompt, STYLES))
  ):
    raise ValueError(
      f"caption.prompt = {prompt!r} is no style{hint} (styles: {', '.join(STYLES)}; "
      "or a whole sentence)"
    )
  return STYLES.get(prompt, prompt)


def _caption(
  captioner: Captioner, rows: Iterable[tuple[int, CaptionRow]], skip_bad_images: bool
) -> Iterator[list[RowResult]]:
  """Output rows of numbered rows, batch by batch. Raises ValueError at the first image that fails,
  unless such are skipped.
  """
  for batch in captioner(rows):
    for output in batch:
      if output.error is not None and not skip_bad_images:
        raise ValueError(
          f"{output.error} (caption.skip_bad_images=True records it and goes on)"
        ) from output.error
    yield [RowResult(out.number, out.row, _row(out), out.about()) for out in batch]


def _row(output: CaptionerOutput) -> dict[str, Any]:
  if output.error is not None:
    return {"image": output.row.name, "error": str(output.error)}
  (caption,) = output.captions
  return {
    "image": output.row.name,
    "caption": caption.text,
    "tokens": caption.tokens,
    "finish": caption.finish,
  }


def run(config, workdir: pathlib.Path) -> None:
  """Captions this host's shards of `caption.input`; host 0 then writes `caption.output`, its
  statistics and its page.

  The same command goes on where it was stopped; once all is done it does nothing. Nothing goes to
  the workdir.
  """
  del workdir
  cfg = configuration.load_section(config, "caption", CaptionConfig)
  section = configuration.load_section(config, "policy", PolicySection)
  # Of this host's devices only: nothing that runs here needs another host.
  mesh = sharding.make_mesh(
    configuration.load_section(config, "mesh", sharding.MeshConfig), jax.local_devices()
  )
  sharding.check_batch_size(cfg.batch_size, mesh, "caption.batch_size")
  instruction = instruction_of(cfg.prompt, section.instruction)
  path = pathlib.Path(os.path.expanduser(cfg.output))
  output = Output(
    path,
    kind_of(path, cfg.format),
    base_folder(cfg.input),
    cfg.embed_images,
    cfg.image_key,
    cfg.caption_key,
    f" with `{section.checkpoint}`, asked: {instruction!r}",
  )
  listing = list_images(cfg.input)
  rows = listing.rows
  seed = config.get("seed", 0)
  settings = section.identity() | {"prompt": instruction, "seed": seed}
  settings |= {key: getattr(cfg, key) for key in SAMPLING}
  settings = manifest(settings, [row.name for row in rows], cfg.shard_rows)
  host, hosts = (
    (jax.process_index(), jax.process_count()) if cfg.hosts is None else (cfg.host, cfg.hosts)
  )
  parts = ShardedJob(path.with_name(path.name + ".parts"), rows, settings, host=host, hosts=hosts)
  if not parts.folder.exists():
    parts.sweep()
    if _finished(output, settings):
      return
    output.check(rows)
  parts.open()

  captioner_cfg = CaptionerConfig(
    instruction, batch_size=cfg.batch_size, **{key: getattr(cfg, key) for key in SAMPLING}
  )
  parts.run(
    lambda: open_captioner(section.load, captioner_cfg, mesh=mesh, seed=seed),
    lambda captioner, left: _caption(captioner, left, cfg.skip_bad_images),
    what="captions",
  )
  if host == 0:
    parts.wait()
    with parts.lock("output"):
      statistics = Statistics(hosts, cfg.shard_rows, cfg.samples, seed, listing.passed_over)
      _write(output, parts, statistics)
  else:
    log.info("host %d of %d: its shards are done; host 0 writes the output", host, hosts)
    if jax.process_count() > 1:  # jax.distributed wants its processes to end together
      parts.wait_until_removed()


def _finished(output: Output, settings: dict) -> bool:
  """Whether the output is there, of this very job. Raises ValueError where it is another job's."""
  path = output.beside(".stats.json")
  if not path.exists():
    return False
  found = read_record(path)
  job = found.get("job") if isinstance(found, dict) else None
  if not isinstance(job, dict):
    raise ValueError(f"{path} is not from mode caption; move it or name another caption.output")
  other = output.path.with_name(job.get("output") or output.path.name)
  if not other.exists():
    return False
  if other != output.path:
    raise ValueError(
      f"{path} belongs to {other.name}, and {output.path.name} would have the same; "
      "name another caption.output"
    )
  if differing := differences(job, settings | {"output": output.path.name, "format": output.kind}):
    raise ValueError(
      f"{output.path} is there, from a job with other settings ({path}): "
      f"{differing}. Delete both or name another caption.output"
    )
  log.info(
    "%s is there, of %d images with these settings: nothing to do", output.path, settings["images"]
  )
  return True


def _write(output: Output, parts: ShardedJob[CaptionRow], statistics: Statistics) -> None:
  """Shards -> output, statistics, page. A kill at any point leaves the shards, or all of it."""

  def counted():
    for item in parts.read():
      statistics.add(item)
      yield item

  output.write(counted())
  figures, settings = statistics.figures(), parts.manifest
  page = samples_page(output.path.name, statistics, settings)
  write_bytes(output.beside(".html"), page.encode("utf-8", "xmlcharrefreplace"))
  job = settings | {"output": output.path.name, "format": output.kind}
  write_json(output.beside(".stats.json"), figures | {"job": job})
  parts.remove()
  tokens = (figures["caption_tokens"] or {}).get("mean", 0.0)
  log.info(
    "%d captions in %s: %.1f tokens per caption, %d cut at %d tokens, %d images failed; "
    "samples in %s",
    figures["captioned"],
    output.path,
    tokens,
    statistics.cut,
    settings["max_tokens"],
    figures["failed"],
    output.beside(".html"),
  )
