"""The paper's claim in small: do captions of a CapRL-trained captioner teach another model more
than its warm start's?

  python benchmarks/captions_teach.py --caprl runs/quickstart/policy
  python benchmarks/captions_teach.py --data charts --caprl runs/charts/policy \\
    --train data/charts/train_4000.jsonl

A captioner before and after CapRL captions the same training images. A model in the paper's
arrangement (a vision tower, a language model that can read and has seen no image, a new projector)
is pretrained on the one's captions, on the other's, or on none, beside the language model's own
lessons without images; then it learns to answer questions about the training images, and is asked
about held-out ones with the image in sight: direct VQA, of easy-VQA by letter, of charts in words.
Stages and model are those of configs/pretrain_letters.py and configs/pretrain_charts.py; everything
but the captions is the same. Prints a table over seeds and writes results.json; what is done is not
done again.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np
from scipy import stats

from caprl_jax.config.loading import load_config
from caprl_jax.data.readers.jsonl import write_jsonl
from caprl_jax.data.readers.qa_sources import read_qa_rows

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = {
  "easy_vqa": ROOT / "configs/pretrain_letters.py",
  "charts": ROOT / "configs/pretrain_charts.py",
}
TOKENS = {"easy_vqa": 12, "charts": 72}  # of a caption, at most


def main_program(*arguments: str) -> None:
  subprocess.run([sys.executable, "-m", "caprl_jax.main", *arguments], check=True)


def caption(
  name: str, checkpoint: str, images: pathlib.Path, workdir: pathlib.Path, tokens: int
) -> pathlib.Path:
  output = workdir / f"{name}.jsonl"
  if not output.exists():
    main_program(
      f"--config={ROOT / 'configs/caption.py'}",
      f"--workdir={workdir / 'caption'}",
      f"--config.policy.checkpoint={checkpoint}",
      f"--config.caption.input={images}",
      f"--config.caption.output={output}",
      f"--config.caption.max_tokens={tokens}",
      "--config.caption.batch_size=64",
    )
  return output


def list_images(source: str, workdir: pathlib.Path) -> pathlib.Path:
  path = workdir / "images.jsonl"
  paths = [row.image for row in read_qa_rows(source, 0)]
  if not all(isinstance(image, pathlib.Path) for image in paths):
    raise SystemExit(
      f"{source} does not keep its images as files; convert it to a .jsonl with mode dataset"
    )
  path.write_text(
    "".join(json.dumps({"image": str(image.resolve())}) + "\n" for image in dict.fromkeys(paths))
  )
  return path


def language_model(args, told: str, workdir: pathlib.Path) -> pathlib.Path:
  """Made by configs/pretrain_language.py, if it is not given."""
  folder = workdir / "language"
  if args.language is None and not (folder / "read").exists():
    main_program(
      f"--config={ROOT / 'configs/pretrain_language.py'}",
      f"--workdir={folder}",
      f"--config.pretrain.stages.read.data={args.train}",
      f"--config.pretrain.stages.read.context_text={told}",
    )
  return args.language or folder / "read"


def text_lessons(train: str, rows: int | None, workdir: pathlib.Path) -> str:
  """A source of the rows whose text lessons are repeated beside captions."""
  if rows is None:
    return train
  path = workdir / "lessons.jsonl"
  if not path.exists():
    write_jsonl(path, read_qa_rows(train, 0)[:rows])
  return str(path)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", choices=sorted(CONFIGS), default="easy_vqa")
  parser.add_argument(
    "--train", help="captioned, and asked about in stage 3; default: the config's"
  )
  parser.add_argument("--test", help="held-out images and questions; default: the config's")
  parser.add_argument(
    "--warm", help="the captioner before CapRL, and the tower of all; default: the config's tower"
  )
  parser.add_argument("--caprl", required=True, help="the captioner after CapRL")
  parser.add_argument(
    "--language", type=pathlib.Path, help="the language model; made if it is not given"
  )
  parser.add_argument("--workdir", type=pathlib.Path, help="default: runs/captions_teach_DATA")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--first-seed", type=int, default=0)
  parser.add_argument("overrides", nargs="*", help="--config.pretrain.... of every run, after --")
  args = parser.parse_args()
  config = load_config(str(CONFIGS[args.data]))
  further = config.pretrain.stages.further
  args.train, args.test = args.train or further.data, args.test or config.pretrain.eval
  args.warm = args.warm or config.pretrain_policy.vision
  workdir = (args.workdir or pathlib.Path("runs", f"captions_teach_{args.data}")).resolve()
  workdir.mkdir(parents=True, exist_ok=True)
  check_settings(
    workdir,
    {
      "config": config.to_json(),
      "arguments": [
        str(x)
        for x in (args.train, args.test, args.warm, args.caprl, args.language, *args.overrides)
      ],
    },
  )
  images, tokens = list_images(args.train, workdir), TOKENS[args.data]
  corpora = {
    "none": None,
    "warm start": caption("warm_start", args.warm, images, workdir, tokens),
    "CapRL": caption("caprl", args.caprl, images, workdir, tokens),
  }
  language = language_model(args, further.context_text, workdir)
  lessons = text_lessons(args.train, further.max_rows, workdir)
  found: dict[str, list[dict]] = {name: [] for name in corpora}
  for seed in range(args.first_seed, args.first_seed + args.seeds):
    for name, corpus in corpora.items():
      folder = workdir / f"{name.replace(' ', '_')}_{seed}"
      if not (folder / "vqa.json").exists():
        data = lessons if corpus is None else f"{corpus} + {lessons}"
        stages = "--config.pretrain.stages"
        main_program(
          f"--config={CONFIGS[args.data]}",
          f"--workdir={folder}",
          f"--config.seed={seed}",
          f"--config.pretrain_policy.vision={args.warm}",
          f"--config.pretrain_policy.language={language}",
          f"{stages}.further.data={data}",
          f"{stages}.further.max_rows=None",
          f"{stages}.instruct.data={args.train}",
          f"--config.pretrain.eval={args.test}",
          *args.overrides,
        )
      found[name].append(json.loads((folder / "vqa.json").read_text()))
      print(f"seed {seed}, {name}: {found[name][-1]['accuracy']:.3f}", flush=True)
  (workdir / "results.json").write_text(json.dumps(found, indent=1) + "\n")
  print(table(found))


def check_settings(workdir: pathlib.Path, settings: dict) -> None:
  """What is kept in a workdir was made with these settings, or it is not used."""
  path = workdir / "settings.json"
  if path.exists() and (held := json.loads(path.read_text())) != settings:
    raise SystemExit(
      f"{workdir} holds results of other settings ({held['arguments']}, now "
      f"{settings['arguments']}, or another config); use another --workdir"
    )
  path.write_text(json.dumps(settings))


def table(found: dict[str, list[dict]]) -> str:
  kinds = sorted(found["none"][0]["kinds"])
  lines = [
    "| pretrained on captions of | accuracy (by seed) | " + " | ".join(kinds) + " | without "
    "the image "
    "|",
    "|---" * (len(kinds) + 3) + "|",
  ]
  for name, runs in found.items():
    each = ", ".join(format(run["accuracy"], ".3f") for run in runs)
    cells = [interval([run["kinds"][kind]["accuracy"] for run in runs]) for kind in kinds]
    lines.append(
      f"| {name} | {interval([run['accuracy'] for run in runs])} ({each}) | "
      + " | ".join(cells)
      + f" | {interval([run['blind'] for run in runs])} |"
    )
  for one, other in (("CapRL", "warm start"), ("CapRL", "none"), ("warm start", "none")):
    difference = [
      a["accuracy"] - b["accuracy"] for a, b in zip(found[one], found[other], strict=True)
    ]
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
