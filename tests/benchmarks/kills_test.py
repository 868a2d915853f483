"""Runs of each mode that are killed end as one that nobody killed.

More kills, with other seeds: python benchmarks/kills.py --kills 20 --seed 1
"""

import json
import subprocess
import sys

import pytest
from helpers.paths import ROOT


@pytest.mark.slow
def test_killed_runs_end_as_whole_ones(tmp_path):
  """In a process of its own: it forks, which one with running threads must not."""
  program = [sys.executable, str(ROOT / "benchmarks" / "kills.py")]
  options = ["--kills=3", f"--json={tmp_path / 'kills.json'}", f"--workdir={tmp_path / 'runs'}"]
  done = subprocess.run([*program, *options], capture_output=True, text=True, timeout=450)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  rows = json.loads((tmp_path / "kills.json").read_text())
  assert {row["mode"] for row in rows} == {"train", "sft", "pretrain", "prism", "curate"}
  assert all(row["kills"] == 3 and row["starts"] >= 4 and not row["differences"] for row in rows)
  assert all(row["keys"] > 4 for row in rows)
