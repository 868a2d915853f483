"""Mode `caption`: images from wherever they lie -> captions, by all hosts at once, batched by
shape.

Greedy in float32 the ids are those of transformers' `generate` on the same directory, image and
prompt: the checkpoint's own chat template, end tokens and repetition penalty are used. The rows are
cut into shards, each host does its own (`ShardedJob`), no host waits for another, and the one
with number 0 writes the output at the end.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from caprl_jax import sharding
from caprl_jax.atomic_files import saying_full_disk, write_bytes, write_json
from caprl_jax.config import schema as configuration
from caprl_jax.data.readers.image_sources import base_folder
from caprl_jax.data.rows import CaptionRow
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.versions import versions
from caprl_jax.harness.row_shards import POLL_SECS, ShardedJob, differences, manifest
from caprl_jax.harness.sections import PolicySection
from caprl_jax.inference.captioner import CaptionerConfig, open_captioner
from caprl_jax.json_files import read_record
from caprl_jax.modes.caption.captioning import Captioning, Captions
from caprl_jax.modes.caption.columns import Column, Units, assembled
from caprl_jax.modes.caption.dry_run import DryRun, dry_run
from caprl_jax.modes.caption.formats.output import Output, kind_of
from caprl_jax.modes.caption.inputs import read_inputs, temporary_cache
from caprl_jax.modes.caption.int8 import check_int8_images, compare
from caprl_jax.modes.caption.page import samples_page
from caprl_jax.modes.caption.reopening import kept_units, made_again, mend, seed, tried_again
from caprl_jax.modes.caption.section import SAMPLING, CaptionConfig, columns_of
from caprl_jax.modes.caption.statistics import Statistics
from caprl_jax.modes.caption.upload import check_upload, upload
from caprl_jax.progress import going_on

log = logging.getLogger("caprl_jax.modes.caption.run")

MANIFEST = "caption_manifest.json"  # in an output that is a folder of its own
INT8 = "int8.json"  # in the folder of the shards: what rounding changes
# How far a job is.
_OPEN, _BEGIN, _AGAIN, _DONE = "in work", "to begin", "to be made again in part", "done"


def run(config, workdir: pathlib.Path) -> None:
  """Captions this host's shards of `caption.input`; host 0 then writes `caption.output`, its
  statistics and its page, and uploads them if that is asked for.

  The same command goes on where it was stopped; once all is done it does nothing. Nothing goes to
  the workdir.
  """
  del workdir
  cfg = configuration.load_section(config, "caption", CaptionConfig)
  section = configuration.load_section(config, "policy", PolicySection).settled()
  # Of this host's devices only: nothing that runs here needs another host.
  mesh = sharding.make_mesh(
    configuration.load_section(config, "mesh", sharding.MeshConfig), jax.local_devices()
  )
  sharding.check_batch_size(cfg.batch_size, mesh, "caption.batch_size")
  check_int8_images(cfg, section)
  columns, seed_ = columns_of(cfg, section.instruction), config.get("seed", 0)
  output = _output(cfg, section, columns)
  parts_folder = output.path.with_name(output.path.name + ".parts")
  open_any = functools.partial(_captioners, mesh=mesh, seed=seed_)
  captioners = functools.partial(open_any, section, cfg)
  int8_changes = functools.partial(compare, cfg, section, open_any, prompt=columns[0].prompt)
  if cfg.dry_run:
    with temporary_cache() as cache:
      inputs = read_inputs(cfg, columns, pathlib.Path(cache), texts=output.kind == "txt")
      settings = _settings(cfg, section, columns, seed_, inputs.rows)
      dry_run(
        cfg, output, inputs.rows, DryRun(section.sizes, captioners, settings, _pace(mesh, cfg))
      )
      if cfg.int8_images:
        int8_changes(inputs.rows)
    return
  remedy = "no finished caption is lost: free some space and run the same command, which goes on"
  with saying_full_disk(output.path.parent, remedy):
    inputs = read_inputs(cfg, columns, parts_folder / "urls", texts=output.kind == "txt")
    settings = _settings(cfg, section, columns, seed_, inputs.rows)
    host, hosts = (
      (jax.process_index(), jax.process_count()) if cfg.hosts is None else (cfg.host, cfg.hosts)
    )
    units = Units(inputs.rows, len(columns))
    parts = ShardedJob(parts_folder, units, settings, host=host, hosts=hosts)
    together = cfg.hosts is None and jax.process_count() > 1
    state = _left_to_do(cfg, output, parts, inputs.rows, from_first if together else None)
    if state != _DONE:
      if cfg.int8_images and host == 0 and not (parts.folder / INT8).exists():
        write_json(parts.folder / INT8, int8_changes(inputs.rows))
      _caption(cfg, output, parts, captioners, state)
      if host == 0:
        again = cfg.repair or cfg.retry_failed
        parts.wait(made_again(parts, retry_failed=cfg.retry_failed) if again else None)
        with parts.lock("output"):
          statistics = Statistics(
            hosts, cfg.shard_rows, cfg.samples, seed_, inputs.passed_over, columns
          )
          _write(output, parts, statistics, _pace(mesh, cfg))
      else:
        log.info("host %d of %d: its shards are done; host 0 writes the output", host, hosts)
        if jax.process_count() > 1:  # jax.distributed wants its processes to end together
          parts.wait_until_removed()
    if host == 0:
      upload(cfg.upload, output)


def _output(cfg: CaptionConfig, section: PolicySection, columns: Sequence[Column]) -> Output:
  path = pathlib.Path(os.path.expanduser(cfg.output))
  asked = ", ".join(repr(column.prompt) for column in columns)
  return Output(
    path,
    kind_of(path, cfg.format),
    base_folder(cfg.input),
    cfg.embed_images,
    cfg.image_key,
    cfg.caption_key,
    f" with `{section.checkpoint}`, asked: {asked}",
    columns,
    cfg.existing,
  )


def _settings(
  cfg: CaptionConfig,
  section: PolicySection,
  columns: Sequence[Column],
  seed: int,
  rows: Sequence[CaptionRow],
) -> dict[str, Any]:
  """What captions depend on. What is at its default stays out where older jobs do not have it."""
  prompts = {column.name: column.prompt for column in columns}
  settings: dict[str, Any] = section.identity()
  settings["prompt"] = columns[0].prompt if cfg.prompts is None else prompts
  settings |= {"seed": seed} | {key: getattr(cfg, key) for key in SAMPLING}
  if cfg.repetition_penalty is None and section.sampled_as_trained:
    settings["repetition_penalty"] = "none, as trained"  # and not that of the files
  if cfg.captions != 1:
    settings["captions"] = cfg.captions
  if cfg.existing is not None:
    settings["existing"] = cfg.existing
  text = dataclasses.asdict(cfg.text)
  defaults = {field.name: field.default for field in dataclasses.fields(cfg.text)}
  if changed := {key: value for key, value in text.items() if value != defaults[key]}:
    settings["text"] = changed
  return manifest(settings, [row.name for row in rows], cfg.shard_rows * len(columns))


@contextlib.contextmanager
def _captioners(
  section: PolicySection, cfg: CaptionConfig, mesh: jax.sharding.Mesh, seed: int
) -> Iterator[Callable[[str], Captions]]:
  """What opens a captioner for a prompt, all of them of one model, which is loaded when the first
  is opened.
  """
  sampling = {key: getattr(cfg, key) for key in SAMPLING}
  with contextlib.ExitStack() as stack:

    @functools.cache
    def loaded():
      return section.load(mesh)

    @functools.cache
    def captioner(prompt: str) -> Captions:
      settings = CaptionerConfig(
        prompt, captions=cfg.captions, batch_size=cfg.batch_size, **sampling
      )
      opened = open_captioner(lambda _: loaded(), settings, mesh=mesh, seed=seed)
      return stack.enter_context(opened)

    yield captioner


def _left_to_do(
  cfg: CaptionConfig,
  output: Output,
  parts: ShardedJob[CaptionRow],
  rows: list[CaptionRow],
  first: Callable[[Callable[[], str]], str] | None,
) -> str:
  """How far the job is; `_DONE` where nothing is to be captioned or written. Makes ready what
  `repair` and `retry_failed` ask for.

  Args:
    first: where the hosts run together, what host 0 finds, told to all: a folder that it has made
      or taken away meanwhile would lead another host elsewhere. None: each looks.
  """
  look = first or (lambda of: of())
  told = output.beside(".stats.json")
  written = told.stat().st_mtime_ns if told.exists() else None
  state = look(lambda: _state(cfg, output, parts, rows))
  if state == _DONE:
    return state
  with going_on("waiting for host 0, which makes ready what is made again"):
    while state == _AGAIN and not parts.folder.exists():
      if told.exists() and told.stat().st_mtime_ns != written:
        return _DONE  # host 0 has done it all
      time.sleep(POLL_SECS)
  parts.open()
  asked = cfg.repair or cfg.retry_failed
  if state == _OPEN and asked and (count := mend(parts, retry_failed=cfg.retry_failed)):
    log.info("%s: %d captions are made again", parts.folder, count)
  return look(lambda: state)  # host 0 may take the folder away from here on


def _state(
  cfg: CaptionConfig, output: Output, parts: ShardedJob[CaptionRow], rows: list[CaptionRow]
) -> str:
  """How far the job is. Host 0 makes the folder of one that is to be made again in part. Raises
  ValueError where it cannot be begun."""
  again = cfg.repair or cfg.retry_failed
  if parts.folder.exists():
    return _OPEN
  parts.sweep()
  if not _finished(output, parts.manifest):
    output.check(rows)
    if parts.host == 0:
      check_upload(cfg.upload, output)
    return _BEGIN
  lost = output.kind == "txt" and cfg.existing == "skip"  # which asks for what is not there
  if not again and not lost:
    log.info("%s is there, of %d images with these settings: nothing to do", output.path, len(rows))
    return _DONE
  units = kept_units(output, rows, cfg.retry_failed)
  left = parts.count - len(units)
  if not left:
    log.info("%s is there, and nothing of it is missing: nothing to do", output.path)
    return _DONE
  log.info("%s: %d of %d captions are made again", output.path, left, parts.count)
  if parts.host == 0:
    seed(parts, units)
  return _AGAIN


def _caption(
  cfg: CaptionConfig, output: Output, parts: ShardedJob[CaptionRow], captioners, state: str
) -> None:
  """Captions what is left of this host's shards."""
  again = cfg.retry_failed and state != _BEGIN

  def work(captioner, left):
    for found in Captioning(output, cfg.text, captioner, cfg.skip_bad_images)(left):
      yield tried_again(found) if again else found

  parts.run(
    captioners,
    work,
    what="captions",
    unit="image" if len(output.columns) == 1 else "caption",
  )


