"""CapRL-3B's recipe (configs/caprl_3b.py) on one machine with eight H100 of 80 GB.

  python -m caprl_jax.main --config=configs/gpu_h100x8.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

The same steps: parameters, moments and images are split over the eight GPUs. Install with
`pip install -e '.[cuda]'`, and start with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 in the environment, or
XLA takes three quarters of each GPU's memory.

Not run yet. --config.mode=plan estimates what a step takes of a GPU's memory, its time and a run's
cost (docs/tpu.md has the figures).
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).with_name("caprl_3b.py"))).unlock()
  config.plan.topology = "H100x8"
  return config
