"""A trained captioner as a Hugging Face directory: config, safetensors shards, tokenizer,
processor, model card.

  python -m caprl_jax.main --config=configs/export.py --config.export.run=runs/quickstart \\
    --config.export.output=DIR

Without `export.run`, `policy.checkpoint` itself is written in `export.dtype`. For laptops:
llama.cpp's convert_hf_to_gguf.py makes a GGUF file of DIR (and its vision part with --mmproj).

Expected: a directory that transformers loads (tested with tiny models). Not run yet with the
checkpoint below.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "export"
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.policy = dict(checkpoint="Qwen/Qwen2.5-VL-3B-Instruct")
  config.export = dict(output="captioner")
  return config
