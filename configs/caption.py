"""Captions for a folder of images, or the images of a JSON lines file.

  python -m caprl_jax.main --config=configs/caption.py --config.policy.checkpoint=DIR_OR_HUB_NAME \\
    --config.caption.input=FOLDER_OR_JSONL --config.caption.output=captions.jsonl

Writes one JSON row an image: `image`, `caption`, `tokens` (ids), `finish` ("end", or "length" where it was cut at
max_tokens). The same command goes on where it was stopped. On an accelerator, --config.policy.dtype=bfloat16
--config.policy.param_dtype=bfloat16 halve memory and time.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "caption"
  config.seed = 0
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.policy = dict(checkpoint="internlm/CapRL-3B", dtype="float32", param_dtype="float32")
  config.caption = dict(input="images", output="captions.jsonl", prompt="Please describe this image in detail.",
                        max_tokens=512, temperature=0.0, top_p=1.0, top_k=0, batch_size=8, skip_bad_images=True)
  for section, key in (("policy", "min_pixels"), ("policy", "max_pixels"), ("caption", "repetition_penalty")):
    config[section][key] = None
  return config
