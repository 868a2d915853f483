"""The judge as one jitted call, for tests that compare it with prompts joined by hand."""

import functools

import jax

from caprl_jax.rl.judge import Judge, JudgeIds, answer_questions, judge_ids


def asked(model, cfg):
  """(params, prompt, ids_BGT, keep_BGT, questions, key) -> Answers, from ids of the judge."""
  run = jax.jit(functools.partial(answer_questions, cfg=cfg))

  def ask(params, prompt, ids_BGT, keep_BGT, questions, key):
    return run(Judge(model, params, prompt), JudgeIds(ids_BGT, keep_BGT), questions, key)

  return ask


def captioned(model, cfg):
  """(params, prompt, captions, questions, vocabulary, key) -> Answers, from policy captions."""
  run = jax.jit(functools.partial(judge_ids, cfg=cfg))

  def ask(params, prompt, captions, questions, vocabulary, key):
    return run(Judge(model, params, prompt), JudgeIds.of(captions, vocabulary), questions, key)

  return ask
