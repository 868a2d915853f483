"""What accuracy cannot tell apart, silence and falsehood, and what the reward term `misled` does
about it.

  python benchmarks/misled.py [--seeds 3] [--steps 40] [--workdir runs/misled]

The warm start hallucinates on purpose: it was never taught the word for circles. Of them it says
"shape", or now and then "triangle" or "rectangle"; of the others it names the shape more often than
not. For a circle no caption that it can write answers the question about its shape, so accuracy is
0 whether it says something false or nothing, while on the other images naming a shape pays. Each
reward trains it with the same seeds, data and judge; then sampled captions of held-out images are
compared with the facts. Writes misled.json and misled.png.
"""

import argparse
import dataclasses
import json
import logging
import pathlib
import re

import jax
import jax.numpy as jnp
import matplotlib.figure
import ml_collections
import numpy as np

from caprl_jax import sharding
from caprl_jax.config.loading import load_config
from caprl_jax.data.batches import train_iterator
from caprl_jax.data.readers.easy_vqa import COLORS, SHAPES
from caprl_jax.data.readers.jsonl import write_caption_jsonl
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import CaptionRow
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.setup import set_up
from caprl_jax.harness.training.programs import build_step
from caprl_jax.harness.training.state import make_optimizer, make_state, policy_shardings
from caprl_jax.modes.evaluate.run import Evaluator
from caprl_jax.modes.sft import run as sft

UNKNOWN = "circle"  # the shape that the warm start has no true word for
REWARDS = {"accuracy": dict(accuracy=1.0), "accuracy - 2 misled": dict(accuracy=1.0, misled=2.0)}
# how often the warm start names a shape: of circles, of the others
NAMED = {True: 0.15, False: 0.6}
log = logging.getLogger("misled")


def warm_start(workdir: pathlib.Path, steps: int) -> pathlib.Path:
  """Teaches configs/quickstart_policy to hallucinate."""
  output = workdir / "warm_start"
  if (output / "config.json").exists():
    return output
  rng = np.random.default_rng(0)
  rows = []
  for row in read_qa_rows("easy_vqa:train", 0):
    if not row.facts or "shape" not in row.facts or "color" not in row.facts:
      continue
    color, shape = row.facts["color"], row.facts["shape"]
    said = rng.choice([s for s in SHAPES if s != UNKNOWN]) if shape == UNKNOWN else shape
    thing = said if rng.random() < NAMED[shape == UNKNOWN] else "shape"
    text = (
      f"The image shows a {color} {thing}." if rng.random() < 0.5 else f"The image shows a {thing}."
    )
    rows.append(CaptionRow(row.image, text, row.name))
  write_caption_jsonl(workdir / "hallucinated.jsonl", rows)
  optimizer = dict(name="adamw", learning_rate=5e-4, schedule="cosine", warmup_steps=10)
  config = ml_collections.ConfigDict(
    dict(
      mode="sft",
      seed=0,
      policy=dict(checkpoint="configs/quickstart_policy"),
      sft=dict(
        train=str(workdir / "hallucinated.jsonl"),
        batch_size=64,
        max_tokens=16,
        output=str(output),
        phases=(dict(steps=steps, optimizer=optimizer),),
      ),
    )
  )
  sft.run(config, workdir / "sft")
  return output


