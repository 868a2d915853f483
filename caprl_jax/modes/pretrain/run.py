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
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from caprl_jax import sharding
from caprl_jax.config import schema as configuration
from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.chat_rendering import ChatRenderer
from caprl_jax.data.packing import PackConfig, Packer, packed_batches
from caprl_jax.data.question_texts import check_open_question
from caprl_jax.data.readers.conversations import (
  Asked,
  Example,
  check_kinds,
  of_kinds,
  read_examples,
  warn_of_options,
)
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import BadRows, QARow
from caprl_jax.harness.checkpoints import CheckpointConfig, Checkpoints, saved_steps
from caprl_jax.harness.loop import run_loop
from caprl_jax.harness.process.workdir_lock import only_run
from caprl_jax.harness.training.state import abstract_state, make_state
from caprl_jax.hub.load import Loaded, save_policy
from caprl_jax.inference.vqa import AnswerConfig
from caprl_jax.models.trainable import merge_params, split_params, trainable_filter
from caprl_jax.modes.pretrain.checked import pack_usable, rules_of
from caprl_jax.modes.pretrain.policy import PretrainPolicyConfig, begin
from caprl_jax.modes.pretrain.record import TRAINING, Record
from caprl_jax.modes.pretrain.vqa import ask, check_model
from caprl_jax.rl.optimizer import OptimizerConfig, build_optimizer, warmup
from caprl_jax.supervised.next_token import pretrain_step
from caprl_jax.types import Packed, Params, TrainState

log = logging.getLogger("caprl_jax.modes.pretrain.run")

