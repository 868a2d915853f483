"""The paper's ablation: questions that need no image.

  python -m caprl_jax.main --config=configs/ablations/leakage.py --workdir=runs/NAME \\
    --config.data.train=unfiltered.parquet --config.data.eval=held_out.parquet

The recipe of configs/caprl_3b.py on 20,000 images whose questions may be answerable without them.
Mode `curate` makes that file with --config.curate.max_blind=None, and its counterpart without the
flag. In the paper (arXiv 2509.22647) leaking and refined questions give a Prism average of 47.4 and
48.5 over five benchmarks. Options are shuffled anew at each draw, as in the paper; the released
script does not. The paper does not say for how many steps it trained: the recipe's 1,800 are 11.5
passes over these images.

Not run yet.
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  return load_config(str(pathlib.Path(__file__).with_name("data_rows.py")))
