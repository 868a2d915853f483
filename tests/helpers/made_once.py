"""Folders that many tests need and none changes in place: made once, then copied."""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable


def made_once(name: str, make: Callable[[pathlib.Path], object], path: pathlib.Path) -> None:
  """Copies to `path` the folder that `make` fills.

  It is filled once for all tests, workers and processes that tests start, in the place that
  tests/conftest.py names; each time where none is named.
  """
  place = os.environ.get("CAPRL_JAX_TEST_CHECKPOINTS")
  if not place:
    path.mkdir(parents=True, exist_ok=True)
    make(path)
    return
  whole = pathlib.Path(place) / name
  if not whole.exists():
    new = pathlib.Path(tempfile.mkdtemp(dir=place))
    make(new)
    try:
      new.rename(whole)
    except OSError:  # another worker was first
      shutil.rmtree(new)
  shutil.copytree(whole, path, dirs_exist_ok=True)
