"""Where a step's time goes, and how much of its work the captions that were written needed.

  python -m benchmarks.step [--model tiny|Qwen/Qwen2.5-VL-3B-Instruct] [--lengths geometric:40]

Random weights, captions of given lengths. Rollout, judge, update and the whole step are programs of
their own; each is timed on its device. "needed" is the arithmetic that the captions call for,
image, prompt and judge's head once each; "executed" is counted while the program's outline runs
with its real values (`benchmarks/parts/executed.py`), "peak" is a large matrix product in the same
precision in the same process. Nothing else should run beside it.
"""

import argparse
import dataclasses
import functools
import io
import json
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from benchmarks.parts import tiny_models
from benchmarks.parts.executed import executed
from benchmarks.parts.timing import best_secs
from caprl_jax import sharding
from caprl_jax.data.batches import ImagePrompt, image_shape, stack
from caprl_jax.data.rows import QARow
from caprl_jax.hub.published_configs import CONFIGS
from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.policy import Policy, PolicyConfig, Remat
from caprl_jax.modes.plan import arithmetic
from caprl_jax.modes.plan.arithmetic import Asked, Step
from caprl_jax.modes.plan.shapes import tower_of
from caprl_jax.rl.advantages import AdvantageConfig
from caprl_jax.rl.groups import Rollout
from caprl_jax.rl.judge_protocol import JudgeConfig
from caprl_jax.rl.loss import LossConfig
from caprl_jax.rl.reward import RewardConfig
from caprl_jax.rl.rollout import RolloutConfig, sample_captions
from caprl_jax.rl.sampling import SamplingConfig
from caprl_jax.rl.step import StepConfig, ask_judge, train_step
from caprl_jax.rl.update import Learner, UpdateConfig, update_policy
from caprl_jax.types import Batch, Frozen, JudgePrompt, Questions, TrainState, Vocabulary


def lengths(spec: str, shape: tuple[int, int], limit: int, rng: np.random.Generator) -> np.ndarray:
  """Tokens of each caption, int32 [B, G], within 1 and `limit`: `fixed`, `geometric:MEAN` or
  `lognormal:MEAN:SIGMA`, whose logarithms correlate by a half within an image."""
  kind, *numbers = spec.split(":")
  if kind == "fixed":
    drawn = np.full(shape, limit)
  elif kind == "geometric":
    drawn = rng.geometric(1 / float(numbers[0]), shape)
  elif kind == "lognormal":
    mean, sigma = map(float, numbers)
    noise = math.sqrt(0.5) * (rng.normal(size=(shape[0], 1)) + rng.normal(size=shape))
    drawn = np.exp(math.log(mean) - sigma**2 / 2 + sigma * noise)
  else:
    raise ValueError(f"--lengths {spec!r}: use fixed, geometric:MEAN or lognormal:MEAN:SIGMA")
  return np.clip(np.round(drawn), 1, limit).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Work:
  """Everything that the stages take."""

  policy: Policy
  judge: Decoder
  cfg: StepConfig
  state: TrainState
  frozen: Frozen
  batch: Batch
  length_BG: jax.Array
  tx: optax.GradientTransformation


