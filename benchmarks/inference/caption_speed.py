"""Captions a second: ours, transformers' batched `generate`, and ours as it was before it had an
engine: one batch until its longest caption ends.

  python -m benchmarks.inference.caption_speed [--images 128] [--batch 8] [--tail 10] [--json FILE]

The same random Qwen2.5-VL (16.7M parameters), the same image files, greedy, with lengths that are
forced: all of them the mean (`fixed`), or log-normal, the longest --tail times the mean (`tail`).
Reading and cutting the images is part of what is timed, compiling is not. The fastest of --repeats
runs counts, taken in turns. Needs `pip install caprl_jax[test]`. Nothing else should run beside it.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.vs_trl import INSTRUCTION, pictures, torch_captioner
from caprl_jax import sharding
from caprl_jax.data.batches import ImagePrompt, stack
from caprl_jax.data.rows import CaptionRow
from caprl_jax.hub.load import Loaded, load_policy
from caprl_jax.inference.captioner import Captioner, CaptionerConfig
from caprl_jax.inference.host_batches import HostPipeline, one_ahead
from caprl_jax.rl.rollout import RolloutConfig, sample_captions
from caprl_jax.rl.sampling import SamplingConfig
from caprl_jax.types import Batch, Vocabulary

Captions = dict[int, list[int]]  # the number of a row -> its ids
Run = Callable[[], Captions]
PACKAGES = ("jax", "torch", "transformers")
THEIRS = "transformers"


class TimedCaptioner(Captioner):
  """A captioner of which each caption has its own longest length."""

  limits: Sequence[int]

  def limit(self, number: int) -> int:
    return self.limits[number]


def by_engine(captioner: TimedCaptioner, rows: Sequence[CaptionRow], limits: np.ndarray) -> Run:
  """Ours."""

  def run() -> Captions:
    captioner.limits = limits.tolist()
    found = (out for some in captioner(list(enumerate(rows))) for out in some)
    return {out.number: out.captions[0].tokens for out in found}

  return run


def by_batches(
  loaded: Loaded,
  host: HostPipeline,
  rows: Sequence[CaptionRow],
  limits: np.ndarray,
  max_tokens: int,
  mesh: jax.sharding.Mesh,
) -> Run:
  """Ours as it was: a batch is dispatched before the one before it is fetched, and each takes as
  long as its longest caption."""
  V = loaded.model.cfg.text.vocab_size
  none_V = jnp.full(V, -1, jnp.int32)
  vocabulary = Vocabulary(jnp.arange(V) != 2, none_V, (2,), 0)  # ends where its length says
  cfg = RolloutConfig(1, SamplingConfig(max_tokens, temperature=0.0))
  pieces = loaded.prompt_pieces(INSTRUCTION)

  @jax.jit
  def write(params: Any, batch: Batch, length_BG: jax.Array) -> tuple[jax.Array, jax.Array]:
    key = jax.random.key(0)
    made = sample_captions(loaded.model, params, batch, key, vocabulary, cfg, length_BG)
    return made.tokens_BGT, made.valid_BGT

  def prepare(shape: Any, numbered: tuple[int, CaptionRow]) -> Any:
    images, prompts = ImagePrompt(loaded.model.cfg, pieces, shape)(numbered[1])
    return Batch(images, prompts, None, np.int32(numbered[0]))  # pyright: ignore

  def dispatch(batch: Any) -> tuple[jax.Array, jax.Array]:
    stacked: Any = stack(batch.ready)
    length_BG = limits[stacked.row_B][:, None]
    return write(loaded.params, *sharding.put_batch((stacked, length_BG), mesh))

  def run() -> Captions:
    buckets, _ = host.bucket(list(enumerate(rows)))
    found = {}
    for batch, written in one_ahead(host.batches(buckets, prepare), dispatch):
      tokens_BGT, valid_BGT = jax.device_get(written)
      for b, (number, _) in enumerate(batch.items):
        ids = tokens_BGT[b, 0][valid_BGT[b, 0]].tolist()
        loaded.tokenizer.decode_written(ids)
        found[number] = ids
    return found

  return run


def by_transformers(
  model: Any, processor: Any, rows: Sequence[CaptionRow], limits: np.ndarray, batch: int
) -> Run:
  """transformers' `generate`, `batch` images at a time; a caption that is as long as it may be has
  ended, and the batch ends with its longest."""
  import torch
  import transformers
  from PIL import Image

  turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]}]
  text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)

  class Lengths(transformers.StoppingCriteria):
    def __init__(self, prompt: int, limits: np.ndarray):
      self.prompt, self.limits = prompt, torch.tensor(limits)

    def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Any:
      return input_ids.shape[1] - self.prompt >= self.limits

  def run() -> Captions:
    found = {}
    for start in range(0, len(rows), batch):
      some = rows[start : start + batch]
      images = [Image.open(row.image).convert("RGB") for row in some]
      inputs = processor(text=[text] * len(some), images=images, return_tensors="pt")
      prompt, longest = inputs["input_ids"].shape[1], limits[start : start + batch]
      with torch.no_grad():
        made = model.generate(
          **inputs,
          max_new_tokens=int(longest.max()),
          do_sample=False,
          pad_token_id=0,
          stopping_criteria=[Lengths(prompt, longest)],
        )
      for i, ids in enumerate(made[:, prompt:].tolist()):
        processor.tokenizer.decode(ids[: longest[i]], skip_special_tokens=True)
        found[start + i] = ids[: longest[i]]
    return found

  return run


def fastest(runs: dict[str, Run], repeats: int) -> dict[str, tuple[float, Captions]]:
  """Seconds of each, and what it wrote. Ours run once before, so that all is compiled."""
  secs, written = {name: [] for name in runs}, {}
  for turn in range(repeats + 1):
    for name, run in runs.items():
      if not turn and name == THEIRS:
        continue
      start = time.perf_counter()
      written[name] = run()
      took = time.perf_counter() - start
      print(f"{name}: {took:.1f} s{'' if turn else ' with compiling'}", file=sys.stderr, flush=True)
      secs[name] += [took] * (turn > 0)
  return {name: (min(secs[name]), written[name]) for name in runs}


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """All figures, of each way and each kind of lengths."""
  import torch

  torch.set_num_threads(os.cpu_count() or 1)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  with tempfile.TemporaryDirectory() as name, jax.set_mesh(mesh):
    folder = pathlib.Path(name)
    model, processor = torch_captioner(folder, args.pixels)
    rows = []
    for number, picture in enumerate(pictures(args.images, args.pixels)):
      path = folder / f"{number}.png"
      picture.save(path)
      rows.append(CaptionRow(path, "", path.name))
    loaded = load_policy(name, mesh)
    limit = round(args.mean * args.tail)
    cfg = CaptionerConfig(
      INSTRUCTION, max_tokens=limit, batch_size=args.batch, repetition_penalty=1.0
    )
    figures = {}
    with (
      TimedCaptioner(loaded, cfg, mesh=mesh, seed=0) as captioner,
      HostPipeline(loaded.model.cfg, args.batch) as host,
    ):
      for spec in args.lengths:
        tail = args.tail if spec == "tail" else 1.0
        limits = lengths(args.images, args.mean, tail)
        runs = {
          THEIRS: by_transformers(model, processor, rows, limits, args.batch),
          "batches": by_batches(loaded, host, rows, limits, limit, mesh),
          "engine": by_engine(captioner, rows, limits),
        }
        runs = {name: run for name, run in runs.items() if name != THEIRS or args.transformers}
        figures[spec] = summary(fastest(runs, args.repeats), limits)
  return {
    "device": jax.devices()[0].device_kind,
    "cores": os.cpu_count(),
    "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    "settings": vars(args) | {"json": None},
    "lengths": figures,
  }


def lengths(images: int, mean: float, tail: float) -> np.ndarray:
  """Tokens of each image's caption, int32: log-normal, in an order drawn once, the longest `tail`
  times the mean, which is `mean`; all the same where `tail` is 1. Raises ValueError where no
  lengths are such.
  """
  if not 1 <= tail <= images / 2:
    raise ValueError(f"--tail {tail} must be from 1 to half of --images {images}")
  noise = np.random.default_rng(0).normal(size=images)

  def drawn(sigma: float) -> np.ndarray:
    weight = np.exp(sigma * noise)
    return mean * weight / weight.mean()

  low, high = 0.0, 20.0
  for _ in range(50):
    sigma = (low + high) / 2
    low, high = (low, sigma) if drawn(sigma).max() > tail * mean else (sigma, high)
  return np.maximum(np.round(drawn(low)), 1).astype(np.int32)


def summary(measured: dict[str, tuple[float, Captions]], limits: np.ndarray) -> dict[str, Any]:
  """Captions and tokens a second of each way, how many times as fast ours is, and the share of
  captions whose ids are those of ours."""
  secs, ours = measured["engine"]
  for name, (_, written) in measured.items():
    assert [len(written[i]) for i in range(len(written))] == limits[: len(written)].tolist(), name
  return {
    "tokens": {
      "mean": float(limits.mean()),
      "median": float(np.median(limits)),
      "longest": int(limits.max()),
    },
    "ways": {
      name: {
        "captions_per_sec": len(written) / took,
        "tokens_per_sec": float(limits[: len(written)].sum()) / took,
        "engine_is_times_as_fast": len(limits) / secs * took / len(written),
        # the last token of ours "as it was" is an end token
        "same_captions": float(np.mean([ours[i][:-1] == ids[:-1] for i, ids in written.items()])),
      }
      for name, (took, written) in measured.items()
    },
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--images", type=int, default=128)
  parser.add_argument(
    "--transformers", action=argparse.BooleanOptionalAction, default=True, help="time theirs too"
  )
  parser.add_argument("--batch", type=int, default=8, help="captions that are written at once")
  parser.add_argument("--pixels", type=int, default=112, help="width and height of the images")
  parser.add_argument("--mean", type=int, default=48, help="tokens of a caption")
  parser.add_argument("--tail", type=float, default=10.0, help="the longest caption, in means")
  parser.add_argument(
    "--lengths", nargs="+", choices=("fixed", "tail"), default=("fixed", "tail"), metavar="KIND"
  )
  parser.add_argument("--repeats", type=int, default=1)
  parser.add_argument("--json", type=pathlib.Path, help="where the figures are written")
  args = parser.parse_args()
  figures = measure(args)
  if args.json:
    args.json.write_text(json.dumps(figures, indent=1) + "\n")
  print(f"{figures['device']}, {figures['cores']} cores, {figures['versions']}")
  print("| lengths | | captions/s | tokens/s | ours is times as fast | same ids |")
  print("|---|---|---|---|---|---|")
  for spec, found in figures["lengths"].items():
    about = "mean {mean:.0f}, median {median:.0f}, longest {longest}".format(**found["tokens"])
    for way, one in found["ways"].items():
      print(
        f"| {spec}: {about} | {way} | {one['captions_per_sec']:.2f} | {one['tokens_per_sec']:.0f} "
        f"| {one['engine_is_times_as_fast']:.2f} | {one['same_captions']:.0%} |"
      )


if __name__ == "__main__":
  main()
