"""Mode `train`: gate, evaluation, CapRL, evaluation, report. Resumes where it stopped."""

import logging
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import optax

from caprl_jax import sharding
from caprl_jax.config import registry
from caprl_jax.config import schema as configuration
from caprl_jax.errors import UserError
from caprl_jax.harness.buckets.shared import saved_steps
from caprl_jax.harness.checkpoints import Checkpoints
from caprl_jax.harness.extras import extra
from caprl_jax.harness.gate import gate
from caprl_jax.harness.loop import run_loop
from caprl_jax.harness.metrics import StageClock
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.run_record import RunRecord
from caprl_jax.harness.process.versions import versions
from caprl_jax.harness.process.workdir_lock import only_run
from caprl_jax.harness.samples import save_samples
from caprl_jax.harness.sections import load_trained
from caprl_jax.harness.settings import Settings, read_settings
from caprl_jax.harness.setup import Run, set_up
from caprl_jax.harness.trackers import Tracker, open_trackers
from caprl_jax.harness.training.made_of import bind_models
from caprl_jax.harness.training.profile import Profile
from caprl_jax.harness.training.programs import StepApart, build_step
from caprl_jax.harness.training.rounding import rounding_effect
from caprl_jax.harness.training.row_batches import TrainingRows, training_batches
from caprl_jax.harness.training.state import (
  abstract_state,
  make_optimizer,
  make_state,
  policy_shardings,
  rate_change,
  rollout_images,
)
from caprl_jax.harness.training.summary import Best, Summary
from caprl_jax.harness.training.trained import Trained, find_run
from caprl_jax.harness.watch import Watch
from caprl_jax.hub.load import Loaded, save_policy
from caprl_jax.hub.lora import save_adapters
from caprl_jax.models.trainable import merge_params, split_params, trainable_filter
from caprl_jax.modes.evaluate.run import Evaluator
from caprl_jax.modes.train.report import write_report
from caprl_jax.types import Batch, Params, Samples, TrainState

log = logging.getLogger("caprl_jax.modes.train.run")

# What may change when a run goes on: it changes no step, or is said (`_begin_record`). Checkpoint
# and judge are bound by what their files hold, not by where they lie.
FREE = (
  "train.*",
  "checkpoint.*",
  "mesh.*",
  "gate.*",
  "optimizer.moment_memory",
  "optimizer.schedule_steps",
  "policy.checkpoint",
  "policy.remat",
  "policy.tower_remat",
  "policy.decoder_remat",
  "policy.attention",
  "judge.attention",
  "judge.gather_once",
  "judge.source",
  "judge.endpoint.url",
  "judge.endpoint.api_key_env",
  "judge.endpoint.concurrency",
  "judge.endpoint.timeout_secs",
  "judge.endpoint.max_retries",
  "judge.endpoint.max_failures",
  "judge.microbatches",
  "judge.chunk_tokens",
  "policy_update.microbatches",
  "policy_update.chunk_tokens",
  "rollout.sampling.chunks",
  "data.bad_rows",
  "data.shape_buckets",
  "evaluate.batch_size",
  "evaluate.every_steps",
  "evaluate.samples",
)


def train(
  made: Run, config: dict, workdir: pathlib.Path, evaluator: Evaluator | None = None
) -> TrainState:
  """Runs the CapRL steps from the newest checkpoint, if there is one; else from
  `made.policy.params`, which the steps use up. `evaluator` is for held-out figures on the way
  (`evaluate.every_steps`)."""
  settings = made.settings
  tx, schedule = make_optimizer(settings)
  images = rollout_images(settings)
  share = sharding.batch_share(made.mesh, images)
  checkpoints = Checkpoints(workdir, settings.checkpoint)
  iterator = training_batches(
    workdir / "train_rows.json",
    TrainingRows(made.train_rows, made.mixture, made.digests, made.shapes, made.bad),
    lambda shapes: made.train.padded(shapes).example,
    cfg=made.policy.model.cfg,
    batch_size=images,
    shape_buckets=settings.data.shape_buckets,
    seed=settings.seed,
    share=share,
    goes_on=checkpoints.latest_step() is not None,
  )
  state = _first_state(made, tx, checkpoints, iterator)
  trackers = _open_trackers(settings, workdir, config, int(state.step))
  best = Best(made.policy, workdir, _headline(settings))

  def held_out(step: int, state: TrainState) -> dict[str, float]:
    params = merge_params(state.params, made.frozen.base)
    figures = evaluator(params, workdir / "samples" / f"eval_{step:06d}.json", "eval", step)
    best.keep(step, params, figures)
    return {f"eval/{name}": value for name, value in figures.items()}

  profile = Profile(settings.train.profile_steps, workdir / "profile")
  step = build_step(made, tx, schedule)
  try:
    return run_loop(
      profile.of(step),
      state,
      iterator,
      steps=settings.train.steps,
      mesh=made.mesh,
      checkpoints=checkpoints,
      config=config,
      workdir=workdir,
      what="CapRL",
      reward_name="reward/mean",
      on_samples=_sample_keeper(made, workdir, share, trackers),
      evaluate=held_out if evaluator else None,
      evaluate_every=settings.evaluate.every_steps,
      trackers=trackers,
      watch=Watch(settings.train.stop_if, settings.train.warn_if),
      skip_nonfinite=settings.train.skip_nonfinite,
      before=step.before if isinstance(step, StepApart) else None,
    )
  finally:
    profile.close()
    checkpoints.close()
    for tracker in trackers:
      tracker.close()


