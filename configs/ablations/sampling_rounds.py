"""The paper's ablation: how often a caption is asked.

  python -m caprl_jax.main --config=configs/ablations/sampling_rounds.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

The recipe of configs/caprl_3b.py with N = 1 draw from an image's questions, where the release has
8; --config.judge.draws=2, 4 or 8 for the others. In the paper (arXiv 2509.22647) 1, 2, 4 and 8 give
a Prism average of 47.3, 47.6, 48.4 and 48.3 over five benchmarks. Options are shuffled anew at each
draw, as in the paper; the released script does not.

Not run yet.
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).parents[1] / "caprl_3b.py")).unlock()
  config.judge.draws = 1
  config.judge.shuffle = True
  config.judge.abstain_letter = "F"
  return config
