"""The paper's claim in small: do captions of a CapRL-trained captioner teach another model more than its warm start's?

  python benchmarks/captions_teach.py --caprl runs/quickstart/policy
  python benchmarks/captions_teach.py --data charts --warm runs/charts_sft/policy --caprl runs/charts/policy \\
    --train data/charts/train.jsonl --test data/charts/test.jsonl --tokens 72

A captioner before and after CapRL captions the same training images. A model in the paper's arrangement (a vision
tower, a language model that can read and has seen no image, a new projector) is pretrained on the one's captions, on
the other's, or on none, beside the language model's own lessons without images; then it learns to answer questions
about the training images, and is asked about held-out ones with the image in sight: direct VQA by letter, each question
in two orders of its options. Stages and model are those of configs/pretrain_letters.py; everything but the captions is
the same. Prints a table over seeds and writes results.json; what is done is not done again.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np
from scipy import stats

from caprl_jax.data.jsonl import write_jsonl
from caprl_jax.data.sources import read_qa_rows

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOLD = {"easy_vqa": "The image shows a {color} {shape}.", "charts": "{description}"}  # what the language model has read
KINDS = {"easy_vqa": ("color", "shape"), "charts": None}  # yes/no questions are answered without the image


def main_program(*arguments: str) -> None:
  subprocess.run([sys.executable, "-m", "caprl_jax.main", *arguments], check=True, cwd=ROOT)


def caption(name: str, checkpoint: str, images: pathlib.Path, workdir: pathlib.Path, tokens: int) -> pathlib.Path:
  output = workdir / f"{name}.jsonl"
  if not output.exists():
    main_program(f"--config={ROOT / 'configs/caption.py'}", f"--workdir={workdir / 'caption'}",
                 f"--config.policy.checkpoint={checkpoint}", f"--config.caption.input={images}",
                 f"--config.caption.output={output}", f"--config.caption.max_tokens={tokens}",
                 "--config.caption.batch_size=64")
  return output


def list_images(source: str, workdir: pathlib.Path) -> pathlib.Path:
  path = workdir / "images.jsonl"
  paths = [row.image for row in read_qa_rows(source, 0)]
  if not all(isinstance(image, pathlib.Path) for image in paths):
    raise SystemExit(f"{source} does not keep its images as files; convert it to a .jsonl with mode dataset")
  path.write_text("".join(json.dumps({"image": str(image.resolve())}) + "\n" for image in dict.fromkeys(paths)))
  return path


def language_model(args, workdir: pathlib.Path) -> pathlib.Path:
  """Made by configs/pretrain_language.py, if it is not given."""
  folder = workdir / "language"
  if args.language is None and not (folder / "read").exists():
    main_program(f"--config={ROOT / 'configs/pretrain_language.py'}", f"--workdir={folder}",
                 f"--config.pretrain.stages.read.data={args.train}",
                 f"--config.pretrain.stages.read.told={TOLD[args.data]}")
  return args.language or folder / "read"


def text_lessons(args, workdir: pathlib.Path) -> str:
  """A source of the rows whose text lessons are repeated beside captions."""
  if args.lessons is None:
    return args.train
  path = workdir / "lessons.jsonl"
  if not path.exists():
    write_jsonl(path, read_qa_rows(args.train, 0)[:args.lessons])
  return str(path)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", choices=sorted(TOLD), default="easy_vqa")
  parser.add_argument("--train", default="easy_vqa:train", help="captioned, and asked about in stage 3")
  parser.add_argument("--test", default="easy_vqa:test", help="held-out images and questions")
  parser.add_argument("--warm", default=str(ROOT / "configs/quickstart_policy"), help="captioner, and the tower of all")
  parser.add_argument("--caprl", required=True, help="the captioner after CapRL")
  parser.add_argument("--language", type=pathlib.Path, help="the language model; made if it is not given")
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/captions_teach"))
  parser.add_argument("--tokens", type=int, default=12, help="of a caption, at most")
  parser.add_argument("--lessons", type=int, help="rows whose text lessons stand beside captions; default: all")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--first-seed", type=int, default=0)
  parser.add_argument("overrides", nargs="*", help="--config.pretrain.... of every run, after --")
  args = parser.parse_args()
  workdir = args.workdir.resolve()
  workdir.mkdir(parents=True, exist_ok=True)
  images = list_images(args.train, workdir)
  corpora = {"none": None, "warm start": caption("warm_start", args.warm, images, workdir, args.tokens),
             "CapRL": caption("caprl", args.caprl, images, workdir, args.tokens)}
  language = language_model(args, workdir)
  lessons, kinds = text_lessons(args, workdir), KINDS[args.data]
  found: dict[str, list[dict]] = {name: [] for name in corpora}
  for seed in range(args.first_seed, args.first_seed + args.seeds):
    for name, corpus in corpora.items():
      folder = workdir / f"{name.replace(' ', '_')}_{seed}"
      if not (folder / "vqa.json").exists():
        data = lessons if corpus is None else f"{corpus} + {lessons}"
        stages = "--config.pretrain.stages"
        main_program(f"--config={ROOT / 'configs/pretrain_letters.py'}", f"--workdir={folder}", f"--config.seed={seed}",
                     f"--config.pretrain_policy.vision={args.warm}", f"--config.pretrain_policy.language={language}",
                     f"{stages}.further.data={data}", f"{stages}.further.told={TOLD[args.data]}",
                     f"{stages}.further.kinds={kinds!r}", f"{stages}.instruct.data={args.train}",
                     f"{stages}.instruct.kinds={kinds!r}", f"--config.pretrain.eval={args.test}",
                     f"--config.pretrain.eval_kinds={kinds!r}", *args.overrides)
      found[name].append(json.loads((folder / "vqa.json").read_text()))
      print(f"seed {seed}, {name}: {found[name][-1]['accuracy']:.3f}", flush=True)
  (workdir / "results.json").write_text(json.dumps(found, indent=1) + "\n")
  print(table(found))


def table(found: dict[str, list[dict]]) -> str:
  kinds = sorted(found["none"][0]["kinds"])
  lines = ["| pretrained on captions of | accuracy (by seed) | " + " | ".join(kinds) + " | without the image |",
           "|---" * (len(kinds) + 3) + "|"]
  for name, runs in found.items():
    each = ", ".join(format(run["accuracy"], ".3f") for run in runs)
    cells = [interval([run["kinds"][kind]["accuracy"] for run in runs]) for kind in kinds]
    lines.append(f"| {name} | {interval([run['accuracy'] for run in runs])} ({each}) | " + " | ".join(cells)
                 + f" | {interval([run['blind'] for run in runs])} |")
  for one, other in (("CapRL", "warm start"), ("CapRL", "none"), ("warm start", "none")):
    difference = [a["accuracy"] - b["accuracy"] for a, b in zip(found[one], found[other], strict=True)]
    each = ", ".join(format(value, "+.3f") for value in difference)
    lines.append(f"\n{one} minus {other}, by seed: {interval(difference, '+.3f')} ({each})")
  return "\n".join(lines)


def interval(values: list[float], how: str = ".3f") -> str:
  """Mean and the half width of its 95% interval over seeds, by Student's t."""
  mean = np.mean(values)
  if len(values) < 2:
    return format(mean, how)
  half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
  return f"{format(mean, how)} ± {half:.3f}"


if __name__ == "__main__":
  main()
