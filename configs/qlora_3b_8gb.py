"""CapRL with QLoRA on one GPU of 8 GB: Qwen2.5-VL-3B's base in 4 bits, a 0.5B judge in 8.

  python -m caprl_jax.main --config=configs/qlora_3b_8gb.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

As configs/qlora_7b_16gb.py, smaller: 8 images x 4 captions of up to 256 tokens a step, on images of
up to 392x392 pixels. Start it with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 in the environment.

Not run yet. --config.mode=plan estimates what a step takes (docs/tpu.md has the figures).
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).with_name("qlora_7b_16gb.py"))).unlock()
  config.policy.checkpoint = "Qwen/Qwen2.5-VL-3B-Instruct"
  config.judge.source = "Qwen/Qwen2.5-0.5B-Instruct"
  config.plan.topology = "RTX4060"
  return config
