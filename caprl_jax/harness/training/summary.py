"""What a run found and kept: summary.json and the best captioner so far."""

import json
import logging
import pathlib
import platform
import shutil

import jax
import optax

from caprl_jax import __version__
from caprl_jax.atomic_files import write_json
from caprl_jax.hub.load import Loaded, save_policy
from caprl_jax.types import Params

log = logging.getLogger("caprl_jax.harness.training.summary")


def summary_path(workdir: pathlib.Path) -> pathlib.Path:
  """Where a run's summary stands."""
  return workdir / "summary.json"


class Summary:
  """summary.json: written after each stage, read when a run resumes.

  `complete` is a record of its own, `{"step": N}`. It is written last, when all that a run leaves
  is on the disk, and taken away when the run goes on.
  """

  def __init__(self, workdir: pathlib.Path):
    self.path = summary_path(workdir)
    self.values = json.loads(self.path.read_text()) if self.path.exists() else {}

  def put(self, **values) -> None:
    """Adds stages, or replaces them."""
    self.values |= values
    self._write()

  def drop(self, *names: str) -> None:
    """Takes stages away, where they are there."""
    kept = {name: value for name, value in self.values.items() if name not in names}
    if len(kept) < len(self.values):
      self.values = kept
      self._write()

  @property
  def complete_step(self) -> int:
    """The step after which the run was complete; 0 where it is not."""
    return self.values.get("complete", {}).get("step", 0)

  def _write(self) -> None:
    if jax.process_index() == 0:
      write_json(self.path, self.values)


def versions() -> dict[str, str]:
  """What the run ran on."""
  device = jax.devices()[0]
  return {
    "caprl_jax": __version__,
    "python": platform.python_version(),
    "jax": jax.__version__,
    "optax": optax.__version__,
    "device": f"{len(jax.devices())} x {device.device_kind}",
  }


class Best:
  """The best captioner so far by held-out accuracy, in workdir/best, with its figures in
  best.json.
  """

  def __init__(self, policy: Loaded, workdir: pathlib.Path):
    self.policy, self.folder = policy, workdir / "best"
    # a kill came between two renames: the newer one, if it was finished
    for name in ("best.new", "best.old"):
      if (
        not self.folder.exists()
        and (workdir / name / "best.json").exists()
        and jax.process_index() == 0
      ):
        (workdir / name).rename(self.folder)
    figures = self.folder / "best.json"
    self.accuracy = (
      json.loads(figures.read_text())["accuracy"] if figures.exists() else float("-inf")
    )

  def keep(self, step: int, params: Params, accuracy: float) -> None:
    """Writes the captioner where it is the best. A kill leaves the old one or the new one."""
    if not accuracy > self.accuracy:
      return
    self.accuracy = accuracy
    new, old = self.folder.with_name("best.new"), self.folder.with_name("best.old")
    main = jax.process_index() == 0
    if main:
      shutil.rmtree(new, ignore_errors=True)
    save_policy(new, self.policy, params)
    if main:
      write_json(new / "best.json", {"step": step, "accuracy": accuracy})
      shutil.rmtree(old, ignore_errors=True)
      if self.folder.exists():
        self.folder.rename(old)
      new.rename(self.folder)
      shutil.rmtree(old, ignore_errors=True)
      log.info(
        "best so far: step %d, held-out accuracy %.3f, kept in %s", step, accuracy, self.folder
      )
