"""The paper's ablation: what the training images show.

  python -m caprl_jax.main --config=configs/ablations/data_domain.py --workdir=runs/NAME \\
    --config.data.train=chart_or_document.parquet --config.data.eval=held_out.parquet

The recipe of configs/caprl_3b.py on 20,000 images of charts and documents; natural.parquet for the
other half of it. configs/image_kinds.py makes the two files as the paper (arXiv 2509.22647) does,
by Qwen2.5-VL-3B. As far as its figure 5 can be read, Prism of ChartQA,
CharXiv, MMStar and SEED is 65.6, 21.8, 46.4, 64.1 untrained, 77.8, 28.9, 50.0, 68.9 with charts and
documents, and 76.3, 26.5, 50.4, 67.7 with natural images. Options are shuffled anew at each draw,
as in the paper; the released script does not. The paper does not say for how many steps it trained:
the recipe's 1,800 are 11.5 passes over these images.

Not run yet.
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  return load_config(str(pathlib.Path(__file__).with_name("data_rows.py")))
