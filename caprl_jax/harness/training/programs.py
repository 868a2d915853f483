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
from caprl_jax.harness.training.compile_times import timed_first
from caprl_jax.harness.training.stages import Made, Numbers, StagesBefore
from caprl_jax.harness.training.state import abstract_state, policy_shardings
from caprl_jax.inference.judge import JudgeSection
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.policy import Policy
from caprl_jax.models.trainable import split_params, trainable_filter
from caprl_jax.rl.reward import ArrayReward, own_reward, score_captions
from caprl_jax.rl.step import StepConfig, ask_judge, train_step, write_captions
from caprl_jax.types import (
  Answers,
  Batch,
  Captions,
  Frozen,
  OwnReward,
  Samples,
  TrainState,
)


def rollout_shardings(shardings: Any, mesh: jax.sharding.Mesh) -> Any:
  """Of the policy's parameters while captions are written; None where they need not move."""
  return sharding.gathered(shardings) if sharding.splits_parameters(mesh) else None


def judge_shardings(section: JudgeSection, params: Any, mesh: jax.sharding.Mesh) -> Any:
  """Of the judge's parameters while it is asked; None where they need not move. params: arrays, or
  structs that say where they lie; None without a judge on the mesh."""
  if params is None or not section.gather_once or not sharding.splits_parameters(mesh):
    return None
  return sharding.gathered(jax.tree.map(lambda x: x.sharding, params))


def build_step(
  made: Run,
  tx: optax.GradientTransformation,
  schedule: Callable[[jax.Array], jax.Array] | None = None,
) -> "Callable[..., tuple[TrainState, Numbers, Samples]] | StepApart":
  """Training's `(state, batch) -> (state, metrics, samples)`, the state donated: one program, or
  several where the host stands between them (`Run.several_programs`) or `train.fused` is off.

  The judge is an argument of the program, never a constant in it.
  """
  cfg, everywhere = made.settings.step, sharding.replicated(made.mesh)
  moved = _moved(made)
  stages = functools.partial(
    train_step,
    policy=made.policy.model,
    judge=made.judge.model if made.judge else None,
    tx=tx,
    cfg=cfg,
    kinds=made.kinds,
    schedule=schedule,
    custom=array_reward(made),
    **moved,
  )
  # The state comes out where it went in: another layout would compile the step anew. Metrics and
  # samples are for every process to read.
  step = jax.jit(
    stages,
    donate_argnums=0,
    out_shardings=(_state_shardings(made, tx), everywhere, everywhere),
  )
  if made.settings.train.fused and not made.several_programs:
    return lambda state, batch: step(state, made.frozen, batch)
  return StepApart(made.frozen, StagesBefore(made, cfg, moved, made.train), step)


def _moved(made: Run) -> dict[str, Any]:
  """Where parameters lie while captions are written and while the judge is asked."""
  return dict(
    rollout_shardings=rollout_shardings(made.policy.shardings, made.mesh),
    judge_shardings=judge_shardings(made.settings.judge, made.frozen.judge, made.mesh),
  )


class StepApart:
  """A step as several programs, each timed. `before` leaves the state as it is: a signal may end it
  at once, and it may wait for a server."""

  def __init__(self, frozen: Frozen, stages: StagesBefore, step: Callable[..., Any]):
    self.frozen, self.stages, self.step = frozen, stages, step

  def before(self, state: TrainState, batch: Batch) -> tuple[Made, Numbers]:
    """What rollout, judge and a reward of texts make, and their numbers."""
    clock = StageClock()
    made, numbers = self.stages(state, self.frozen, batch, clock)
    return made, numbers | _times(clock)

  def __call__(
    self, state: TrainState, batch: Batch, found: tuple[Made, Numbers] | None = None
  ) -> tuple[TrainState, Numbers, Samples]:
    """The step; `found` is what `before` gave, where that was called already."""
    made, numbers = found or self.before(state, batch)
    clock = StageClock()
    with clock("update"):
      state, metrics, samples = self.step(state, self.frozen, batch, *made)
      jax.block_until_ready(metrics)
    return state, {**metrics, **numbers, **_times(clock)}, samples


def _times(clock: StageClock) -> Numbers:
  return {f"time/{stage}_secs": np.float32(secs) for stage, secs in clock.secs.items()}


def build_evaluation(
  made: Run, cfg: StepConfig
) -> Callable[[Any, Batch, jax.Array], tuple[Batch, Samples]]:
  """Evaluation's `(params, batch, key) -> (the batch without its images, samples)`, of all of a
  captioner's parameters: one program, or several where the host stands between them."""
  frozen, moved = dataclasses.replace(made.frozen, base=None, reference=None), _moved(made)
  judged = jax.jit(
    functools.partial(
      caption_and_judge,
      policy=made.policy.model,
      judge=made.judge.model if made.judge else None,
      cfg=cfg,
      custom=array_reward(made),
      **moved,
    ),
    # every process reads the whole batch's figures
    out_shardings=sharding.replicated(made.mesh),
  )
  judged = timed_first(judged, "compiling the evaluation")
  before = StagesBefore(made, cfg, moved, made.eval) if made.several_programs else None

  def evaluate(params: Any, batch: Batch, key: jax.Array) -> tuple[Batch, Samples]:
    state = TrainState(jnp.int32(0), params, (), key)
    found = before(state, frozen, batch, StageClock())[0] if before else ()
    return judged(state, frozen, batch, *found)

  return evaluate


def array_reward(made: Run) -> ArrayReward | None:
  """The user's reward function where it is one of arrays."""
  custom = made.custom
  return custom.array_reward if custom is not None and not custom.of_texts else None


def caption_and_judge(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  captions: Captions | None = None,
  answers: Answers | None = None,
  own: OwnReward | None = None,
  *,
  policy: Policy,
  judge: Decoder | Policy | None,
  cfg: StepConfig,
  rollout_shardings: Any = None,
  judge_shardings: Any = None,
  custom: ArrayReward | None = None,
) -> tuple[Batch, Samples]:
  """As `train_step`, but without an update: the batch without its images, and samples."""
  captions = captions or write_captions(state, frozen, batch, policy, cfg, rollout_shardings)
  answers = answers or ask_judge(state, frozen, batch, captions, judge, cfg, judge_shardings)
  own = own or own_reward(custom, captions, answers, batch.questions)
  scored = score_captions(answers, captions, frozen.vocabulary, cfg.reward, own)
  samples = Samples(captions, answers, scored.reward_BG, scored.scored_BG)
  return dataclasses.replace(batch, images=None, prompts=None, sight=None), samples


def _state_shardings(made: Run, tx: optax.GradientTransformation) -> TrainState:
  kind = trainable_filter(made.settings.policy.trainable, made.policy.model.cfg.family)
  params, _ = split_params(made.policy.params, kind)
  memory = made.settings.optimizer.moment_memory
  state = abstract_state(params, tx, policy_shardings(made), made.mesh, memory)
  return jax.tree.map(lambda x: x.sharding, state)