def _first_state(
  made: Run, tx: optax.GradientTransformation, checkpoints: Checkpoints, iterator: Any
) -> TrainState:
  """The newest checkpoint's, which puts the iterator behind its last batch; else one with the
  captioner as it was loaded."""
  kind = trainable_filter(made.settings.policy.trainable, made.policy.model.cfg.family)
  params, shardings = split_params(made.policy.params, kind)[0], policy_shardings(made)
  memory = made.settings.optimizer.moment_memory
  if checkpoints.latest_step() is None:
    return make_state(params, tx, shardings, made.settings.seed, made.mesh, memory)
  state, position = checkpoints.restore(abstract_state(params, tx, shardings, made.mesh, memory))
  iterator.set_state(position)
  log.info("resuming after step %d", int(state.step))
  return state


def _open_trackers(
  settings: Settings, workdir: pathlib.Path, config: dict, step: int
) -> list[Tracker]:
  """What `train.trackers` names, on the main process. A run goes on without them where they do not
  open."""
  if jax.process_index() > 0:
    return []
  names = settings.train.trackers
  try:
    return open_trackers(names, workdir, config, step, settings.train.wandb_mode)
  except Exception as error:  # noqa: BLE001  a service's client raises anything
    log.warning("the run goes on without trackers %s: %s", list(names), error)
    return []


def _sample_keeper(
  made: Run, workdir: pathlib.Path, share: Sequence[int], trackers: Sequence[Tracker]
) -> Callable[[int, Batch, Samples], None]:
  """The loop's `on_samples`: writes some steps' samples, and gives them to the trackers.

  Args:
    share: the places in the batch that this process made.
  """
  cfg = made.settings.train

  def keep_samples(step: int, batch: Batch, samples: Samples) -> None:
    if step > 1 and step % cfg.sample_every:
      return
    host = jax.tree.map(lambda x: x[share], jax.device_get(samples))
    path = workdir / "samples" / f"step_{step:06d}.json"
    with extra("samples", path):
      save_samples(
        path,
        "train",
        step,
        [(batch, host)],
        made.train,
        made.policy.tokenizer,
        cfg.sample_images,
      )
      for tracker in trackers:
        tracker.samples(step, path)

  return keep_samples


def run(config, workdir: pathlib.Path) -> None:
  """All stages. What a kill left undone is done by the same command; a finished run is left as it
  is, but for what is missing of what it left, unless `train.steps` was raised: then it goes on."""
  settings = read_settings(config)
  _check_base(settings)
  settings.policy.check_exact("mode train changes")
  with only_run(workdir):
    _run(settings, configuration.to_plain(config), workdir)


def _check_base(settings: Settings) -> None:
  """Raises UserError for adapters on a run's checkpoint, onto which PEFT could not load them."""
  policy = settings.policy
  if policy.trainable == "lora" and (run := find_run(policy.checkpoint)):
    raise UserError(
      f"policy.checkpoint = {policy.checkpoint!r} is a training run, and the base of adapters must "
      "be a folder that PEFT can load: write one with `--config=configs/export.py "
      f"--config.export.run={run.place} --config.export.output=FOLDER`, and name that"
    )


