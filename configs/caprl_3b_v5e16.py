"""CapRL-3B's recipe (configs/caprl_3b.py) on sixteen small chips, a v5e-16 slice.

  python -m caprl_jax.main --config=configs/caprl_3b_v5e16.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

The same steps: two chips share each layer's matrices, so that the weights that captions are written
with fit beside the captions' caches.

Not run yet. Compiled for v5e:4x4, a step takes 14.0 GiB of a chip's 16 (docs/tpu.md).
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).with_name("caprl_3b.py")))
  with config.unlocked():
    config.mesh.tensor = 2
    config.plan.topology = "v5e:4x4"
  return config
