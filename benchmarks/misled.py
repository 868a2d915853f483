"""What accuracy cannot tell apart, silence and falsehood, and what the reward term `misled` does
about it.

  python benchmarks/misled.py [--data easy_vqa] [--weights 0,2] [--seeds 3] [--steps 40]
  python benchmarks/misled.py --data charts --weights 0,0.5,1,2 --workdir runs/misled_charts

The warm start hallucinates on purpose. On easy_vqa it was never taught the word for circles. Of
them it says "shape", or now and then "triangle" or "rectangle"; of the others it names the shape
more often than not. For a circle no caption that it can write answers the question about its shape,
so accuracy is 0 whether it says something false or nothing, while on the other images naming a
shape pays. On charts it was taught to read for a short time only, so that much of what it reads is
wrong, and then to say little (configs/charts_sft.py with other steps). Each weight of `misled`
trains it with the same seeds, data and judge; then sampled captions of held-out images are compared
with the facts. Writes misled.json, misled.png and misled_curve.png: facts told against false
statements, and right against wrong answers, one line over the weights.
"""

import argparse
import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import matplotlib.figure
import ml_collections
import numpy as np

from caprl_jax import atomic_files, sharding
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
from caprl_jax.scoring.captions.facts import KnownFacts
from caprl_jax.scoring.captions.words import words_of

UNKNOWN = "circle"  # the shape that the warm start has no true word for
CHARTS = "charts:{split}:{count}:96x72"
# how often the warm start names a shape: of circles, of the others
NAMED = {True: 0.15, False: 0.6}
log = logging.getLogger("misled")


def rewards(weights: Sequence[float]) -> dict[str, dict[str, float]]:
  """Name of each arm -> its reward."""
  name = lambda weight: f"accuracy - {weight:g} misled" if weight else "accuracy"
  return {name(weight): dict(accuracy=1.0, misled=weight) for weight in weights}


