"""What a step saves by running what captions share once: the image and the prompt once for a group
of captions, a caption once for all questions about it.

  python -m benchmarks.sharing [--group 2,4,8] [--prompt 100,1300]

The same captions, questions and weights with sharing switched off: every caption is a group of its
own, whose image and prompt are encoded again, and every question a prompt of its own, with the
judge's head and the caption in it. Scores and gradient are compared, seconds measured; FLOPs are
the arithmetic that either way calls for (`benchmarks/step.py` counts what is executed: 1.04 times
as much where all captions are as long as the limit). Small random models; nothing else should run
beside it.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.parts.timing import best_secs
from benchmarks.step import Work, make_work, needed
from caprl_jax import sharding
from caprl_jax.modes.plan.arithmetic import decoder_flops
from caprl_jax.rl.groups import Rollout
from caprl_jax.rl.judge import Judge, JudgeIds, judge_ids
from caprl_jax.rl.rollout import sample_captions
from caprl_jax.rl.update import Learner, loss_gradients
from caprl_jax.types import Captions


def wide(tree: Any, times: int) -> Any:
  """Every row of a batch so many times, one after the other."""
  return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def stages(work: Work, share: bool) -> dict[str, Callable[..., Any]]:
  """Name -> the stage as a function of captions ("rollout": of none), with sharing or without."""
  cfg, G = work.cfg, work.cfg.rollout.group_size
  batch = work.batch if share else wide(work.batch, G)
  group = G if share else 1

  def regrouped(captions: Captions) -> Captions:
    return jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[2:]), captions)

  def rollout(params, frozen):
    settings = dataclasses.replace(cfg.rollout, group_size=group)
    length = work.length_BG.reshape(-1, group)
    key = jax.random.key(3)
    return sample_captions(
      work.policy, params, batch, key, frozen.vocabulary, settings, length
    ).logp_BGT

  def judge(judge_params, frozen, captions):
    prompt, ids = frozen.prompt, JudgeIds.of(captions, frozen.vocabulary)
    questions, K = work.batch.questions, work.batch.questions.valid_BK.shape[1]
    if not share:  # a row a question: its head, the caption, the question
      head = jnp.asarray(prompt.head_L)
      ids = wide(jax.tree.map(lambda x: x.reshape(-1, 1, x.shape[-1]), ids), K)
      N = len(ids.tokens_BGT)
      front = jnp.broadcast_to(head[1:], (N, 1, len(head) - 1))
      ids = JudgeIds(
        jnp.concatenate([front, ids.tokens_BGT], axis=-1),
        jnp.concatenate([jnp.ones(front.shape, bool), ids.keep_BGT], axis=-1),
      )
      questions = jax.tree.map(lambda x: x.reshape(N, 1, *x.shape[2:]), wide(questions, G))
      prompt = prompt.replace(head_L=head[:1])
    asked = Judge(work.judge, judge_params, prompt)
    return judge_ids(asked, ids, questions, jax.random.key(5), cfg.judge).score_BGKA

  def update(params, frozen, captions, advantage_BG):
    learner = Learner(work.policy, work.tx, cfg.update)
    captions, advantage = regrouped(captions), advantage_BG.reshape(-1, group)
    rollout = Rollout(batch, captions, jnp.ones(advantage.shape, bool), advantage)
    return loss_gradients(learner, params, frozen, rollout).grads

  return {"rollout": rollout, "judge": judge, "update": update}


def needed_alone(work: Work) -> dict[str, float]:
  """FLOPs of each stage with sharing switched off, for captions that are as long as the limit."""
  shared = needed(work, np.asarray(work.length_BG))
  text, judge, q = work.policy.cfg.text, work.judge.cfg, work.batch.questions
  (B, G), n = work.length_BG.shape, float(work.length_BG.max())
  P, L = work.batch.prompts.tokens_BP.shape[1], len(work.frozen.prompt.head_L)
  K, Q, A, O = *q.stem_BKQ.shape[1:], *q.option_BKAO.shape[2:]
  run = n - 1  # the last token never runs
  captions = B * G * decoder_flops(text, run, run * P + run * (run + 1) / 2)
  logits = 2 * text.vocab_size * text.hidden_size
  prefix = shared["rollout"] - captions - logits * (B * G * run + B)  # of all images
  forward = G * prefix + captions + logits * B * G * n
  before = L + n + Q
  options = A * (O - 1)
  pairs = before * (before + 1) / 2 + options * (before + O / 2)
  asked = decoder_flops(judge, before + options, pairs)
  asked += 2 * judge.vocab_size * judge.hidden_size * (1 + options)
  return {"rollout": forward, "judge": B * G * K * asked, "update": 3 * forward}


def check(shared: dict[str, Any], alone: dict[str, Any]) -> None:
  """Raises AssertionError where sharing changes more than rounding."""
  np.testing.assert_allclose(
    np.ravel(alone["judge"]), np.ravel(shared["judge"]), rtol=1e-3, atol=1e-3
  )
  for a, b in zip(jax.tree.leaves(alone["update"]), jax.tree.leaves(shared["update"]), strict=True):
    scale = float(jnp.abs(b).max()) + 1e-12
    np.testing.assert_allclose(a, b, atol=2e-3 * scale)


def measure(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Seconds and FLOPs of each stage, with sharing and without."""
  work = make_work(args, mesh)
  key, cfg = jax.random.key(3), work.cfg
  captions = jax.jit(
    lambda params: sample_captions(
      work.policy, params, work.batch, key, work.frozen.vocabulary, cfg.rollout, work.length_BG
    )
  )(work.state.params)
  advantage = jax.random.normal(jax.random.key(4), captions.ended_BG.shape)
  given = {
    "rollout": (work.state.params, work.frozen),
    "judge": (work.frozen.judge, work.frozen, captions),
    "update": (work.state.params, work.frozen, captions, advantage),
  }
  row: dict[str, Any] = {}
  made: dict[bool, dict[str, Any]] = {}
  asked_for = {True: needed(work, np.asarray(work.length_BG)), False: needed_alone(work)}
  for share in (True, False):
    made[share] = {}
    for name, function in stages(work, share).items():
      compiled = jax.jit(function)
      made[share][name] = jax.block_until_ready(compiled(*given[name]))
      secs = best_secs(functools.partial(compiled, *given[name]), args.repeats)
      flops = asked_for[share][name]
      row[f"{name}_{'shared' if share else 'alone'}"] = dict(secs=secs, gflop=flops / 1e9)
  check(made[True], made[False])
  for what in ("secs", "gflop"):
    for share in ("shared", "alone"):
      row[f"whole_{share}_{what}"] = sum(
        row[f"{name}_{share}"][what] for name in ("rollout", "judge", "update")
      )
  return row


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  numbers = lambda text: [int(x) for x in text.split(",")]
  add = parser.add_argument
  add("--group", type=numbers, default=[8], help="captions an image, several by commas")
  add("--prompt", type=numbers, default=[1300], help="tokens of the prompt")
  add("--max_tokens", type=numbers, default=[400], help="tokens of each caption")
  add("--questions", type=numbers, default=[8], help="questions about each image")
  add("--images", type=int, default=2)
  add("--microbatches", type=int, default=1)
  add("--repeats", type=int, default=1)
  add("--json", default="", help="a file for the numbers")
  args = parser.parse_args()
  fixed = dict(
    model="tiny",
    judge="tiny",
    dtype="float32",
    params="float32",
    image=56,
    lengths="fixed",
    question_tokens=20,
    chunk_tokens=1024,
    remat=False,
    attention="xla",
  )
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  device, rows = jax.devices()[0].device_kind, []
  print(f"{device}, jax {jax.__version__}, {args.images} images; without sharing over with it")
  titles = (
    "group",
    "prompt",
    "caption",
    "questions",
    "FLOPs",
    "time",
    "rollout",
    "judge",
    "update",
  )
  print(" ".join(f"{title:>9}" for title in titles))
  with jax.set_mesh(mesh):
    for sizes in itertools.product(args.group, args.prompt, args.max_tokens, args.questions):
      names = dict(zip(("group", "prompt", "max_tokens", "questions"), sizes, strict=True))
      begun = time.perf_counter()
      row = measure(argparse.Namespace(**{**vars(args), **fixed, **names}), mesh)
      rows.append({**names, **row, "measured_in_secs": time.perf_counter() - begun})
      flops = row["whole_alone_gflop"] / row["whole_shared_gflop"]
      ratio = lambda name, row=row: row[f"{name}_alone"]["secs"] / row[f"{name}_shared"]["secs"]
      print(
        " ".join(f"{size:>9}" for size in sizes),
        f"{flops:>8.2f}x {row['whole_alone_secs'] / row['whole_shared_secs']:>8.2f}x",
        " ".join(f"{ratio(name):>8.2f}x" for name in ("rollout", "judge", "update")),
        flush=True,
      )
  if args.json:
    report = dict(device=device, jax=jax.__version__, images=args.images, rows=rows)
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(report, file, indent=2)


if __name__ == "__main__":
  main()
