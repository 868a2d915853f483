"""Captions for images from wherever they lie, on one machine or many.

  python -m caprl_jax.main --config=configs/caption.py --config.policy.checkpoint=DIR_OR_HUB_NAME \\
    --config.caption.input=IMAGES --config.caption.output=captions.jsonl

IMAGES is an image or a folder of them, a .jsonl with an `image` on each line, a .tar (WebDataset),
a .parquet, a folder or a pattern of those ('shards/*.tar'), or tfds:FOLDER:SPLIT. The output is a
.jsonl or a .parquet, or with --config.caption.format=txt (a .txt per image), hf (a folder for
datasets.load_dataset) or caprl_2m (JSON lines of image and caption alone) what that says. A JSON
row has `image`, `caption`, `tokens` (ids), `finish` ("end", or "length" where it was cut at
max_tokens); an image that failed has `error`. Beside it come captions.stats.json and captions.html.

--config.caption.prompt is `detailed`, `medium`, `short`, `document` or any text. The same command
goes on where it was stopped. Several machines that see one folder share the work: under
jax.distributed by themselves, else with --config.caption.host=0 --config.caption.hosts=4 and so on.
On an accelerator, --config.policy.dtype=bfloat16 --config.policy.param_dtype=bfloat16 halve memory
and time. Every key is described in `caption.CaptionConfig`.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "caption"
  config.seed = 0
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.policy = dict(checkpoint="internlm/CapRL-3B", dtype="float32", param_dtype="float32")
  config.caption = dict(
    input="images",
    output="captions.jsonl",
    prompt="detailed",
    max_tokens=512,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    batch_size=8,
    skip_bad_images=True,
    embed_images=True,
    image_key="image",
    caption_key="caption",
    shard_rows=10_000,
    samples=48,
  )
  for section, key in (
    ("policy", "min_pixels"),
    ("policy", "max_pixels"),
    ("caption", "repetition_penalty"),
    ("caption", "format"),
    ("caption", "host"),
    ("caption", "hosts"),
  ):
    config[section][key] = None
  return config
