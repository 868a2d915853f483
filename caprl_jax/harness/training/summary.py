"""What a run found and kept: summary.json and the best captioner so far."""

import logging
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax

from caprl_jax.atomic_files import write_json
from caprl_jax.harness.process.first import from_first
from caprl_jax.hub.load import Loaded, save_policy
from caprl_jax.json_files import cut, read_record, shown
from caprl_jax.types import Params

log = logging.getLogger("caprl_jax.harness.training.summary")


def summary_path(workdir: pathlib.Path) -> pathlib.Path:
  """Where a run's summary stands."""
  return workdir / "summary.json"


def read_summary(path: pathlib.Path) -> dict[str, Any]:
  """What a run's summary holds. Raises ValueError, with the path, for a file that is none."""
  values = read_record(path)
  if not isinstance(values, dict):
    raise ValueError(f"{path}: holds {shown(values)}, not an object; restore or delete the file")
  remedy = "restore the file, or delete it and start again"
  for name in ("gate", "before", "after", "wall_secs", "counts"):
    if not isinstance(values.get(name, {}), dict | None):
      raise ValueError(f"{path}: {name} is {shown(values[name])}, not an object; {remedy}")
  numbers = {
    f"{name}.{key}": value
    for name in ("wall_secs", "counts")
    for key, value in (values.get(name) or {}).items()
  }
  for name, value in numbers.items():
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise ValueError(f"{path}: {cut(name)} is {shown(value)}, not a number; {remedy}")
  return values


class Summary:
  """summary.json: written after each stage, read when a run resumes."""

  def __init__(self, workdir: pathlib.Path):
    self.path = summary_path(workdir)
    self.values = from_first(lambda: read_summary(self.path) if self.path.exists() else {})

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

  def _write(self) -> None:
    if jax.process_index() == 0:
      write_json(self.path, self.values)


def _figure(path: pathlib.Path, name: str) -> float:
  held = read_record(path)
  value = held.get(name) if isinstance(held, dict) else None
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise ValueError(
      f"{path}: holds {shown(held)}, without a number {name!r}; delete the folder {path.parent}"
    )
  return float(value)


class Best:
  """The best captioner so far by a held-out figure, in workdir/best, with this in best.json.

  Args:
    figure: "accuracy" or, without a judge, "reward".
  """

  def __init__(self, policy: Loaded, workdir: pathlib.Path, figure: str = "accuracy"):
    self.policy, self.folder, self.figure = policy, workdir / "best", figure
    self.value = from_first(self._found)

  def _found(self) -> float:
    """The figure of the one that is there."""
    # a kill came between two renames: the newer one, if it was finished
    for name in ("best.new", "best.old"):
      there = self.folder.with_name(name)
      if not self.folder.exists() and (there / "best.json").exists():
        there.rename(self.folder)
    figures = self.folder / "best.json"
    return _figure(figures, self.figure) if figures.exists() else float("-inf")

  def keep(self, step: int, params: Params, figures: Mapping[str, float]) -> None:
    """Writes the captioner where it is the best. A kill leaves the old one or the new one.

    Args:
      figures: of an evaluation; without the one that counts, it is not the best.
    """
    value = figures.get(self.figure, float("-inf"))
    if not value > self.value:
      return
    self.value = value
    new, old = self.folder.with_name("best.new"), self.folder.with_name("best.old")
    main = jax.process_index() == 0
    if main:
      shutil.rmtree(new, ignore_errors=True)
    save_policy(new, self.policy, params)
    if main:
      write_json(new / "best.json", {"step": step, self.figure: value})
      shutil.rmtree(old, ignore_errors=True)
      if self.folder.exists():
        self.folder.rename(old)
      new.rename(self.folder)
      shutil.rmtree(old, ignore_errors=True)
      log.info(
        "best so far: step %d, held-out %s %.3f, kept in %s", step, self.figure, value, self.folder
      )
