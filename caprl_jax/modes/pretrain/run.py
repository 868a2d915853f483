"""Mode `pretrain`: what captions are worth as pretraining data. A captioner trained in stages, then
asked about images.

The paper's evaluation (CapRL, arXiv 2509.22647): a vision tower, a text-only language model and a
new projector are aligned on short captions (projector only), pretrained further on the captions
under test, and taught to converse (both with all parameters). Stages read captions, conversations
or questions, several of them packed into a row.
"""

import dataclasses
import functools
import logging
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from caprl_jax import sharding
from caprl_jax.config import schema as configuration
from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.chat_rendering import ChatRenderer
from caprl_jax.data.packing import Packer, packed_batches
from caprl_jax.data.readers.conversations import (
  Asked,
  Example,
  check_kinds,
  of_kinds,
  read_examples,
  warn_of_options,
)
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import QARow
from caprl_jax.harness.checkpoints import Checkpoints, saved_steps
from caprl_jax.harness.loop import run_loop
from caprl_jax.harness.process import peers
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.workdir_lock import only_run
from caprl_jax.harness.training.state import abstract_state, make_state
from caprl_jax.hub.load import Loaded, save_policy
from caprl_jax.models.trainable import merge_params, split_params, trainable_filter
from caprl_jax.modes.pretrain.checked import pack_usable, rules_of
from caprl_jax.modes.pretrain.policy import PretrainPolicyConfig, begin
from caprl_jax.modes.pretrain.record import TRAINING, Record, begin_run
from caprl_jax.modes.pretrain.section import PretrainConfig, StageConfig
from caprl_jax.modes.pretrain.vqa import ask, check_model
from caprl_jax.rl.optimizer import build_optimizer, warmup
from caprl_jax.supervised.next_token import pretrain_step
from caprl_jax.types import Packed, Params, TrainState

log = logging.getLogger("caprl_jax.modes.pretrain.run")

FAR = 0.15  # relative difference of examples per step from those asked for that is worth a warning


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


def _renderer(policy: Loaded) -> ChatRenderer:
  template, special = policy.chat_template()
  return ChatRenderer(template, policy.model.cfg.family, policy.tokenizer, special)


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
  name: str,
  stage: StageConfig,
  policy: Loaded,
  packer: Packer,
  examples_digest: str,
  cfg: PretrainConfig,
  seed: int,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
  config: dict,
  record: Record,
) -> Params:
  """Runs a stage, from its newest checkpoint where there is one, and gives all parameters.
  `policy.params` are used up."""
  family = policy.model.cfg.family
  batch_size, steps = plan_stage(name, stage, packer, mesh, record)
  record.check_vocabulary(name, policy.tokenizer)
  record.check_examples(name, len(packer.examples), examples_digest)
  params, base = split_params(policy.params, trainable_filter(stage.trained, family))
  shardings = split_params(policy.shardings, trainable_filter(stage.trained, family))[0]
  tx, schedule = build_optimizer(stage.optimizer, steps)
  place = workdir / TRAINING / name
  place.mkdir(parents=True, exist_ok=True)
  checkpoints = Checkpoints(place, cfg.checkpoints())
  iterator = packed_batches(packer, batch_size, steps, sharding.batch_share(mesh, batch_size))
  if checkpoints.latest_step() is not None:
    like = abstract_state(params, tx, shardings, mesh)
    for x in jax.tree.leaves(params):
      x.delete()  # or they would lie beside the restored ones
    state, position = checkpoints.restore(like)
    iterator.set_state(position)
    log.info("stage %s goes on after step %d of %d", name, int(state.step), steps)
  else:
    state = make_state(params, tx, shardings, seed, mesh)
  settings = dict(microbatches=stage.microbatches, chunk_tokens=cfg.chunk_tokens)
  step = jax.jit(
    functools.partial(_step, policy=policy.model, tx=tx, schedule=schedule, **settings),
    donate_argnums=0,
    # The state comes out where it went in: another layout would compile the step anew.
    out_shardings=(jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh), None),
  )
  try:
    state = run_loop(
      lambda state, batch: step(state, base, batch),
      state,
      iterator,
      steps=steps,
      mesh=mesh,
      checkpoints=checkpoints,
      config=config,
      workdir=place,
      what=name,
      reward_name="update/none",
    )
  finally:
    checkpoints.close()
  return merge_params(state.params, base)


def run(config, workdir: pathlib.Path) -> None:
  """Runs the stages that `pretrain.json` does not call finished, and asks the last model about
  images (`vqa.json`).
  """
  with only_run(workdir):
    _run(config, workdir)


