"""What killed runs leave half done is swept; a model is in its place whenever the kill came."""

import contextlib
import os

import pytest

from caprl_jax import atomic_files
from caprl_jax.atomic_files import mend_folders, partial_folder, replace_folder, whole_file
from caprl_jax.harness.process.leftovers import sweep
from caprl_jax.harness.process.workdir_lock import only_run


class Killed(BaseException):
  """Nothing catches it, as nothing catches a kill."""


def model(path, text):
  path.mkdir(parents=True)
  (path / "config.json").write_text(text)
  return path


def content(path):
  return (path / "config.json").read_text()


def test_unfinished_checkpoints_models_and_files_are_swept(tmp_path):
  kept = [
    model(tmp_path / "policy", "whole"),
    model(tmp_path / "checkpoints" / "5", "whole"),
    model(tmp_path / "checkpoints" / "damaged" / "7", "kept"),
    model(tmp_path / "policy" / ".cache.partial-1", "somebody else's"),
  ]
  gone = [
    model(tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp", "half"),
    model(tmp_path / "training" / "align" / "checkpoints" / "2.orbax-checkpoint-tmp-12", "half"),
    model(tmp_path / ".policy.partial-17", "half"),
    model(tmp_path / ".policy.replaced-16", "old"),
    model(tmp_path / "training" / ".align.partial-4", "half"),
  ]
  files = [tmp_path / ".summary.json.12.tmp", tmp_path / "samples" / "images" / ".a.png.9.tmp"]
  others = [tmp_path / ".lock", tmp_path / ".env.tmp", tmp_path / "a.1.tmp"]
  for path in [*files, *others]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
  sweep(tmp_path)
  assert all(path.exists() for path in [*kept, *others])
  assert not any(path.exists() for path in [*gone, *files])


def test_whoever_has_the_workdir_sweeps_it(tmp_path):
  model(tmp_path / ".policy.partial-17", "half")
  with only_run(tmp_path):
    assert not (tmp_path / ".policy.partial-17").exists()
    model(tmp_path / ".policy.partial-18", "half")  # this run's own
    with pytest.raises(ValueError, match="in use"), only_run(tmp_path):
      raise AssertionError
    assert (tmp_path / ".policy.partial-18").exists()


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("moment", range(5))
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, monkeypatch, exchanges, moment):
  """Killed before the call of the operating system with that number."""
  path = model(tmp_path / "policy", "old")
  calls = [0]

  def counted(function):
    def call(*args, **more):
      calls[0] += 1
      if calls[0] > moment:
        raise Killed
      return function(*args, **more)

    return call

  with monkeypatch.context() as patched:
    if not exchanges:
      patched.setattr(atomic_files, "_exchange", lambda one, other: False)
    new = partial_folder(path)
    (new / "config.json").write_text("new")
    patched.setattr(atomic_files, "_exchange", counted(atomic_files._exchange))
    patched.setattr(atomic_files.pathlib.Path, "rename", counted(atomic_files.pathlib.Path.rename))
    patched.setattr(atomic_files.shutil, "rmtree", counted(atomic_files.shutil.rmtree))
    with contextlib.suppress(Killed):
      replace_folder(path, new)
  if exchanges and moment == 1:  # there is no moment without a model
    assert content(path) == "new" and content(new) == "old"
  mend_folders(tmp_path)
  assert content(path) == ("old" if moment == 0 or (moment == 1 and not exchanges) else "new")
  assert os.listdir(tmp_path) == ["policy"]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / "rows" / "a.jsonl"
  with whole_file(path) as partial:
    partial.write_text("old")
  with pytest.raises(KeyError), whole_file(path) as partial:
    partial.write_text("half of the ne")
    raise KeyError
  assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