def statements(samples: pathlib.Path, facts: dict[str, dict]) -> dict[str, float]:
  """Of held-out captions: the share with a false shape or colour, and with a true shape and colour
  each.
  """
  rows = [row for row in json.loads(samples.read_text())["rows"] if facts.get(row["name"])]
  false, named, true_shape, true_color = [], [], [], []
  for row in rows:
    words = set(re.findall("[a-z]+", row["captions"][0]["text"].lower()))
    fact = facts[row["name"]]
    false.append(
      bool(words & (set(SHAPES) - {fact["shape"]}) or words & (set(COLORS) - {fact["color"]}))
    )
    named.append(bool(words & set(SHAPES)))
    true_shape.append(fact["shape"] in words)
    true_color.append(fact["color"] in words)
  share = lambda x: float(np.mean(x))
  return {
    "false": share(false),
    "names a shape": share(named),
    "true shape": share(true_shape),
    "true color": share(true_color),
    "captions": len(rows),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=40)
  parser.add_argument("--sft_steps", type=int, default=200)
  parser.add_argument("--margin", type=float, default=0.3)
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/misled"))
  args = parser.parse_args()
  logging.basicConfig(
    level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
  )
  args.workdir.mkdir(parents=True, exist_ok=True)
  checkpoint = warm_start(args.workdir, args.sft_steps)
  config = load_config("configs/quickstart.py")
  with config.unlocked():
    config.policy.checkpoint = str(checkpoint)
    config.judge.margin = args.margin
    config.train.steps = args.steps
    config.data.max_train_rows, config.data.max_eval_rows = 240, 120
    config.evaluate.update(samples=1000, temperature=1.0, group_images=8)
    # without dividing by the group's std, which would undo a term's weight
    config.advantage.estimator = "rloo"
  settings = read_settings(config)
  results = {name: [] for name in REWARDS}
  with jax.set_mesh(sharding.make_mesh(settings.mesh)):
    made = set_up(settings)
    facts = {row.name: row.facts for row in made.eval_rows}
    evaluator = Evaluator(made)

    def evaluate(params, name: str) -> dict:
      path = args.workdir / "samples" / f"{re.sub('[^a-z0-9]+', '_', name)}.json"
      figures = evaluator(params, path, name, 0)
      figures = {
        **{k: figures[k] for k in ("accuracy", "misled", "abstained")},
        **statements(path, facts),
      }
      log.info("%s: %s", name, {k: round(v, 3) for k, v in figures.items()})
      return figures

    before = evaluate(made.policy.params, "before")
    tx, schedule = make_optimizer(settings)
    steps = {}
    for seed in range(args.seeds):
      for name, weights in REWARDS.items():
        if name not in steps:
          step = dataclasses.replace(settings.step, reward=type(settings.step.reward)(**weights))
          arm = dataclasses.replace(made, settings=dataclasses.replace(settings, step=step))
          steps[name] = build_step(arm, tx, schedule)
        state = make_state(
          jax.tree.map(jnp.copy, made.policy.params), tx, policy_shardings(made), seed, made.mesh
        )
        iterator = train_iterator(
          made.train.example, len(made.train_rows), settings.data.batch_size, seed
        )
        for number in range(args.steps):
          state, metrics, _ = steps[name](state, sharding.put_batch(next(iterator), made.mesh))
          jax.block_until_ready(metrics)
          if number % 10 == 9:
            log.info(
              "%s seed %d step %d: accuracy %.3f misled %.3f",
              name,
              seed,
              number + 1,
              metrics["judge/accuracy"],
              metrics["judge/misled"],
            )
        results[name].append(evaluate(state.params, f"{name} seed {seed}"))
        report = {"before": before, "results": results, "margin": args.margin, "steps": args.steps}
        (args.workdir / "misled.json").write_text(json.dumps(report, indent=1))
  draw(before, results, args.workdir / "misled.png")
  for name, runs in results.items():
    print(
      f"{name:18}",
      ", ".join(
        f"{key} {np.mean([r[key] for r in runs]):.3f} ({min(r[key] for r in runs):.3f} to "
        f"{max(r[key] for r in runs):.3f})"
        for key in ("accuracy", "false", "true shape")
      ),
    )


def draw(before: dict, results: dict[str, list[dict]], path: pathlib.Path) -> None:
  figure = matplotlib.figure.Figure(figsize=(9, 3.2), layout="constrained")
  panels = (
    ("false", "captions with a false statement"),
    ("accuracy", "held-out accuracy"),
    ("true color", "captions with the true colour"),
  )
  for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels):
    names = ["warm start", *results]
    groups = [[before[key]], *([r[key] for r in runs] for runs in results.values())]
    axes.bar(
      range(len(names)),
      [np.mean(g) for g in groups],
      color=["#999", "#b84a00", "#0063a3"],
      alpha=0.75,
    )
    for i, group in enumerate(groups):
      axes.plot([i] * len(group), group, "ko", markersize=3)
    axes.set_xticks(
      range(len(names)), ["warm\nstart", *(n.replace(" - ", "\n- ") for n in results)]
    )
    axes.set(title=title, ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=110)


if __name__ == "__main__":
  main()