def warm_start_charts(workdir: pathlib.Path, steps: int) -> pathlib.Path:
  """A captioner that reads charts badly, and mostly does not say what it read."""
  output = workdir / "warm_start"
  if (output / "config.json").exists():
    return output
  config = load_config("configs/charts_sft.py")
  with config.unlocked():
    config.sft.train = CHARTS.format(split="train", count=4000)
    config.sft.eval, config.sft.output = CHARTS.format(split="test", count=100), str(output)
    seeing, saying = (dict(phase) for phase in config.sft.phases)
    config.sft.phases = (seeing | dict(steps=steps), saying | dict(steps=steps // 4))
  sft.run(config, workdir / "sft")
  return output


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


def told(samples: pathlib.Path, facts: dict[str, dict], known: KnownFacts) -> dict[str, float]:
  """Of held-out captions: the share of the known facts that they tell, the share of captions with a
  false statement, and their words."""
  rows = json.loads(samples.read_text())["rows"]
  texts = {row["name"]: row["captions"][0]["text"] for row in rows if facts.get(row["name"])}
  found = [one for name, text in texts.items() if (one := known.told(text, facts[name]))]
  return {
    "told": float(np.mean([one.share for one in found])),
    "false": float(np.mean([one.false > 0 for one in found])),
    "words": float(np.mean([len(words_of(text)) for text in texts.values()])),
    "captions": len(found),
  }


def statements(samples: pathlib.Path, facts: dict[str, dict]) -> dict[str, float]:
  """Of held-out captions of easy-VQA: the share with a false shape or colour, and with a true shape
  and colour each.
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


def training_config(data: str, checkpoint: pathlib.Path, margin: float, steps: int):
  """The config that all arms share but for their reward."""
  config = load_config("configs/charts.py" if data == "charts" else "configs/quickstart.py")
  with config.unlocked():
    config.policy.checkpoint = str(checkpoint)
    config.judge.margin = margin
    config.train.steps = steps
    if data == "charts":
      config.data.train = CHARTS.format(split="train", count=400)
      config.data.eval = CHARTS.format(split="test", count=300)
    config.data.max_train_rows, config.data.max_eval_rows = 240, 120
    config.evaluate.update(samples=1000, temperature=1.0, group_images=0)
    # without dividing by the group's std, which would undo a term's weight
    config.advantage.estimator = "rloo"
  return config


class Experiment:
  """One warm start, one data set and one judge; `evaluate` and `train` an arm."""

  def __init__(self, config, data: str, workdir: pathlib.Path):
    self.settings, self.data, self.workdir = read_settings(config), data, workdir
    self.made = set_up(self.settings)
    self.facts = {row.name: row.facts for row in self.made.eval_rows}
    self.known = KnownFacts(facts for facts in self.facts.values() if facts)
    self.evaluator = Evaluator(self.made)
    self.tx, self.schedule = make_optimizer(self.settings)
    self.steps: dict[str, Callable] = {}

  def evaluate(self, params, name: str) -> dict[str, float]:
    """The judge's figures on held-out captions, and what these tell and say falsely."""
    path = self.workdir / "samples" / f"{re.sub('[^a-z0-9.]+', '_', name)}.json"
    figures = self.evaluator(params, path, name, 0)
    figures = {key: figures[key] for key in ("accuracy", "misled", "abstained")}
    figures |= told(path, self.facts, self.known)
    if self.data == "easy_vqa":
      figures |= statements(path, self.facts)
    log.info("%s: %s", name, {key: round(value, 3) for key, value in figures.items()})
    return figures

  def train(self, name: str, weights: dict[str, float], seed: int) -> dict[str, float]:
    """Trains an arm with one seed, and evaluates it."""
    settings, made = self.settings, self.made
    if name not in self.steps:
      step = dataclasses.replace(settings.step, reward=type(settings.step.reward)(**weights))
      arm = dataclasses.replace(made, settings=dataclasses.replace(settings, step=step))
      self.steps[name] = build_step(arm, self.tx, self.schedule)
    params = jax.tree.map(jnp.copy, made.policy.params)
    state = make_state(params, self.tx, policy_shardings(made), seed, made.mesh)
    rows, size = len(made.train_rows), settings.data.batch_size
    iterator = train_iterator(made.train.example, rows, size, seed)
    for number in range(settings.train.steps):
      batch = sharding.put_batch(next(iterator), made.mesh)
      state, metrics, _ = self.steps[name](state, batch)
      jax.block_until_ready(metrics)
      if number % 10 == 9:
        shown = (metrics[key] for key in ("judge/accuracy", "judge/misled"))
        log.info("%s seed %d step %d: accuracy %.3f misled %.3f", name, seed, number + 1, *shown)
    return self.evaluate(state.params, f"{name} seed {seed}")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", choices=("easy_vqa", "charts"), default="easy_vqa")
  parser.add_argument("--weights", default="0,2", help="of misled, joined by commas")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=40)
  parser.add_argument("--sft_steps", type=int, default=200)
  parser.add_argument("--margin", type=float, default=0.3)
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/misled"))
  args = parser.parse_args()
  logging.basicConfig(
    level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
  )
  args.workdir = args.workdir.resolve()
  args.workdir.mkdir(parents=True, exist_ok=True)
  begin = warm_start_charts if args.data == "charts" else warm_start
  checkpoint = begin(args.workdir, args.sft_steps)
  config = training_config(args.data, checkpoint, args.margin, args.steps)
  arms = rewards([float(weight) for weight in args.weights.split(",")])
  results: dict[str, list] = {name: [] for name in arms}
  about = {"data": args.data, "margin": args.margin, "steps": args.steps}
  about |= {"sft_steps": args.sft_steps}
  written = args.workdir / "misled.json"
  if written.exists():
    earlier = json.loads(written.read_text())
    if any(earlier.get(key) != value for key, value in about.items()):
      parser.error(f"{written} is of other settings; name another --workdir")
    results |= earlier["results"]  # goes on where it was cut
  with jax.set_mesh(sharding.make_mesh(read_settings(config).mesh)):
    experiment = Experiment(config, args.data, args.workdir)
    before = experiment.evaluate(experiment.made.policy.params, "before")
    for seed in range(args.seeds):
      for name, weights in arms.items():
        if seed < len(results[name]):
          continue
        results[name].append(experiment.train(name, weights, seed))
        report = {**about, "before": before, "results": results}
        atomic_files.write_text(written, json.dumps(report, indent=1))
  if args.data == "easy_vqa":
    draw(before, results, args.workdir / "misled.png")
  draw_curve(before, results, args.workdir / "misled_curve.png")
  for name, runs in results.items():
    print(
      f"{name:20}",
      ", ".join(
        f"{key} {np.mean([r[key] for r in runs]):.3f} ({min(r[key] for r in runs):.3f} to "
        f"{max(r[key] for r in runs):.3f})"
        for key in ("accuracy", "misled", "told", "false", "words")
      ),
    )


def draw_curve(before: dict, results: dict[str, list[dict]], path: pathlib.Path) -> None:
  """Both axes: what is told over what is said falsely, one line through the means of the weights,
  the warm start beside it, and each seed as a dot."""
  figure = matplotlib.figure.Figure(figsize=(9, 3.8), layout="constrained")
  for axes, (x, y, x_label, y_label) in zip(
    figure.subplots(1, 2),
    (
      ("false", "told", "captions with a false statement", "known facts told"),
      ("misled", "accuracy", "questions answered wrong", "questions answered right"),
    ),
  ):
    means = [
      [float(np.mean([run[key] for run in runs])) for key in (x, y)] for runs in results.values()
    ]
    axes.plot(*zip(*means), color="#777", linewidth=1, zorder=1)
    for i, (name, runs) in enumerate(results.items()):
      axes.scatter([r[x] for r in runs], [r[y] for r in runs], s=14, color=f"C{i}", alpha=0.6)
      axes.scatter(*means[i], s=60, color=f"C{i}", label=name, zorder=2)
    axes.scatter(before[x], before[y], s=60, color="#999", marker="s", label="warm start")
    axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, 1))
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=110)


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
      color=["#999", "#b84a00", "#0063a3", "#007a58", "#a8447f"][: len(names)],
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
