"""Where a step's time goes, and how much of its work the captions that were written needed.

  python -m benchmarks.step [--model tiny|Qwen/Qwen2.5-VL-3B-Instruct] [--lengths geometric:40]

Images of several sizes (`--image 224x224,896x448`) are padded to the largest, as a training batch
without buckets of shapes is; "needed" has all of them as large.

Random weights, captions of given lengths. Rollout, judge, update and the whole step are programs of
their own; each is timed on its device. "needed" is the arithmetic that the captions call for, as
mode `plan` reckons it: image, prompt and judge's head once each. "executed" is counted while the
program's outline runs with its real values (`benchmarks/parts/executed.py`), "peak" is a large
matrix product in the same precision in the same process. Nothing else should run beside it.
"""

import argparse
import dataclasses
import functools
import io
import itertools
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
from caprl_jax.models.attention_choice import choose_attention
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
from caprl_jax.types import Batch, Captions, Frozen, JudgePrompt, Questions, TrainState, Vocabulary


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


def image_sizes(spec: str | int, count: int) -> list[tuple[int, int]]:
  """Width and height of each image in pixels: `448`, `896x448`, or several of these in turn."""
  sides = [[int(side) for side in one.split("x")] for one in str(spec).split(",")]
  return [(side[0], side[-1]) for side, _ in zip(itertools.cycle(sides), range(count))]


@dataclasses.dataclass(frozen=True)
class Work:
  """Everything that the stages take."""

  policy: Policy
  judge: Decoder
  cfg: StepConfig
  state: TrainState
  frozen: Frozen
  batch: Batch
  image: tuple[int, int]  # height and width
  length_BG: jax.Array
  tx: optax.GradientTransformation