def _run(settings: Settings, plain: dict, workdir: pathlib.Path) -> None:
  summary = Summary(workdir)
  record = _begin_record(summary, settings, workdir)
  done = record.complete_step
  if done is not None and done >= settings.train.steps:
    _make_again(settings, workdir, record)
    name = _headline(settings)
    log.info(
      "this run is complete after step %d: %s %.3f -> %.3f; see %s",
      done,
      name,
      summary.values["before"].get(name, math.nan),
      summary.values["after"].get(name, math.nan),
      workdir / "report.html",
    )
    return
  record.reopen()
  summary.drop("complete", "after")  # a run of an older version may have `complete` here
  clock = StageClock(summary.values.get("wall_secs"))
  with jax.set_mesh(sharding.make_mesh(settings.mesh)):
    with clock("setup"):
      made = set_up(settings, workdir=workdir, record=record)
    with clock("gate"):
      figures = gate(made)
    summary.put(
      gate=figures, counts=made.counts, versions=versions(), config=plain, wall_secs=clock.secs
    )
    if settings.policy.lora.base_weights and "rounding" not in summary.values:
      with clock("rounding"):
        effect = rounding_effect(made)
      summary.put(rounding=effect, wall_secs=clock.secs)
    evaluator = Evaluator(made)
    if "before" not in summary.values:
      with clock("before"):
        before = evaluator(made.policy.params, workdir / "samples" / "before.json", "before", 0)
      summary.put(before=before, wall_secs=clock.secs)
    try:
      with clock("train"):
        state = jax.block_until_ready(train(made, plain, workdir, evaluator))
    finally:
      summary.put(wall_secs=clock.secs)
      report(workdir)
    step, params = int(state.step), merge_params(state.params, made.frozen.base)
    with clock("after"):
      after = evaluator(params, workdir / "samples" / "after.json", "after", step)
    if settings.evaluate.every_steps:
      Best(made.policy, workdir, _headline(settings)).keep(step, params, after)
    summary.put(after=after, wall_secs=clock.secs)
    save_captioner(settings, workdir, made.policy, params, ("policy", "adapters"))
  report(workdir)
  record.finish(step)
  log.info("report: %s   captioner: %s", workdir / "report.html", workdir / "policy")


def _headline(settings: Settings) -> str:
  """The held-out figure that says how good a captioner is."""
  return "accuracy" if settings.judge.named else "reward"


def _begin_record(summary: Summary, settings: Settings, workdir: pathlib.Path) -> RunRecord:
  """The run's record. Raises ValueError where the workdir holds another mode's summary, or a run of
  another config."""
  if summary.values and "config" not in summary.values:
    raise ValueError(f"{summary.path} is not a training run's; use another --workdir")
  record, older = RunRecord(workdir, "train"), None
  if summary.values and not record.values:  # of a version that kept no record
    config = registry.with_new_names(summary.values["config"])
    older = configuration.to_plain(read_settings(ml_collections.ConfigDict(config)).sections())
  goes_on = bool(summary.values)
  changed = record.begin(settings.sections(), FREE, goes_on=goes_on, older=older)
  then = {one.key: one.then for one in changed}
  if steps := saved_steps(workdir):
    said = rate_change(
      settings,
      then.get("train.steps", settings.train.steps),
      then.get("optimizer.schedule_steps", settings.optimizer.schedule_steps),
      steps[-1],
    )
    if said:
      log.warning("%s", said)
  return record


def _make_again(settings: Settings, workdir: pathlib.Path, record: RunRecord) -> None:
  """Makes what is missing of what a finished run leaves, from its last checkpoint. Raises
  ValueError where the checkpoint is missing too, or what it was trained from is another one."""
  files = {
    "policy": workdir / "policy" / "config.json",
    "adapters": workdir / "adapters" / "adapter_config.json",
    "report": workdir / "report.html",
  }
  if settings.policy.trainable != "lora":
    del files["adapters"]
  # the first process decides for all: it may write while others still look
  missing = from_first(lambda: [name for name, path in files.items() if not path.exists()])
  if {"policy", "adapters"} & {*missing}:
    bind_models(record, settings, goes_on=True)
    with jax.set_mesh(sharding.make_mesh(settings.mesh)):
      loaded, _ = load_trained(settings.policy, Trained(workdir), jax.sharding.get_mesh())
      save_captioner(settings, workdir, loaded, loaded.params, missing)
  if "report" in missing:
    report(workdir)
  if missing:
    log.info("made again, since missing: %s", ", ".join(missing))


def save_captioner(
  settings: Settings,
  workdir: pathlib.Path,
  policy: Loaded,
  params: Params,
  parts: Sequence[str],
) -> None:
  """Writes `policy` and, of a LoRA run, `adapters`: those that `parts` names. All processes call
  it."""
  if "policy" in parts:
    save_policy(workdir / "policy", policy, params)
  if "adapters" in parts and settings.policy.trainable == "lora":
    save_adapters(workdir / "adapters", params, settings.policy.lora, settings.policy.checkpoint)


def report(workdir: pathlib.Path) -> None:
  """Writes report.html, on the main process."""
  if jax.process_index() == 0:
    with extra("the report", workdir / "report.html"):
      write_report(workdir)
