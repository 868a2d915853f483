"""Captions of CapRL-3B as its README samples them: temperature 1, no repetition penalty.

  python -m caprl_jax.main --config=configs/caption_caprl.py --config.caption.input=IMAGES \\
    --config.caption.output=captions.jsonl

All else is as in configs/caption.py, whose captions are greedy and keep the repetition penalty that
the checkpoint's generation_config.json names (1.05 for Qwen2.5-VL and its descendants). The length
limit of 2,048 tokens is Prism's in CapRL's code.

Not run yet.
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).with_name("caption.py"))).unlock()
  config.caption.temperature = 1.0
  config.caption.top_p = 1.0
  config.caption.repetition_penalty = 1.0
  return config
