"""CapRL 2.0, the smaller one: Qwen3-VL-2B captions, Qwen3-4B-Instruct answers.

  python -m caprl_jax.main --config=configs/caprl_qwen3vl_2b.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

What was released for CapRL++ on images (preset official_caprlpp), on the batch and number of steps
of configs/caprl_3b.py: parameters in bfloat16, and the checkpoint's own limits of pixels. All
images of a batch are padded to the largest of all rows; the script's prompts end at 4,096 tokens,
so its data has none much above 4 million pixels: where yours has, give
--config.policy.max_pixels=4000000.
Its README names Qwen3-4B-Instruct as judge: the 2507 release. 1,800 steps are CapRL-3B's; the
script's three epochs of its own data would be 1,764 steps of the 75,285 rows.

Not run yet.
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).with_name("caprl_3b.py"))).unlock()
  config.policy.checkpoint = "Qwen/Qwen3-VL-2B-Instruct"
  config.judge.source = "Qwen/Qwen3-4B-Instruct-2507"
  config.preset = "official_caprlpp"
  return config
