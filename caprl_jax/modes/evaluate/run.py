"""Mode `evaluate`: captions of held-out images -> the judge's accuracy, or without a judge the
reward itself; caption length, flat groups, examples.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.data.batches import eval_batches
from caprl_jax.data.usable_rows import NextUsable
from caprl_jax.harness.extras import extra
from caprl_jax.harness.process import peers
from caprl_jax.harness.process.workdir_lock import only_writer
from caprl_jax.harness.samples import save_samples
from caprl_jax.harness.settings import Settings, read_settings
from caprl_jax.harness.setup import Run, set_up
from caprl_jax.harness.training.programs import build_evaluation
from caprl_jax.progress import counted
from caprl_jax.rl.advantages import flat_groups
from caprl_jax.rl.rollout import RolloutConfig
from caprl_jax.rl.step import StepConfig
from caprl_jax.types import Batch, Params, Samples

log = logging.getLogger("caprl_jax.modes.evaluate.run")

EVALUATION = "evaluation.json"


def evaluation_config(settings: Settings, rollout: RolloutConfig, images: int) -> StepConfig:
  """Every question once; in the judge's pieces (of whole images where it sees them, if they fit a
  batch of `images`)."""
  judge = settings.step.judge
  fits = not judge.sees_image or images % judge.microbatches == 0
  pieces = judge.microbatches if fits else 1
  return dataclasses.replace(settings.step, judge=judge.each_once(pieces), rollout=rollout)


Array = np.ndarray | jax.Array


class Evaluator:
  """Compiles once; `__call__` evaluates any parameters of the run's captioner."""

  def __init__(self, run: Run):
    self.run = run
    settings, rollout = run.settings, run.settings.step.rollout
    greedy = dataclasses.replace(rollout.sampling, temperature=settings.evaluate.temperature)
    one, group = RolloutConfig(1, greedy), RolloutConfig(rollout.group_size, rollout.sampling)
    self._single = build_evaluation(
      run, evaluation_config(settings, one, settings.evaluate.batch_size)
    )
    self._group = build_evaluation(
      run, evaluation_config(settings, group, settings.data.batch_size)
    )

  def __call__(
    self, params: Params, samples_path: pathlib.Path, stage: str, step: int
  ) -> dict[str, float]:
    """Evaluates on all held-out rows and writes example captions; figures by name."""
    run, cfg = self.run, self.run.settings.evaluate
    tallies, shown, left = [], [], cfg.samples
    for batch, samples in self._parts(
      self._single, params, len(run.eval_rows), cfg.batch_size, stage
    ):
      tallies.append(Tally.of(batch, samples))
      if left > 0:  # captions and answers of all rows would fill the memory
        shown.append((batch, samples))
        left -= len(batch.row_B)
    figures = figures_of(tallies, run.kinds, run.judged) | self._flat_groups(params)
    if run.settings.step.reward.is_accuracy:
      figures.pop("reward", None)
    if jax.process_index() == 0:
      with extra("samples", samples_path):
        save_samples(samples_path, stage, step, shown, run.eval, run.policy.tokenizer, cfg.samples)
    log.info(
      "%s: %s, %.1f tokens per caption, flat groups %.2f",
      stage,
      self._told(figures),
      figures["length_tokens"],
      figures["flat_groups"],
    )
    return figures

  def _told(self, figures: dict[str, float]) -> str:
    """What the captions earned."""
    run = self.run
    reward = f"reward {figures['reward']:.3f}" if "reward" in figures else ""
    if not run.judged:
      return f"{reward or 'no reward'} on {figures['images'] - figures['unscored']} images"
    known = [name for name in run.kinds if name and f"accuracy/{name}" in figures]
    by_kind = ", ".join(f"{name} {figures[f'accuracy/{name}']:.3f}" for name in known)
    accuracy = f"accuracy {figures['accuracy']:.3f} on {figures['questions']} questions"
    accuracy += f" ({by_kind})" if by_kind else ""
    return f"{accuracy}, {reward}" if reward else accuracy

  def _flat_groups(self, params: Params) -> dict[str, float]:
    """The share of the first `evaluate.group_images` rows whose captions all earn the same."""
    cfg, size = self.run.settings.evaluate, self.run.settings.data.batch_size
    flat, groups = 0.0, 0
    for _, samples in self._parts(self._group, params, cfg.group_images, size, "groups", 10_000):
      flat += float(np.asarray(flat_groups(samples.reward_BG, samples.scored_BG)).sum())
      groups += len(samples.reward_BG)
    return {"flat_groups": flat / max(groups, 1)}

  def _parts(
    self, program, params: Params, rows: int, size: int, what: str, first_key: int = 0
  ) -> Iterator[tuple[Batch, Samples]]:
    """Batches of the first `rows` held-out rows without images, and what was made of them, of numpy
    arrays; a last batch is cut to its real rows."""
    run = self.run
    seed, rows = run.settings.seed, min(rows, len(run.eval_rows))
    share = sharding.batch_share(run.mesh, size)
    # One that cannot be read any more is left out below, by its number.
    absent = lambda batch: dataclasses.replace(batch, row_B=np.int32(-1))
    example = NextUsable(run.eval.example, run.eval_rows, run.bad, absent)
    batches = eval_batches(example, rows, size, seed, share)
    bar = counted(batches, what, "batch", -(-rows // size), shown=jax.process_index() == 0)
    for number, (batch, real) in enumerate(bar):
      peers.check()
      key = jax.random.fold_in(jax.random.key(seed), first_key + number)
      made = jax.device_get(program(params, sharding.put_batch(batch, run.mesh), key))
      there = np.flatnonzero(made[0].row_B[:real] >= 0)
      yield jax.tree.map(lambda x, there=there: x[there], made)


@dataclasses.dataclass(frozen=True)
class Tally:
  """What the figures need of a batch with one caption per image. Of each question that was
  answered: correct, abstained, kind; of each image: length_tokens, ended, scored, reward."""

  correct: Array
  abstained: Array
  kind: Array
  length_tokens: Array
  ended: Array
  scored: Array
  reward: Array

  @classmethod
  def of(cls, batch: Batch, samples: Samples) -> "Tally":
    """Args: of numpy arrays."""
    answers, captions = samples.answers, samples.captions
    valid = answers.valid_BGK[:, 0]
    return cls(
      correct=answers.correct_BGK[:, 0][valid],
      abstained=answers.choice_BGK[:, 0][valid] < 0,
      kind=batch.questions.kind_BK[valid],
      length_tokens=captions.valid_BGT[:, 0].sum(-1),
      ended=captions.ended_BG[:, 0].copy(),  # not a view, which would keep the batch
      scored=samples.scored_BG.copy(),
      reward=samples.reward_BG.copy(),
    )


def figures_of(
  tallies: list[Tally], kinds: tuple[str, ...], judged: bool = True
) -> dict[str, float]:
  """The held-out figures of batches with one caption per image. `reward` is the mean over captions
  that could be scored, and not there without one; judged: a judge has answered questions."""
  of = lambda name: np.concatenate([getattr(tally, name) for tally in tallies])
  correct, abstained, kind, length = map(of, ("correct", "abstained", "kind", "length_tokens"))
  scored = of("scored")
  figures: dict[str, float] = {}
  if judged:
    figures |= {
      "accuracy": float(correct.mean()),
      "abstained": float(abstained.mean()),
      "misled": float((~correct & ~abstained).mean()),
      "questions": len(correct),
    }
  if scored.any():
    figures["reward"] = float(of("reward")[scored].mean(dtype=np.float64))
  figures |= {
    "images": len(length),
    "length_tokens": float(length.mean()),
    "truncated": float(1 - of("ended").mean()),
    "unscored": int((~scored).sum()),
  }
  return figures | {
    f"accuracy/{name}": float(correct[kind == i].mean())
    for i, name in enumerate(kinds)
    if (kind == i).any()
  }


def run(config, workdir: pathlib.Path) -> None:
  """Evaluates `policy.checkpoint`; writes evaluation.json and samples/evaluation.json, which are no
  other mode's: the workdir may be a training run's."""
  settings = read_settings(config)
  with only_writer(workdir / EVALUATION), jax.set_mesh(sharding.make_mesh(settings.mesh)):
    _run(settings, workdir)


def _run(settings: Settings, workdir: pathlib.Path) -> None:
  made = set_up(settings, training=False, workdir=workdir)
  samples = workdir / "samples" / EVALUATION
  figures = Evaluator(made)(made.policy.params, samples, "evaluation", 0)
  left_out = len(made.bad.rows)
  if left_out:
    log.warning("the figures leave out %d rows that cannot be used", left_out)
  if jax.process_index() == 0:
    found = {
      "checkpoint": settings.policy.checkpoint,
      "data": settings.data.eval,
      "figures": figures,
      "counts": made.counts,
    }
    write_json(workdir / EVALUATION, found)
