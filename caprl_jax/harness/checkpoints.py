"""Train state, data iterator and config <-> one atomic Orbax checkpoint a step."""

import dataclasses
import logging
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from caprl_jax.errors import UserError
from caprl_jax.harness.buckets.shared import (
  checkpoints_of,
  copy_now,
  in_bucket,
  move,
)
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.wall_time import WallTime
from caprl_jax.json_files import cut
from caprl_jax.progress import going_on
from caprl_jax.types import TrainState

log = logging.getLogger("caprl_jax.harness.checkpoints")

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When a checkpoint is written; after the last step it always is.

  every_steps: steps from one to the next.
  every_minutes: a checkpoint is also written when so many minutes are over since the last one;
    None: only by steps.
  keep: the newest checkpoints that are kept; at least 2, since a run whose newest one is damaged
    goes on from the one before.
  """

  every_steps: int = 50
  every_minutes: float | None = None
  keep: int = 2

  def __post_init__(self):
    if self.every_steps < 1:
      raise UserError(f"checkpoint.every_steps = {self.every_steps} must be at least 1")
    if self.keep < 2:
      raise UserError(
        f"checkpoint.keep = {self.keep} must be at least 2: where the newest checkpoint is "
        "damaged, by a disk or a kill, the run goes on from the one before"
      )
    if self.every_minutes is not None and not self.every_minutes > 0:
      raise ValueError(
        f"checkpoint.every_minutes = {self.every_minutes} must be above 0; None: only by steps"
      )


class Checkpoints:
  """The checkpoints under `workdir/checkpoints`, or in the bucket that it stands for. A checkpoint
  that was not finished is not one: Orbax renames it into place when all items are written, in the
  background; in a bucket it writes a last file."""

  def __init__(self, workdir: pathlib.Path, cfg: CheckpointConfig):
    self.cfg, self.workdir = cfg, workdir
    place = checkpoints_of(workdir)
    self._wall_time = WallTime(cfg.every_minutes)
    self._failure = _Failure()
    self.manager = ocp.CheckpointManager(
      place,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=cfg.keep,
        cleanup_tmp_directories=in_bucket(place),  # in a folder `leftovers` does it
      ),
      item_names=("state", "data", "config"),
    )

  def due(self, step: int) -> bool:
    """Whether a checkpoint is to be written after this step. All processes call it after every
    step."""
    return self._wall_time.over(step) or step % self.cfg.every_steps == 0

  def save(
    self, state: TrainState, iterator_state: dict, config: dict, *, force: bool = False
  ) -> None:
    """Writes a checkpoint named after the state's step when one is due by steps or `force` asks for
    it. All processes call it, with the same iterator state.

    It returns when the state is copied to the host, and may be donated; `wait` returns when the
    checkpoint is on the disk.
    """
    step = int(state.step)
    if not force and step % self.cfg.every_steps:
      return
    self.wait()  # for the one before
    if step in self._steps():
      return
    packed = dataclasses.replace(state, key=jax.random.key_data(state.key))
    copy_now(self.workdir)
    self.manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(packed),
        data=ocp.args.JsonSave(iterator_state),
        config=ocp.args.JsonSave(config),
      ),
      force=True,
    )
    self._wall_time.begin(step)
    log.info("checkpoint of step %d: its state is copied, and is written in the background", step)

  def wait(self) -> None:
    """Returns when all that was saved is on the disk. Raises what went wrong with it."""
    with going_on("writing a checkpoint"):
      while self.manager.is_saving_in_progress():
        self._failure.check()
        time.sleep(0.02)
      self.manager.wait_until_finished()

  def latest_step(self) -> int | None:
    """The newest step, as all processes call it."""
    return max(self._steps(), default=None)

  def _steps(self) -> list[int]:
    """As the first process sees them: a shared folder may show others another list."""
    return from_first(lambda: [int(step) for step in self.manager.all_steps()])

  def restore(self, like: TrainState) -> tuple[TrainState, dict]:
    """The newest state that is whole, in the shapes and shardings of `like`, and the iterator's.

    A newer one that cannot be read is moved to `checkpoints/damaged/` with a warning. All processes
    call it, and what one of them cannot read, none uses.

    Raises:
      ValueError: none can be read: they are of another model or optimizer, or all damaged.
    """
    step, found, failed = self._newest_whole(lambda step: self._read(step, like))
    for damaged, why in failed:
      self._move_aside(damaged, step, why)
    if failed:
      self.manager.reload()
    return found

  def _newest_whole(
    self, read: Callable[[int], Found]
  ) -> tuple[int, Found, list[tuple[int, Exception | None]]]:
    """The newest step that `read` can read in all processes, what it read, and the steps after it
    with what it raised."""
    failed: list[tuple[int, Exception | None]] = []
    for step in sorted(self._steps(), reverse=True):
      found, error = None, None
      try:
        with going_on(f"reading the checkpoint of step {step}"):
          found = read(step)
      except Exception as raised:  # noqa: BLE001  a damaged file may raise anything below Orbax
        error = raised
      if _all_processes(found is not None) and found is not None:
        return step, found, failed
      failed.append((step, error))
    step, error = failed[0]
    others = f", nor does any older one ({[s for s, _ in failed[1:]]})" if failed[1:] else ""
    raise ValueError(
      f"checkpoint {self.manager.directory / str(step)} does not fit this "
      f"config's model or optimizer, or is damaged{others}; use another --workdir or the config it "
      f"was made with. Orbax says: {cut(error, 500)}"
    ) from error

  def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
    """What a checkpoint holds. Raises whatever a damaged file leads to."""
    is_key = jnp.issubdtype(like.key.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(like.key) if is_key else like.key
    packed = dataclasses.replace(like, key=data)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, packed)
    found = self.manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
      ),
    )
    state, position = found["state"], found["data"]
    if state is None or position is None:
      raise ValueError("a part of it is missing")
    # Fresh buffers: donating memory that the restore still refers to would copy on every backend
    # anyway.
    return state.replace(key=jax.random.wrap_key_data(state.key)), position

  def _move_aside(self, step: int, used: int, why: Exception | None) -> None:
    place = self.manager.directory
    log.warning(
      "checkpoint of step %d cannot be read (%s): it is moved to %s, and the run goes on from step "
      "%d",
      step,
      _words(why),
      place / "damaged",
      used,
    )
    if jax.process_index() == 0:
      source, target = place / str(step), place / "damaged" / str(step)
      if in_bucket(place):
        move(source, target)
        return
      (place / "damaged").mkdir(exist_ok=True)
      shutil.rmtree(target, ignore_errors=True)
      shutil.move(source, target)

  def close(self) -> None:
    self.manager.close()
    logging.getLogger("absl").removeHandler(self._failure)


class _Failure(logging.Handler):
  """What went wrong in the background in this process. Orbax raises it only after all processes
  have met, which they do not where one has failed; but it logs it at once."""

  def __init__(self):
    super().__init__(logging.ERROR)
    self._error: BaseException | None = None
    logging.getLogger("absl").addHandler(self)

  def emit(self, record: logging.LogRecord) -> None:
    if record.exc_info and "background save thread" in record.getMessage():
      self._error = record.exc_info[1]

  def check(self) -> None:
    """Raises it, in several processes; one alone has nobody to wait for."""
    if self._error and jax.process_count() > 1:
      raise self._error


def _words(why: Exception | None) -> str:
  return cut(why, 300) if why else "another process could not"


def _all_processes(here: bool) -> bool:
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.process_allgather(np.array(here)).all())
