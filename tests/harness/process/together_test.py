"""Two real processes end after the same step, with one message and one code, whatever ends one."""

import json
import time

import numpy as np
import pytest
from helpers.launching.fake_mode import FAKE_MODE, PROGRAM
from helpers.processes import CONFIG, start, wait

from caprl_jax.harness.buckets.shared import saved_steps
from caprl_jax.harness.metrics import read_metrics

STEPS = 8


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
  """Starts `fake` in a workdir of that name, with an event."""
  folder = tmp_path_factory.mktemp("fake")
  (folder / "fake_mode.py").write_text(FAKE_MODE)
  (folder / "config.py").write_text(
    CONFIG.format(text=json.dumps(dict(mode="fake", train=dict(steps=STEPS))))
  )

  def begin(name, processes, event="::"):
    workdir = folder / name
    started = start(
      folder, workdir, processes, 4 // processes, program=("-c", PROGRAM), FAKE_EVENT=event
    )
    return started, workdir

  return begin


@pytest.mark.usefixtures("interruptible")
def test_two_processes_end_together_and_go_on_whatever_ends_one(begin):
  """One workdir, taken up again after each end; at last it holds the run of one process that
  nothing stopped. The state is split over both processes."""
  said = wait(*begin("cut", 2, "1:4:error"), 2)
  assert all("row 7 has no image" in text for text in said)
  assert "error: process 1 (" in said[0] and "Traceback" not in said[0] + said[1]
  started, workdir = begin("cut", 2, "1:4:SIGTERM")  # before the first step of a resumed run
  said = wait(started, workdir, 75)
  assert all("stopped by SIGTERM; run the same command again" in text for text in said)
  assert saved_steps(workdir) == [3]
  said = wait(*begin("cut", 2, "1:evaluation 5:SIGINT"), 130)  # the next start makes it again
  assert all("run the same command to go on" in text for text in said)
  assert saved_steps(workdir) == [3, 5]
  assert "eval/sum" not in read_metrics(workdir / "metrics.jsonl")[-1]

  started, _ = begin("cut", 2, "1:7:SIGKILL")
  started[1].wait(100)
  killed = time.monotonic()
  said = wait(started, workdir, 75, -9)
  assert time.monotonic() - killed < 36  # 60, with jax's heartbeat of 30 seconds
  assert "process 1 (" in said[0] and f"pid {started[1].pid}) is dead, or" in said[0]
  assert "run the same command again, it goes on" in said[0]

  said = wait(*begin("cut", 2, "0:7:SIGKILL"), -9, 75)  # the one that has the store
  assert "error: process 0 (at localhost:" in said[1] and ") is dead, or" in said[1]

  wait(*begin("cut", 2, f"0:after {STEPS}:SIGTERM"), 75)  # when no step is left to stop before
  assert saved_steps(workdir) == [5, STEPS]
  started, whole = begin("whole", 1)
  wait(started, whole)
  rows, wanted = (read_metrics(place / "metrics.jsonl") for place in (workdir, whole))
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  for row, want in zip(rows, wanted, strict=True):
    for name in ("loss", "first"):
      np.testing.assert_allclose(row[name], want[name], rtol=1e-5)
  figures = [[row.get("eval/sum") for row in found] for found in (rows, wanted)]
  assert [n for n, figure in enumerate(figures[0], 1) if figure is not None] == [5]
  np.testing.assert_allclose(figures[0][4], figures[1][4], rtol=1e-5)
  said = (workdir / "log.txt").read_text()
  assert said.count("step 5 was saved before its evaluation had ended") == 1


def test_a_checkpoint_that_one_cannot_write_ends_both(begin):
  """Orbax alone would let both wait for one another for twenty minutes."""
  started, workdir = begin("full", 2, "0:3:full")
  said = wait(started, workdir, 74, secs=60)
  assert all("No space left on device" in text for text in said)
  assert saved_steps(workdir) == []