def _pace(mesh: jax.sharding.Mesh, cfg: CaptionConfig) -> dict[str, Any]:
  """What a job's rate depends on besides its settings."""
  return {
    "device": mesh.devices.flat[0].device_kind,
    "devices": mesh.devices.size,
    "batch_size": cfg.batch_size,
  }


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
  differing = differences(job, settings | {"output": output.path.name, "format": output.kind})
  if differing and output.kind == "txt" and output.existing not in (None, "refuse"):
    return False  # another job for the same texts: it is said what becomes of those that are there
  if differing:
    raise ValueError(
      f"{output.path} is there, from a job with other settings ({path}): "
      f"{differing}. Delete both or name another caption.output"
    )
  return True


def _write(
  output: Output, parts: ShardedJob[CaptionRow], statistics: Statistics, pace: dict[str, Any]
) -> None:
  """Shards -> output, statistics, page. A kill at any point leaves the shards, or all of it."""

  def counted():
    for item in assembled(parts.read(), output.columns):
      statistics.add(item)
      yield item

  output.write(counted())
  figures, settings = statistics.figures(), parts.manifest
  page = samples_page(output.path.name, statistics, settings)
  write_bytes(output.beside(".html"), page.encode("utf-8", "xmlcharrefreplace"))
  job = settings | {"output": output.path.name, "format": output.kind}
  made = {"versions": versions(), **pace, "hosts": parts.hosts}
  told = figures | {"made_with": made, "job": job}
  if (parts.folder / INT8).exists():
    told["int8"] = read_record(parts.folder / INT8)
  if output.kind in ("hf", "webdataset", "tfds"):
    write_json(output.path / MANIFEST, told)
  write_json(output.beside(".stats.json"), told)
  parts.remove()
  tokens = (figures["caption_tokens"] or {}).get("mean", 0.0)
  log.info(
    "%d captions in %s: %.1f tokens per caption, %d cut at %d tokens, %d images failed; "
    "samples in %s",
    figures.get("captions", figures["captioned"]),
    output.path,
    tokens,
    statistics.cut,
    settings["max_tokens"],
    figures["failed"],
    output.beside(".html"),
  )
