"""A stage of pretraining, its packed examples, the model before it -> the model after it."""

import dataclasses
import functools
import logging
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.data.packing import Packer, packed_batches
from caprl_jax.harness.buckets.shared import saved_steps
from caprl_jax.harness.checkpoints import Checkpoints
from caprl_jax.harness.loop import run_loop
from caprl_jax.harness.training.state import abstract_state, make_state
from caprl_jax.hub.load import Loaded
from caprl_jax.models.trainable import merge_params, split_params, trainable_filter
from caprl_jax.modes.pretrain.record import TRAINING, Record
from caprl_jax.modes.pretrain.section import PretrainConfig, StageConfig
from caprl_jax.rl.optimizer import build_optimizer, warmup
from caprl_jax.supervised.next_token import pretrain_step
from caprl_jax.types import Packed, Params, TrainState

log = logging.getLogger("caprl_jax.modes.pretrain.stage")

FAR = 0.15  # relative difference of examples per step from those asked for that is worth a warning


@dataclasses.dataclass(frozen=True)
class Run:
  """What all stages share."""

  cfg: PretrainConfig
  mesh: jax.sharding.Mesh
  workdir: pathlib.Path
  config: dict[str, Any]  # as checkpoints keep it
  record: Record


def rows_a_step(
  stage: StageConfig, name: str, packer: Packer, mesh: jax.sharding.Mesh, begun: int | None = None
) -> int:
  """Rows of a batch. Raises ValueError where a batch cannot be split over devices and microbatches.

  begun: rows of the steps that were made already; what follows has as many.
  """
  devices = mesh.size // sharding.batch_sharding(mesh).shard_shape((mesh.size,))[0]
  parts = devices * stage.microbatches
  cut = f"microbatches = {stage.microbatches} parts for {devices} devices each"
  if begun is not None:
    if begun % parts:
      raise ValueError(
        f"stage {name!r} was begun with {begun} rows per step, which cannot be cut "
        f"into {cut}; set pretrain.stages.{name}.microbatches, or the number of "
        f"devices, so that their product divides {begun}"
      )
    return begun
  if stage.batch_size is not None:
    if stage.batch_size % parts:
      raise ValueError(
        f"pretrain.stages.{name}.batch_size = {stage.batch_size} rows cannot be cut "
        f"into {cut}; use a multiple of {parts}"
      )
    return stage.batch_size
  per_row = packer.figures()["examples_per_row"]
  rows = max(round(stage.examples / per_row / parts), 1) * parts
  if abs(rows * per_row / stage.examples - 1) > FAR:
    log.warning(
      "pretrain.stages.%s.examples = %d, but a step has about %.0f: %d rows of %.1f "
      "examples, as %s need a multiple of %d rows; lower microbatches, pack.tokens or "
      "the number of devices",
      name,
      stage.examples,
      rows * per_row,
      rows,
      per_row,
      cut,
      parts,
    )
  return rows


def plan_stage(
  name: str, stage: StageConfig, packer: Packer, mesh: jax.sharding.Mesh, record: Record
) -> tuple[int, int]:
  """Rows a step, and steps; logs them and puts them into the record. Raises ValueError where there
  are no such, or others than when the stage was begun."""
  begun, place = record.stages.get(name, {}), record.path.parent / TRAINING / name
  if not begun and saved_steps(place):
    raise ValueError(
      f"{place} holds a checkpoint of a stage that {record.path} does not know; remove that folder"
    )
  rows = rows_a_step(stage, name, packer, mesh, begun.get("batch_rows"))
  steps = stage.steps or max(1, math.ceil(packer.rows_until(stage.epochs) / rows))
  if steps != begun.get("steps", steps):
    raise ValueError(
      f"stage {name!r} was begun with {begun['steps']} steps of {rows} rows, but "
      f"{stage.data} makes {steps} now; bring it back as it was, or remove {place} "
      "to begin the stage anew"
    )
  fixed, rising = stage.optimizer.warmup_steps, warmup(stage.optimizer, steps)
  if rising < fixed:
    log.warning(
      "pretrain.stages.%s.optimizer.warmup_steps = %d is cut to %d: the stage has %d "
      "steps; lower it, or set warmup_fraction in its place",
      name,
      fixed,
      rising,
      steps,
    )
  figures = {k: round(v, 4) for k, v in packer.figures().items()}
  log.info(
    "stage %s: %d examples in %d rows of %d tokens, %.1f%% filled, %d images per row; %d steps of "
    "%d rows (%.0f examples)",
    name,
    figures["examples"],
    figures["rows"],
    stage.pack.tokens,
    100 * figures["fill"],
    figures["images_per_row"],
    steps,
    rows,
    rows * figures["examples_per_row"],
  )
  record.put(name, steps=steps, batch_rows=rows, packing=figures)
  return rows, steps


def _step(state: TrainState, base: Params, batch: Packed, **settings):
  """`pretrain_step`, with what the packer left out among the metrics."""
  state, metrics, _ = pretrain_step(state, base, batch, **settings)
  return state, {**metrics, "pack/dropped": batch.dropped_B.sum().astype(jnp.float32)}, None


def train_stage(
  run: Run, name: str, policy: Loaded, packer: Packer, *, examples_digest: str, seed: int
) -> Params:
  """Runs a stage, from its newest checkpoint where there is one, and gives all parameters.
  `policy.params` are used up."""
  stage = run.cfg.stages[name]
  family = policy.model.cfg.family
  batch_size, steps = plan_stage(name, stage, packer, run.mesh, run.record)
  run.record.check_vocabulary(name, policy.tokenizer)
  run.record.check_examples(name, len(packer.examples), examples_digest)
  params, base = split_params(policy.params, trainable_filter(stage.trained, family))
  shardings = split_params(policy.shardings, trainable_filter(stage.trained, family))[0]
  tx, schedule = build_optimizer(stage.optimizer, steps)
  place = run.workdir / TRAINING / name
  place.mkdir(parents=True, exist_ok=True)
  checkpoints = Checkpoints(place, run.cfg.checkpoints())
  iterator = packed_batches(packer, batch_size, steps, sharding.batch_share(run.mesh, batch_size))
  if checkpoints.latest_step() is not None:
    like = abstract_state(params, tx, shardings, run.mesh, stage.optimizer.moment_memory)
    for x in jax.tree.leaves(params):
      x.delete()  # or they would lie beside the restored ones
    state, position = checkpoints.restore(like)
    iterator.set_state(position)
    log.info("stage %s goes on after step %d of %d", name, int(state.step), steps)
  else:
    state = make_state(params, tx, shardings, seed, run.mesh, stage.optimizer.moment_memory)
  settings = dict(microbatches=stage.microbatches, chunk_tokens=run.cfg.chunk_tokens)
  step = jax.jit(
    functools.partial(_step, policy=policy.model, tx=tx, schedule=schedule, **settings),
    donate_argnums=0,
    # The state comes out where it went in: another layout would compile the step anew.
    out_shardings=(jax.tree.map(lambda x: x.sharding, state), sharding.replicated(run.mesh), None),
  )
  try:
    state = run_loop(
      lambda state, batch: step(state, base, batch),
      state,
      iterator,
      steps=steps,
      mesh=run.mesh,
      checkpoints=checkpoints,
      config=run.config,
      workdir=place,
      what=name,
      reward_name="update/none",
    )
  finally:
    checkpoints.close()
  return merge_params(state.params, base)
