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
from caprl_jax.rl.advantages import flat_groups
from caprl_jax.rl.judge import judge_captions, judge_ids
from caprl_jax.rl.reward import caption_reward
from caprl_jax.rl.rollout import RolloutConfig, sample_captions
from caprl_jax.rl.step import stage_keys
from caprl_jax.types import Batch, Frozen, Params

log = logging.getLogger("caprl_jax.modes.evaluate.run")


def caption_and_judge(
  params: Params, frozen: Frozen, batch: Batch, key, *, policy, judge, rollout: RolloutConfig, cfg
):
  """The batch without its images, captions, their answers and rewards; no update. One jitted
  program.
  """
  caption_key, judge_key = stage_keys(key, jnp.int32(0))
  captions = sample_captions(policy, params, batch, caption_key, frozen.vocabulary, rollout)
  answers, _ = judge_captions(
    judge,
    frozen.judge,
    frozen.prompt,
    captions,
    batch.questions,
    frozen.vocabulary,
    judge_key,
    cfg.judge,
  )
  reward_BG, scored_BG, _ = caption_reward(answers, captions, cfg.reward, frozen.stamps_VX)
  return batch.replace(images=None, prompts=None), captions, answers, reward_BG, scored_BG


def judge_translated(frozen: Frozen, batch: Batch, captions, ids_BGT, keep_BGT, key, *, judge, cfg):
  """As `caption_and_judge`, for captions in the judge's ids."""
  _, judge_key = stage_keys(key, jnp.int32(0))
  answers, _ = judge_ids(
    judge, frozen.judge, frozen.prompt, ids_BGT, keep_BGT, batch.questions, judge_key, cfg.judge
  )
  reward_BG, scored_BG, _ = caption_reward(answers, captions, cfg.reward, frozen.stamps_VX)
  return batch.replace(images=None, prompts=None), captions, answers, reward_BG, scored_BG


def two_programs(run: Run, rollout: RolloutConfig, cfg):
  """`caption_and_judge` with the captions' text tokenised anew in between."""
  write = jax.jit(
    lambda params, frozen, batch, key: sample_captions(
      run.policy.model, params, batch, stage_keys(key, jnp.int32(0))[0], frozen.vocabulary, rollout
    )
  )
  judge = jax.jit(functools.partial(judge_translated, judge=run.judge.model, cfg=cfg))

  def both(params, frozen, batch, key):
    captions = write(params, frozen, batch, key)
    ids, keep, _ = run.translator(jax.device_get(captions))
    return judge(frozen, batch, captions, *sharding.put_batch((ids, keep), run.mesh), key)

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
      host, captions, answers, reward, scored = jax.device_get(
        self._single(params, run.frozen, batch, jax.random.fold_in(key, number))
      )
      valid = answers.valid_BGK[:real, 0]
      correct.append(answers.correct_BGK[:real, 0][valid])
      abstained.append(answers.choice_BGK[:real, 0][valid] < 0)
      kind.append(host.questions.kind_BK[:real][valid])
      length.append(captions.valid_BGT[:real].sum(-1)[:, 0])
      ended.append(captions.ended_BG[:real, 0])
      unscored += int((~scored[:real]).sum())
      saved.append(
        jax.tree.map(
          lambda x, real=real: x[:real], (host, (captions, answers, reward, scored, None))
        )
      )
    correct, abstained, kind, length = (
      np.concatenate(x) for x in (correct, abstained, kind, length)
    )
    flat, groups = 0.0, 0
    for number, (batch, real) in enumerate(
      self._batches(cfg.group_images, run.settings.data.batch_size, "groups")
    ):
      *_, reward, scored = jax.device_get(
        self._group(params, run.frozen, batch, jax.random.fold_in(key, 10_000 + number))
      )
      flat += float(np.asarray(flat_groups(reward, scored))[:real].sum())
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
      "%s: accuracy %.3f on %d questions (%s), %.1f tokens a caption, flat groups %.2f",
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
