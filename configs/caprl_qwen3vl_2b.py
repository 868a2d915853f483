"""CapRL 2.0, the smaller one: Qwen3-VL-2B captions, Qwen3-4B-Instruct answers.

  python -m caprl_jax.main --config=configs/caprl_qwen3vl_2b.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

What was released for CapRL++ on images (preset official_caprlpp), on the batch and number of steps
of configs/caprl_3b.py: parameters in bfloat16, and the processor's own limits of pixels, as verl's
script leaves them. Its README names Qwen3-4B-Instruct as judge: the 2507 release.

Not run yet.
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).with_name("caprl_3b.py"))).unlock()
  config.policy.checkpoint = "Qwen/Qwen3-VL-2B-Instruct"
  # verl cuts the data's "<image> Please ..." at the marker and leaves the space.
  config.policy.instruction = " Please describe this image in detail."
  config.policy.param_dtype = "bfloat16"
  del config.policy.min_pixels
  del config.policy.max_pixels
  config.judge.source = "Qwen/Qwen3-4B-Instruct-2507"
  config.preset = "official_caprlpp"
  return config
