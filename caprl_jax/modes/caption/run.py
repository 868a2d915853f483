"""Mode `caption`: images from wherever they lie -> captions, by all hosts at once, batched by
shape.

Greedy in float32 the ids are those of transformers' `generate` on the same directory, image and
prompt: the checkpoint's own chat template, end tokens and repetition penalty are used. The rows are
cut into shards, each host does its own (`caption_shards`), no host waits for another, and the one
with number 0 writes the output at the end.
"""

import collections
import dataclasses
import functools
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from caprl_jax import sharding
from caprl_jax.atomic_files import write_bytes, write_json
from caprl_jax.config import schema as configuration
from caprl_jax.data.batches import ImagePrompt, ImageShape, image_shape, shape_bucket, stack
from caprl_jax.data.readers.image_sources import base_folder, find_images
from caprl_jax.data.rows import CaptionRow
from caprl_jax.harness.row_shards import RowResult, Shard, ShardedJob, differences, manifest
from caprl_jax.harness.sections import PolicySection
from caprl_jax.hub.load import Loaded
from caprl_jax.modes.caption.formats import Format, Output, kind_of
from caprl_jax.modes.caption.report import Statistics, reason_of, samples_page
from caprl_jax.rl.rollout import RolloutConfig, sample_captions
from caprl_jax.rl.sampling import SamplingConfig
from caprl_jax.types import Batch, Vocabulary

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
# decode and cut pictures while the device writes captions
PREPARE_THREADS = min(16, os.cpu_count() or 1)
BATCHES_AHEAD = 2
SAY_SECS = 60
SHOWN_FAILURES = 20
# PIL's name for an image in memory: another every time
_ADDRESS = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
  """input: see `data.pictures.find_images`: folders, JSON lines, tar (WebDataset), parquet,
  tfds:FOLDER:SPLIT.

  output, format: see `formats.Output`; None takes the format of the output's suffix
    (.jsonl, .parquet).
    embed_images: `hf` datasets hold the images' bytes, not their names.
    image_key, caption_key: of `caprl_2m`; how the released CapRL-2M spells its keys could not be
    looked up, so these are a guess.
  prompt: a style (`detailed`, `medium`, `short`, `document`) or any other text; None asks
    `policy.instruction`. A prompt asks for a length; max_tokens cuts.
  temperature: 0 is greedy, and a caption then depends on its image alone. Sampled ones depend on
    `seed` and on which images share a batch, so that after an interruption others are drawn.
    repetition_penalty: None takes the checkpoint's own (generation_config.json).
  batch_size: images a program runs at once, all of one bucket of shapes; the last batch of each
    bucket in a shard is filled up, so that shards should be long beside it. It may be changed when
    a job goes on.
  skip_bad_images: a row with `error` in place of a caption; False stops at the first one.
  shard_rows: rows that are one host's work at a time. With fewer shards than hosts some hosts have
  nothing to do.
  host, hosts: this process's number of how many that share the output's folder;
  None: jax.process_index() and
    process_count(). Set both on machines that do not run under jax.distributed.
  samples: images on the page of samples, about.
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


def end_ids(loaded: Loaded) -> tuple[int, ...]:
  """What ends a text, as transformers' `generate` has it: generation_config.json, config.json where
  there is none.
  """
  configs = [loaded.config, loaded.config.get("text_config") or {}]
  if "generation_config.json" in loaded.files:
    configs = [json.loads(loaded.files["generation_config.json"])]
  for config in configs:
    end = config.get("eos_token_id")
    if end is not None:
      return tuple(end) if isinstance(end, list) else (end,)
  return ()


def caption_vocabulary(loaded: Loaded) -> Vocabulary:
  """Every id may be written, as in `generate`."""
  size, ends = loaded.model.cfg.text.vocab_size, end_ids(loaded)
  return Vocabulary(
    jnp.ones(size, bool), jnp.full(size, -1, jnp.int32), ends, ends[0] if ends else 0
  )


class Captioner:
  """Images -> captions, a compiled program a bucket of image shapes. A context manager: it has
  threads.
  """

  def __init__(
    self,
    loaded: Loaded,
    cfg: CaptionConfig,
    instruction: str,
    mesh: jax.sharding.Mesh,
    seed: int,
    system: str | None = None,
    group: int = 1,
  ):
    """system: a turn before the instruction. group: captions an image; with several, a row's
    `group` holds them all.
    """
    self.loaded, self.cfg, self.mesh, self.seed = loaded, cfg, mesh, seed
    generation = json.loads(loaded.files.get("generation_config.json", b"{}"))
    penalty = (
      generation.get("repetition_penalty")
      if cfg.repetition_penalty is None
      else cfg.repetition_penalty
    )
    sampling = SamplingConfig(cfg.max_tokens, cfg.temperature, cfg.top_k, cfg.top_p, penalty or 1.0)
    self.vocabulary = caption_vocabulary(loaded)
    self.pieces = loaded.prompt_pieces(instruction, system)
    self._run = jax.jit(
      functools.partial(
        sample_captions,
        loaded.model,
        vocabulary=self.vocabulary,
        cfg=RolloutConfig(group, sampling),
      )
    )
    self._pool = futures.ThreadPoolExecutor(PREPARE_THREADS, "pictures")
    self._since, self._failures = time.monotonic(), 0

  def __enter__(self) -> "Captioner":
    return self

  def __exit__(self, *failure) -> None:
    self._pool.shutdown(cancel_futures=True)

  def __call__(
    self, rows: Sequence[CaptionRow], numbers: Sequence[int]
  ) -> Iterator[list[RowResult]]:
    """Captions `rows[number]` of each number, shape by shape; yields them as batches finish. A
    batch is dispatched before the one before it is fetched, and pictures are prepared for the ones
    after it meanwhile."""
    self._since = time.monotonic()
    buckets: dict[ImageShape, list[int]] = {}
    failed = []
    for number, (shape, error) in zip(
      numbers, self._pool.map(lambda number: self._shape(rows[number]), numbers)
    ):
      if error is None:
        buckets.setdefault(shape, []).append(number)
      else:
        failed.append(self._failed(number, rows[number], error))
    if failed:
      yield failed
    log.info("%d images in %d shapes", sum(map(len, buckets.values())), len(buckets))
    running: tuple | None = None
    for shape, members, examples in self._prepared(rows, buckets):
      kept, failed = [], []
      for number, (example, error) in zip(members, examples):
        if error is None:
          kept.append((number, example))
        else:
          failed.append(self._failed(number, rows[number], error))
      if failed:
        yield failed
      if kept:
        last, running = running, (shape, [number for number, _ in kept], self._dispatch(kept))
        if last:
          yield self._fetch(rows, *last)
    if running:
      yield self._fetch(rows, *running)

  def _shape(self, row: CaptionRow) -> tuple[ImageShape | None, ValueError | None]:
    cfg = self.loaded.model.cfg
    try:
      return shape_bucket(image_shape([row], cfg), cfg.vision.slots_multiple), None
    except ValueError as error:
      return None, error

  def _prepared(
    self, rows, buckets: dict[ImageShape, list[int]]
  ) -> Iterator[tuple[ImageShape, list[int], list]]:
    """(shape, row numbers, (example, error) of each), batch by batch; the next few are in the
    making.
    """

    def prepare(prompt: ImagePrompt, number: int):
      try:
        return prompt(rows[number]), None
      except ValueError as error:
        return None, error

    ahead: collections.deque = collections.deque()
    for shape in sorted(buckets, key=lambda shape: (shape.tokens, shape.slots)):
      prompt = ImagePrompt(self.loaded.model.cfg, self.pieces, shape)
      for start in range(0, len(buckets[shape]), self.cfg.batch_size):
        members = buckets[shape][start : start + self.cfg.batch_size]
        ahead.append(
          (shape, members, [self._pool.submit(prepare, prompt, number) for number in members])
        )
        if len(ahead) > BATCHES_AHEAD:
          shape_, members, made = ahead.popleft()
          yield shape_, members, [one.result() for one in made]
    for shape, members, made in ahead:
      yield shape, members, [one.result() for one in made]

  def _dispatch(self, kept: list[tuple]):
    """Begins to caption a batch, filled up with its last image, and does not wait for it."""
    filled = kept + kept[-1:] * (self.cfg.batch_size - len(kept))
    images, prompts = stack([example for _, example in filled])
    batch = Batch(images, prompts, None, np.asarray([number for number, _ in filled], np.int32))
    key = jax.random.fold_in(jax.random.key(self.seed), kept[0][0])
    captions = self._run(self.loaded.params, sharding.put_batch(batch, self.mesh), key)
    return captions.tokens_BGT, captions.valid_BGT, captions.ended_BG

  def _fetch(self, rows, shape: ImageShape, numbers: list[int], captions) -> list[RowResult]:
    tokens_BGT, valid_BGT, ended_BG = jax.device_get(captions)
    found = []
    for n, number in enumerate(numbers):
      group = []
      for tokens_T, valid_T, ended in zip(tokens_BGT[n], valid_BGT[n], ended_BG[n]):
        ids = tokens_T[valid_T].tolist()
        group.append(
          {
            "caption": self.loaded.tokenizer.decode_written(ids),
            "tokens": ids,
            "finish": "end" if ended else "length",
          }
        )
      row = {"image": rows[number].name, **group[0]}
      found.append((number, row if len(group) == 1 else row | {"group": group}))
    now = time.monotonic()
    secs, self._since = (now - self._since) / len(found), now
    about = {"bucket": f"{shape.slots}x{shape.tokens}", "secs": round(secs, 6)}
    return [RowResult(number, row, about) for number, row in found]

  def _failed(self, number: int, row: CaptionRow, error: ValueError) -> RowResult:
    error_text = _ADDRESS.sub("", str(error))
    message = error_text if row.name in error_text else f"row {row.name!r}: {error_text}"
    if not self.cfg.skip_bad_images:
      raise ValueError(
        f"{message} (caption.skip_bad_images=True records it and goes on)"
      ) from error
    self._failures += 1
    log.log(logging.WARNING if self._failures <= SHOWN_FAILURES else logging.DEBUG, "%s", message)
    if self._failures == SHOWN_FAILURES:
      log.warning(
        "%d images have failed; those to come stand in the output, with their reasons",
        SHOWN_FAILURES,
      )
    return RowResult(number, {"image": row.name, "error": message}, {"reason": reason_of(error)})


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
  path = pathlib.Path(cfg.output).expanduser()
  output = Output(
    path,
    kind_of(path, cfg.format),
    base_folder(cfg.input),
    cfg.embed_images,
    cfg.image_key,
    cfg.caption_key,
    f" with `{section.checkpoint}`, asked: {instruction!r}",
  )
  rows = find_images(cfg.input)
  seed = config.get("seed", 0)
  settings = section.identity() | {"prompt": instruction, "seed": seed}
  settings |= {
    key: getattr(cfg, key)
    for key in ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
  }
  settings = manifest(settings, [row.name for row in rows], cfg.shard_rows)
  host, hosts = (
    (jax.process_index(), jax.process_count()) if cfg.hosts is None else (cfg.host, cfg.hosts)
  )
  parts = ShardedJob(path.with_name(path.name + ".parts"), settings, host, hosts)
  if not parts.folder.exists():
    parts.sweep()
    if _finished(output, settings):
      return
    output.check(rows)
  parts.open()

  with jax.set_mesh(mesh):
    _caption_shards(
      parts, rows, lambda: Captioner(section.load(mesh), cfg, instruction, mesh, seed)
    )
  if host == 0:
    parts.wait()
    with parts.lock("output"):
      _write(output, parts, rows, Statistics(hosts, cfg.shard_rows, cfg.samples, seed))
  else:
    log.info("host %d of %d: its shards are done; host 0 writes the output", host, hosts)
    if jax.process_count() > 1:  # jax.distributed wants its processes to end together
      parts.wait_until_removed()


def _finished(output: Output, settings: dict) -> bool:
  """Whether the output is there, of this very job. Raises ValueError where it is another job's."""
  path = output.beside(".stats.json")
  if not path.exists():
    return False
  job = json.loads(path.read_text("utf-8")).get("job", {})
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


