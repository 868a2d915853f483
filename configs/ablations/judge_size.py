"""The ablation of the judge's size.

  python -m caprl_jax.main --config=configs/ablations/judge_size.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

The recipe of configs/caprl_3b.py with Qwen2.5-0.5B-Instruct as judge;
--config.judge.source=Qwen/Qwen2.5-7B-Instruct (or 1.5B, 32B) for the others. The paper's ICLR
version is reported to find 0.5B clearly worse than 3B, and 7B and 32B little better; its numbers
were not found. Options are shuffled anew at each draw, as in the paper; the released script does
not.

Not run yet.
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).parents[1] / "caprl_3b.py")).unlock()
  config.judge.source = "Qwen/Qwen2.5-0.5B-Instruct"
  config.judge.shuffle = True
  config.judge.abstain_letter = "F"
  return config
