"""The paper's claim in small: do captions of a CapRL-trained captioner teach another model more than its warm start's do?

  python benchmarks/captions_teach.py --caprl runs/quickstart/policy [--seeds 3] [--images 3000]

Two captioners, before and after CapRL, caption the same training images of easy-VQA. A new model, with no weights of either,
is pretrained on the one's captions, on the other's, or on none, then taught to answer colour and shape questions in a word on a
few other images, and asked about held-out ones with the image in sight: direct VQA, greedy, exact match. Model and stages
are those of `configs/pretrain_small.py`; everything but the captions is the same. Prints a table over seeds and writes
results.json; what is done is not done again.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np

from caprl_jax import sharding
from caprl_jax.caption import CaptionConfig, Captioner
from caprl_jax.data.easy_vqa import read_easy_vqa
from caprl_jax.data.rows import CaptionRow
from caprl_jax.models.load import load_policy

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
  path = workdir / "images.jsonl"
  rows = read_easy_vqa("train", 0)[-count:]
  path.write_text("".join(json.dumps({"image": str(row.image)}) + "\n" for row in rows))
  return path


def asked(split: str, count: int) -> list[tuple[str, str, str, str]]:
  """(image, question, answer, kind) of the colour and shape questions about a split's first images."""
  return [(str(row.image), q.stem, q.options[q.gold], q.kind) for row in read_easy_vqa(split, 0)[:count] for q in row.questions
          if q.kind in ("color", "shape")]


def list_conversations(count: int, workdir: pathlib.Path) -> pathlib.Path:
  path = workdir / "conversations.jsonl"
  path.write_text("".join(json.dumps({"image": image, "conversations": [
      {"from": "human", "value": f"<image>\n{stem}"}, {"from": "gpt", "value": answer}]}) + "\n"
      for image, stem, answer, _ in asked("train", count)))
  return path


def answer(checkpoint: pathlib.Path, count: int) -> dict:
  """Greedy answers to held-out questions: accuracy, by kind too."""
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  questions = asked("test", count)
  right: dict[str, list[bool]] = {"color": [], "shape": []}
  with jax.set_mesh(mesh):
    loaded = load_policy(str(checkpoint), mesh)
    cfg = CaptionConfig("", "", max_tokens=4, batch_size=32, repetition_penalty=1.0)
    with Captioner(loaded, cfg, "what", mesh, 0) as captioner:
      for stem in sorted({stem for _, stem, _, _ in questions}):
        captioner.pieces = loaded.prompt_pieces(stem)
        these = [question for question in questions if question[1] == stem]
        rows = [CaptionRow(pathlib.Path(image), "", str(n)) for n, (image, *_) in enumerate(these)]
        for found in captioner(rows, range(len(rows))):
          for item in found:
            _, _, gold, kind = these[item.number]
            right[kind].append(item.row["caption"].strip() == gold)
  every = right["color"] + right["shape"]
  return {"accuracy": float(np.mean(every)), "questions": len(every),
          "kinds": {kind: {"accuracy": float(np.mean(found))} for kind, found in right.items()}}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--warm", default=str(ROOT / "configs/quickstart_policy"))
  parser.add_argument("--caprl", required=True)
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/captions_teach"))
  parser.add_argument("--images", type=int, default=3000)
  parser.add_argument("--taught", type=int, default=300, help="images that stage 3 asks about")
  parser.add_argument("--asked", type=int, default=300, help="held-out images")
  parser.add_argument("--first-seed", type=int, default=0)
  parser.add_argument("--config", default=str(ROOT / "configs/pretrain_small.py"))
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
  conversations = list_conversations(args.taught, workdir)
  for seed in range(args.first_seed, args.first_seed + args.seeds):
    for name, corpus in corpora.items():
      folder = workdir / f"{name.replace(' ', '_')}_{seed}"
      if not (folder / "answers.json").exists():
        more = [] if corpus is None else [f"--config.pretrain.stages.further.data={corpus}"]
        main_program(f"--config={args.config}", f"--workdir={folder}", f"--config.seed={seed}",
                     f"--config.pretrain.stages.instruct.data={conversations}", "--config.pretrain.eval=None",
                     f"--config.pretrain_policy.texts={tuple(texts)!r}", *more, *args.overrides)
        figures = answer(folder / "instruct", args.asked)
        (folder / "answers.json").write_text(json.dumps(figures))
        print(f"seed {seed}, {name}: {figures['accuracy']:.3f}", flush=True)
      found[name].append(json.loads((folder / "answers.json").read_text()))
  (workdir / "results.json").write_text(json.dumps(found, indent=1) + "\n")
  print(table(found))


def table(found: dict[str, list[dict]]) -> str:
  kinds = sorted(found["none"][0]["kinds"])
  lines = ["| pretrained on captions of | accuracy | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 2) + "|"]
  for name, runs in found.items():
    value = lambda get: interval([get(run) for run in runs])
    lines.append(f"| {name} | {value(lambda run: run['accuracy'])} ({', '.join(format(run['accuracy'], '.3f') for run in runs)}) | "
                 + " | ".join(value(lambda run, kind=kind: run["kinds"][kind]["accuracy"]) for kind in kinds) + " |")
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