def make_work(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Work:
  """Random models of the shapes asked for, drawn images and questions."""
  dtype = jnp.dtype(args.dtype)
  config = tiny_models.CAPTIONER if args.model == "tiny" else CONFIGS[args.model]
  pixels = args.image**2
  cfg = PolicyConfig.from_hf(
    config, dict(min_pixels=pixels, max_pixels=pixels), dtype=dtype, remat=Remat.of(args.remat)
  )
  policy, judge = Policy(cfg), Decoder(judge_cfg)
  rng = np.random.default_rng(0)
  pictures = rng.integers(0, 255, (args.images, args.image, args.image, 3), np.uint8)
  rows = [_row(picture, number) for number, picture in enumerate(pictures)]
  pieces = (list(range(10, 16)), list(range(20, 20 + args.prompt)))
  prompt = ImagePrompt(cfg, pieces, image_shape(rows[:1], cfg))
  images, prompts = zip(*map(prompt, rows))
  B, K, A, O, Q = args.images, args.questions, 4, 2, args.question_tokens
  questions = Questions(
    stem_BKQ=rng.integers(5, 1000, (B, K, Q)).astype(np.int32),
    stem_valid_BKQ=np.ones((B, K, Q), bool),
    option_BKAO=rng.integers(5, 1000, (B, K, A, O)).astype(np.int32),
    option_valid_BKAO=np.ones((B, K, A, O), bool),
    gold_BK=rng.integers(0, A, (B, K)).astype(np.int32),
    valid_BK=np.ones((B, K), bool),
    kind_BK=np.zeros((B, K), np.int32),
    prior_BKA=np.zeros((B, K, A), np.float32),
  )
  batch = Batch(stack(images), stack(prompts), questions, np.arange(B, dtype=np.int32))
  batch = sharding.put_batch(batch, mesh)
  V = cfg.text.vocab_size
  vocabulary = Vocabulary(
    jnp.arange(V) > 4, jnp.arange(V, dtype=jnp.int32) % judge_cfg.vocab_size, (7,), 0
  )
  empty = np.zeros((A, 1), np.int32)
  judge_prompt = JudgePrompt(
    np.arange(10, 40, dtype=np.int32),
    empty,
    np.zeros((A, 1), bool),
    np.zeros(0, np.int32),
    np.arange(A, dtype=np.int32),
    np.zeros(0, np.int32),
  )
  params = jax.jit(
    lambda key: _unboxed(policy.init(key, *jax.tree.map(lambda x: x[:1], (images_of(batch)))))
  )(jax.random.key(0))
  params = jax.tree.map(lambda x: x.astype(args.params), params)
  one = jnp.ones((1, 1), jnp.int32)
  judge_params = jax.jit(
    lambda key: _unboxed(judge.init(key, one, one, one > 0, (), method="extend"))
  )(jax.random.key(1))
  judge_params = jax.tree.map(lambda x: x.astype(dtype), judge_params)
  tx = optax.adamw(1e-6, b2=0.95)
  state = TrainState(jnp.int32(0), params, tx.init(params), jax.random.key(2))
  step = StepConfig(
    RolloutConfig(args.group, SamplingConfig(args.max_tokens)),
    JudgeConfig(blind=False),
    RewardConfig(),
    AdvantageConfig(),
    UpdateConfig(LossConfig(), microbatches=args.microbatches, chunk_tokens=args.chunk_tokens),
  )
  drawn = lengths(args.lengths, (B, args.group), args.max_tokens, rng)
  frozen = Frozen(judge_params, judge_prompt, vocabulary)
  return Work(policy, judge, step, state, frozen, batch, jnp.asarray(drawn), tx)


def images_of(batch: Batch) -> tuple[Any, Any]:
  """What the captioner reads of a batch."""
  return batch.images, batch.prompts


def _unboxed(variables: Any) -> Any:
  return jax.tree.map(
    lambda x: x.unbox() if hasattr(x, "unbox") else x,
    variables["params"],
    is_leaf=lambda x: hasattr(x, "unbox"),
  )


def _row(picture: np.ndarray, number: int) -> QARow:
  file = io.BytesIO()
  Image.fromarray(picture).save(file, "PNG")
  return QARow(file.getvalue(), (), f"{number}")


def stages(work: Work) -> dict[str, tuple[Any, tuple]]:
  """Name -> the stage as a function, and what it is given."""
  cfg, policy = work.cfg, work.policy

  def rollout(params, frozen, batch, length_BG):
    key = jax.random.key(3)
    return sample_captions(policy, params, batch, key, frozen.vocabulary, cfg.rollout, length_BG)

  def judge(state, frozen, batch, captions):
    return ask_judge(state, frozen, batch, captions, judge=work.judge, cfg=cfg)

  def update(state, frozen, batch, captions, advantage_BG):
    learner = Learner(policy, work.tx, cfg.update, cfg.rollout.sampling.temperature)
    scored = jnp.ones(advantage_BG.shape, bool)
    return update_policy(learner, state, frozen, Rollout(batch, captions, scored, advantage_BG))

  def whole(state, frozen, batch, length_BG):
    captions = rollout(state.params, frozen, batch, length_BG)
    return train_step(
      state, frozen, batch, captions, policy=policy, judge=work.judge, tx=work.tx, cfg=cfg
    )

  captions = jax.jit(rollout)(work.state.params, work.frozen, work.batch, work.length_BG)
  np.testing.assert_array_equal(captions.valid_BGT.sum(-1) <= work.length_BG, True)
  advantage = jax.random.normal(jax.random.key(4), captions.ended_BG.shape)
  given = (work.state, work.frozen, work.batch)
  return {
    "rollout": (rollout, (work.state.params, work.frozen, work.batch, work.length_BG)),
    "judge": (judge, (*given, captions)),
    "update": (update, (*given, captions, advantage)),
    "whole": (whole, (*given, work.length_BG)),
  }


def decoder_flops(cfg: DecoderConfig, tokens: float, pairs: float) -> float:
  """Of a forward pass over so many tokens, which see `pairs` tokens in all; no unembedding."""
  heads = cfg.num_heads * cfg.head_dim
  width = cfg.num_kv_heads * cfg.head_dim
  matrices = cfg.hidden_size * (2 * heads + 2 * width + 3 * cfg.intermediate_size)
  return cfg.num_layers * (2 * matrices * tokens + 4 * heads * pairs)


def needed(work: Work, written_BG: np.ndarray) -> dict[str, float]:
  """FLOPs that captions of these lengths call for, by stage."""
  text, judge, B = work.policy.cfg.text, work.judge.cfg, len(written_BG)
  P = work.batch.prompts.tokens_BP.shape[1]
  vision, _ = executed(
    lambda params, images: work.policy.apply(
      {"params": params}, images, method=lambda m, images: m.visual(images)
    ),
    work.state.params,
    work.batch.images,
  )
  n = written_BG.astype(float)
  prefix = vision + B * decoder_flops(text, P, P * (P + 1) / 2)
  run = np.maximum(n - 1, 0)  # the last token never runs
  captions = decoder_flops(text, run.sum(), (run * P + run * (run + 1) / 2).sum())
  head = 2 * text.vocab_size * text.hidden_size * (n.sum() - n.size + B)
  q = work.batch.questions
  K, Q, A, O = *q.stem_BKQ.shape[1:], *q.option_BKAO.shape[2:]
  L = len(work.frozen.prompt.head_L)
  each = K * (Q + A * (O - 1))
  context = n + L
  pairs = n * L + n * (n + 1) / 2 + K * (Q * context + Q * (Q + 1) / 2)
  pairs += K * A * (O - 1) * (context + Q + O / 2)
  asked = decoder_flops(judge, L + n.sum() + n.size * each, L * (L + 1) / 2 + pairs.sum())
  asked += 2 * judge.vocab_size * judge.hidden_size * n.size * K * (1 + A * (O - 1))
  forward = prefix + captions + head
  # While captions are written their first token's logits are the image's own, for all of a group.
  return {
    "rollout": forward,
    "judge": asked,
    "update": 3 * forward,
    "whole": 4 * forward + asked,
  }


def needed_decode_bytes(work: Work, written_BG: np.ndarray) -> float:
  """Bytes of weights and of keys and values that decoding must read: the weights once a token of
  the longest caption, the image's keys once a token of its group's longest, a caption's own as long
  as it is written."""
  text = work.policy.cfg.text
  item = jnp.dtype(text.dtype).itemsize
  slot = 2 * text.num_layers * text.num_kv_heads * text.head_dim * item
  weights = item * (decoder_flops(text, 1, 0) / 2 + text.vocab_size * text.hidden_size)
  n = written_BG.astype(float)
  P = work.batch.prompts.tokens_BP.shape[1]
  return float(weights * n.max() + slot * P * n.max(1).sum() + slot * (n * (n - 1) / 2).sum())


def peak_flops(dtype: Any) -> float:
  """FLOP/s of a large matrix product on one device."""
  size = 2048 if jax.default_backend() == "cpu" else 8192
  x = jnp.ones((size, size), dtype)
  product = jax.jit(lambda x: x @ x)
  product(x).block_until_ready()
  return 2 * size**3 / best_secs(lambda: product(x), 5)


def peak_bandwidth() -> float:
  """Bytes a second that one device reads: the sum of a large array."""
  x = jnp.ones(2**27 if jax.default_backend() == "cpu" else 2**30, jnp.bfloat16)
  total = jax.jit(lambda x: x.astype(jnp.float32).sum())
  total(x).block_until_ready()
  return x.nbytes / best_secs(lambda: total(x), 5)


def arguments() -> argparse.Namespace:
  """What the command line says."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--model", default="tiny", help="tiny, or a name of hub/published_configs.py")
  add("--judge", default="tiny", help="tiny, or a name of a language model there")
  add("--dtype", default="float32", help="of activations and the judge's parameters")
  add("--params", default="float32", help="of the captioner's parameters")
  add("--images", type=int, default=8)
  add("--image", type=int, default=56, help="width and height in pixels")
  add("--group", type=int, default=8)
  add("--prompt", type=int, default=12, help="tokens of the instruction")
  add("--max_tokens", type=int, default=64)
  add("--lengths", default="fixed", help="fixed, geometric:MEAN or lognormal:MEAN:SIGMA")
  add("--questions", type=int, default=4)
  add("--question_tokens", type=int, default=20)
  add("--microbatches", type=int, default=1)
  add("--chunk_tokens", type=int, default=4096)
  add("--remat", action="store_true")
  add("--stages", default="rollout,judge,update,whole", help="which are run")
  add("--repeats", type=int, default=2)
  add("--count", action="store_true", help="count what is executed too: slow at real sizes")
  add("--json", default="", help="a file for the numbers")
  return parser.parse_args()


def main() -> None:
  args = arguments()
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    work = make_work(args, mesh)
    made = stages(work)
    written = np.asarray(made["judge"][1][3].valid_BGT.sum(-1))
    asked_for, peak, bandwidth = needed(work, written), peak_flops(args.dtype), peak_bandwidth()
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {args.model}, judge {args.judge}, {args.dtype}")
    print(
      f"{args.images} images x {args.group} captions, limit {args.max_tokens}, written: mean "
      f"{written.mean():.0f}, longest {written.max()}; prompt of "
      f"{work.batch.prompts.tokens_BP.shape[1]} tokens; {args.microbatches} microbatches"
    )
    print(f"measured peak {peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
    titles = ("stage", "seconds", "compile", "tokens/s", "captions/s", "needed", "executed", "peak")
    print(" ".join(f"{title:>10}" for title in titles))
    report: dict[str, Any] = dict(
      vars(args), device=device, jax=jax.__version__, peak=peak, bandwidth=bandwidth, stages={}
    )
    for name in args.stages.split(","):
      function, given = made[name]
      compiled = jax.jit(function)
      start = time.perf_counter()
      jax.block_until_ready(compiled(*given))
      first = time.perf_counter() - start
      secs = best_secs(functools.partial(compiled, *given), args.repeats)
      flops, moved = executed(function, *given) if args.count else (math.nan, math.nan)
      report["stages"][name] = row = dict(
        secs=secs,
        first_secs=first,
        tokens_per_sec=written.sum() / secs,
        captions_per_sec=written.size / secs,
        needed_gflop=asked_for[name] / 1e9,
        executed_over_needed=flops / asked_for[name],
        needed_over_peak=asked_for[name] / secs / peak,
      )
      if name == "rollout":
        least = needed_decode_bytes(work, written)
        row["decode_bytes_over_needed"] = moved / least
        row["decode_bytes_over_bandwidth"] = least / secs / bandwidth
      print(
        f"{name:>10} {secs:>10.2f} {first - secs:>10.1f} {row['tokens_per_sec']:>10.0f} "
        f"{row['captions_per_sec']:>10.1f} {asked_for[name] / 1e9:>8.1f} G "
        f"{row['executed_over_needed']:>9.2f}x {row['needed_over_peak']:>9.0%}"
      )
    if rollout := report["stages"].get("rollout"):
      print(
        f"decode: bytes of products over needed {rollout['decode_bytes_over_needed']:.2f}, needed "
        f"over bandwidth {rollout['decode_bytes_over_bandwidth']:.0%}"
      )
    stats = jax.devices()[0].memory_stats() or {}
    report["peak_bytes"] = stats.get("peak_bytes_in_use")
    if report["peak_bytes"]:
      print(f"peak memory {report['peak_bytes'] / 2**30:.2f} GiB")
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(report, file, indent=2)


if __name__ == "__main__":
  main()
