"""Images -> captions, as transformers' `generate` writes them: by the checkpoint's own chat
template, end tokens and repetition penalty.

A fixed number of captions is written at once (`engine/`): when one has ended, the next image takes
its place.
"""

import collections
import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from caprl_jax.data.batches import ImagePrompt, ImageShape, stack
from caprl_jax.data.rows import CaptionRow, QARow, failure_reason
from caprl_jax.hub.folders.notices import warn_once
from caprl_jax.hub.folders.text_files import json_of
from caprl_jax.hub.load import Loaded
from caprl_jax.hub.tokenizer import said_ends
from caprl_jax.hub.vocabulary import own_vocabulary
from caprl_jax.inference.engine.engine import Asked, Engine, EngineConfig
from caprl_jax.inference.engine.programs import EngineModel, Request
from caprl_jax.inference.engine.slots import Written
from caprl_jax.inference.host_batches import BatchesAhead, HostPipeline, NumberedRow
from caprl_jax.rl.sampling import SamplingConfig
from caprl_jax.types import Vocabulary

log = logging.getLogger("caprl_jax.inference.captioner")

GENERATION = "generation_config.json"
NOT_WHOLE = "\ufffd"  # in the place of bytes that are no character, or not yet
SHOWN_FAILURES = 20
# PIL's name for an image in memory: another every time
_ADDRESS = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
  """instruction: what the captioner is asked; system: a turn before it.

  captions: written of each image, all from one run of the image.
  max_tokens, temperature, top_p, top_k: of each caption. 0 is greedy, and a caption then depends on
    its image alone; a sampled one depends also on the seed, on its row's number and on its own
    number among the captions of the image. Neither depends on which images are captioned beside it.
  repetition_penalty: None takes the checkpoint's own (generation_config.json), but for captioners
    of CapRL (`PolicySection.sampled_as_trained`).
  batch_size: images that are captioned at once; when one is done, the next takes its place. A
    quarter as many, all of one bucket of shapes, are encoded at once.
  """

  instruction: str
  system: str | None = None
  captions: int = 1
  max_tokens: int = 512
  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0
  repetition_penalty: float | None = None
  batch_size: int = 8


@dataclasses.dataclass(frozen=True)
class WrittenCaption:
  """A caption's text, the ids that were sampled (the end token included), and whether it ended by
  itself ("end") or was cut at max_tokens ("length"); "" while it is being written, and then the
  text has whole characters alone: it is the beginning of the whole caption's.
  """

  text: str
  tokens: list[int]
  finish: str


@dataclasses.dataclass(frozen=True)
class CaptionerOutput:
  """What became of one image: its captions, or the error that names its row.

  number, row: as they were given. shape: the bucket that it ran in. secs: its share of the time
  since others were done before it.
  """

  number: int
  row: CaptionRow | QARow
  captions: tuple[WrittenCaption, ...] = ()
  error: ValueError | None = None
  shape: ImageShape | None = None
  secs: float = 0.0

  def about(self) -> dict[str, Any]:
    """What statistics need beside the captions: bucket and secs, or the reason of the error."""
    if self.error is not None:
      return {"reason": failure_reason(self.error)}
    return {"bucket": f"{self.shape.slots}x{self.shape.tokens}", "secs": round(self.secs, 6)}


@contextlib.contextmanager
def open_captioner(
  load: Callable[[jax.sharding.Mesh], Loaded],
  cfg: CaptionerConfig,
  *,
  mesh: jax.sharding.Mesh,
  seed: int,
) -> "Iterator[Captioner]":
  """A captioner on the mesh, which is jax's own within the context. `load` gives the model, as
  `PolicySection.load`.
  """
  with jax.set_mesh(mesh), Captioner(load(mesh), cfg, mesh=mesh, seed=seed) as captioner:
    yield captioner


class _Given(NamedTuple):
  """An image that is captioned: a numbered row and its bucket."""

  numbered: NumberedRow
  shape: ImageShape


