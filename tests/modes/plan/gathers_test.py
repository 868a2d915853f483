"""Where weights are gathered in the program that a TPU slice runs: before captions are written and
judged, not for each token of them. Looked up in what libtpu compiled; no TPU is needed."""

import os
import re
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from modes.plan.run_test import HAS_LIBTPU, LIBTPU, LITTLE_EFFORT

# CapRL-3B's widths at two layers, on four chips: two parts of the batch, two of each matrix.
PROGRAM = """
import jax
from caprl_jax.config.loading import load_config
from caprl_jax.harness.settings import read_settings
from caprl_jax.modes.plan import compiling
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.rl.step import ask_judge, write_captions

def before_the_update(state, frozen, batch, *, policy, judge, cfg, **places):
  captions = write_captions(state, frozen, batch, policy, cfg, places["rollout_shardings"])
  answers = ask_judge(state, frozen, batch, captions, judge, cfg, places["judge_shardings"])
  return state, answers, captions

jax.config.update("jax_platforms", "cpu")
compiling.train_step = before_the_update
config = load_config("configs/caprl_3b_v5e16.py").unlock()
config.data.update(batch_size=4, questions=1)
config.rollout.update(group_size=2, sampling=dict(max_tokens=8))
config.policy_update.microbatches = config.judge.microbatches = 1
config.mesh = dict(data=1, fsdp=2, tensor=2)
small = dict(image=(56, 84), prompt_tokens=16, judge_prompt_tokens=16, stem_tokens=8, layers=2)
devices = compiling.topology_devices("v5e:2x2")
lowered, _ = compiling.lower_step(read_settings(config), PlanConfig(**small), devices)
print(lowered.as_text(), "COMPILED", lowered.compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="pip install libtpu")
def test_weights_are_gathered_before_the_loops():
  """By where in the source each gather comes from. Without the two shardings a hundred of them are
  of the loops' products."""
  path = os.pathsep.join(filter(None, [LIBTPU, str(ROOT), os.environ.get("PYTHONPATH")]))
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": path} | LITTLE_EFFORT,
    capture_output=True,
    text=True,
    timeout=1100,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  lowered, compiled = done.stdout.split("COMPILED")
  found = re.findall(r'= [^=]*all-gather(?:-start)?\(.*op_name="([^"]*)"', compiled)
  assert len([name for name in found if "while" not in name]) > 10  # they are split, then
  assert not [name for name in found if "while" in name and name.endswith("dot_general")]

  # The judge's wait for the captions: what writes them needs the memory. A compiler that did as it
  # likes would take them first, with more effort than it has here.
  [(name, given)] = re.findall(r"(%\w+):\d+ = stablehlo.optimization_barrier (.*?) :", lowered)
  given = given.split(", ")
  waiting = [value for value in given if value.startswith("%arg")]
  assert len(waiting) > 10 and len(given) > len(waiting)  # the judge's weights; the captions
  constrained = re.findall(r"sdy.sharding_constraint (\S+) ", lowered)
  assert all(f"{name}#{n}" in constrained for n in range(len(waiting)))
  assert not set(waiting) & set(constrained)
