"""CapRL-InternVL3.5-8B: InternVL3.5-8B captions, Qwen2.5-3B answers.

  python -m caprl_jax.main --config=configs/caprl_internvl35_8b.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

The recipe of configs/caprl_3b.py, judge included, with this captioner; images are cut into tiles,
not limited in pixels.

Not run yet.
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).with_name("caprl_3b.py"))).unlock()
  config.policy.checkpoint = "OpenGVLab/InternVL3_5-8B-HF"
  config.rollout.sampling.chunks = 16  # its prompts are long, so less is left for caches
  # Images are cut into up to 12 tiles, not limited in pixels.
  config.policy.min_pixels = None
  config.policy.max_pixels = None
  return config
