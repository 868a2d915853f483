"""The paper's claim in small: do captions of a CapRL-trained captioner teach another model more than its warm start's do?

  python benchmarks/captions_teach.py --caprl runs/quickstart/policy [--seeds 3] [--images 3000]

Two captioners, before and after CapRL, caption the same training images of easy-VQA. A new model, with no weights of either,
is pretrained on the one's captions, on the other's, or on none, then taught to answer questions on few images, and asked about
held-out ones with the image in sight (`configs/pretrain_small.py`; direct VQA, each question in two orders of its options).
Everything but the captions is the same. Prints a table over seeds and writes results.json; what is done is not done again.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t for a 95% interval of the mean of so many seeds


def main_program(*arguments: str) -> None:
  subprocess.run([sys.executable, "-m", "caprl_jax.main", *arguments], check=True, cwd=ROOT)


def caption(name: str, checkpoint: str, images: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
  output = workdir / f"{name}.jsonl"
  if not output.exists():
    main_program(f"--config={ROOT / 'configs/caption.py'}", f"--workdir={workdir / 'caption'}", f"--config.policy.checkpoint={checkpoint}",
                 f"--config.caption.input={images}", f"--config.caption.output={output}", "--config.caption.max_tokens=12",
                 "--config.caption.batch_size=64")
  return output


def list_images(count: int, workdir: pathlib.Path) -> pathlib.Path:
  """The last images of the training split: those that the questions are about come first, and are none of these."""
  from caprl_jax.data.easy_vqa import read_easy_vqa
  path = workdir / "images.jsonl"
  rows = read_easy_vqa("train", 0)[-count:]
  path.write_text("".join(json.dumps({"image": str(row.image)}) + "\n" for row in rows))
  return path


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--warm", default=str(ROOT / "configs/quickstart_policy"))
  parser.add_argument("--caprl", required=True)
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/captions_teach"))
  parser.add_argument("--images", type=int, default=3000)
  parser.add_argument("--questions", type=int, default=600, help="images that stage 3 asks about")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("overrides", nargs="*", help="--config.pretrain.... of every run, after --")
  args = parser.parse_args()
  workdir = args.workdir.resolve()
  workdir.mkdir(parents=True, exist_ok=True)
  images = list_images(args.images, workdir)
  corpora = {"none": None, "warm start": caption("warm_start", args.warm, images, workdir), "CapRL": caption("caprl", args.caprl, images, workdir)}
  # One vocabulary for all, whatever they are pretrained on.
  texts = sorted({json.loads(line)["caption"] for corpus in corpora.values() if corpus for line in corpus.read_text().splitlines()})
  found: dict[str, list[dict]] = {name: [] for name in corpora}
  for seed in range(args.seeds):
    for name, corpus in corpora.items():
      folder = workdir / f"{name.replace(' ', '_')}_{seed}"
      if not (folder / "vqa.json").exists():
        more = [] if corpus is None else [f"--config.pretrain.stages.further.data={corpus}"]
        main_program(f"--config={ROOT / 'configs/pretrain_small.py'}", f"--workdir={folder}", f"--config.seed={seed}",
                     f"--config.pretrain.stages.instruct.max_rows={args.questions}", f"--config.pretrain_policy.texts={tuple(texts)!r}",
                     *more, *args.overrides)
      found[name].append(json.loads((folder / "vqa.json").read_text()))
  (workdir / "results.json").write_text(json.dumps(found, indent=1) + "\n")
  print(table(found))


def table(found: dict[str, list[dict]]) -> str:
  kinds = sorted(found["none"][0]["kinds"])
  lines = ["| pretrained on captions of | accuracy | " + " | ".join(kinds) + " | without the image |", "|---" * (len(kinds) + 3) + "|"]
  for name, runs in found.items():
    value = lambda get: interval([get(run) for run in runs])
    lines.append(f"| {name} | {value(lambda run: run['accuracy'])} ({', '.join(format(run['accuracy'], '.3f') for run in runs)}) | "
                 + " | ".join(value(lambda run, kind=kind: run["kinds"][kind]["accuracy"]) for kind in kinds)
                 + f" | {value(lambda run: run['blind'])} |")
  for one, other in (("CapRL", "warm start"), ("CapRL", "none"), ("warm start", "none")):
    difference = [a["accuracy"] - b["accuracy"] for a, b in zip(found[one], found[other])]
    lines.append(f"\n{one} minus {other}, by seed: {interval(difference, '+.3f')} ({', '.join(format(d, '+.3f') for d in difference)})")
  return "\n".join(lines)


def interval(values: list[float], how: str = ".3f") -> str:
  """Mean and the half width of its 95% interval over seeds."""
  mean = np.mean(values)
  if len(values) < 2:
    return format(mean, how)
  half = T95.get(len(values), 1.96) * np.std(values, ddof=1) / np.sqrt(len(values))
  return f"{format(mean, how)} ± {half:.3f}"


if __name__ == "__main__":
  main()
