"""CapRL-3B's recipe: Qwen2.5-VL-3B captions, Qwen2.5-3B answers; all parameters trained.

  python -m caprl_jax.main --config=configs/caprl_3b.py --workdir=runs/NAME \\
    --config.data.train='CapRL-QA-75K/*.parquet' --config.data.eval=held_out.parquet

As released: 128 images x 8 captions a step at temperature 1, captions of up to 4096 tokens, 8 draws
with replacement from an image's questions, answers sampled at 0.6, Adam at 1e-6 with 20 warm-up
steps and a cosine to a tenth over 17,640 steps (30 episodes), leave-one-out advantages whitened
over the batch, no KL, images of up to 10^6 pixels. The release stopped near step 1800, about three
passes over 75,285 images, where the rate is still 0.978 of its peak. --config.preset=paper,
official_caprlpp or caprl_jax trains with another algorithm. Written for a v5p-16 slice (8 chips);
for another one, --config.mode=plan --config.plan.topology=... says whether the step fits.

Not run yet. An earlier version of the step, compiled for v5p:2x2x2, took 25.3 GiB of a chip's 95;
configs/caprl_3b_v5e16.py is the same for sixteen small chips (docs/tpu.md).
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "train"
  config.preset = "official_caprl_3b"
  config.seed = 42
  config.mesh = dict(data=1, fsdp=-1, tensor=1)

  config.policy = dict(
    checkpoint="Qwen/Qwen2.5-VL-3B-Instruct",
    dtype="bfloat16",
    remat=True,
    trainable="full",
  )
  config.judge = dict(source="Qwen/Qwen2.5-3B-Instruct", dtype="bfloat16", microbatches=16)

  config.data = dict(
    train="data/caprl_qa.jsonl", eval="data/held_out.jsonl", batch_size=128, questions=5
  )
  config.question_filter = dict(informed=())  # the released questions are filtered already
  config.gate = dict(ideal=None)  # they come without facts, of which true captions could be made

  # What is still written when most captions have ended goes on in eighths of them rather than
  # quarters: less memory (docs/tpu.md), and no other captions.
  config.rollout = dict(sampling=dict(chunks=8))
  # Prompt, pixels, judge protocol, sampling, reward, advantages, loss and optimizer are the
  # preset's (caprl_jax/config/presets.py).
  config.policy_update = dict(microbatches=16)  # 8 images x 8 captions at once

  config.train = dict(steps=1800, sample_every=50, fused=True, trackers=())
  config.evaluate = dict(every_steps=200, batch_size=64, temperature=0.0, group_images=128)
  config.checkpoint = dict(every_steps=50, keep=2)
  config.plan = dict(topology="v5p:2x2x2", image=(1000, 1000), options=5)
  return config
