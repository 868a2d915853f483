"""Name of a training run, or of one of its steps -> the captioner's parameters in its checkpoints.

No optimizer's moments are read, and nothing is written: the run may be going on.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
import re
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from caprl_jax.config import registry
from caprl_jax.errors import UserError
from caprl_jax.harness.buckets.mirror import listed
from caprl_jax.harness.buckets.shared import checkpoints_of, saved_steps
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.leftovers import CHECKPOINTS
from caprl_jax.json_files import cut, shown
from caprl_jax.progress import going_on
from caprl_jax.types import Params

log = logging.getLogger("caprl_jax.harness.training.trained")


@dataclasses.dataclass(frozen=True)
class Trained:
  """A captioner in a run's checkpoints.

  workdir: of the run. step: the one that is asked for; None: the newest whose parameters are whole.
  """

  workdir: pathlib.Path
  step: int | None = None

  @property
  def place(self) -> pathlib.Path:
    """What to name for exactly this."""
    return self.workdir if self.step is None else self.workdir / CHECKPOINTS / str(self.step)

  def settled(self) -> "Trained":
    """With the step that is the newest one now, the same in all processes, which all call it: what
    a run adds meanwhile is then not mixed in."""
    if self.step is not None:
      return self
    return Trained(self.workdir, from_first(lambda: saved_steps(self.workdir)[-1]))

  def config(self) -> ml_collections.ConfigDict:
    """The run's config, as a checkpoint has it.

    Raises:
      ValueError: it is of another mode than `train`, or cannot be read.
    """
    steps = [self.step] if self.step is not None else saved_steps(self.workdir)[::-1]
    found, error = None, None
    for step in steps:
      try:
        found = json.loads((_step(self.workdir, step) / "config" / "metadata").read_text())
        break
      except (OSError, ValueError) as raised:
        error = raised
    if found is None:
      raise UserError(
        f"{self.place}: the config in it cannot be read ({cut(error, 300)}); name another step of "
        f"{saved_steps(self.workdir)} as {self.workdir / CHECKPOINTS}/STEP"
      )
    sections = found if isinstance(found, dict) else {}
    policy = sections.get("policy")
    of_a_phase = re.fullmatch(r"phase_\d+", self.workdir.name)
    if of_a_phase or "train" not in sections or not isinstance(policy, dict):
      raise UserError(
        f"{self.place} is a checkpoint of mode {shown(sections.get('mode'))}, not of a training "
        "run: name the folder that this mode writes when it ends (sft.output, pretrain.output)"
      )
    return ml_collections.ConfigDict(registry.with_new_names(sections))

  def digest(self) -> str:
    """Of a step's files: Orbax gives each write names of its own.

    Raises:
      ValueError: they are not there.
    """
    step = self.step if self.step is not None else saved_steps(self.workdir)[-1]
    state = _step(self.workdir, step) / "state"
    files = listed(state) if state.exists() else []
    if not files:
      raise UserError(f"{state} holds no files; name another step of {saved_steps(self.workdir)}")
    found = hashlib.sha256()
    for name in files:
      path = state / name
      found.update(json.dumps([name, path.stat().length]).encode())
      if path.name in ("manifest.ocdbt", "_METADATA"):
        found.update(path.read_bytes())
    return found.hexdigest()

  def restore(self, like: Params) -> tuple[int, Params]:
    """The step, and its parameters in the shapes, types and shardings of `like`. Of the processes
    that these shardings are of, all call it, and use the same step.

    Raises:
      ValueError: the step, or where none is asked for all of them, cannot be read.
    """
    together = _several_processes(like)
    steps = [self.step] if self.step is not None else saved_steps(self.workdir)[::-1]
    if together:
      steps = from_first(lambda: steps)
    failed: dict[int, Exception | None] = {}
    for step in steps:
      found, error = None, None
      try:
        with going_on(f"reading the parameters of step {step}"):
          found = _read(_step(self.workdir, step), like)
      except Exception as raised:  # noqa: BLE001  a damaged file may raise anything below Orbax
        error = raised
      if together:
        all_could = multihost_utils.process_allgather(np.array(found is not None)).all()
        found = found if all_could else None
      if found is not None:
        break
      failed[step] = error
    else:
      self._refuse(failed)
    for older, why in failed.items():
      log.warning(
        "checkpoint of step %d cannot be read (%s): the parameters are those of step %d",
        older,
        cut(why, 300) if why else "another process could not",
        step,
      )
    log.info("parameters after step %d of %s", step, self.workdir)
    return step, found

  def _refuse(self, failed: dict[int, Exception | None]) -> None:
    others = [step for step in saved_steps(self.workdir) if step not in failed]
    why = next((error for error in failed.values() if error), None)
    more = f"name another step of {others}" if others else "none is left that could be"
    raise UserError(
      f"{self.place}: no parameters of step {', '.join(map(str, failed))} can be read: damaged, or "
      f"of another model than its config says; {more}. Orbax says: {cut(why, 500)}"
    ) from why


def find_run(source: str) -> Trained | None:
  """The run that a captioner's name stands for: `<workdir>`, `<workdir>/checkpoints` or
  `<workdir>/checkpoints/<step>`; None where it is something else.

  Raises:
    ValueError: such a run has checkpoints, and not this one.
  """
  path = pathlib.Path(source).expanduser()
  workdir, step = path, None
  if path.name == CHECKPOINTS:
    workdir = path.parent
  elif path.name.isdecimal() and path.parent.name == CHECKPOINTS:
    workdir, step = path.parent.parent, int(path.name)
  if (path / "config.json").exists():
    return None
  steps = saved_steps(workdir)
  if not steps:
    return None
  if step is not None and step not in steps:
    raise UserError(f"{source}: no such checkpoint; {workdir} has those of steps {steps}")
  return Trained(workdir, step)


def _step(workdir: pathlib.Path, step: int) -> epath.Path:
  return checkpoints_of(workdir) / str(step)


def _several_processes(like: Params) -> bool:
  devices = {device for x in jax.tree.leaves(like) for device in _devices(x)}
  return len({device.process_index for device in devices}) > 1


def _devices(struct: Any) -> set:
  return struct.sharding.device_set if struct.sharding is not None else set()


def _read(step: epath.Path, like: Params) -> Params:
  """By this process for itself: others may not need it now, or have it already."""
  import orbax.checkpoint as ocp  # it takes a second, and few captioners are a run's

  me = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"captioner_{me}"
  )
  wanted = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
  args = ocp.args.PyTreeRestore(
    wanted,
    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
    partial_restore=True,
  )
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
  with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
    return reader.restore(step / "state", args=args)["params"]
