"""The jitted programs of training and evaluation: one, or several with the host in between."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from caprl_jax import sharding
from caprl_jax.harness.metrics import StageClock
from caprl_jax.harness.setup import Run
from caprl_jax.harness.training.state import abstract_state, policy_shardings
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.policy import Policy
from caprl_jax.models.trainable import split_params, trainable_filter
from caprl_jax.progress import saying_first
from caprl_jax.rl.judge import JudgeIds
from caprl_jax.rl.reward import score_captions
from caprl_jax.rl.step import StepConfig, ask_judge, train_step, write_captions
from caprl_jax.types import Answers, Batch, Captions, Frozen, Samples, TrainState

Numbers = dict[str, Any]  # metrics by name


def rollout_shardings(shardings: Any, mesh: jax.sharding.Mesh) -> Any:
  """Of the policy's parameters while captions are written; None where they need not move."""
  return sharding.gathered(shardings) if sharding.splits_parameters(mesh) else None


def build_step(
  made: Run,
  tx: optax.GradientTransformation,
  schedule: Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Numbers, Samples]]:
  """Training's `(state, batch) -> (state, metrics, samples)`, the state donated: one program, or
  three where captions have to be tokenised again between them or `train.fused` is off.

  The judge is an argument of the program, never a constant in it.
  """
  cfg, everywhere = made.settings.step, sharding.replicated(made.mesh)
  moved = rollout_shardings(made.policy.shardings, made.mesh)
  stages = functools.partial(
    train_step,
    policy=made.policy.model,
    judge=made.judge.model,
    tx=tx,
    cfg=cfg,
    kinds=made.kinds,
    schedule=schedule,
    rollout_shardings=moved,
  )
  # The state comes out where it went in: another layout would compile the step anew. Metrics and
  # samples are for every process to read.
  step = jax.jit(
    stages,
    donate_argnums=0,
    out_shardings=(_state_shardings(made, tx), everywhere, everywhere),
  )
  if made.settings.train.fused and not made.translator:
    return lambda state, batch: step(state, made.frozen, batch)
  before = _stages_before(made, cfg, moved)

  def timed(state: TrainState, batch: Batch) -> tuple[TrainState, Numbers, Samples]:
    clock = StageClock()
    captions, answers, numbers = before(state, made.frozen, batch, clock)
    with clock("update"):
      state, metrics, samples = step(state, made.frozen, batch, captions, answers)
      jax.block_until_ready(metrics)
    times = {f"time/{stage}_secs": np.float32(secs) for stage, secs in clock.secs.items()}
    return state, {**metrics, **numbers, **times}, samples

  return timed


def build_evaluation(
  made: Run, cfg: StepConfig
) -> Callable[[Any, Batch, jax.Array], tuple[Batch, Samples]]:
  """Evaluation's `(params, batch, key) -> (the batch without its images, samples)`, of all of a
  captioner's parameters: one program, or three where captions have to be tokenised again."""
  frozen = dataclasses.replace(made.frozen, base=None, reference=None)
  judged = jax.jit(
    functools.partial(caption_and_judge, policy=made.policy.model, judge=made.judge.model, cfg=cfg),
    # every process reads the whole batch's figures
    out_shardings=sharding.replicated(made.mesh),
  )
  judged = saying_first(judged, "compiling the evaluation")
  before = _stages_before(made, cfg, None) if made.translator else None

  def evaluate(params: Any, batch: Batch, key: jax.Array) -> tuple[Batch, Samples]:
    state = TrainState(jnp.int32(0), params, (), key)
    written = before(state, frozen, batch, StageClock())[:2] if before else ()
    return judged(state, frozen, batch, *written)

  return evaluate


def caption_and_judge(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  captions: Captions | None = None,
  answers: Answers | None = None,
  *,
  policy: Policy,
  judge: Decoder | Policy,
  cfg: StepConfig,
) -> tuple[Batch, Samples]:
  """As `train_step`, but without an update: the batch without its images, and samples."""
  captions = captions or write_captions(state, frozen, batch, policy, cfg)
  answers = answers or ask_judge(state, frozen, batch, captions, judge=judge, cfg=cfg)
  scored = score_captions(answers, captions, frozen.vocabulary, cfg.reward)
  samples = Samples(captions, answers, scored.reward_BG, scored.scored_BG)
  return dataclasses.replace(batch, images=None, prompts=None, sight=None), samples


def _stages_before(
  made: Run, cfg: StepConfig, moved: Any
) -> Callable[[TrainState, Frozen, Batch, StageClock], tuple[Captions, Answers, Numbers]]:
  """Rollout and judge as programs of their own: `(state, frozen, batch, clock) -> (captions,
  answers, metrics)`. Waits for each; `clock` gets its seconds."""
  split = sharding.batch_sharding(made.mesh)  # each process reads the captions of its images
  write = jax.jit(
    functools.partial(write_captions, policy=made.policy.model, cfg=cfg, rollout_shardings=moved),
    out_shardings=split,
  )
  ask = jax.jit(functools.partial(ask_judge, judge=made.judge.model, cfg=cfg), out_shardings=split)
  mean = jax.jit(jnp.mean, out_shardings=sharding.replicated(made.mesh))

  def run(
    state: TrainState, frozen: Frozen, batch: Batch, clock: StageClock
  ) -> tuple[Captions, Answers, Numbers]:
    numbers, retokenised = {}, None
    with clock("rollout"):
      captions = jax.block_until_ready(write(state, frozen, batch))
    if made.translator:
      mine = sharding.own_rows((captions.tokens_BGT, captions.valid_BGT))
      ids, keep, cut = sharding.put_batch(made.translator(*mine), made.mesh)
      retokenised = JudgeIds(ids, keep)
      numbers["judge/cut"] = mean(cut)
    with clock("judge"):
      answers = jax.block_until_ready(ask(state, frozen, batch, captions, retokenised))
    return captions, answers, numbers

  return run


def _state_shardings(made: Run, tx: optax.GradientTransformation) -> TrainState:
  kind = trainable_filter(made.settings.policy.trainable, made.policy.model.cfg.family)
  params, _ = split_params(made.policy.params, kind)
  state = abstract_state(params, tx, policy_shardings(made), made.mesh)
  return jax.tree.map(lambda x: x.sharding, state)
