"""Mode `evaluate`: captions of held-out images -> the judge's accuracy, caption length, flat
groups, examples.
"""

import dataclasses
import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.data.batches import eval_batches
from caprl_jax.harness.extras import extra
from caprl_jax.harness.samples import save_samples
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.setup import Run, set_up
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.policy import Policy
from caprl_jax.rl.advantages import flat_groups
from caprl_jax.rl.judge import Judge, JudgeIds, judge_ids
from caprl_jax.rl.reward import score_captions
from caprl_jax.rl.rollout import RolloutConfig, sample_captions
from caprl_jax.rl.step import StepConfig, stage_keys
from caprl_jax.types import Array, Batch, Captions, Frozen, Params, Samples

log = logging.getLogger("caprl_jax.modes.evaluate.run")


def caption_and_judge(
  params: Params,
  frozen: Frozen,
  batch: Batch,
  key: Array,
  *,
  policy: Policy,
  judge: Decoder,
  rollout: RolloutConfig,
  cfg: StepConfig,
) -> tuple[Batch, Samples]:
  """Captions of a batch, their answers and rewards, and the batch without its images; no update.
  One jitted program.
  """
  captions = sample_captions(
    policy, params, batch, stage_keys(key, jnp.int32(0)).rollout, frozen.vocabulary, rollout
  )
  ids = JudgeIds.of(captions, frozen.vocabulary)
  return judge_written(frozen, batch, captions, ids, key, judge=judge, cfg=cfg)


def judge_written(
  frozen: Frozen,
  batch: Batch,
  captions: Captions,
  ids: JudgeIds,
  key: Array,
  *,
  judge: Decoder,
  cfg: StepConfig,
) -> tuple[Batch, Samples]:
  """As `caption_and_judge`, of captions that are written, given in the judge's ids too."""
  answers = judge_ids(
    Judge(judge, frozen.judge, frozen.prompt),
    ids,
    batch.questions,
    stage_keys(key, jnp.int32(0)).judge,
    cfg.judge,
  )
  scored = score_captions(answers, captions, frozen.vocabulary, cfg.reward)
  samples = Samples(captions, answers, scored.reward_BG, scored.scored_BG)
  return batch.replace(images=None, prompts=None), samples


def two_programs(run: Run, rollout: RolloutConfig, cfg):
  """`caption_and_judge` with the captions' text tokenised again in between."""
  write = jax.jit(
    lambda params, frozen, batch, key: sample_captions(
      run.policy.model,
      params,
      batch,
      stage_keys(key, jnp.int32(0)).rollout,
      frozen.vocabulary,
      rollout,
    )
  )
  judge = jax.jit(functools.partial(judge_written, judge=run.judge.model, cfg=cfg))

  def both(params, frozen, batch, key):
    captions = write(params, frozen, batch, key)
    ids, keep, _ = run.translator(jax.device_get(captions))
    ids = sharding.put_batch(JudgeIds(ids, keep), run.mesh)
    return judge(frozen, batch, captions, ids, key)

  return both


