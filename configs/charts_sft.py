"""The warm start of configs/charts.py: a toy captioner that reads small charts and mostly does not
say what it read.

  for split in train:12000 test:400; do
    python -m caprl_jax.main --config=configs/dataset.py --workdir=runs/charts_data \\
      --config.dataset.input=charts:$split:96x72 \\
      --config.dataset.output=data/charts/${split%:*}.jsonl
  done
  python -m caprl_jax.main --config=configs/charts_sft.py --workdir=runs/charts_sft

The first command needs `pip install -e '.[charts]'`. Phase 0 teaches it to see, on complete
descriptions. Phase 1 teaches it to say little: one in seven captions is complete. 13 minutes on 2
CPU cores.

Expected: about 1% of its captions of training charts are the whole truth; after configs/charts.py,
which starts from it, 95% are.
"""

import pathlib

from caprl_jax.config.loading import load_config

FULL = "{description}"


def get_config():
  # The quickstart's captioner, on other data.
  config = load_config(str(pathlib.Path(__file__).with_name("quickstart_sft.py"))).unlock()
  config.sft.train = "data/charts/train.jsonl"
  config.sft.eval = "data/charts/test.jsonl"
  config.sft.recognition = "a {chart}"
  config.sft.batch_size = 32
  config.sft.max_tokens = 72
  config.sft.augment = False  # a mirrored chart rises where it fell
  optimizer = dict(
    name="muon",
    learning_rate=0.01,
    adam_learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=50,
    final_fraction=0.05,
  )
  config.sft.phases = (
    dict(steps=900, optimizer=optimizer, templates=((1.0, FULL),)),
    dict(
      steps=150,
      optimizer={
        **optimizer,
        "learning_rate": 0.003,
        "adam_learning_rate": 3e-4,
        "warmup_steps": 10,
      },
      templates=(
        (0.15, FULL),
        (0.35, "a {chart} chart."),
        (0.25, "a chart."),
        (0.25, "a picture of numbers."),
      ),
    ),
  )
  return config
