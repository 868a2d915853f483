"""Mode `train`: gate, evaluation, CapRL, evaluation, report. Resumes where it stopped."""

import functools
import json
import logging
import pathlib
import platform

import jax
import jax.numpy as jnp
import optax

from caprl_jax import __version__, configuration, sharding
from caprl_jax.checkpoint import Checkpoints
from caprl_jax.data.batches import train_iterator
from caprl_jax.evaluate import Evaluator
from caprl_jax.files import write_json
from caprl_jax.loop import run_loop
from caprl_jax.metrics import StageClock
from caprl_jax.models.load import save_policy
from caprl_jax.models.lora import save_adapters, split, trained, whole
from caprl_jax.optimizer import build_optimizer
from caprl_jax.report import write_report
from caprl_jax.samples import save_samples
from caprl_jax.setup_run import Run, gate, read_settings, set_up, workdir_file
from caprl_jax.step import judge_and_learn, train_step, write_captions
from caprl_jax.types import Params, TrainState

log = logging.getLogger("caprl_jax.train")


class Summary:
  """summary.json: written after each stage, read when a run resumes."""

  def __init__(self, workdir: pathlib.Path):
    self.path = workdir_file(workdir)
    self.values = json.loads(self.path.read_text()) if self.path.exists() else {}

  def put(self, **values) -> None:
    self.values |= values
    if jax.process_index() == 0:
      write_json(self.path, self.values)


def versions() -> dict[str, str]:
  """What the run ran on."""
  device = jax.devices()[0]
  return {"caprl_jax": __version__, "python": platform.python_version(), "jax": jax.__version__,
          "optax": optax.__version__, "device": f"{len(jax.devices())} x {device.device_kind}"}


def make_state(params: Params, tx: optax.GradientTransformation, shardings, seed: int, mesh) -> TrainState:
  """The state before the first step. It owns `params`, and is donated to the step with them."""
  opt_state = jax.jit(tx.init, out_shardings=sharding.optimizer_shardings(tx, params, shardings, mesh))(params)
  put = lambda x: jax.device_put(x, sharding.replicated(mesh))
  return TrainState(put(jnp.int32(0)), params, opt_state, put(jax.random.key(seed)))


def abstract_state(params: Params, tx: optax.GradientTransformation, shardings, mesh) -> TrainState:
  """Shapes and shardings of the state, for restoring one without having another in memory."""
  with_sharding = lambda tree, places: jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)
  params = with_sharding(params, shardings)
  opt_state = with_sharding(jax.eval_shape(tx.init, params), sharding.optimizer_shardings(tx, params, shardings, mesh))
  scalar = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh))
  return TrainState(scalar(jnp.int32(0)), params, opt_state, scalar(jax.random.key_data(jax.random.key(0))))


def rollout_shardings(shardings, mesh):
  """Of the policy's parameters while captions are written; None where they need not move."""
  return sharding.gathered(shardings) if sharding.splits_parameters(mesh) else None


def policy_shardings(made: Run):
  """Shardings of the parameters that are trained."""
  kind = made.settings.policy.trainable
  return split(made.policy.shardings, trained(kind, made.policy.model.cfg.family))[0]


def build_step(made: Run, tx: optax.GradientTransformation):
  """The one jit of training: `(state, batch) -> (state, metrics, samples)`, the state donated. The judge is an
  argument of the program, never a constant in it. Two jits where captions have to be translated between them."""
  if made.translator:
    return _build_two_programs(made, tx)
  stages = functools.partial(train_step, policy=made.policy.model, judge=made.judge.model, tx=tx,
                             cfg=made.settings.step, kinds=made.kinds,
                             rollout_shardings=rollout_shardings(made.policy.shardings, made.mesh))
  step = None

  def run(state: TrainState, batch):
    nonlocal step
    if step is None:  # the state comes out where it went in: another layout would compile the step anew
      shardings = jax.tree.map(lambda x: x.sharding, state)
      everywhere = sharding.replicated(made.mesh)  # every process reads metrics and samples
      step = jax.jit(stages, donate_argnums=0, out_shardings=(shardings, everywhere, everywhere))
    return step(state, made.frozen, batch)

  return run