def _caption_shards(parts: ShardedJob, rows: Sequence[CaptionRow], make_captioner) -> None:
  """Does what is left of this host's shards. The captioner is only made where something is."""
  left = [shard for shard in parts.missing() if shard in parts.mine]
  total = sum(len(parts.numbers(shard)) for shard in parts.mine)
  before = total - sum(len(parts.numbers(shard)) - parts.count_done(shard) for shard in left)
  if before:
    log.info("going on after %d of %d images", before, total)
  if not left:
    return
  started = said = time.monotonic()
  done = 0
  bar = tqdm(total=total, initial=before, desc="captions", unit="image", disable=None)
  with bar, make_captioner() as captioner:
    for shard in left:
      with Shard(parts, shard) as kept:
        for found in captioner(
          rows, [number for number in kept.numbers if number not in kept.done]
        ):
          kept.put(found)
          done += len(found)
          bar.update(len(found))
          if time.monotonic() - said > SAY_SECS:
            said = time.monotonic()
            rate = done / (said - started)
            log.info(
              "%d of %d images, %.1f a second, %.0f minutes to go",
              before + done,
              total,
              rate,
              (total - before - done) / rate / 60,
            )
  secs = time.monotonic() - started
  log.info(
    "%d images in %.1f s, %.1f a second, loading and compiling included", done, secs, done / secs
  )


def _write(
  output: Output, parts: ShardedJob, rows: Sequence[CaptionRow], statistics: Statistics
) -> None:
  """Shards -> output, statistics, page. A kill at any point leaves the shards, or all of it."""

  def counted():
    for item in parts.read():
      statistics.add(item)
      yield item.number, item.row

  output.write(counted(), rows)
  figures, settings = statistics.figures(), parts.manifest
  page = samples_page(output.path.name, statistics, settings, rows)
  write_bytes(output.beside(".html"), page.encode("utf-8", "xmlcharrefreplace"))
  job = settings | {"output": output.path.name, "format": output.kind}
  write_json(output.beside(".stats.json"), figures | {"job": job})
  parts.remove()
  tokens = (figures["caption_tokens"] or {}).get("mean", 0.0)
  log.info(
    "%d captions in %s: %.1f tokens a caption, %d cut at %d tokens, %d images failed; "
    "samples in %s",
    figures["captioned"],
    output.path,
    tokens,
    statistics.cut,
    settings["max_tokens"],
    figures["failed"],
    output.beside(".html"),
  )
