"""Mode `pretrain`: what captions are worth as pretraining data. A captioner trained in stages, then
asked about images.

The paper's evaluation (CapRL, arXiv 2509.22647): a vision tower, a text-only language model and a
new projector are aligned on short captions (projector only), pretrained further on the captions
under test, and taught to converse (both with all parameters). Stages read captions, conversations
or questions, several of them packed into a row.
"""

import dataclasses
import logging
import pathlib
import shutil
from collections.abc import Sequence

import jax
import ml_dtypes
import numpy as np

from caprl_jax import sharding
from caprl_jax.config import schema as configuration
from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.chat_rendering import ChatRenderer
from caprl_jax.data.readers.conversations import (
  Asked,
  Asking,
  Example,
  check_kinds,
  of_kinds,
  read_examples,
  warn_of_options,
)
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import QARow
from caprl_jax.harness.process import peers
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.workdir_lock import only_run
from caprl_jax.hub.load import Loaded, save_policy
from caprl_jax.modes.pretrain.checked import pack_usable, rules_of
from caprl_jax.modes.pretrain.policy import PretrainPolicyConfig, begin
from caprl_jax.modes.pretrain.record import TRAINING, Record, begin_run
from caprl_jax.modes.pretrain.section import PretrainConfig, StageConfig
from caprl_jax.modes.pretrain.stage import Run, train_stage
from caprl_jax.modes.pretrain.vqa import ask, check_model
from caprl_jax.types import Params

log = logging.getLogger("caprl_jax.modes.pretrain.run")


def _renderer(policy: Loaded) -> ChatRenderer:
  template, special = policy.chat_template()
  return ChatRenderer(template, policy.model.cfg.family, policy.tokenizer, special)


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
  _drop_checkpoints(workdir, done)  # a kill may have come before
  whole, left = begin_run(workdir, {**plain, "mesh": mesh_section}, section, record)
  if not left and done == order and from_first(lambda: _answers_are_there(cfg, workdir)):
    log.info("this run is complete: its stages are %s", ", ".join(done) or "none")
    return
  whole.reopen()
  made = Run(cfg, mesh, workdir, plain, record)
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
      data,
      asked,
      render=_renderer(policy),
      cfg=policy.model.cfg,
      packs=packs,
      seeds=seeds,
      rules=rules,
      workdir=workdir,
    )
    for name in packs:
      params = train_stage(
        made, name, policy, packers.pop(name), examples_digest=digests[name], seed=seeds[name]
      )
      policy = _written(made, name, policy, params)
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
  ask(
    policy,
    rows,
    workdir / "vqa.json",
    source=cfg.eval,
    cfg=cfg.answer,
    seed=seed,
    mesh=mesh,
    open_question=cfg.eval_open_question,
    max_tokens=cfg.eval_max_tokens,
  )


def _order(cfg: PretrainConfig) -> list[str]:
  """The stages that have data, in order."""
  for name in cfg.order:
    if cfg.stages[name].data is None:
      log.info("stage %s is skipped: it has no data", name)
  return [name for name in cfg.order if cfg.stages[name].data is not None]


def _answers_are_there(cfg: PretrainConfig, workdir: pathlib.Path) -> bool:
  return cfg.eval is None or (workdir / "vqa.json").exists()


def _written(run: Run, name: str, policy: Loaded, params: Params) -> Loaded:
  """Writes a stage's model, says that the stage is finished, and gives what the next one begins
  with: what was written, as it would in another process."""
  output, workdir = run.cfg.output_dtype, run.workdir
  dtype = ml_dtypes.bfloat16 if output == "bfloat16" else np.dtype(output)
  save_policy(workdir / name, policy, params, dtype)
  run.record.put(name, finished=True)
  _drop_checkpoints(workdir, [name])
  if jax.process_index() == 0:
    log.info("stage %s: wrote %s", name, workdir / name)
  params = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)
  return dataclasses.replace(policy, params=params)


def _drop_checkpoints(workdir: pathlib.Path, finished: Sequence[str]) -> None:
  """Removes the checkpoints of stages whose models are written."""
  if jax.process_index() == 0:
    for name in finished:
      shutil.rmtree(workdir / TRAINING / name / "checkpoints", ignore_errors=True)


def _read(name: str, stage: StageConfig, seed: int, bad: BadRowList) -> list[Example]:
  try:
    return read_examples(
      stage.data,
      stage.instruction,
      Asking(stage.questions, stage.context_text, stage.kinds, stage.open_question),
      image_root=stage.image_root,
      seed=seed,
      max_rows=stage.max_rows,
      bad_rows=bad,
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
