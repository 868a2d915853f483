"""What reads an input, up to where programs would be compiled.

Each function takes the input's folder and its arguments, and returns the messages of what it left
out (bad rows). It raises what the readers raise.
"""

import contextlib
import functools
import io
import os
import pathlib
from collections.abc import Callable
from types import SimpleNamespace

from fuzz import bases

Arguments = tuple[str, ...]


def rows(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  from caprl_jax.data import rows as rows_lib
  from caprl_jax.data.readers import qa_sources

  path = folder / arguments[0]
  found = list(qa_sources.scan_qa_rows(str(path), 0))
  bad = [row.message for row in found if isinstance(row, rows_lib.BadRow)]
  rows_lib.check_rows(rows_lib.good_rows(found), str(path))
  return bad


def conversations(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  from caprl_jax.data.readers import conversations as reader
  from caprl_jax.data.rows import BadRow

  path = folder / "talk.jsonl"
  found = list(reader.scan_conversations(path, "Describe."))
  reader.read_examples(str(path), "Describe.")
  return [row.message for row in found if isinstance(row, BadRow)]


def _read_all(*readers: Callable[[], object]) -> list[str]:
  """Calls all of them, then raises the last ValueError of those that refused."""
  errors = []
  for read in readers:
    try:
      read()
    except ValueError as error:
      errors.append(error)
  if errors:
    raise errors[-1]
  return []


def captions(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  from caprl_jax.data.readers import image_sources, qa_sources
  from caprl_jax.modes.gallery import captions as gallery

  path = folder / "captions.jsonl"
  return _read_all(
    lambda: qa_sources.read_caption_rows(str(path)),
    lambda: image_sources.find_images(str(path)),
    lambda: gallery.read_captions(path),
  )


def benchmark(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  from caprl_jax.data.readers.benchmarks import captionqa, files
  from caprl_jax.data.rows import BadRow, CaptionRow, read_image

  found = list(captionqa.read_captionqa(str(folder / "captionqa.json")))
  found += files.read_benchmark(folder / "lmm_eval_MMStar.json", folder / "images.zip")
  for row in found:
    if not isinstance(row, BadRow):
      read_image(CaptionRow(row.image, "", row.name))
  return [row.message for row in found if isinstance(row, BadRow)]


def images(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  from caprl_jax.data.batches import image_shape
  from caprl_jax.data.readers import image_sources
  from caprl_jax.data.rows import CaptionRow, read_image
  from caprl_jax.models.image_processor import SmartResize, Tiles

  row = CaptionRow(folder / arguments[0], "", arguments[0])
  with contextlib.suppress(ValueError):
    image_sources.find_images(str(folder))
  image = read_image(row)
  for pixels in (SmartResize(8, 2, 1024, 16384, 2), Tiles(16, 4, 2)):
    image_shape([row], SimpleNamespace(vision=SimpleNamespace(pixels=pixels)))  # as every batch
    pixels.patchify(image)
  return []


def tars(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  from caprl_jax.data.readers import image_sources
  from caprl_jax.data.rows import read_image

  for row in image_sources.find_images(str(folder / "shards")):
    read_image(row)
  return []


def parquet(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  from caprl_jax.data import rows as rows_lib
  from caprl_jax.data.readers import caprl_parquet

  path = folder / "rows.parquet"
  for row in caprl_parquet.scan_images(path):
    rows_lib.image_bytes(row)
  found = list(caprl_parquet.scan_parquet(path))
  rows_lib.good_rows(found)
  return [row.message for row in found if isinstance(row, rows_lib.BadRow)]


def config(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  return flags(folder, (f"--config=FOLDER/{arguments[0]}", "--workdir=FOLDER/run"))


def flags(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  """As `main` starts, up to the sections of the modes."""
  from caprl_jax import main
  from caprl_jax.config import keys, registry, schema
  from caprl_jax.harness.settings import read_settings

  here = os.getcwd()
  os.chdir(folder)
  try:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
      argv = ["main", *(argument.replace("FOLDER", str(folder)) for argument in arguments)]
      found, *_ = main._parse(main._define_flags(), argv)
  finally:
    os.chdir(here)
  schema.to_plain(found)
  for name, mode in registry.modes_of(found).items():
    for section, path in mode.sections.items():
      if section in found:
        schema.load_section(found, section, keys.resolve(path))
    if name in ("train", "evaluate"):
      read_settings(found)
  return []


@functools.cache
def _mesh():
  import jax

  from caprl_jax import sharding

  return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


def captioner(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  from caprl_jax.hub import load

  config = folder / "model" / "adapter_config.json"
  if config.is_file():
    config.write_bytes(config.read_bytes().replace(b"BASE", bytes(folder / "base")))
  loaded = load.load_policy(str(folder / "model"), _mesh())
  loaded.prompt_pieces("Describe the image.")
  load.relate_vocabularies(loaded.tokenizer, loaded.tokenizer, loaded.model.cfg.text.vocab_size)
  return []


def judge(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  from caprl_jax.hub import load

  load.load_judge(str(folder / "model"), _mesh())
  return []


def gguf(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  from caprl_jax.hub import load

  load.load_judge(str(folder / "model.gguf"), _mesh())
  return []


def tokenizers(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  from caprl_jax.hub import tokenizer as tokenizer_lib

  for place in ("new", "old"):
    loaded = tokenizer_lib.load_tokenizer(folder / place)
    tokenizer_lib.check_tokenizer(loaded, 4096, folder / place)
    ids = loaded.encode("The image shows a red circle.<|im_end|>\n")
    loaded.decode(ids)
    loaded.decode_written([*ids, 10**6])
    loaded.encode_plain("<|im_end|> a")
    loaded.texts(4096)
    assert loaded.end_ids is not None
  return []


def templates(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  from caprl_jax.data.chat_rendering import ChatRenderer
  from caprl_jax.hub import chat_template
  from caprl_jax.hub.hub_files import read_small_files
  from caprl_jax.hub.tokenizer import load_tokenizer
  from caprl_jax.models import families
  from fuzz.bases import WARM_START

  tokenizer = load_tokenizer(WARM_START)
  files = read_small_files(folder)
  template = chat_template.find_template(files)
  if template is None:
    return []
  family = families.family_of({"model_type": "qwen2_5_vl"})
  chat_template.prompt_pieces(template, family, tokenizer, "Describe.", {}, "You see.")
  chat_template.text_prompt(template, tokenizer, "Describe.")
  ChatRenderer(template, family, tokenizer)
  return []


def records(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  import json

  from caprl_jax.harness import result_cache, row_shards
  from caprl_jax.harness.process.run_record import RunRecord
  from caprl_jax.harness.training.kept_questions import KeptQuestions, Split
  from caprl_jax.harness.training.summary import Best
  from caprl_jax.modes.pretrain.record import Record

  stages = {"first": {"data": "a", "steps": 3}}
  config = {"seed": 0, "pretrain_policy": {"vision": "v"}, "pretrain": {"stages": stages}}
  job = json.loads(bases.records()["shards/settings.json"])
  # A cache passes over what is damaged; a list of two is a line like its own.
  cache = result_cache.ResultCache(folder / "cache", "kind", {"a": 1})
  cache.put({"x": 1})
  damaged = folder / "pretrain.json"
  if damaged.is_file():
    cache.path.write_bytes(cache.path.read_bytes() + damaged.read_bytes() + b"\n")
  assert result_cache.ResultCache(folder / "cache", "kind", {"a": 1})["x"] == 1
  return _read_all(
    lambda: Best(None, folder),
    lambda: Record(folder, config, ["first"]),
    lambda: RunRecord(folder, "train").begin({"seed": 0}, ()),
    lambda: KeptQuestions(folder, {"seed": 0}, goes_on=True).recall([Split([], [])]),
    lambda: row_shards.ShardedJob(folder / "shards", ["a"] * 3, job, host=0, hosts=1).open(),
  )


def metrics(folder: pathlib.Path, arguments: Arguments) -> list[str]:
  from caprl_jax.harness import metrics as metrics_lib
  from caprl_jax.harness.training.summary import Summary
  from caprl_jax.modes.train import report

  report.write_report(folder)
  summary = Summary(folder)
  summary.put(after={})
  with metrics_lib.MetricsWriter(folder) as writer:
    writer.truncate_after(1)
  return []
