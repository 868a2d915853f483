"""Peak host memory of loading a checkpoint, against the size of its parameters.

  python benchmarks/load_memory.py [--gb 1.2] [--dtype bfloat16]

Writes a Llama of random float32 weights to a temporary folder in shards, loads it in a fresh
process and prints its largest resident set over what the process had before. On a CPU the loaded
parameters are host memory themselves, so the least possible ratio is 1; on an accelerator they are
not.
"""

import argparse
import pathlib
import resource
import subprocess
import sys
import tempfile

import numpy as np

WIDTH, INNER, VOCAB = 1024, 4096, 8192
LAYER = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH


class RandomTensors(dict):
  """Name -> shape, each tensor made when it is asked for."""

  def __getitem__(self, name):
    return np.random.default_rng(0).standard_normal(super().__getitem__(name), np.float32)


def write(folder: pathlib.Path, gb: float) -> float:
  """A checkpoint of about `gb` * 10^9 bytes; returns its exact size in 10^9 bytes."""
  from caprl_jax.hub.hub_files import write_directory

  layers = round((gb * 1e9 / 4 - VOCAB * WIDTH) / LAYER)
  shapes = RandomTensors(
    {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
  )
  for i in range(layers):
    block = f"model.layers.{i}."
    shapes |= {f"{block}self_attn.{x}_proj.weight": (WIDTH, WIDTH) for x in "qkvo"}
    shapes |= {f"{block}mlp.{x}_proj.weight": (INNER, WIDTH) for x in ("gate", "up")}
    shapes |= {
      f"{block}mlp.down_proj.weight": (WIDTH, INNER),
      f"{block}input_layernorm.weight": (WIDTH,),
      f"{block}post_attention_layernorm.weight": (WIDTH,),
    }
  shapes = RandomTensors(shapes)
  config = dict(
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_hidden_layers=layers,
    num_attention_heads=16,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
  )
  tokenizer = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}'
  write_directory(
    folder,
    config,
    shapes,
    tokenizer_files={"tokenizer.json": tokenizer},
    max_shard_bytes=300_000_000,
  )
  return sum(4 * np.prod(shape) for shape in dict.values(shapes)) / 1e9


def load(folder: str, dtype: str) -> None:
  import jax

  from caprl_jax import sharding
  from caprl_jax.hub.load import load_judge

  mesh = sharding.make_mesh(sharding.MeshConfig())
  jax.block_until_ready(jax.numpy.zeros(8))
  peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
  before = peak()
  judge = load_judge(folder, mesh, jax.numpy.dtype(dtype))
  jax.block_until_ready(judge.params)
  held = sum(x.nbytes for x in jax.tree.leaves(judge.params)) / 1e9
  print(
    f"{dtype}: {held:.2f} GB of parameters, peak {peak() - before:.2f} GB over the "
    f"{before:.2f} GB before: ratio {(peak() - before) / held:.2f}"
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--gb", type=float, default=1.2)
  parser.add_argument("--dtype", default="float32,bfloat16")
  parser.add_argument("--load", help="used by the program itself")
  args = parser.parse_args()
  if args.load:
    return load(args.load, args.dtype)
  with tempfile.TemporaryDirectory() as folder:
    size = write(pathlib.Path(folder) / "model", args.gb)
    print(f"checkpoint of {size:.2f} GB, float32")
    for dtype in args.dtype.split(","):
      subprocess.run(
        [sys.executable, __file__, f"--load={folder}/model", f"--dtype={dtype}"], check=True
      )


if __name__ == "__main__":
  main()
