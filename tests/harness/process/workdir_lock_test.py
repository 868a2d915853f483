"""One run has a workdir at a time; the lock of one that was killed is none."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from helpers.paths import ROOT

from caprl_jax.harness.process.workdir_lock import LOCK, only_run

HOLDER = """
import pathlib, sys, time
from caprl_jax.harness.process.workdir_lock import only_run
with only_run(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
  with only_run(tmp_path):
    message = f"is in use by process {os.getpid()} on .*, since 20.*use another --workdir"
    with pytest.raises(ValueError, match=message):
      with only_run(tmp_path):
        pass
  with only_run(tmp_path):  # again, and after an error
    pass
  with pytest.raises(KeyError):
    with only_run(tmp_path):
      raise KeyError
  with only_run(tmp_path):
    pass


def test_the_lock_of_a_run_that_was_killed_is_none(tmp_path):
  command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as holder:
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"in use by process {holder.pid} on"):
      with only_run(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
  assert (tmp_path / LOCK).read_text()  # what it wrote is still there
  with only_run(tmp_path):
    pass
