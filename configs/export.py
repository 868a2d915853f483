"""A trained captioner as a Hugging Face directory: config, safetensors shards, tokenizer,
processor, model card.

  python -m caprl_jax.main --config=configs/export.py --config.export.run=runs/quickstart \\
    --config.export.output=DIR

Without `export.run`, `policy.checkpoint` itself is written in `export.dtype`. For laptops:
llama.cpp's convert_hf_to_gguf.py makes a GGUF file of DIR (and its vision part with --mmproj).
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "export"
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.policy = dict(
    checkpoint="Qwen/Qwen2.5-VL-3B-Instruct", dtype="float32", param_dtype="float32"
  )
  config.export = dict(output="captioner", dtype="bfloat16", adapters=False, shard_gb=5.0)
  config.export.run = None
  return config
