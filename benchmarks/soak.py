"""Thousands of tiny training steps: does anything grow?

  python benchmarks/soak.py [--steps 2000] [--plot soak.png] [--json soak.json]

Mode `train` on tiny models, with checkpoints, held-out evaluations and samples on the way. After
each step: memory of the process, bytes of arrays on the devices, threads, open files, compilations,
seconds of the step. The first fifth is warm-up; then the medians of the second and the last fifth
are compared, and the difference is given per 1,000 steps. Prints a table; the exit code is 1 where
something grows by more than it may.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  after the platform is chosen
import matplotlib.figure  # noqa: E402

MB = 1e6


@dataclasses.dataclass(frozen=True)
class Quantity:
  """unit: of a value. most: growth per 1,000 steps that is none, in this unit. slack: growth over
  the whole run that is none, however short it is. share: the same as a share of the value, for
  seconds, which a busy machine moves."""

  name: str
  unit: str
  most: float
  slack: float = 0.0
  share: float = 0.0


QUANTITIES = (
  Quantity("host memory", "MB", most=15.0, slack=20.0),
  Quantity("device arrays", "MB", most=0.1, slack=0.1),
  Quantity("threads", "", most=0.5, slack=2.0),
  Quantity("open files", "", most=0.5, slack=2.0),
  Quantity("compilations", "", most=0.0),
  Quantity("step time", "ms", most=1.0, share=0.2),
)


class Probe:
  """A tracker that notes what the process has after each step."""

  def __init__(self, compiles):
    self.compiles = compiles
    self.rows: list[list[float]] = []

  def write(self, step: int, numbers: dict[str, float]) -> None:
    del step
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    self.rows.append(
      [
        pages * os.sysconf("SC_PAGE_SIZE") / MB,
        sum(array.nbytes for array in jax.live_arrays()) / MB,
        len(os.listdir("/proc/self/task")),
        len(os.listdir("/proc/self/fd")),
        self.compiles.count,
        numbers["time/step_secs"] * 1e3,
      ]
    )

  def samples(self, step: int, path: pathlib.Path) -> None:
    pass

  def close(self) -> None:
    pass


def growth(values: np.ndarray) -> tuple[float, float, int]:
  """From the median of the second fifth to that of the last one; the former; the steps between."""
  fifth = len(values) // 5
  before, after = np.median(values[fifth : 2 * fifth]), np.median(values[-fifth:])
  return float(after - before), float(before), 3 * fifth + len(values) % 5


def judge(rows: np.ndarray) -> list[dict]:
  """Of each quantity how it grows, and whether that is none."""
  found = []
  for quantity, values in zip(QUANTITIES, rows.T, strict=True):
    change, level, steps = growth(values)
    most = max(quantity.most * steps / 1000, quantity.slack, quantity.share * level)
    ends = {"first": float(values[0]), "last": float(values[-1])}
    found.append(
      {
        "quantity": quantity.name,
        "unit": quantity.unit,
        "level": level,
        "per_1000_steps": change / steps * 1000,
        "flat": bool(change <= most),
        **ends,
      }
    )
  return found


def table(found: list[dict]) -> str:
  """As Markdown."""
  lines = ["| | after warm-up | per 1,000 steps | |", "|---|---|---|---|"]
  for row in found:
    verdict = "flat" if row["flat"] else "GROWS"
    level, slope = (f"{row[key]:,.2f}" for key in ("level", "per_1000_steps"))
    lines.append(f"| {row['quantity']} {row['unit']} | {level} | {slope} | {verdict} |")
  return "\n".join(lines)


def plot(rows: np.ndarray, path: pathlib.Path) -> None:
  figure = matplotlib.figure.Figure(figsize=(9, 5), layout="constrained")
  for axis, quantity, values in zip(figure.subplots(2, 3).flat, QUANTITIES, rows.T, strict=True):
    axis.plot(np.arange(1, len(values) + 1), values, linewidth=0.8)
    axis.set_title(f"{quantity.name} {quantity.unit}".strip(), fontsize=9)
    axis.set_ylim(0, 1.2 * float(np.quantile(values, 0.99)) + 1e-9)
    axis.set_xlabel("step", fontsize=8)
  figure.savefig(path, dpi=120)


def train(folder: pathlib.Path, steps: int) -> np.ndarray:
  """The run: what was noted after each step, [steps, quantities]."""
  from helpers import tiny

  from caprl_jax.harness.loop import CompileCounter
  from caprl_jax.modes.train import run

  config = tiny.write_all(folder)
  config.train = dict(steps=steps, sample_every=20)
  config.evaluate = dict(batch_size=8, group_images=0, every_steps=max(steps // 40, 1))
  config.checkpoint.every_steps = max(steps // 80, 1)
  with CompileCounter() as compiles:
    probe = Probe(compiles)
    run._open_trackers = lambda *_: [probe]  # the loop tells it of every step
    run.run(config, folder / "run")
  return np.array(probe.rows)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--steps", type=int, default=2000)
  parser.add_argument("--plot", type=pathlib.Path, help="a PNG")
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  if args.steps < 50:
    parser.error("--steps must be at least 50")
  with tempfile.TemporaryDirectory(prefix="caprl_jax_soak_") as folder:
    rows = train(pathlib.Path(folder), args.steps)
  found = judge(rows)
  print(f"{len(rows)} steps\n\n{table(found)}")
  if args.plot:
    plot(rows, args.plot)
  if args.json:
    args.json.write_text(json.dumps({"steps": len(rows), "found": found}, indent=1) + "\n")
  return int(not all(row["flat"] for row in found))


if __name__ == "__main__":
  sys.exit(main())
