"""CapRL on one 16 GB chip: Qwen3-VL-2B with LoRA adapters, a 0.6B judge, easy-VQA's images.

  python -m caprl_jax.main --config=configs/colab_lora.py --workdir=runs/colab_lora

Only adapters are trained: 4 images x 4 captions of up to 64 tokens a step. Base and judge are
bfloat16.

Not run yet, on Colab or elsewhere. By estimate, a step takes 6.4 GiB of the chip's 16
(docs/tpu.md).
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "train"
  config.seed = 0
  config.mesh = dict(data=-1, fsdp=1, tensor=1)

  config.policy = dict(
    checkpoint="Qwen/Qwen3-VL-2B-Instruct",
    instruction="Describe this image in one short sentence.",
    dtype="bfloat16",
    param_dtype="bfloat16",
    remat=True,
    trainable="lora",
    lora=dict(
      rank=16,
      alpha=32.0,
      targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    min_pixels=256 * 256,
    max_pixels=256 * 256,
  )
  config.judge = dict(
    source="Qwen/Qwen3-0.6B",
    dtype="bfloat16",
    reading="letter_argmax",
    prompt="official",
    abstain="last",
    permutations=2,
    microbatches=1,
  )

  config.data = dict(
    train="easy_vqa:train",
    eval="easy_vqa:test",
    batch_size=4,
    questions=2,
    max_train_rows=400,
    max_eval_rows=160,
  )
  config.question_filter = dict(
    informed=(
      "The image shows a {color} {shape}.",
      "The image shows a {color} {shape} on a light background.",
    ),
    mismatched=4,
    min_informed=0.75,
    max_blind=0.25,
  )
  config.gate = dict(
    ideal="The image shows a {color} {shape} on a light background.",
    generic="A simple picture.",
    min_gap=0.3,
  )

  config.rollout = dict(group_size=4, oversample=1, sampling=dict(max_tokens=64, temperature=1.0))
  config.reward = dict(accuracy=1.0, misled=0.0, repetition=0.0)
  config.advantage = dict(estimator="grpo")
  config.policy_update = dict(
    microbatches=4, loss=dict(clip_low=0.2, clip_high=0.28, aggregation="token_mean", kl=0.0)
  )
  config.optimizer = dict(
    name="adamw", learning_rate=1e-4, schedule="cosine", warmup_steps=5, clip_norm=1.0
  )

  config.train = dict(steps=100, sample_every=10, fused=True, trackers=())
  config.evaluate = dict(every_steps=0, batch_size=8, temperature=0.0, group_images=16)
  config.checkpoint = dict(every_steps=20, keep=2)
  config.plan = dict(topology="v5e:1x1", image=(256, 256), options=4)
  return config
