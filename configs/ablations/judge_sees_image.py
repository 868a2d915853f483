"""The paper's baseline: a judge that sees the image gives each caption a score.

  python -m caprl_jax.main --config=configs/ablations/judge_sees_image.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

The recipe of configs/caprl_3b.py with Qwen2.5-VL-3B as judge, which reads image and caption and is
not asked the questions; --config.judge.source=CodeGoat24/UnifiedReward-2.0-qwen-3b for the other
one. The reward is the expected overall score, 1 to 5, read from the judge's logits. The words of
the paper's prompts (its figures 16 and 17) were not found: ours stand in their place, and
judge.score_prompt and judge.score_answer take others. In the paper (arXiv 2509.22647, table 3)
Prism's average over eleven benchmarks is 39.9 untrained, 38.4 with UnifiedReward, whose captions
shrink, 42.5 with Qwen2.5-VL-3B, whose captions praise themselves, and 48.3 with CapRL.

Not run yet.
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).parents[1] / "caprl_3b.py")).unlock()
  config.judge.update(
    source="Qwen/Qwen2.5-VL-3B-Instruct",
    sees_image=True,
    max_pixels=1_000_000,  # as the captioner
    reading="letter_prob",
    prompt="plain",
    abstain="none",
    permutations=1,
    draws=0,
  )
  return config