def make_work(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Work:
  """Random models of the shapes asked for, drawn images and questions."""
  dtype = jnp.dtype(args.dtype)
  config = _config(args.model, tiny_models.CAPTIONER)
  sizes = image_sizes(args.image, args.images)
  areas = [width * height for width, height in sizes]
  cfg = PolicyConfig.from_hf(
    config,
    dict(min_pixels=min(areas), max_pixels=max(areas)),
    dtype=dtype,
    remat=Remat.of(args.remat),
  )
  judge_cfg = DecoderConfig.from_hf(_config(args.judge, tiny_models.JUDGE), dtype=dtype)
  platform = jax.default_backend()
  cfg, notice = choose_attention(cfg, args.attention, platform, "captioner")
  judge_cfg, more = choose_attention(judge_cfg, args.attention, platform, "judge")
  for said in filter(None, (notice, more)):
    print(said)
  policy, judge = Policy(cfg), Decoder(judge_cfg)
  rng = np.random.default_rng(0)
  pictures = (rng.integers(0, 255, (height, width, 3), np.uint8) for width, height in sizes)
  rows = [_row(picture, number) for number, picture in enumerate(pictures)]
  pieces = (list(range(10, 16)), list(range(20, 20 + args.prompt)))
  prompt = ImagePrompt(cfg, pieces, image_shape(rows, cfg))
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
  width, height = max(sizes, key=math.prod)
  size = (height, width)
  return Work(policy, judge, step, state, frozen, batch, size, jnp.asarray(drawn), tx)


def _config(model: str | dict, tiny: dict) -> dict:
  """config.json of "tiny", of a published model, or the one given."""
  if isinstance(model, dict):
    return model
  return tiny if model == "tiny" else CONFIGS[model]


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


def _write(work: Work, params, frozen, batch, length_BG) -> Captions:
  """Captions of the given lengths."""
  key, cfg = jax.random.key(3), work.cfg.rollout
  return sample_captions(work.policy, params, batch, key, frozen.vocabulary, cfg, length_BG)


def whole_step(work: Work) -> tuple[Any, tuple]:
  """The whole step as a function, and what it is given."""

  def whole(state, frozen, batch, length_BG):
    captions = _write(work, state.params, frozen, batch, length_BG)
    models = dict(policy=work.policy, judge=work.judge, tx=work.tx, cfg=work.cfg)
    return train_step(state, frozen, batch, captions, **models)

  return whole, (work.state, work.frozen, work.batch, work.length_BG)


def stages(work: Work) -> dict[str, tuple[Any, tuple]]:
  """Name -> the stage as a function, and what it is given."""
  cfg, policy = work.cfg, work.policy
  rollout = functools.partial(_write, work)

  def judge(state, frozen, batch, captions):
    return ask_judge(state, frozen, batch, captions, work.judge, cfg)

  def update(state, frozen, batch, captions, advantage_BG):
    learner = Learner(policy, work.tx, cfg.update, cfg.rollout.sampling.temperature)
    scored = jnp.ones(advantage_BG.shape, bool)
    return update_policy(learner, state, frozen, Rollout(batch, captions, scored, advantage_BG))

  captions = jax.jit(rollout)(work.state.params, work.frozen, work.batch, work.length_BG)
  np.testing.assert_array_equal(captions.valid_BGT.sum(-1) <= work.length_BG, True)
  advantage = jax.random.normal(jax.random.key(4), captions.ended_BG.shape)
  given = (work.state, work.frozen, work.batch)
  return {
    "rollout": (rollout, (work.state.params, work.frozen, work.batch, work.length_BG)),
    "judge": (judge, (*given, captions)),
    "update": (update, (*given, captions, advantage)),
    "whole": whole_step(work),
  }


def planned(work: Work, written_BG: np.ndarray) -> Step:
  """A step with captions of these lengths, as mode `plan` reckons it."""
  q, params = work.batch.questions, work.state.params
  K, Q, A, O = *q.stem_BKQ.shape[1:], *q.option_BKAO.shape[2:]
  return Step(
    tower_of(work.policy.cfg, params, work.image),
    work.policy.cfg.text,
    work.batch.prompts.tokens_BP.shape[1],
    written_BG,
    work.judge.cfg,
    Asked(len(work.frozen.prompt.head_L), K, Q, A, O - 1, logits=1 + A * (O - 1)),
    learned=len(written_BG),
  )


def needed(work: Work, written_BG: np.ndarray) -> dict[str, float]:
  """FLOPs that captions of these lengths call for, by stage."""
  found = arithmetic.needed(planned(work, written_BG))
  return {**found, "whole": sum(found.values())}


def needed_decode_bytes(work: Work, written_BG: np.ndarray) -> float:
  """Bytes of weights and of keys and values that decoding must read."""
  item = jnp.dtype(work.policy.cfg.text.dtype).itemsize
  return arithmetic.decode_bytes(planned(work, written_BG)) * item / 2


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
  add("--image", default="56", help="pixels: a square's side, or 224x224,896x448 in turn")
  add("--group", type=int, default=8)
  add("--prompt", type=int, default=12, help="tokens of the instruction")
  add("--max_tokens", type=int, default=64)
  add("--lengths", default="fixed", help="fixed, geometric:MEAN or lognormal:MEAN:SIGMA")
  add("--questions", type=int, default=4)
  add("--question_tokens", type=int, default=20)
  add("--microbatches", type=int, default=1)
  add("--chunk_tokens", type=int, default=4096)
  add("--attention", default="xla", help="xla, kernel or auto; several by commas")
  add("--remat", action="store_true")
  add("--stages", default="rollout,judge,update,whole", help="which are run")
  add("--repeats", type=int, default=2)
  add("--count", action="store_true", help="count what is executed too: slow at real sizes")
  add("--json", default="", help="a file for the numbers")
  return parser.parse_args()


def times(ratio: float | None) -> str:
  """Of the table; `-` where it was not counted."""
  return "-" if ratio is None else f"{ratio:.2f}x"


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """One table, and its numbers."""
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    work = make_work(args, mesh)
    made = stages(work)
    written = np.asarray(made["judge"][1][3].valid_BGT.sum(-1))
    asked_for, peak, bandwidth = needed(work, written), peak_flops(args.dtype), peak_bandwidth()
    device = jax.devices()[0].device_kind
    models = f"{args.model}, judge {args.judge}, {args.dtype}, attention {args.attention}"
    print(f"{device}, jax {jax.__version__}, {models}")
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
      flops, moved = executed(function, *given) if args.count else (None, None)
      report["stages"][name] = row = dict(
        secs=secs,
        first_secs=first,
        tokens_per_sec=written.sum() / secs,
        captions_per_sec=written.size / secs,
        needed_gflop=asked_for[name] / 1e9,
        executed_over_needed=flops and flops / asked_for[name],
        needed_over_peak=asked_for[name] / secs / peak,
      )
      if name == "rollout":
        least = needed_decode_bytes(work, written)
        row["decode_bytes_over_needed"] = moved and moved / least
        row["decode_bytes_over_bandwidth"] = least / secs / bandwidth
      print(
        f"{name:>10} {secs:>10.2f} {first - secs:>10.1f} {row['tokens_per_sec']:>10.0f} "
        f"{row['captions_per_sec']:>10.1f} {asked_for[name] / 1e9:>8.1f} G "
        f"{times(row['executed_over_needed']):>10} {row['needed_over_peak']:>9.0%}"
      )
    if rollout := report["stages"].get("rollout"):
      print(
        f"decode: bytes of products over needed {times(rollout['decode_bytes_over_needed'])}, "
        f"needed over bandwidth {rollout['decode_bytes_over_bandwidth']:.0%}"
      )
    stats = jax.devices()[0].memory_stats() or {}
    report["peak_bytes"] = stats.get("peak_bytes_in_use")
    if report["peak_bytes"]:
      print(f"peak memory {report['peak_bytes'] / 2**30:.2f} GiB")
  return report


def main() -> None:
  args = arguments()
  kinds = args.attention.split(",")
  reports = [measure(argparse.Namespace(**dict(vars(args), attention=kind))) for kind in kinds]
  for name, row in reports[0]["stages"].items() if len(kinds) > 1 else ():
    ratios = [row["secs"] / other["stages"][name]["secs"] for other in reports[1:]]
    print(f"{name}: {kinds[0]} takes {', '.join(f'{x:.2f}' for x in ratios)} times as long")
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(reports[0] if len(reports) == 1 else reports, file, indent=2)


if __name__ == "__main__":
  main()
