"""What a step costs when one of its sizes is doubled, and whether anything grows faster than its
arithmetic.

  python -m benchmarks.rl.scaling [--sizes group,caption] [--json FILE]

Small random models, captions as long as the limit. Each size is doubled alone. For the whole step:
seconds, and bytes of temporaries as the compiler counts them, both over those of the base; and the
same of the matrix products that are needed, as mode `plan` reckons them. "over" is by how much the
seconds grew more than the products. A size whose work is no matrix product (the vocabulary that a
token is drawn from) may grow by a little more, and none by more than the size itself. Nothing else
should run beside it.
"""

import argparse
import copy
import functools
import json
import time
from typing import Any

import jax
import jaxlib
import numpy as np

from benchmarks.parts import tiny_models
from benchmarks.parts.executed import executed
from benchmarks.parts.timing import best_secs
from benchmarks.step import make_work, needed, whole_step
from caprl_jax import sharding

# Of the step: a key of `benchmarks/step.py`'s command line each.
STEP = {
  "rows": "images",
  "group": "group",
  "caption": "max_tokens",
  "prompt": "prompt",
  "questions": "questions",
  "image side": "image",
}
# Of captioner and judge: the keys of config.json that are doubled together.
MODEL = {
  "vocabulary": ("vocab_size",),
  "width": (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_heads",
    "out_hidden_size",
  ),
  "layers": ("num_hidden_layers", "depth"),
}
SIZES = (*STEP, *MODEL)
NOISE = 0.1  # of seconds, by which a growth may be off


def shrunk(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
  """The benchmarks' model in the base's sizes."""
  changed = copy.deepcopy(config)
  for part in (changed, *(v for v in changed.values() if isinstance(v, dict))):
    for key, value in (
      ("vocab_size", args.vocabulary),
      ("num_hidden_layers", args.layers),
      ("depth", args.layers),
    ):
      if key in part:
        part[key] = value
    if "fullatt_block_indexes" in part:
      part["fullatt_block_indexes"] = [args.layers - 1]
  return changed


def doubled(config: Any, keys: tuple[str, ...]) -> Any:
  """A config.json with these numbers twice as large, wherever in it they stand."""
  if not isinstance(config, dict):
    return config
  return {
    key: 2 * value if key in keys and isinstance(value, int) else doubled(value, keys)
    for key, value in config.items()
  }


def sizes_of(base: argparse.Namespace, size: str | None) -> argparse.Namespace:
  """The base's sizes, one of them doubled. Raises ValueError for one that is none."""
  changed = copy.deepcopy(base)
  if size in STEP:
    setattr(changed, STEP[size], 2 * getattr(base, STEP[size]))
  elif size in MODEL:
    changed.model, changed.judge = (doubled(x, MODEL[size]) for x in (base.model, base.judge))
  elif size is not None:
    raise ValueError(f"--sizes: {size!r} is none of {', '.join(SIZES)}")
  return changed


def measure(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> dict[str, float]:
  """Seconds of a step, its temporaries in bytes, and FLOPs: needed, and executed where they are
  counted."""
  work = make_work(args, mesh)
  function, given = whole_step(work)
  began = time.perf_counter()
  compiled = jax.jit(function).lower(*given).compile()
  compile_secs = time.perf_counter() - began
  jax.block_until_ready(compiled(*given))
  memory = compiled.memory_analysis()
  found = dict(
    secs=best_secs(functools.partial(compiled, *given), args.repeats),
    needed=needed(work, np.asarray(work.length_BG))["whole"],
    temporaries=float(memory.temp_size_in_bytes) if memory else float("nan"),
    compile_secs=compile_secs,
  )
  if args.count:
    found["executed"] = executed(function, *given)[0]
  return found


def growth(base: dict[str, float], found: dict[str, float]) -> dict[str, float]:
  """By what factor each number grew, and `over`: seconds over what is needed, at least 1."""
  grown = {name: found[name] / base[name] for name in base}
  return {**grown, "over": grown["secs"] / max(grown["needed"], 1.0)}


def line(size: str, found: dict[str, float], grown: dict[str, float]) -> str:
  """Of the table."""
  executed_text = f"{grown['executed']:>9.2f}x" if "executed" in grown else f"{'-':>10}"
  late = " faster than its arithmetic" if grown["over"] > 1 + NOISE else ""
  return (
    f"{size:>10} {found['secs']:>9.3f} {grown['secs']:>8.2f}x {grown['needed']:>8.2f}x "
    f"{executed_text} {grown['temporaries']:>10.2f}x {grown['over']:>7.2f}{late}"
  )


def arguments() -> argparse.Namespace:
  """What the command line says, with models in the base's sizes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--sizes", default=",".join(SIZES), help="which are doubled")
  add("--images", type=int, default=4)
  add("--group", type=int, default=4, help="captions per image")
  add("--max_tokens", type=int, default=48, help="of each caption")
  add("--prompt", type=int, default=64, help="tokens of the instruction")
  add("--questions", type=int, default=4)
  add("--image", type=int, default=112, help="width and height in pixels")
  add("--vocabulary", type=int, default=8192)
  add("--layers", type=int, default=2, help="of tower, captioner and judge")
  add("--dtype", default="float32")
  add("--repeats", type=int, default=3)
  add("--count", action="store_true", help="count executed products too: minutes more")
  add("--json", default="", help="a file for the numbers")
  args = parser.parse_args()
  fixed = dict(
    params="float32", lengths="fixed", question_tokens=20, microbatches=1, chunk_tokens=4096
  )
  base = argparse.Namespace(**{**vars(args), **fixed, "remat": False, "attention": "xla"})
  base.model, base.judge = (
    shrunk(config, args) for config in (tiny_models.CAPTIONER, tiny_models.JUDGE)
  )
  return base


def main() -> None:
  base = arguments()
  chosen = [size.strip() for size in base.sizes.split(",")]
  asked = {size: sizes_of(base, size) for size in chosen}  # a wrong name is told before any work
  device = jax.devices()[0].device_kind
  versions = dict(jax=jax.__version__, jaxlib=jaxlib.__version__, numpy=np.__version__)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  rows: dict[str, Any] = {}
  with jax.set_mesh(mesh):
    begin = measure(base, mesh)
    print(f"{device}, {', '.join(f'{name} {version}' for name, version in versions.items())}")
    print(
      f"base: {base.images} images of {base.image}x{base.image} x {base.group} captions of "
      f"{base.max_tokens} tokens, prompt {base.prompt}, {base.questions} questions, vocabulary "
      f"{base.vocabulary}, {base.layers} layers: {begin['secs']:.3f} s, "
      f"{begin['needed'] / 1e9:.1f} GFLOP needed"
    )
    titles = ("doubled", "seconds", "time", "needed", "executed", "temporaries", "over")
    print(" ".join(f"{title:>{width}}" for title, width in zip(titles, (10, 9, 9, 9, 10, 11, 7))))
    for size, args in asked.items():
      found = measure(args, mesh)
      rows[size] = {"found": found, "growth": growth(begin, found)}
      print(line(size, found, rows[size]["growth"]), flush=True)
      jax.clear_caches()
  if base.json:
    report = dict(device=device, **versions, settings=vars(base), base=begin, sizes=rows)
    with open(base.json, "w", encoding="utf-8") as file:
      json.dump(report, file, indent=2)


if __name__ == "__main__":
  main()