class Captioner:
  """Images -> captions. For each bucket of image shapes a program or two are compiled, once. A
  context manager: it has threads.
  """

  def __init__(self, loaded: Loaded, cfg: CaptionerConfig, *, mesh: jax.sharding.Mesh, seed: int):
    self.loaded, self.cfg, self.mesh, self.seed = loaded, cfg, mesh, seed
    self.vocabulary = caption_vocabulary(loaded)
    self.pieces = loaded.prompt_pieces(cfg.instruction, cfg.system)
    engine_cfg = EngineConfig(cfg.batch_size, cfg.captions, _sampling(loaded, cfg))
    self.engine = Engine(
      EngineModel.of_policy(loaded.model),
      loaded.params,
      engine_cfg,
      vocabulary=self.vocabulary,
      mesh=mesh,
      seed=seed,
    )
    prefilled = engine_cfg.prefilled(self.engine.shards)
    ahead = -(-2 * cfg.batch_size // prefilled)
    self._host = HostPipeline(loaded.model.cfg, prefilled, ahead)
    self._since, self._failures = time.monotonic(), 0

  def __enter__(self) -> "Captioner":
    return self

  def __exit__(self, *failure) -> None:
    self._host.close()

  def __call__(self, rows: Iterable[NumberedRow]) -> Iterator[list[CaptionerOutput]]:
    """Captions numbered rows, smaller images first; yields them as they are done, in no order.
    Pictures are prepared while the device works.

    Args:
      rows: a row's number goes into its random keys.
    """
    self._since = time.monotonic()
    source, failed = self._open(list(rows))
    if failed:
      yield failed
    group: dict[int, dict[int, WrittenCaption]] = collections.defaultdict(dict)  # by image
    for found in self.engine(source):
      done: list[tuple[_Given, tuple[WrittenCaption, ...]]] = []
      for one in found:
        image = id(one.item)
        group[image][one.caption] = self._written(one)
        if len(group[image]) == self.cfg.captions:
          done.append((one.item, tuple(text for _, text in sorted(group.pop(image).items()))))
      failed = source.failures()
      if failed or done:
        yield failed + self._outputs(done)
    if failed := source.failures():
      yield failed

  def stream(self, numbered: NumberedRow) -> Iterator[CaptionerOutput]:
    """One image's first caption as it is written: outputs with more and more of it, whose `finish`
    is "" until the last one."""
    self._since = time.monotonic()
    source, failed = self._open([numbered])
    for found in self.engine(source, partly=True):
      first = [one for one in found if not one.caption]
      yield from self._outputs([(one.item, (self._written(one),)) for one in first])
    yield from failed + source.failures()

  def limit(self, number: int) -> int:
    """The longest caption of a row, in tokens; measurements have others."""
    del number
    return self.cfg.max_tokens

  def _open(self, rows: list[NumberedRow]) -> "tuple[_Pictures, list[CaptionerOutput]]":
    """Rows as a source for the engine, and those whose image cannot be opened."""
    buckets, failed = self._host.bucket(rows)
    log.info("%d images in %d shapes", sum(map(len, buckets.values())), len(buckets))
    return (
      _Pictures(self._host.batches(buckets, self._prepare), self._failed, self.limit),
      [self._failed(*numbered, error) for numbered, error in failed],
    )

  def _prepare(self, shape: ImageShape, numbered: NumberedRow) -> Request:
    number, row = numbered
    images, prompts = ImagePrompt(self.loaded.model.cfg, self.pieces, shape)(row)
    return Request(images, prompts, np.int32(number))

  def _outputs(
    self, done: Sequence[tuple[_Given, tuple[WrittenCaption, ...]]]
  ) -> list[CaptionerOutput]:
    if not done:
      return []
    now = time.monotonic()
    secs, self._since = (now - self._since) / len(done), now
    return [
      CaptionerOutput(*given.numbered, captions, shape=given.shape, secs=secs)
      for given, captions in done
    ]

  def _written(self, one: Written[_Given]) -> WrittenCaption:
    text = self.loaded.tokenizer.decode_written(one.ids)
    if one.live:
      text = text.rstrip(NOT_WHOLE)
    finish = "end" if one.ids[-1] in self.vocabulary.end_ids else "length"
    return WrittenCaption(text, one.ids, "" if one.live else finish)

  def _failed(self, number: int, row: CaptionRow | QARow, cause: ValueError) -> CaptionerOutput:
    said = _ADDRESS.sub("", str(cause))
    error = ValueError(
      said if row.name in said or repr(row.name) in said else f"row {row.name!r}: {said}"
    )
    error.__cause__ = cause
    self._failures += 1
    log.log(logging.WARNING if self._failures <= SHOWN_FAILURES else logging.DEBUG, "%s", error)
    if self._failures == SHOWN_FAILURES:
      log.warning(
        "%d images have failed; those to come stand in the output, with their reasons",
        SHOWN_FAILURES,
      )
    return CaptionerOutput(number, row, error=error)


class _Pictures:
  """Pictures that threads prepare, as a source of prompts; what cannot be prepared is kept."""

  def __init__(
    self,
    batches: BatchesAhead[NumberedRow, Request],
    fail: Callable[[int, CaptionRow | QARow, ValueError], CaptionerOutput],
    limit: Callable[[int], int],
  ):
    self._batches, self._fail, self._limit = batches, fail, limit
    self._failed: list[CaptionerOutput] = []

  def take(self, wait: bool) -> Asked[_Given] | None:
    """As of `Source`."""
    while wait or self._batches.ready():
      batch = next(self._batches, None)
      if batch is None:
        return None
      self._failed += [self._fail(*numbered, error) for numbered, error in batch.failed]
      if batch.items:
        items = [_Given(numbered, batch.shape) for numbered in batch.items]
        request: Any = stack(batch.ready)
        return Asked(items, request, [self._limit(number) for number, _ in batch.items])
    return None

  def failures(self) -> list[CaptionerOutput]:
    """What could not be prepared since this was called."""
    failed, self._failed = self._failed, []
    return failed


def _sampling(loaded: Loaded, cfg: CaptionerConfig) -> SamplingConfig:
  # Older checkpoints say it in config.json, which transformers reads where there is no other file.
  generation = json_of(loaded.files, GENERATION) if GENERATION in loaded.files else loaded.config
  penalty = cfg.repetition_penalty
  if penalty is None:
    penalty = generation.get("repetition_penalty")
  return SamplingConfig(cfg.max_tokens, cfg.temperature, cfg.top_k, cfg.top_p, penalty or 1.0)


def end_ids(loaded: Loaded) -> tuple[int, ...]:
  """What ends a text, as transformers' `generate` has it: generation_config.json, config.json where
  there is none.
  """
  said = [said_ends(loaded.config), said_ends(loaded.config.get("text_config"))]
  ends = next(filter(None, said), ())
  if GENERATION in loaded.files:
    ours, ends = ends, said_ends(json_of(loaded.files, GENERATION))
    if set(ours) - set(ends):
      warn_once(
        f"{GENERATION} says that {ends or 'nothing'} ends a text and config.json that {ours} does; "
        f"{GENERATION} is taken, as transformers does"
      )
  elif not ends:
    warn_once(
      f"the checkpoint has no {GENERATION} and no eos_token_id in config.json: as in transformers, "
      "nothing ends a caption but max_tokens"
    )
  return ends


def caption_vocabulary(loaded: Loaded) -> Vocabulary:
  """Every id may be written, as in `generate`."""
  size, ends = loaded.model.cfg.text.vocab_size, end_ids(loaded)
  return own_vocabulary(np.ones(size, bool), ends)
