"""A workdir -> the same without what runs that were killed left half done in it."""

import logging
import os
import pathlib
import shutil
from collections.abc import Iterator

from caprl_jax.atomic_files import mend_folders

log = logging.getLogger("caprl_jax.harness.process.leftovers")

CHECKPOINTS = "checkpoints"
ORBAX_PARTIAL = ".orbax-checkpoint-tmp"
DEPTH = 2  # of folders in a workdir in which runs write: training/<stage>


def sweep(workdir: pathlib.Path) -> None:
  """Takes away unfinished checkpoints, models and files, and puts a model in its place where a kill
  came between two renames. Nobody else may be writing there: call it under the workdir's lock."""
  found = []
  for folder in _folders(workdir):
    if folder.name == CHECKPOINTS:
      partial = [path for path in folder.iterdir() if ORBAX_PARTIAL in path.name]
      for path in partial:
        shutil.rmtree(path, ignore_errors=True)
      found += [f"{CHECKPOINTS}/{path.name}" for path in partial]
    else:
      found += mend_folders(folder)
  if found:
    log.info("swept what a run that was killed left unfinished: %s", ", ".join(found))


def _folders(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
  """The workdir and the folders in it that runs write to themselves, checkpoints among them."""
  for name, inner, _ in os.walk(workdir):
    folder = pathlib.Path(name)
    is_model = (folder / "config.json").exists()
    if not is_model:
      yield folder
    deep = len(folder.relative_to(workdir).parts) > DEPTH
    if deep or is_model or folder.name == CHECKPOINTS:
      inner.clear()
    inner[:] = [one for one in inner if not one.startswith(".")]
