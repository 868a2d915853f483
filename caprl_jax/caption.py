"""Mode `caption`: images of a folder or a JSON lines file -> one JSON row an image, batched by shape.

Greedy in float32 the ids are those of transformers' `generate` on the same directory, image and prompt: the
checkpoint's own chat template, end tokens and repetition penalty are used.
"""

from collections.abc import Iterator
import dataclasses
import functools
import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from caprl_jax import configuration, sharding
from caprl_jax.data.batches import ImagePrompt, ImageShape, image_shape, stack
from caprl_jax.data.rows import CaptionRow
from caprl_jax.files import write_text
from caprl_jax.models.load import Loaded
from caprl_jax.rollout import RolloutConfig, sample_captions
from caprl_jax.sampling import SamplingConfig
from caprl_jax.setup_run import PolicySection
from caprl_jax.types import Batch, Vocabulary

log = logging.getLogger("caprl_jax.caption")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
  """input: a folder (searched whole), a JSON lines file with an `image` a row, or one image. output: JSON lines.

  prompt: None asks `policy.instruction`. temperature 0 is greedy. repetition_penalty: None takes the checkpoint's own
  (generation_config.json). skip_bad_images: a row with `error` in place of a caption; False stops at the first one.
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


def find_images(source: str) -> list[CaptionRow]:
  """The images to caption. A row is named by what `image` will say in the output: the path, or what the file said.

  Raises ValueError for a source that is not there, holds no image, or a line without an `image`.
  """
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not found:
      raise ValueError(f"caption.input = {source!r}: no image in this folder (looked for {', '.join(IMAGE_SUFFIXES)})")
    return [CaptionRow(file, "", str(file)) for file in found]
  if not path.is_file():
    raise ValueError(f"caption.input = {source!r}: no such file or folder; name a folder of images or a .jsonl file")
  if path.suffix.lower() in IMAGE_SUFFIXES:
    return [CaptionRow(path, "", str(path))]
  rows = []
  for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
    if not line.strip():
      continue
    try:
      name = json.loads(line)["image"]
      rows.append(CaptionRow(path.parent / name, "", name))
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{path}:{number}: not a JSON object with an 'image' path ({type(error).__name__}: {error}); "
                       "mend or drop the line") from error
  if not rows:
    raise ValueError(f"caption.input = {source!r} has no rows")
  return rows


def end_ids(loaded: Loaded) -> tuple[int, ...]:
  """What ends a text, as transformers' `generate` has it: generation_config.json, config.json where there is none."""
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
  return Vocabulary(jnp.ones(size, bool), jnp.full(size, -1, jnp.int32), ends, ends[0] if ends else 0)