FAR = 0.15  # relative difference of examples per step from those asked for that is worth a warning


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """One stage of training.

  data: see `conversations.read_examples`; None skips the stage.
  optimizer: as the section `optimizer`.
  pack: how examples share rows.
  trained: which parameters are trained; the others have no gradient.
  steps, epochs: the length of the stage; set one of the two.
  batch_size, examples: rows per step, or examples per step; set one of the two. With `examples`, a
    step has as many rows as hold that many on average, rounded to a multiple of devices x
    microbatches: close to a published batch size where rows are packed.
  microbatches: parts that a batch is cut into, to save memory; the gradient is the same. It
    may be changed when a run goes on.
  instruction: what the user says where a row has a caption only.
  image_root: what images' paths are relative to; None: the file's folder or, where they are not
    there, the current one.
  max_rows: the first rows only, of each source.
  questions: questions about one image in one conversation; None: all of them.
  told: a template of facts: questions are asked after this text and without the image.
  kinds: kinds of questions that are asked; None: all.
  open_question: a wording in which no options are shown and the assistant says the right one;
    None: it says a letter.
  """

  data: str | None
  optimizer: OptimizerConfig
  pack: PackConfig
  trained: Literal["projector", "decoder", "full"] = "full"
  steps: int | None = None
  epochs: float | None = None
  batch_size: int | None = None
  examples: int | None = None
  microbatches: int = 1
  instruction: str = "Please describe this image in detail."
  image_root: str | None = None
  max_rows: int | None = None
  questions: int | None = None
  told: str | None = None
  kinds: tuple[str, ...] | None = None
  open_question: str | None = None

  def __post_init__(self):
    for first, second in (("steps", "epochs"), ("batch_size", "examples")):
      given = [getattr(self, name) for name in (first, second) if getattr(self, name) is not None]
      if len(given) != 1 or given[0] <= 0:
        raise ValueError(
          f"{first} = {getattr(self, first)}, {second} = {getattr(self, second)}: set one of "
          "them, to more than 0"
        )
    if self.microbatches < 1:
      raise ValueError(f"microbatches = {self.microbatches} must be at least 1")
    check_open_question(self.open_question)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """The section `pretrain`.

  stages: by name. Each one's model is written to `workdir/<name>`, in output_dtype, and the next
    one begins with what is written; its metrics are in `workdir/training/<name>`. If no stage has
    data, the model is not trained and only answers `eval`.
  order: which stages are run, one after the other.
  eval: multiple-choice questions (`qa_sources.py`) that the last model is asked, with the image
    and without, as `answer` says; None asks nothing.
  eval_rows: the first images only.
  eval_bad_rows: "refuse" to start while one of them cannot be used, or "drop" and log it; as
    `data.bad_rows`.
  eval_kinds: kinds of questions that are asked; None: all.
  eval_open_question: asks without showing the options, as a stage's `open_question`; what is
    written is right where it is the right option but for case, articles and punctuation. None: by
    letter.
  eval_max_tokens: longest answer to an open question.
  answer: how questions are asked by letter.
  output_dtype: of the models that are written.
  checkpoint_every_steps: steps from one checkpoint inside a stage to the next.
  chunk_tokens: tokens whose logits exist at once.
  """

  stages: dict[str, StageConfig]
  order: tuple[str, ...]
  eval: str | None = None
  eval_rows: int = 500
  eval_bad_rows: BadRows = "refuse"
  eval_kinds: tuple[str, ...] | None = None
  eval_open_question: str | None = None
  eval_max_tokens: int = 16
  answer: AnswerConfig = AnswerConfig(none_of_above=False)
  output_dtype: str = "float32"
  checkpoint_every_steps: int = 200
  chunk_tokens: int = 1024  # tokens whose logits exist at once

  def __post_init__(self):
    for name in self.order:
      if name not in self.stages:
        raise ValueError(
          f"order names {name!r}, which is no "
          f"stage{configuration.did_you_mean(name, self.stages)} (stages: "
          f"{', '.join(self.stages)})"
        )
    check_open_question(self.eval_open_question)
    if self.answer.protocol != "letters":
      raise ValueError(
        f"answer.protocol = {self.answer.protocol!r} is for mode curate; use 'letters' here"
      )
    if self.eval_max_tokens < 1:
      raise ValueError(f"eval_max_tokens = {self.eval_max_tokens} must be at least 1")
    if not self.order or len(set(self.order)) < len(self.order) or TRAINING in self.order:
      raise ValueError(
        f"order = {self.order}: name each stage once; none may be called {TRAINING!r}"
      )


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
  before, now = begun.get("packing", figures)["examples"], figures["examples"]
  if before != now:
    log.warning(
      "stage %s was begun with %d examples that can be used and has %d now: its next batches are "
      "others than they would have been",
      name,
      before,
      now,
    )
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
  params, base = split_params(policy.params, trainable_filter(stage.trained, family))
  shardings = split_params(policy.shardings, trainable_filter(stage.trained, family))[0]
  tx, schedule = build_optimizer(stage.optimizer, steps)
  place = workdir / TRAINING / name
  place.mkdir(parents=True, exist_ok=True)
  checkpoints = Checkpoints(place, CheckpointConfig(cfg.checkpoint_every_steps, keep=2))
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
  mesh = sharding.make_mesh(configuration.load_section(config, "mesh", sharding.MeshConfig))
  seed = config.get("seed", 0)
  plain = configuration.to_plain({"seed": seed, "pretrain": cfg, "pretrain_policy": section})
  order = [name for name in cfg.order if cfg.stages[name].data is not None]
  for name in cfg.order:
    if name not in order:
      log.info("stage %s is skipped: it has no data", name)
  record = Record(workdir, plain, order)
  done = record.finished()
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
    packers, asked = pack_usable(
      data, asked, _renderer(policy), policy.model.cfg, packs, seeds, rules, workdir
    )
    dtype = ml_dtypes.bfloat16 if cfg.output_dtype == "bfloat16" else np.dtype(cfg.output_dtype)
    for name in packs:
      packer = packers.pop(name)
      params = train_stage(
        name, cfg.stages[name], policy, packer, cfg, seeds[name], mesh, workdir, plain, record
      )
      save_policy(workdir / name, policy, params, dtype)
      # The next stage begins with what was written, as it would in another process.
      params = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)
      policy = dataclasses.replace(policy, params=params)
      record.put(name, finished=True)
      if jax.process_index() == 0:
        shutil.rmtree(workdir / TRAINING / name / "checkpoints")
        log.info("stage %s: wrote %s", name, workdir / name)
    if cfg.eval is not None:
      ask(
        policy,
        asked,
        cfg.eval,
        cfg.answer,
        seed,
        mesh,
        workdir / "vqa.json",
        cfg.eval_open_question,
        cfg.eval_max_tokens,
      )


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
  if jax.process_count() == 1:  # several do not ask
    sharding.check_batch_size(cfg.answer.batch_size, mesh, "pretrain.answer.batch_size")
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
