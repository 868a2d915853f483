"""What benchmarks/soak.py calls flat, and what it says grows."""

import importlib.util

import numpy as np
from helpers.paths import ROOT

spec = importlib.util.spec_from_file_location("soak", ROOT / "benchmarks" / "soak.py")
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


def rows(steps=1000, **added):
  """Warm-up, then levels with noise; `added` grows by so much from the first step to the last."""
  rng, part = np.random.default_rng(0), np.linspace(0, 1, steps)
  names = [quantity.name.replace(" ", "_") for quantity in soak.QUANTITIES]
  levels = dict(zip(names, (900, 5, 30, 40, 70, 20), strict=True))
  found = []
  for name, level in levels.items():
    noise = rng.normal(0, 0.05 * level, steps) if name == "step_time" else np.zeros(steps)
    warming = np.where(part < 0.1, 0.5, 1.0)
    found.append(level * warming + noise + added.get(name, 0) * part)
  return np.stack(found, 1)


def growing(made):
  return [row["quantity"] for row in soak.judge(made) if not row["flat"]]


def test_warm_up_and_noise_are_no_growth():
  assert growing(rows()) == [] == growing(rows(100)) == growing(rows(host_memory=5.0))


def test_each_quantity_that_grows_is_named():
  for quantity, much in {
    "host memory": 40.0,
    "device arrays": 1.0,
    "threads": 4.0,
    "open files": 4.0,
    "compilations": 3.0,
    "step time": 10.0,
  }.items():
    assert growing(rows(**{quantity.replace(" ", "_"): much})) == [quantity]
  (slope,) = [r["per_1000_steps"] for r in soak.judge(rows(2000, threads=8)) if r["flat"] is False]
  assert 3.5 < slope < 4.5
  assert "GROWS" in soak.table(soak.judge(rows(threads=8))) and "GROWS" not in soak.table(
    soak.judge(rows())
  )
