"""CapRL-3B's recipe with LoRA adapters on one GPU of 24 GB (RTX 3090 or 4090, L4, A10G).

  python -m caprl_jax.main --config=configs/gpu_24gb_lora.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

Only adapters of Qwen2.5-VL-3B are trained: 16 images x 8 captions of up to 512 tokens a step, on
images of up to 512x512 pixels. Base and judge (Qwen2.5-3B) are bfloat16, adapters float32. The
optimizer is the file's own, CapRL-3B's at 2e-5, whose cosine has hardly begun to fall at step
1,800: --config.preset=NAME changes all else, --config.optimizer.schedule_steps=1800 ends it with
the run.

Install with `pip install -e '.[cuda]'`, and start with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 in the
environment, or XLA takes three quarters of the GPU's memory.

Not run yet. --config.mode=plan estimates what a step takes of the GPU's memory, its time and the
run's cost (docs/tpu.md has the figures).
"""

import pathlib

from caprl_jax.config import presets
from caprl_jax.config.loading import load_config


def get_config():
  config = load_config(str(pathlib.Path(__file__).with_name("caprl_3b.py"))).unlock()
  config.mesh.update(data=-1, fsdp=1)
  config.policy.update(param_dtype="bfloat16", trainable="lora", max_pixels=512 * 512)
  config.data.batch_size = 16
  config.rollout = dict(sampling=dict(max_tokens=512))
  # The recipe's own rate is for all parameters.
  config.optimizer = dict(presets.PRESETS[config.preset]["optimizer"], learning_rate=2e-5)
  config.evaluate.update(batch_size=16, group_images=32)
  config.plan.update(topology="RTX4090", image=(512, 512))
  return config
