"""The paper's baseline with the released code's words: a judge that sees the image writes scores.

  python -m caprl_jax.main --config=configs/ablations/judge_writes_scores.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

As configs/ablations/judge_sees_image.py, but the judge writes a JSON object, as the score mode
vl_judge of CapRL++'s reward server has it: up to 256 tokens at temperature 0.2, with four scores
from 0 to 1 for factuality (which counts 0.30), temporal alignment (0.25), coverage (0.25) and no
hallucination (0.20); a score that cannot be read counts 0. That prompt speaks of a video: the
release has none for images, and the words of the paper's own (its figures 16 and 17) were not
found. It is downloaded once from github.com/InternLM/CapRL; judge.score_prompt may name a copy of
serve_rm.py. With judge.score_unread = "left_out" nothing is learned from captions whose scores
cannot be read. The host reads what the judge wrote, so that a step is three programs.

Not run yet.
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).with_name("judge_sees_image.py"))).unlock()
  config.judge.update(
    reading="generate",
    score_prompt="official",
    score_weights="factuality=0.30,temporal_alignment=0.25,coverage=0.25,hallucination_penalty=0.20",
    score_unread="zero",
    temperature=0.2,
    max_tokens=256,
  )
  return config
