"""How many 448x448 JPEG images per second one core makes into training batches: the whole input
pipeline, part by part.

  python -m benchmarks.data_throughput [--images 512] [--threads 1]

Writes photographs-like JPEGs into a TFDS dataset (ArrayRecord), then times, on the same records:
reading alone, reading and decoding, cutting into patches too, and the training iterator as `train`
runs it (prompts, questions, stacking) with its batches put on the device. Nothing else should run
beside it.
"""

import argparse
import io
import os
import tempfile
import time

import jax
import numpy as np
from PIL import Image

from caprl_jax import sharding
from caprl_jax.data.batches import ImagePrompt, QABatcher, image_shape, train_iterator
from caprl_jax.data.judge_questions import TokenizedQuestion, question_shape
from caprl_jax.data.readers import tfds
from caprl_jax.data.rows import QARow, Question, image_bytes, read_image
from caprl_jax.hub.published_configs import CONFIGS
from caprl_jax.models.policy import PolicyConfig


def photograph(rng: np.random.Generator, size: int) -> bytes:
  """A JPEG with detail at every scale, about as heavy as a photograph's (50 KB at 448 pixels)."""
  picture = np.zeros((size, size, 3), np.float32)
  for cells, height in ((4, 80), (16, 50), (64, 25), (size // 2, 14)):
    noise = rng.normal(size=(cells, cells, 3)).astype(np.float32)
    planes = [
      Image.fromarray(noise[..., c]).resize((size, size), Image.Resampling.BICUBIC)
      for c in range(3)
    ]
    picture += height * np.stack([np.asarray(plane) for plane in planes], -1)
  file = io.BytesIO()
  Image.fromarray(np.clip(picture + 128, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
  return file.getvalue()


def timed(name: str, images: int, run) -> float:
  """Prints and returns images per second of a core; beside it, per second by the clock."""
  wall, cpu = time.perf_counter(), time.process_time()
  run()
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  print(
    f"{name:<44}{images / wall:>8.0f} images/s by the clock{images / cpu:>8.0f} images/s and core"
  )
  return images / cpu


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--images", type=int, default=512)
  parser.add_argument("--size", type=int, default=448)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--threads", type=int, default=1)
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  question = Question("What is it?", ("a", "b"), 0)
  photos = [photograph(rng, args.size) for _ in range(64)]
  rows = [QARow(photos[i % len(photos)], (question,), f"{i}") for i in range(args.images)]
  cfg = PolicyConfig.from_hf(
    CONFIGS["Qwen/Qwen2.5-VL-3B-Instruct"], dict(min_pixels=3136, max_pixels=1_000_000)
  )
  with tempfile.TemporaryDirectory() as folder:
    path = str(tfds.write_tfds(folder, {"train": rows}))
    rows = list(tfds.scan_tfds(path, "train"))
    print(
      f"{args.images} JPEGs of {args.size}x{args.size} pixels, "
      f"{np.mean([len(p) for p in photos]) / 1e3:.0f} KB each, {os.cpu_count()} cores, "
      f"{args.threads} thread(s); Qwen2.5-VL's processor, batches of {args.batch}"
    )
    timed("read", args.images, lambda: [image_bytes(row) for row in rows])
    timed("read, decode", args.images, lambda: [read_image(row) for row in rows])
    timed(
      "read, decode, cut into patches",
      args.images,
      lambda: [cfg.vision.pixels.patchify(read_image(row)) for row in rows],
    )
    prompt = ImagePrompt(cfg, (list(range(20)), list(range(30))), image_shape(rows[:1], cfg))
    tokenized = [[TokenizedQuestion((1, 2), ((1,), (2,)), 0, 0, (0.0, 0.0))]] * len(rows)
    batcher = QABatcher(rows, tokenized, prompt, 1, question_shape(tokenized[0]))
    mesh = sharding.make_mesh(sharding.MeshConfig())
    iterator = train_iterator(batcher.example, len(rows), args.batch, 0, threads=args.threads)

    def run():
      for _ in range(args.images // args.batch):
        jax.block_until_ready(sharding.put_batch(next(iterator), mesh))

    timed("the training iterator, onto the device", args.images, run)


if __name__ == "__main__":
  main()