def _bucket(shape: ImageShape, multiple: int) -> ImageShape:
  """The shape rounded up by at most a quarter, so that few programs are compiled."""
  def up(n: int, multiple: int) -> int:
    step = max(multiple, 1 << max(n.bit_length() - 3, 0))
    step = -(-step // multiple) * multiple
    return -(-n // step) * step
  return ImageShape(up(shape.slots, multiple), up(shape.tokens, 4))


class Captioner:
  """Images -> captions, a compiled program a bucket of image shapes."""

  def __init__(self, loaded: Loaded, cfg: CaptionConfig, instruction: str, mesh: jax.sharding.Mesh, seed: int):
    self.loaded, self.cfg, self.mesh, self.seed = loaded, cfg, mesh, seed
    generation = json.loads(loaded.files.get("generation_config.json", b"{}"))
    penalty = generation.get("repetition_penalty") if cfg.repetition_penalty is None else cfg.repetition_penalty
    sampling = SamplingConfig(cfg.max_tokens, cfg.temperature, cfg.top_k, cfg.top_p, penalty or 1.0)
    self.vocabulary = caption_vocabulary(loaded)
    self.pieces = loaded.prompt_pieces(instruction)
    self._run = jax.jit(functools.partial(
        sample_captions, loaded.model, vocabulary=self.vocabulary, cfg=RolloutConfig(1, sampling)))

  def __call__(self, rows: list[CaptionRow], done=frozenset()) -> Iterator[tuple[int, dict]]:
    """Yields (row number, output row) as batches finish, shape by shape; `done` row numbers are left out."""
    cfg = self.loaded.model.cfg
    buckets: dict[ImageShape, list[int]] = {}
    for i, row in enumerate(rows):
      if i in done:
        continue
      try:
        shape = _bucket(image_shape([row], cfg), cfg.vision.slots_multiple)
      except ValueError as error:
        yield i, self._failed(row, error)
        continue
      buckets.setdefault(shape, []).append(i)
    log.info("%d images in %d shapes", sum(map(len, buckets.values())), len(buckets))
    for shape, members in sorted(buckets.items(), key=lambda item: item[0].tokens):
      prompt = ImagePrompt(cfg, self.pieces, shape)
      for start in range(0, len(members), self.cfg.batch_size):
        yield from self._batch(rows, members[start:start + self.cfg.batch_size], prompt)

  def _batch(self, rows, members: list[int], prompt: ImagePrompt) -> Iterator[tuple[int, dict]]:
    examples, kept = [], []
    for i in members:
      try:
        examples.append(prompt(rows[i]))
        kept.append(i)
      except ValueError as error:
        yield i, self._failed(rows[i], error)
    if not kept:
      return
    filled = examples + [examples[-1]] * (self.cfg.batch_size - len(examples))
    images, prompts = stack(filled)
    batch = Batch(images, prompts, None, np.asarray([*kept, *[kept[-1]] * (len(filled) - len(kept))], np.int32))
    key = jax.random.fold_in(jax.random.key(self.seed), kept[0])
    captions = jax.device_get(self._run(self.loaded.params, sharding.put_batch(batch, self.mesh), key))
    for n, i in enumerate(kept):
      ids = captions.tokens_BGT[n, 0][captions.valid_BGT[n, 0]].tolist()
      yield i, {"image": rows[i].name, "caption": self.loaded.tokenizer.decode(ids), "tokens": ids,
                "finish": "end" if captions.ended_BG[n, 0] else "length"}

  def _failed(self, row: CaptionRow, error: ValueError) -> dict:
    if not self.cfg.skip_bad_images:
      raise ValueError(f"{error} (caption.skip_bad_images=True records it and goes on)") from error
    log.warning("%s", error)
    return {"image": row.name, "error": str(error)}


class Output:
  """The output file: finished rows are appended to `<output>.partial`, which a second run goes on with; when all are
  there, they are written in order to the output, whole or not at all."""

  def __init__(self, path: pathlib.Path, header: dict):
    self.path, self.partial = path, path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    self.rows: dict[int, dict] = {}
    if self.partial.exists():
      lines = self.partial.read_text("utf-8").split("\n")
      if lines and lines[0] and json.loads(lines[0]) != header:
        raise ValueError(f"{self.partial} is left from a run with other settings; delete it, or run with these: "
                         f"{lines[0]}")
      for line in lines[1:-1]:  # what stands after the last line end was cut off
        number, row = json.loads(line)
        self.rows[number] = row
    text = json.dumps(header) + "\n" + "".join(json.dumps(item) + "\n" for item in self.rows.items())
    write_text(self.partial, text)
    self.file = open(self.partial, "a", encoding="utf-8")

  def put(self, number: int, row: dict) -> None:
    self.rows[number] = row
    self.file.write(json.dumps([number, row]) + "\n")
    self.file.flush()

  def finish(self) -> None:
    self.file.close()
    write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in sorted(self.rows.items())))
    self.partial.unlink()  # only now: a kill before this loses nothing


def run(config, workdir: pathlib.Path) -> None:
  """Captions `caption.input` into `caption.output`."""
  cfg = configuration.load_section(config, "caption", CaptionConfig)
  section = configuration.load_section(config, "policy", PolicySection)
  mesh = sharding.make_mesh(configuration.load_section(config, "mesh", sharding.MeshConfig))
  if jax.process_count() > 1:
    raise ValueError("mode caption runs in one process; start one a host, each with its own caption.input")
  sharding.check_batch_size(cfg.batch_size, mesh, "caption.batch_size")
  rows = find_images(cfg.input)
  header = configuration.to_plain(config["caption"]) | {"checkpoint": section.checkpoint}
  with jax.set_mesh(mesh):
    loaded = section.load(mesh)
    captioner = Captioner(loaded, cfg, cfg.prompt or section.instruction, mesh, config.get("seed", 0))
    output = Output(pathlib.Path(cfg.output).expanduser(), header)
    if output.rows:
      log.info("going on after %d of %d images", len(output.rows), len(rows))
    with tqdm(total=len(rows), initial=len(output.rows), desc="captions", unit="image", disable=None) as bar:
      for number, row in captioner(rows, output.rows.keys()):
        output.put(number, row)
        bar.update()
  output.finish()
  good = [row for row in output.rows.values() if "error" not in row]
  tokens = float(np.mean([len(row["tokens"]) for row in good])) if good else 0.0
  cut = sum(row["finish"] == "length" for row in good)
  log.info("%d captions in %s: %.1f tokens a caption, %d cut at %d tokens, %d images failed", len(good), cfg.output,
           tokens, cut, cfg.max_tokens, len(output.rows) - len(good))
