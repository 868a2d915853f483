"""What is in a QA dataset, what is wrong with it, and a copy of it in another format.

  python -m caprl_jax.main --config=configs/dataset.py --config.dataset.input=SOURCE
  python -m caprl_jax.main --config=configs/dataset.py --config.dataset.input="train-*.parquet" \\
    --config.dataset.output=tfds:data --config.dataset.bad_rows=drop

Prints a table, writes dataset.html (a page of samples) and bad_rows.jsonl to the workdir. SOURCE is
easy_vqa:train, charts:train, FILE.jsonl, FILE.json, FILE.parquet, tfds:FOLDER:SPLIT,
hf:OWNER/NAME:SPLIT, or a mixture such as "0.7*easy_vqa:train + 0.3*charts:train"; the output is
FILE.jsonl, FILE.json, FILE.parquet or tfds:FOLDER. For training on millions of images use `tfds:`,
since parquet is slow at random access.

Expected, with --config.dataset.input=charts:test:200: the table in docs/data.md.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "dataset"
  config.seed = 0
  config.dataset = dict(input="easy_vqa:test")
  # Only with dataset.image_kinds, as in configs/image_kinds.py.
  config.answerer = dict(checkpoint="Qwen/Qwen2.5-VL-3B-Instruct")
  return config