def _build_two_programs(made: Run, tx: optax.GradientTransformation):
  cfg, everywhere = made.settings.step, sharding.replicated(made.mesh)
  write = jax.jit(functools.partial(write_captions, policy=made.policy.model, cfg=cfg,
                                    rollout_shardings=rollout_shardings(made.policy.shardings, made.mesh)))
  stages = functools.partial(judge_and_learn, policy=made.policy.model, judge=made.judge.model, tx=tx, cfg=cfg,
                             kinds=made.kinds)
  learn = None

  def run(state: TrainState, batch):
    nonlocal learn
    if learn is None:
      shardings = jax.tree.map(lambda x: x.sharding, state)
      learn = jax.jit(stages, donate_argnums=0, out_shardings=(shardings, everywhere, everywhere))
    captions = write(state, made.frozen, batch)
    ids, keep, cut = made.translator(jax.device_get(captions))
    ids, keep = sharding.put_batch((ids, keep), made.mesh)
    state, metrics, samples = learn(state, made.frozen, batch, captions, ids, keep)
    return state, {**metrics, "judge/cut": jnp.float32(cut)}, samples

  return run


def train(made: Run, config: dict, workdir: pathlib.Path) -> TrainState:
  """Runs the CapRL steps from the newest checkpoint, if there is one; else from `made.policy.params`, which the steps
  use up."""
  settings = made.settings
  tx, _ = build_optimizer(settings.optimizer, settings.train.steps)
  kind = trained(settings.policy.trainable, made.policy.model.cfg.family)
  params, shardings = split(made.policy.params, kind)[0], policy_shardings(made)
  share = sharding.batch_share(made.mesh, settings.data.batch_size)
  iterator = train_iterator(made.train.example, len(made.train_rows), settings.data.batch_size, settings.seed, share)
  checkpoints = Checkpoints(workdir, settings.checkpoint)
  if checkpoints.latest_step() is not None:
    state, position = checkpoints.restore(abstract_state(params, tx, shardings, made.mesh))
    iterator.set_state(position)
    log.info("resuming after step %d", int(state.step))
  else:
    state = make_state(params, tx, shardings, settings.seed, made.mesh)

  def keep_samples(step: int, batch, samples) -> None:
    if step == 1 or step % settings.train.sample_every == 0:
      host = jax.tree.map(lambda x: x[share], jax.device_get(samples))
      save_samples(workdir / "samples" / f"step_{step:06d}.json", "train", step, [(batch, host)], made.train,
                   made.policy.tokenizer, settings.train.sample_images)

  try:
    return run_loop(build_step(made, tx), state, iterator, steps=settings.train.steps, mesh=made.mesh,
                    checkpoints=checkpoints, config=config, workdir=workdir, what="CapRL", reward_name="reward/mean",
                    on_samples=keep_samples)
  finally:
    checkpoints.close()


def run(config, workdir: pathlib.Path) -> None:
  """All stages; a stage that summary.json already holds is not run again."""
  settings = read_settings(config)
  plain = configuration.to_plain(config)
  summary = Summary(workdir)
  old = summary.values.get("config")
  if old is not None and {**old, "train": None} != {**plain, "train": None}:
    changed = [k for k in plain if old.get(k) != plain[k]]
    raise ValueError(f"{workdir} holds a run of another config (differing: {changed}); use another --workdir, or "
                     "delete it")
  if "after" in summary.values and summary.values.get("config") == plain:
    log.info("this run is complete: accuracy %.3f -> %.3f; see %s", summary.values["before"]["accuracy"],
             summary.values["after"]["accuracy"], workdir / "report.html")
    return
  clock = StageClock(summary.values.get("wall_secs"))
  with jax.set_mesh(sharding.make_mesh(settings.mesh)):
    with clock("setup"):
      made = set_up(settings)
    with clock("gate"):
      figures = gate(made)
    summary.put(gate=figures, counts=made.counts, versions=versions(), config=plain, wall_secs=clock.secs)
    evaluator = Evaluator(made)
    if "before" not in summary.values:
      with clock("before"):
        before = evaluator(made.policy.params, workdir / "samples" / "before.json", "before", 0)
      summary.put(before=before, wall_secs=clock.secs)
    try:
      with clock("train"):
        state = jax.block_until_ready(train(made, plain, workdir))
    finally:
      summary.put(wall_secs=clock.secs)
      if jax.process_index() == 0:
        write_report(workdir)
    with clock("after"):
      params = whole(state.params, made.frozen.base)
      after = evaluator(params, workdir / "samples" / "after.json", "after", settings.train.steps)
    summary.put(after=after, wall_secs=clock.secs)
    save_policy(workdir / "policy", made.policy, params)
    if settings.policy.trainable == "lora":
      save_adapters(workdir / "adapters", params, settings.policy.lora, settings.policy.checkpoint)
  if jax.process_index() == 0:
    log.info("report: %s   captioner: %s", write_report(workdir), workdir / "policy")
