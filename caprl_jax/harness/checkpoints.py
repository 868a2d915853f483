"""Train state, data iterator and config <-> one atomic Orbax checkpoint a step."""

import dataclasses
import logging
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from caprl_jax.types import TrainState

log = logging.getLogger("caprl_jax.harness.checkpoints")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When a checkpoint is written; after the last step it always is.

  every_steps: steps from one to the next.
  keep: checkpoints that are kept.
  """

  every_steps: int = 50
  keep: int = 2


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """The steps of the checkpoints under `workdir/checkpoints`, of which none is opened."""
  return sorted(
    int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()
  )


class Checkpoints:
  """The checkpoints under `workdir/checkpoints`. A checkpoint that was not finished is not one:
  Orbax renames it into place when all items are written."""

  def __init__(self, workdir: pathlib.Path, cfg: CheckpointConfig):
    self.cfg = cfg
    self.manager = ocp.CheckpointManager(
      (workdir / "checkpoints").absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=cfg.keep, enable_async_checkpointing=False),
      item_names=("state", "data", "config"),
    )

  def save(
    self, state: TrainState, iterator_state: dict, config: dict, *, force: bool = False
  ) -> None:
    """Writes a checkpoint named after the state's step when one is due or `force` asks for it. All
    processes call it, with the same iterator state."""
    step = int(state.step)
    if (not force and step % self.cfg.every_steps) or step in self.manager.all_steps():
      return
    packed = dataclasses.replace(state, key=jax.random.key_data(state.key))
    self.manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(packed),
        data=ocp.args.JsonSave(iterator_state),
        config=ocp.args.JsonSave(config),
      ),
      force=True,
    )
    self.manager.wait_until_finished()
    log.info("checkpoint of step %d written", step)

  def latest_step(self) -> int | None:
    return self.manager.latest_step()

  def restore(self, like: TrainState) -> tuple[TrainState, dict]:
    """The newest state, in the shapes and shardings of `like`, and the iterator's state. Raises
    ValueError where the checkpoint is of another model or optimizer."""
    step = self.manager.latest_step()
    is_key = jnp.issubdtype(like.key.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(like.key) if is_key else like.key
    packed = dataclasses.replace(like, key=data)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, packed)
    try:
      found = self.manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        ),
      )
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"checkpoint {self.manager.directory / str(step)} does not fit this "
        "config's model or optimizer; use another --workdir or the config it was "
        f"made with. Orbax says: {error}"
      ) from error
    state = found["state"]
    # Fresh buffers: donating memory that the restore still refers to would copy on every backend
    # anyway.
    state = state.replace(key=jax.random.wrap_key_data(state.key))
    return state, found["data"]

  def close(self) -> None:
    self.manager.close()
