"""The stages of a step before its update as programs of their own, with the host between them: for
captions that have to be tokenised again, a judge behind an endpoint or one that writes its scores,
and a reward of texts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.data.batches import QABatcher
from caprl_jax.data.rows import Question
from caprl_jax.harness.metrics import StageClock
from caprl_jax.harness.rewards.texts import TextReward
from caprl_jax.harness.setup import Run
from caprl_jax.inference.endpoint_judge import EndpointJudge
from caprl_jax.inference.image_judge import written_answers
from caprl_jax.rl.judge import JudgeIds
from caprl_jax.rl.judge_protocol import presentations
from caprl_jax.rl.step import StepConfig, ask_judge, judge_texts, stage_keys, write_captions
from caprl_jax.types import (
  Answers,
  Array,
  Batch,
  Captions,
  Frozen,
  OwnReward,
  TrainState,
)

Numbers = dict[str, Any]  # metrics by name
# What `train_step` takes of it: captions, answers and the user's reward.
Made = tuple[Captions, Answers, OwnReward | None]


class StagesBefore:
  """Rollout, judge and a reward of texts, each on its own.

  Args:
    moved: where the captioner's parameters lie while captions are written, and the judge's while it
      is asked (`rollout_shardings` and `judge_shardings` of `programs.py`).
    batcher: what the batches are made by, whose rows they count.
  """

  def __init__(self, made: Run, cfg: StepConfig, moved: dict[str, Any], batcher: QABatcher):
    self.made, self.cfg, self.batcher = made, cfg, batcher
    split = sharding.batch_sharding(made.mesh)  # each process reads the captions of its images
    jit = functools.partial(jax.jit, out_shardings=split)
    self._write = jit(
      functools.partial(
        write_captions,
        policy=made.policy.model,
        cfg=cfg,
        rollout_shardings=moved["rollout_shardings"],
      )
    )
    self._written = made.settings.judge.writes_scores
    self._ask = jit(
      functools.partial(
        judge_texts if self._written else ask_judge,
        judge=made.judge.model if made.judge else None,
        cfg=cfg,
        judge_shardings=moved["judge_shardings"],
      )
    )
    self._draw = jit(self._presentations)
    self._mean = jax.jit(jnp.mean, out_shardings=sharding.replicated(made.mesh))
    self._reward = None
    if made.custom is not None and made.custom.of_texts:
      asked = made.settings.policy.instruction
      self._reward = TextReward(
        made.custom, batcher.rows, made.policy.tokenizer, asked, made.judged
      )

  def __call__(
    self, state: TrainState, frozen: Frozen, batch: Batch, clock: StageClock
  ) -> tuple[Made, Numbers]:
    """Runs the stages and waits for each; `clock` gets its seconds. The numbers are metrics."""
    with clock("rollout"):
      captions = jax.block_until_ready(self._write(state, frozen, batch))
    with clock("judge"):
      answers, numbers = self._judged(state, frozen, batch, captions)
    own = None
    if self._reward is not None:
      with clock("reward"):
        own = self._rewarded(self._reward, batch, captions, answers)
    return (captions, answers, own), numbers

  def _judged(
    self, state: TrainState, frozen: Frozen, batch: Batch, captions: Captions
  ) -> tuple[Answers, Numbers]:
    made, mesh = self.made, self.made.mesh
    if made.endpoint is not None:
      return self._asked(made.endpoint, state, batch, captions), {}
    retokenised, numbers = None, {}
    if made.translator is not None:
      mine = sharding.own_rows((captions.tokens_BGT, captions.valid_BGT))
      ids, keep, cut = sharding.put_batch(made.translator(*mine), mesh)
      retokenised, numbers = JudgeIds(ids, keep), {"judge/cut": self._mean(cut)}
    found = self._ask(state, frozen, batch, captions, retokenised=retokenised)
    if self._written:
      found, unread = self._scored(batch, *found)
      numbers["judge/unread"] = unread
    return jax.block_until_ready(found), numbers

  def _scored(self, batch: Batch, tokens: Array, valid: Array) -> tuple[Answers, Array]:
    """Answers from what the judge wrote about the captions, and the share that could not be read.
    Each process reads what is about its own images."""
    judge, section = self.made.judge, self.made.settings.judge
    assert judge is not None
    tokens_BGT, valid_BGT, valid_BK = sharding.own_rows((tokens, valid, batch.questions.valid_BK))
    text_of = judge.tokenizer.decode_written
    texts = [
      [text_of(ids[kept]) for ids, kept in zip(tokens_GT, valid_GT)]
      for tokens_GT, valid_GT in zip(tokens_BGT, valid_BGT)
    ]
    answers, unread_B = written_answers(
      texts,
      valid_BK,
      len(section.scores),
      section.weights,
      unread_is_zero=section.score_unread == "zero",
      blind=self.cfg.judge.blind,  # not of an evaluation
    )
    answers, unread_B = sharding.put_batch((answers, unread_B), self.made.mesh)
    return answers, self._mean(unread_B)

  def _presentations(self, key: Array, step: Array, batch: Batch) -> Any:
    """What is asked about each caption, and about an empty one where the judge's blind answers are
    a metric."""
    group = self.cfg.rollout.group_size + self.cfg.judge.blind
    return presentations(batch.questions, group, stage_keys(key, step).judge, self.cfg.judge)

  def _asked(
    self, judge: EndpointJudge, state: TrainState, batch: Batch, captions: Captions
  ) -> Answers:
    """The answers of a judge behind an endpoint. Each process asks about its own images."""
    bare = Batch(None, None, batch.questions, batch.row_B)  # type: ignore[arg-type]  unused here
    drawn = sharding.own_rows(self._draw(state.key, state.step, bare))
    tokens, valid, row_B, index_BK = sharding.own_rows(
      (captions.tokens_BGT, captions.valid_BGT, batch.row_B, batch.question_BK)
    )
    decode = self.made.policy.tokenizer.decode
    texts = [
      [decode(tokens[b, g][valid[b, g]]) for g in range(tokens.shape[1])] for b in range(len(row_B))
    ]
    judge_cfg = self.cfg.judge
    answers = judge.answers(texts, self._questions(row_B, index_BK), drawn, blind=judge_cfg.blind)
    return sharding.put_batch(answers, self.made.mesh)

  def _questions(self, row_B: np.ndarray, index_BK: np.ndarray) -> list[list[Question | None]]:
    """The question in each place of the batch; None where there is none."""
    return [
      [self.batcher.rows[int(row)].questions[i] if i >= 0 else None for i in index_K.tolist()]
      for row, index_K in zip(row_B, index_BK)
    ]

  def _rewarded(
    self, reward: TextReward, batch: Batch, captions: Captions, answers: Answers
  ) -> OwnReward:
    mine = sharding.own_rows(
      (
        batch.row_B,
        captions.tokens_BGT,
        captions.valid_BGT,
        answers.credit_BGK,
        answers.asked_BGK,
        answers.valid_BGK,
      )
    )
    row_B, tokens, valid, credit, asked, answered = mine
    count = asked.sum(-1)
    read = (count > 0) & (answered | ~asked).all(-1)
    share = (credit * asked).sum(-1) / np.maximum(count, 1)
    found = reward(row_B, tokens, valid, np.where(read, share, np.nan))
    return OwnReward(*sharding.put_batch(found, self.made.mesh))
