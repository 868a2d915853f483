"""Images -> captions, as transformers' `generate` writes them: by the checkpoint's own chat
template, end tokens and repetition penalty.
"""

import contextlib
import dataclasses
import functools
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from caprl_jax import sharding
from caprl_jax.data.batches import ImagePrompt, ImageShape, stack
from caprl_jax.data.rows import CaptionRow, QARow, failure_reason
from caprl_jax.hub.folders.notices import warn_once
from caprl_jax.hub.folders.text_files import json_of
from caprl_jax.hub.load import Loaded
from caprl_jax.hub.tokenizer import said_ends
from caprl_jax.hub.vocabulary import own_vocabulary
from caprl_jax.inference.host_batches import HostBatch, HostPipeline, NumberedRow, one_ahead
from caprl_jax.rl.rollout import RolloutConfig, sample_captions
from caprl_jax.rl.sampling import SamplingConfig
from caprl_jax.types import Batch, Vocabulary

log = logging.getLogger("caprl_jax.inference.captioner")

GENERATION = "generation_config.json"
SHOWN_FAILURES = 20
# PIL's name for an image in memory: another every time
_ADDRESS = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
  """instruction: what the captioner is asked; system: a turn before it.

  captions: written of each image, all from one run of the image.
  max_tokens, temperature, top_p, top_k: of each caption. 0 is greedy, and a caption then depends on
    its image alone; a sampled one depends on the seed and on which images share its batch.
  repetition_penalty: None takes the checkpoint's own (generation_config.json).
  batch_size: images that a program runs at once, all of one bucket of shapes; the last batch of
    each bucket is filled up.
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
  itself ("end") or was cut at max_tokens ("length").
  """

  text: str
  tokens: list[int]
  finish: str


@dataclasses.dataclass(frozen=True)
class CaptionerOutput:
  """What became of one image: its captions, or the error that names its row.

  number, row: as they were given. shape: the bucket that it ran in. secs: its share of the time
  that its batch took.
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


class Captioner:
  """Images -> captions, one compiled program per bucket of image shapes. A context manager: it has
  threads.
  """

  def __init__(self, loaded: Loaded, cfg: CaptionerConfig, *, mesh: jax.sharding.Mesh, seed: int):
    self.loaded, self.cfg, self.mesh, self.seed = loaded, cfg, mesh, seed
    self.vocabulary = caption_vocabulary(loaded)
    self.pieces = loaded.prompt_pieces(cfg.instruction, cfg.system)
    self._run = jax.jit(
      functools.partial(
        sample_captions,
        loaded.model,
        vocabulary=self.vocabulary,
        cfg=RolloutConfig(cfg.captions, _sampling(loaded, cfg)),
      )
    )
    self._host = HostPipeline(loaded.model.cfg, cfg.batch_size)
    self._since, self._failures = time.monotonic(), 0

  def __enter__(self) -> "Captioner":
    return self

  def __exit__(self, *failure) -> None:
    self._host.close()

  def __call__(self, rows: Iterable[NumberedRow]) -> Iterator[list[CaptionerOutput]]:
    """Captions numbered rows, shape by shape; yields them as batches finish. A batch is dispatched
    before the one before it is fetched, and pictures are prepared for the ones after it meanwhile.

    Args:
      rows: the number of a batch's first row goes into its random key.
    """
    self._since = time.monotonic()
    buckets, failed = self._host.bucket(list(rows))
    if failed:
      yield [self._failed(*numbered, error) for numbered, error in failed]
    log.info("%d images in %d shapes", sum(map(len, buckets.values())), len(buckets))
    batches = self._host.batches(buckets, self._prepare)
    for batch, captions in one_ahead(batches, self._dispatch):
      failed = [self._failed(*numbered, error) for numbered, error in batch.failed]
      yield failed + (self._fetch(batch.shape, batch.items, captions) if batch.items else [])

  def _prepare(self, shape: ImageShape, numbered: NumberedRow) -> Batch:
    number, row = numbered
    images, prompts = ImagePrompt(self.loaded.model.cfg, self.pieces, shape)(row)
    return Batch(images, prompts, None, np.int32(number))

  def _dispatch(self, batch: HostBatch[NumberedRow, Batch]) -> tuple[jax.Array, ...] | None:
    """Begins to caption a batch and does not wait for it; None where all of its images failed."""
    if not batch.items:
      return None
    key = jax.random.fold_in(jax.random.key(self.seed), batch.items[0][0])
    put = sharding.put_batch(stack(batch.ready), self.mesh)
    captions = self._run(self.loaded.params, put, key)
    return captions.tokens_BGT, captions.valid_BGT, captions.ended_BG

  def _fetch(
    self, shape: ImageShape, members: list[NumberedRow], captions: tuple[jax.Array, ...]
  ) -> list[CaptionerOutput]:
    tokens_BGT, valid_BGT, ended_BG = jax.device_get(captions)
    written = []
    for b in range(len(members)):  # what fills the batch up comes after them
      group = zip(tokens_BGT[b], valid_BGT[b], ended_BG[b])
      written.append(tuple(self._written(*caption) for caption in group))
    now = time.monotonic()
    secs, self._since = (now - self._since) / len(members), now
    return [
      CaptionerOutput(number, row, captions, shape=shape, secs=secs)
      for (number, row), captions in zip(members, written)
    ]

  def _written(self, tokens_T: np.ndarray, valid_T: np.ndarray, ended: bool) -> WrittenCaption:
    ids = tokens_T[valid_T].tolist()
    text = self.loaded.tokenizer.decode_written(ids)
    return WrittenCaption(text, ids, "end" if ended else "length")

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
