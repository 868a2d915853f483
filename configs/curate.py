"""Questions for training, from images alone: CapRL's curation (five questions per image, answered
with the image and not without it).

With two checkpoints, `generator` and `answerer`, both run here; the second may be smaller (CapRL:
72B writes, 3B answers):

  python -m caprl_jax.main --config=configs/curate.py --workdir=runs/curate \\
    --config.curate.input=IMAGES --config.curate.output=qa.parquet \\
    --config.generator.checkpoint=Qwen/Qwen2.5-VL-7B-Instruct

With the questions written behind any OpenAI-compatible endpoint (vLLM, SGLang, ...):

  ... --config.curate.questions=endpoint --config.endpoint.url=http://HOST:8000/v1 \\
    --config.endpoint.model=qwen-vl

Only the filter, over questions that you have already (a QA source as in configs/dataset.py):

  ... --config.curate.questions=given --config.curate.input=qa.jsonl

IMAGES: a folder, JSON lines, tar (WebDataset), parquet or tfds:FOLDER:SPLIT. The same command goes
on where it was stopped; other thresholds (min_visual, max_blind) select again without asking a
model. The workdir gets funnel.json, left_out.jsonl (everything left out, with the reason) and
curation.html.

Not run yet with these checkpoints; tests run it with tiny ones.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "curate"
  config.seed = 0
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.generator = dict(
    checkpoint="Qwen/Qwen2.5-VL-7B-Instruct",
    dtype="bfloat16",
    param_dtype="bfloat16",
    max_pixels=1_000_000,
  )
  config.answerer = dict(
    checkpoint="Qwen/Qwen2.5-VL-3B-Instruct",
    dtype="bfloat16",
    param_dtype="bfloat16",
    max_pixels=1_000_000,
  )
  config.endpoint = dict(
    url="http://localhost:8000/v1",  # only with curate.questions = "endpoint"
    model="qwen-vl",
  )
  config.curate = dict(
    input="images",
    output="qa.parquet",
  )
  return config
