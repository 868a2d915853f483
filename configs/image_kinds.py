"""A QA dataset split by what its images show: charts and documents, and natural images.

  python -m caprl_jax.main --config=configs/image_kinds.py --workdir=runs/image_kinds \\
    --config.dataset.input='CapRL-QA-75K/*.parquet' --config.dataset.output='{kind}.parquet'

Writes chart_or_document.parquet and natural.parquet, the two halves of
configs/ablations/data_domain.py; dataset.html shows images of both, and how many the model was not
sure of. As in the paper's ablation (arXiv 2509.22647), Qwen2.5-VL-3B says which images are which.
The words of its question were not found: ours are one multiple-choice question, asked once with
each kind at each letter. Other kinds may be named in dataset.image_kinds, ten at most. The same
command goes on where it was stopped.

Not run yet with this checkpoint; tests run it with a tiny one.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "dataset"
  config.seed = 0
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.dataset = dict(
    input="CapRL-QA-75K/*.parquet",
    bad_rows="drop",
    repeated_questions="keep",  # as training does
    image_kinds=dict(
      chart_or_document="A chart, a diagram, a table, a document, a screen or other text",
      natural="A natural image, such as a photograph of people, animals, things or places",
    ),
  )
  config.answerer = dict(
    checkpoint="Qwen/Qwen2.5-VL-3B-Instruct",
    dtype="bfloat16",
    param_dtype="bfloat16",
    max_pixels=1_000_000,
  )
  return config
