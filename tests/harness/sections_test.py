"""The sections that all modes share stand alone."""

import subprocess
import sys

# What only training and its evaluation work with.
HEAVY = ("setup", "settings", "gate", "question_filter", "trackers", "loop", "metrics")


def test_who_reads_a_section_does_not_load_what_trains():
  code = (
    "import sys; import caprl_jax.harness.sections; print([name for name in sys.modules "
    "if name.startswith('caprl_jax.')])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert "caprl_jax.harness.sections" in done.stdout
  for name in [f"caprl_jax.harness.{name}" for name in HEAVY] + ["caprl_jax.rl.update"]:
    assert repr(name) not in done.stdout, name
