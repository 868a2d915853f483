"""CapRL with QLoRA on one chip of 16 GB: Qwen2.5-VL-7B's base in 4 bits, a 1.5B judge in 8.

  python -m caprl_jax.main --config=configs/qlora_7b_16gb.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

For Colab's T4 or a v5e-1. The matrices of the captioner's decoder are stored as nf4 and not
trained; adapters on them are. 8 images x 4 captions of up to 256 tokens a step, on images of up to
392x392 pixels. The judge is Qwen2.5-1.5B in int8. What is written at the end are the adapters, and
the captioner with these merged into the weights as they were before they were rounded.

On a GPU start it with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 in the environment. A T4 has no bfloat16
of its own, which makes it slow; what the captioner and the judge take of its memory is the same.

Not run yet. --config.mode=plan estimates what a step takes (docs/tpu.md has the figures).
"""

import pathlib

from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).with_name("gpu_24gb_lora.py"))).unlock()
  config.policy.update(checkpoint="Qwen/Qwen2.5-VL-7B-Instruct", max_pixels=392 * 392)
  config.policy.lora = dict(rank=16, alpha=32.0, base_weights="nf4")
  config.judge.update(source="Qwen/Qwen2.5-1.5B-Instruct", int8=True)
  config.data.batch_size = 8
  config.rollout.update(group_size=4, sampling=dict(max_tokens=256))
  config.policy_update.microbatches = 8
  config.evaluate.update(batch_size=8, group_images=32)
  config.plan.update(topology="v5e:1x1", image=(392, 392))
  return config
