"""A published captioner's exact shapes with random weights: one image captioned by this package and
by transformers, and the ids compared.

  python -m benchmarks.models.real_size Qwen/Qwen2.5-VL-3B-Instruct [--layers 4] [--json a.json]
  python -m benchmarks.models.real_size --table a.json b.json

Writes a checkpoint under the names of the published one (bfloat16, shards of 2 GB) with a stand-in
for its tokenizer, then captions an image in float32, greedily: three processes, one after the
other. Says whether the ids are equal, and seconds and peak host memory of both. Neither
the published files nor a network are needed: shapes are those of hub/published_configs.py, of which
any captioner may be named. A model of N billion parameters takes 2 N GB of disk and 4 N GB of
memory at least; --layers takes the first layers alone. Needs `pip install caprl_jax[test]`.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

SHARD_BYTES = 2_000_000_000
INSTRUCTION = "Please describe this image in detail."
TEXT_TOKENS = 151_643  # of Qwen's vocabulary; the ones below follow
ADDED = (
  *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
  *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
  *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>"),
  *("</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
  *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
ADDED_OF = {  # what a family adds to these
  "internvl": ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>")
}
WRITE, OURS, THEIRS = "write", "ours", "transformers"


# ---- the checkpoint ----


def tokenizer_json(family: str) -> str:
  """A byte-level tokenizer of Qwen's size whose special tokens have their published ids; a text is
  one token for each byte, and the other tokens are never written by it."""
  import tokenizers

  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  names = [*letters, *(f"⟨{i}⟩" for i in range(TEXT_TOKENS - len(letters)))]
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[])
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  made.add_special_tokens(
    [
      tokenizers.AddedToken(token, special=True, normalized=False)
      for token in (*ADDED, *ADDED_OF.get(family, ()))
    ]
  )
  return made.to_str()


def write_checkpoint(folder: pathlib.Path, config: dict[str, Any]) -> dict[str, float]:
  """Writes a directory that transformers and this package load; how many parameters it has, and how
  many bytes of tensors, both in 10^9.

  Args:
    config: contents of a captioner's config.json.
  """
  import flax.linen as nn
  import jax

  from caprl_jax import sharding
  from caprl_jax.hub.folders.pixels import processor_of
  from caprl_jax.hub.hub_files import write_directory
  from caprl_jax.hub.load import init_policy, new_policy_files
  from caprl_jax.hub.tokenizer import load_tokenizer
  from caprl_jax.hub.weights import TensorsOfParams
  from caprl_jax.models.policy import PolicyConfig

  class RandomTensors(TensorsOfParams):
    """Tensors under their published names, each drawn when it is asked for."""

    def shape(self, name: str) -> tuple[int, ...]:
      leaf, number, transposed = self.sources[name]
      shape = leaf.shape if number is None else leaf.shape[1:]
      return shape[::-1] if transposed else shape

    def __getitem__(self, name: str) -> np.ndarray:
      shape = self.shape(name)
      rng = np.random.default_rng(zlib.crc32(name.encode()))
      drawn = rng.standard_normal(shape, np.float32) * np.float32(0.02)
      scale = len(shape) == 1 and not name.endswith("bias")  # of a norm, or of a layer
      return (drawn + np.float32(scale)).astype(jax.numpy.bfloat16)

  cfg = PolicyConfig.from_hf(config, {})
  init = init_policy(cfg)
  params = nn.unbox(sharding.abstract_params(lambda: init(jax.random.key(0))))
  tensors = RandomTensors(params, cfg.family.keys)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "tokenizer.json").write_text(tokenizer_json(config["model_type"]), encoding="utf-8")
  tokenizer = load_tokenizer(folder)
  (folder / "tokenizer.json").unlink()
  write_directory(
    folder,
    {**config, "dtype": "bfloat16"},
    tensors,
    tokenizer_files=new_policy_files(tokenizer, cfg.family),
    json_files={"preprocessor_config.json": processor_of(cfg.vision)},
    max_shard_bytes=SHARD_BYTES,
  )
  count = sum(int(np.prod(tensors.shape(name))) for name in tensors)
  return {"parameters_billions": count / 1e9, "checkpoint_gb": 2 * count / 1e9}


def draw_image(path: pathlib.Path, pixels: int) -> None:
  """A square of noise."""
  rng = np.random.default_rng(0)
  Image.fromarray(rng.integers(0, 256, (pixels, pixels, 3), np.uint8)).save(path)


# ---- captions, each in a process of its own ----


def caption_with_ours(folder: pathlib.Path, image: pathlib.Path, tokens: int) -> dict[str, Any]:
  """Ids that this package writes, seconds to load and to caption (compiling included)."""
  from caprl_jax import sharding
  from caprl_jax.data.rows import CaptionRow
  from caprl_jax.harness.sections import PolicySection
  from caprl_jax.inference.captioner import CaptionerConfig, open_captioner

  section = PolicySection(str(folder), instruction=INSTRUCTION)
  cfg = CaptionerConfig(INSTRUCTION, max_tokens=tokens, temperature=0.0, batch_size=1)
  begun = time.monotonic()
  mesh = sharding.make_mesh(sharding.MeshConfig())
  with open_captioner(section.load, cfg, mesh=mesh, seed=0) as captioner:
    loaded = time.monotonic()
    found = [one for batch in captioner([(0, CaptionRow(image, "", "image"))]) for one in batch]
  if found[0].error is not None:
    raise found[0].error
  return _result(found[0].captions[0].tokens, begun, loaded)


def caption_with_transformers(
  folder: pathlib.Path, image: pathlib.Path, tokens: int
) -> dict[str, Any]:
  """Ids that transformers' `generate` writes, and seconds as above. Raises RuntimeError where it
  finds tensors missing or left over: then the names are not the published ones."""
  import torch
  import transformers

  begun = time.monotonic()
  model, report = transformers.AutoModelForImageTextToText.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
  )
  wrong = {k: sorted(report[k])[:5] for k in ("missing_keys", "unexpected_keys") if report[k]}
  if wrong:
    raise RuntimeError(f"{folder}: transformers does not know the tensors: {wrong}")
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
  loaded = time.monotonic()
  turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]}]
  text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
  picture = [Image.open(image).convert("RGB")]
  if "<IMG_CONTEXT>" in text:
    made = dict(images(picture, return_tensors="pt", crop_to_patches=True))
    vision = model.config.vision_config
    sides = [size // patch for size, patch in zip(vision.image_size, vision.patch_size)]
    each = int(sides[0] * sides[1] * model.config.downsample_ratio**2)
    context = "<IMG_CONTEXT>" * each * int(made.pop("num_patches")[0])
    around = "" if "<img>" in text else "<img>{}</img>"
    text = text.replace("<IMG_CONTEXT>", (around or "{}").format(context))
  else:
    made = dict(images(picture, return_tensors="pt"))
    each = images.merge_size**2
    text = text.replace(
      "<|image_pad|>", "<|image_pad|>" * int(made["image_grid_thw"].prod() // each)
    )
  ids = tokenizer(text, return_tensors="pt").input_ids
  if "image_grid_thw" in made:
    made["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
  with torch.no_grad():
    out = model.eval().generate(
      input_ids=ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=tokens,
      do_sample=False,
      **made,
    )
  return _result(out[0, ids.shape[1] :].tolist(), begun, loaded)


def _result(ids: list[int], begun: float, loaded: float) -> dict[str, Any]:
  return {"ids": ids, "load_secs": loaded - begun, "caption_secs": time.monotonic() - loaded}


RUN = {OURS: caption_with_ours, THEIRS: caption_with_transformers}
PARTS = (WRITE, *RUN)


def measured(part: str, args: argparse.Namespace, workdir: pathlib.Path) -> dict[str, Any]:
  """What one of `PARTS` does, in a new process, so that none pays for another's memory: as its
  function returns it, with `peak_gb`."""
  command = [sys.executable, "-m", "benchmarks.models.real_size", args.name, "--run", part]
  command += ["--workdir", str(workdir), "--tokens", str(args.tokens)]
  command += ["--layers", str(args.layers)] if args.layers is not None else []
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
  return json.loads(done.stdout.splitlines()[-1])


def run_part(args: argparse.Namespace) -> dict[str, Any]:
  """One of `PARTS`, here."""
  folder, image = args.workdir / "model", args.workdir / "image.png"
  if args.run != WRITE:
    return RUN[args.run](folder, image, args.tokens)
  from caprl_jax.modes.plan.abstract import read_config, shallower

  file = pathlib.Path(args.name)
  config = json.loads(file.read_text()) if file.is_file() else read_config(args.name)
  return write_checkpoint(folder, shallower(config, args.layers))


# ---- the table ----


def equal_ids(report: dict[str, Any]) -> int:
  """How many ids are equal before the first that differs."""
  pairs = zip(report[OURS]["ids"], report[THEIRS]["ids"])
  same = [a == b for a, b in pairs]
  return same.index(False) if False in same else len(same)


def row(report: dict[str, Any]) -> str:
  """A line of a table in Markdown, as `HEAD` names its columns."""
  of = max(len(report[who]["ids"]) for who in RUN)
  layers = "all" if report["layers"] is None else str(report["layers"])
  cells = [
    report["model"],
    layers,
    f"{report['parameters_billions']:.2f}",
    f"{equal_ids(report)} of {of}",
  ]
  for who in RUN:
    one = report[who]
    cells += [f"{one['load_secs'] + one['caption_secs']:.0f}", f"{one['peak_gb']:.1f}"]
  return f"| {' | '.join(cells)} |"


HEAD = (
  "| model | layers | parameters, 10^9 | equal ids | seconds | peak, GB | transformers: seconds "
  "| peak, GB |\n|---|---|---|---|---|---|---|---|"
)


def table(reports: Sequence[dict[str, Any]]) -> str:
  """Reports as a table in Markdown, smaller models first."""
  return "\n".join([HEAD, *map(row, sorted(reports, key=lambda one: one["parameters_billions"]))])


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("name", nargs="?", help="of hub/published_configs.py, or a config.json")
  parser.add_argument("--table", type=pathlib.Path, nargs="+", help="prints reports (--json)")
  parser.add_argument("--layers", type=int, help="of text and tower; all by default")
  parser.add_argument("--tokens", type=int, default=8)
  parser.add_argument("--pixels", type=int, default=448, help="a side of the image")
  parser.add_argument("--workdir", type=pathlib.Path, help="where the checkpoint stays")
  parser.add_argument("--json", type=pathlib.Path, help="writes the report here")
  parser.add_argument("--run", choices=PARTS, help="used by the program itself")
  args = parser.parse_args()
  if args.table:
    print(table([json.loads(path.read_text()) for path in args.table]))
    return 0
  if args.name is None:
    parser.error("name a model, or --table and reports")
  if args.run:
    found = run_part(args)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    print(json.dumps(found | {"peak_gb": peak}))
    return 0
  with tempfile.TemporaryDirectory() as temporary:
    workdir = (args.workdir or pathlib.Path(temporary)).resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    report = {"model": args.name, "layers": args.layers, "pixels": args.pixels}
    report |= {key: of for key, of in measured(WRITE, args, workdir).items() if key != "peak_gb"}
    print(f"checkpoint of {report['checkpoint_gb']:.2f} GB", file=sys.stderr)
    draw_image(workdir / "image.png", args.pixels)
    for who in RUN:
      report[who] = measured(who, args, workdir)
  if args.json:
    args.json.write_text(json.dumps(report, indent=1) + "\n")
  print(table([report]))
  return 0 if report[OURS]["ids"] == report[THEIRS]["ids"] else 1


if __name__ == "__main__":
  sys.exit(main())
