"""Images -> captions, as transformers' `generate` writes them: by the checkpoint's own chat
template, end tokens and repetition penalty.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.data.batches import ImagePrompt, ImageShape, image_shape, shape_bucket, stack
from caprl_jax.data.rows import CaptionRow, QARow, failure_reason
from caprl_jax.hub.load import Loaded
from caprl_jax.rl.rollout import RolloutConfig, sample_captions
from caprl_jax.rl.sampling import SamplingConfig
from caprl_jax.types import Batch, Vocabulary

log = logging.getLogger("caprl_jax.inference.captioner")

# decode and cut pictures while the device writes captions
PREPARE_THREADS = min(16, os.cpu_count() or 1)
BATCHES_AHEAD = 2
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
    self._pool = futures.ThreadPoolExecutor(PREPARE_THREADS, "pictures")
    self._since, self._failures = time.monotonic(), 0

  def __enter__(self) -> "Captioner":
    return self

  def __exit__(self, *failure) -> None:
    self._pool.shutdown(cancel_futures=True)

  def __call__(
    self, rows: Iterable[tuple[int, CaptionRow | QARow]]
  ) -> Iterator[list[CaptionerOutput]]:
    """Captions numbered rows, shape by shape; yields them as batches finish. A batch is dispatched
    before the one before it is fetched, and pictures are prepared for the ones after it meanwhile.

    Args:
      rows: the number of a batch's first row goes into its random key.
    """
    self._since = time.monotonic()
    rows = list(rows)
    buckets: dict[ImageShape, list[tuple[int, CaptionRow | QARow]]] = {}
    failed = []
    shapes = self._pool.map(self._shape, [row for _, row in rows])
    for numbered, (shape, error) in zip(rows, shapes):
      if error is None:
        buckets.setdefault(shape, []).append(numbered)
      else:
        failed.append(self._failed(*numbered, error))
    if failed:
      yield failed
    log.info("%d images in %d shapes", sum(map(len, buckets.values())), len(buckets))
    running: tuple | None = None
    for shape, members, examples in self._prepared(buckets):
      kept, failed = [], []
      for numbered, (example, error) in zip(members, examples):
        if error is None:
          kept.append((numbered, example))
        else:
          failed.append(self._failed(*numbered, error))
      if failed:
        yield failed
      if kept:
        last, running = running, (shape, [numbered for numbered, _ in kept], self._dispatch(kept))
        if last:
          yield self._fetch(*last)
    if running:
      yield self._fetch(*running)

  def _shape(self, row: CaptionRow | QARow) -> tuple[ImageShape | None, ValueError | None]:
    cfg = self.loaded.model.cfg
    try:
      return shape_bucket(image_shape([row], cfg), cfg.vision.slots_multiple), None
    except ValueError as error:
      return None, error

  def _prepared(
    self, buckets: dict[ImageShape, list[tuple[int, CaptionRow | QARow]]]
  ) -> Iterator[tuple[ImageShape, list, list]]:
    """(shape, numbered rows, (example, error) of each), batch by batch; the next few are in the
    making.
    """

    def prepare(prompt: ImagePrompt, row: CaptionRow | QARow):
      try:
        return prompt(row), None
      except ValueError as error:
        return None, error

    ahead: collections.deque = collections.deque()
    for shape in sorted(buckets, key=lambda shape: (shape.tokens, shape.slots)):
      prompt = ImagePrompt(self.loaded.model.cfg, self.pieces, shape)
      for start in range(0, len(buckets[shape]), self.cfg.batch_size):
        members = buckets[shape][start : start + self.cfg.batch_size]
        ahead.append(
          (shape, members, [self._pool.submit(prepare, prompt, row) for _, row in members])
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
    numbers = np.asarray([number for (number, _), _ in filled], np.int32)
    key = jax.random.fold_in(jax.random.key(self.seed), int(numbers[0]))
    batch = sharding.put_batch(Batch(images, prompts, None, numbers), self.mesh)
    captions = self._run(self.loaded.params, batch, key)
    return captions.tokens_BGT, captions.valid_BGT, captions.ended_BG

  def _fetch(self, shape: ImageShape, members: list, captions) -> list[CaptionerOutput]:
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
    error = ValueError(said if row.name in said else f"row {row.name!r}: {said}")
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
  generation = json.loads(loaded.files.get("generation_config.json", b"{}"))
  penalty = cfg.repetition_penalty
  if penalty is None:
    penalty = generation.get("repetition_penalty")
  return SamplingConfig(cfg.max_tokens, cfg.temperature, cfg.top_k, cfg.top_p, penalty or 1.0)


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