class Evaluator:
  """Compiles once; `__call__` evaluates any parameters of the run's captioner."""

  def __init__(self, run: Run):
    self.run = run
    settings = run.settings
    rollout = settings.step.rollout

    def protocol(images: int):
      """Every question once; in the judge's pieces where they fit the batch."""
      judge = settings.step.judge
      pieces = judge.microbatches if images % judge.microbatches == 0 else 1
      return dataclasses.replace(settings.step, judge=judge.each_once(pieces))

    sampling = dataclasses.replace(rollout.sampling, temperature=settings.evaluate.temperature)
    make = lambda group, sampling, images: jax.jit(
      functools.partial(
        caption_and_judge,
        policy=run.policy.model,
        judge=run.judge.model,
        rollout=RolloutConfig(group, sampling),
        cfg=protocol(images),
      ),
      # every process reads the whole batch's figures
      out_shardings=sharding.replicated(run.mesh),
    )
    if run.translator:
      make = lambda group, sampling, images: two_programs(
        run, RolloutConfig(group, sampling), protocol(images)
      )
    self._single = make(1, sampling, settings.evaluate.batch_size)
    self._group = make(rollout.group_size, rollout.sampling, settings.data.batch_size)

  def _batches(self, rows: int, size: int, what: str):
    batcher, seed = self.run.eval, self.run.settings.seed
    rows = min(rows, len(self.run.eval_rows))
    batches = eval_batches(
      batcher.example, rows, size, seed, sharding.batch_share(self.run.mesh, size)
    )
    hidden = jax.process_index() > 0 or None  # None: hidden where there is no terminal
    for batch, real in tqdm(
      batches, total=-(-rows // size), desc=what, unit="batch", leave=False, disable=hidden
    ):
      yield sharding.put_batch(batch, self.run.mesh), real

  def __call__(
    self, params: Params, samples_path: pathlib.Path, stage: str, step: int
  ) -> dict[str, float]:
    """Evaluates on all held-out rows and writes example captions; figures by name."""
    run, cfg = self.run, self.run.settings.evaluate
    key = jax.random.key(run.settings.seed)
    correct, abstained, kind, length, unscored, ended, saved = [], [], [], [], 0, [], []
    for number, (batch, real) in enumerate(
      self._batches(len(run.eval_rows), cfg.batch_size, stage)
    ):
      host, samples = jax.device_get(
        self._single(params, run.frozen, batch, jax.random.fold_in(key, number))
      )
      captions, answers, scored = samples.captions, samples.answers, samples.scored_BG
      valid = answers.valid_BGK[:real, 0]
      correct.append(answers.correct_BGK[:real, 0][valid])
      abstained.append(answers.choice_BGK[:real, 0][valid] < 0)
      kind.append(host.questions.kind_BK[:real][valid])
      length.append(captions.valid_BGT[:real].sum(-1)[:, 0])
      ended.append(captions.ended_BG[:real, 0])
      unscored += int((~scored[:real]).sum())
      saved.append(jax.tree.map(lambda x, real=real: x[:real], (host, samples)))
    correct, abstained, kind, length = (
      np.concatenate(x) for x in (correct, abstained, kind, length)
    )
    flat, groups = 0.0, 0
    for number, (batch, real) in enumerate(
      self._batches(cfg.group_images, run.settings.data.batch_size, "groups")
    ):
      _, samples = jax.device_get(
        self._group(params, run.frozen, batch, jax.random.fold_in(key, 10_000 + number))
      )
      flat += float(np.asarray(flat_groups(samples.reward_BG, samples.scored_BG))[:real].sum())
      groups += real
    figures = {
      "accuracy": float(correct.mean()),
      "abstained": float(abstained.mean()),
      "misled": float((~correct & ~abstained).mean()),
      "questions": int(len(correct)),
      "images": len(length),
      "length_tokens": float(length.mean()),
      "truncated": float(1 - np.concatenate(ended).mean()),
      "flat_groups": flat / max(groups, 1),
      "unscored": unscored,
    }
    figures |= {
      f"accuracy/{name}": float(correct[kind == i].mean())
      for i, name in enumerate(run.kinds)
      if (kind == i).any()
    }
    if jax.process_index() == 0:
      with extra("samples", samples_path):
        save_samples(samples_path, stage, step, saved, run.eval, run.policy.tokenizer, cfg.samples)
    log.info(
      "%s: accuracy %.3f on %d questions (%s), %.1f tokens per caption, flat groups %.2f",
      stage,
      figures["accuracy"],
      len(correct),
      ", ".join(
        f"{n} {figures[f'accuracy/{n}']:.3f}" for n in run.kinds if f"accuracy/{n}" in figures
      ),
      figures["length_tokens"],
      figures["flat_groups"],
    )
    return figures


def run(config, workdir: pathlib.Path) -> None:
  """Evaluates `policy.checkpoint`; writes evaluation.json and samples/evaluation.json, which are no
  other mode's: the workdir may be a training run's."""
  settings = read_settings(config)
  with jax.set_mesh(sharding.make_mesh(settings.mesh)):
    made = set_up(settings, training=False)
    samples = workdir / "samples" / "evaluation.json"
    figures = Evaluator(made)(made.policy.params, samples, "evaluation", 0)
  if jax.process_index() == 0:
    found = {
      "checkpoint": settings.policy.checkpoint,
      "data": settings.data.eval,
      "figures": figures,
      "counts": made.counts,
    }
    write_json(workdir / "evaluation.json", found)
