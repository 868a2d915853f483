"""One run has a workdir at a time; the lock of one that was killed is none."""

import importlib
import os
import signal
import subprocess
import sys
import textwrap

import ml_collections
import pytest
from helpers.paths import ROOT

from caprl_jax.config import registry
from caprl_jax.harness.process import workdir_lock
from caprl_jax.harness.process.workdir_lock import LOCK, only_run, only_writer

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


def test_an_output_has_one_writer_and_others_may_write_beside_it(tmp_path):
  page, figures = tmp_path / "out" / "page.html", tmp_path / "figures.json"
  with only_run(tmp_path), only_writer(page, figures):
    for again in (page, figures):
      message = f"{again.name} is in use by process {os.getpid()} on .*name another output"
      with pytest.raises(ValueError, match=message), only_writer(tmp_path / "other", again):
        pass
    with only_writer(tmp_path / "other"):
      pass
  with only_writer(page, page):
    assert [path.name for path in page.parent.iterdir()] == [f".page.html{LOCK}"]
  assert not [*page.parent.iterdir()], "no lock stays beside an output"


def test_a_lock_that_goes_is_no_lock(tmp_path, monkeypatch):
  """Its holder ends, and takes the file away, between our opening and our locking it."""
  path, taken = tmp_path / f".a{LOCK}", []
  lock = workdir_lock.fcntl.flock

  def flock(file, how):
    if not taken:
      taken.append(path.unlink())
    lock(file, how)

  monkeypatch.setattr(workdir_lock.fcntl, "flock", flock)
  with only_writer(tmp_path / "a"):
    assert taken and path.exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="in use by process"), only_writer(tmp_path / "a"):
      pass


@pytest.mark.parametrize(
  "mode, output",
  [
    ("evaluate", "evaluation.json"),
    ("calibrate", "calibration.json"),
    ("gallery", "gallery.json"),
    ("gallery", "page.html"),
    ("dataset", "dataset.json"),
    ("dataset", "rows.jsonl"),
    ("export", "exported"),
  ],
)
def test_a_mode_is_refused_what_another_run_writes(mode, output, tmp_path):
  """Before it reads anything: what the config names is not there."""
  config = ml_collections.ConfigDict(
    dict(
      policy=dict(checkpoint="none"),
      judge=dict(source="none"),
      data=dict(train="none", eval="none", batch_size=8, questions=2),
      rollout=dict(group_size=4, sampling=dict(max_tokens=6)),
      train=dict(steps=4),
      gallery=dict(captions="a=none.jsonl", output=str(tmp_path / "page.html")),
      dataset=dict(input="none", output=str(tmp_path / "rows.jsonl")),
      export=dict(output=str(tmp_path / "exported")),
    )
  )
  module = importlib.import_module(registry.MODES[mode].module)
  with only_writer(tmp_path / output):
    with pytest.raises(ValueError, match=f"{output} is in use by process {os.getpid()} on"):
      module.run(config, tmp_path)
  with pytest.raises((ValueError, OSError), match="none"):
    module.run(config, tmp_path)
