"""CapRL 2.0, the smaller one: Qwen3-VL-2B captions, Qwen3-4B answers.

  python -m caprl_jax.main --config=configs/caprl_qwen3vl_2b.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

What was released for CapRL++ on images (preset official_caprlpp), on the batch and number of steps
of configs/caprl_3b.py. Its README names Qwen3-4B-Instruct as judge; any checkpoint of that
architecture loads.

Not run yet.
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).with_name("caprl_3b.py"))).unlock()
  config.policy.checkpoint = "Qwen/Qwen3-VL-2B-Instruct"
  config.judge.source = "Qwen/Qwen3-4B"
  config.preset = "official_caprlpp"
  return config