def _run(config, workdir: pathlib.Path) -> None:
  cfg = configuration.load_section(config, "pretrain", PretrainConfig)
  section = configuration.load_section(config, "pretrain_policy", PretrainPolicyConfig)
  mesh_section = configuration.load_section(config, "mesh", sharding.MeshConfig)
  mesh = sharding.make_mesh(mesh_section)
  seed = config.get("seed", 0)
  plain = configuration.to_plain({"seed": seed, "pretrain": cfg, "pretrain_policy": section})
  order = _order(cfg)
  record = Record(workdir, plain, order)
  done = record.finished()
  whole, left = begin_run(workdir, {**plain, "mesh": mesh_section}, section, record)
  if not left and done == order and from_first(lambda: _answers_are_there(cfg, workdir)):
    log.info("this run is complete: its stages are %s", ", ".join(done) or "none")
    return
  whole.reopen()
  # All of them first: what a later stage's data lack should show before an earlier stage has run.
  packs = {name: cfg.stages[name].pack for name in order if name not in done}
  seeds = {name: seed + number for number, name in enumerate(packs, len(done))}
  rules = rules_of(cfg.eval_bad_rows, packs, workdir)
  asked = _asked(cfg, seed, mesh, rules.asked)
  data = {name: _read(name, cfg.stages[name], seed, rules.stages[name]) for name in packs}
  with jax.set_mesh(mesh):
    questions = [
      Asked(row.image, row.questions, row.name, open_question=cfg.eval_open_question)
      for row in asked
    ]
    policy = begin(section, data, questions, seed, mesh, workdir / done[-1] if done else None)
    if asked:
      check_model(policy, cfg.eval_open_question)
    packers, digests, asked = pack_usable(
      data, asked, _renderer(policy), policy.model.cfg, packs, seeds, rules, workdir
    )
    for name in packs:
      params = train_stage(
        name,
        cfg.stages[name],
        policy,
        packers.pop(name),
        digests[name],
        cfg,
        seeds[name],
        mesh,
        workdir,
        plain,
        record,
      )
      policy = _written(name, policy, params, cfg.output_dtype, workdir, record)
  if cfg.eval is not None:
    if sharding.local_mesh(mesh) != mesh:  # each process asks its part, with a model of its own
      del policy
      peers.check()  # the first one has written it
      mesh = sharding.local_mesh(mesh)
      policy = begin(section, {}, questions, seed, mesh, workdir / order[-1] if order else None)
    _ask(policy, asked, cfg, seed, mesh, workdir)
  whole.finish(sum(record.stages[name]["steps"] for name in order))


def _ask(
  policy: Loaded,
  rows: list[QARow],
  cfg: PretrainConfig,
  seed: int,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
) -> None:
  path, open_question = workdir / "vqa.json", cfg.eval_open_question
  ask(policy, rows, cfg.eval, cfg.answer, seed, mesh, path, open_question, cfg.eval_max_tokens)


def _order(cfg: PretrainConfig) -> list[str]:
  """The stages that have data, in order."""
  for name in cfg.order:
    if cfg.stages[name].data is None:
      log.info("stage %s is skipped: it has no data", name)
  return [name for name in cfg.order if cfg.stages[name].data is not None]


def _answers_are_there(cfg: PretrainConfig, workdir: pathlib.Path) -> bool:
  return cfg.eval is None or (workdir / "vqa.json").exists()


def _written(
  name: str,
  policy: Loaded,
  params: Params,
  output_dtype: str,
  workdir: pathlib.Path,
  record: Record,
) -> Loaded:
  """Writes a stage's model, says that the stage is finished, and gives what the next one begins
  with: what was written, as it would in another process."""
  dtype = ml_dtypes.bfloat16 if output_dtype == "bfloat16" else np.dtype(output_dtype)
  save_policy(workdir / name, policy, params, dtype)
  record.put(name, finished=True)
  if jax.process_index() == 0:
    for done in record.finished():  # of earlier ones too: a kill may have come before
      shutil.rmtree(workdir / TRAINING / done / "checkpoints", ignore_errors=True)
    log.info("stage %s: wrote %s", name, workdir / name)
  params = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)
  return dataclasses.replace(policy, params=params)


def _read(name: str, stage: StageConfig, seed: int, bad: BadRowList) -> list[Example]:
  try:
    return read_examples(
      stage.data,
      stage.instruction,
      stage.image_root,
      seed,
      stage.max_rows,
      bad,
      stage.questions,
      stage.told,
      stage.kinds,
      stage.open_question,
    )
  except ValueError as error:
    raise ValueError(f"in pretrain.stages.{name}: {error}") from error


def _asked(
  cfg: PretrainConfig, seed: int, mesh: jax.sharding.Mesh, bad: BadRowList | None = None
) -> list[QARow]:
  """The rows that the last model is asked about. Raises ValueError for settings that would fail
  when it is.
  """
  if cfg.eval is None:
    return []
  here = sharding.local_mesh(mesh)
  sharding.check_batch_size(cfg.answer.batch_size, here, "pretrain.answer.batch_size")
  rows = read_qa_rows(cfg.eval, seed, bad_rows=bad or cfg.eval_bad_rows)[: cfg.eval_rows]
  check_kinds(rows, cfg.eval_kinds, "pretrain.eval_kinds")
  asked = of_kinds(rows, cfg.eval_kinds)
  if not asked:
    raise ValueError(
      f"pretrain.eval = {cfg.eval!r}: no row is left to ask about with eval_rows = "
      f"{cfg.eval_rows}, eval_kinds = {cfg.eval_kinds}"
    )
  if cfg.eval_open_question:
    warn_of_options(asked, cfg.eval)
  if len(asked) < len(rows):
    log.info(
      "%s: eval_kinds = %s leaves out %d of %d rows",
      cfg.eval,
      cfg.eval_kinds,
      len(rows) - len(asked),
      len(rows),
    )
  return asked
