"""Compiling in a process of its own: it ends with the one that asked, and its errors come back."""

import os
import signal
import sys
import threading
import time

import pytest

from caprl_jax.harness.process import signals
from caprl_jax.modes.plan import compiling

WAITS = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"


@pytest.mark.parametrize("number, error", [(signal.SIGTERM, signals.Preempted)])
def test_a_signal_ends_it_at_once(tmp_path, number, error):
  told = tmp_path / "pid"

  def interrupt():
    while not (told.exists() and told.read_text()):
      time.sleep(0.02)
    os.kill(os.getpid(), number)

  threading.Thread(target=interrupt).start()
  begun = time.monotonic()
  with signals.notices(), pytest.raises(error):
    compiling.run_apart([sys.executable, "-S", "-c", WAITS, str(told)], "{}")
  assert time.monotonic() - begun < 20
  with pytest.raises(ProcessLookupError):  # it is gone, and was waited for
    os.kill(int(told.read_text()), 0)


def test_its_input_ends_with_the_process_that_asked():
  reads = "import sys; line = sys.stdin.readline(); sys.exit(7 if line == 'one\\n' else 8)"
  assert compiling.run_apart([sys.executable, "-S", "-c", reads], "one") == 7


def test_the_thread_that_waits_for_the_parent_does_not_end_it_badly():
  child = """
import sys, threading, time
from caprl_jax.modes.plan import compiling
sys.stdin.buffer.readline()
threading.Thread(target=compiling._end_with_parent, daemon=True).start()
time.sleep(0.3)
sys.exit(7)
"""
  assert compiling.run_apart([sys.executable, "-c", child], "one") == 7


def test_what_goes_wrong_there_is_said_here(monkeypatch):
  def answers(text):
    def run(command, line):
      import json

      with open(json.loads(line)["answer"], "w") as file:
        file.write(text)
      return 0

    return run

  class Settings:
    def sections(self):
      return {}

  ask = lambda: compiling.compile_apart(Settings(), compiling.PlanConfig(), "v5e:1x1")
  monkeypatch.setattr(compiling, "run_apart", answers('{"wrong": "no libtpu"}'))
  with pytest.raises(ValueError, match="no libtpu"):
    ask()
  monkeypatch.setattr(compiling, "run_apart", answers('{"error": "RESOURCE_EXHAUSTED: HBM"}'))
  with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
    ask()
  monkeypatch.setattr(compiling, "run_apart", lambda command, line: -9)
  with pytest.raises(MemoryError, match="was killed"):
    ask()
