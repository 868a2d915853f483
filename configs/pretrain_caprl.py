"""CapRL's pretraining evaluation, set-up (a): Qwen2.5-VL's vision tower, Qwen2.5-3B-Instruct, a
new projector, three stages.

  python -m caprl_jax.main --config=configs/pretrain_caprl.py --workdir=runs/pretrain \\
    --config.pretrain.stages.further.data=captions.jsonl \\
    --config.pretrain.stages.further.image_root=IMAGES

Bring: BLIP-558K (blip_laion_cc_sbu_558k.json of LLaVA-Pretrain), the captions under test (JSON
lines of image and caption; mode `caption` writes them), Open-LLaVA-NeXT-1M
(open-llava-next_instruct_mix1M.json), and the images of each. Without `further.data` that stage is
skipped: the paper's "vanilla".

As in the paper (arXiv 2509.22647): the stages, what each trains, learning rates, batch sizes (256,
256, 128 examples; `examples` counts them, however many share a row). As in the ScaleCap notebooks,
which CapRL links: the instruct model, and a new projector as torch draws it. Neither gives the
following, so these are our choices: one epoch per stage, 3% warm-up and cosine decay to 0, AdamW
without weight decay, 4,096 tokens per row, images up to 1,280 tokens, that examples are packed, and
the instruction of captions. Its benchmarks (InfoVQA, DocVQA, ...) are not part of this package:
`pretrain.eval` asks multiple-choice questions of your own, and every stage's model is a directory
that lmms-eval or VLMEvalKit can load.

The paper's set-up (b) is --config.pretrain_policy.vision=Qwen/Qwen2.5-VL-7B-Instruct
--config.pretrain_policy.language=Qwen/Qwen2.5-7B-Instruct, as in the notebook for 7B; (c),
InternLM2.5 with CLIP-ViT-L, needs families that this package does not have.

Sizes for 3B on 8 accelerators of 80 GB or more, or a TPU slice of as much memory. Raise
`microbatches` where memory is short.

Not run yet.
"""

import ml_collections


def stage(
  data: str | None, examples: int, learning_rate: float, microbatches: int, **settings
) -> dict:
  optimizer = dict(
    name="adamw",
    learning_rate=learning_rate,
    schedule="cosine",
    warmup_steps=0,
    warmup_fraction=0.03,
    final_fraction=0.0,
    b1=0.9,
    b2=0.999,
    weight_decay=0.0,
    clip_norm=1.0,
  )
  return dict(
    data=data,
    epochs=1.0,
    examples=examples,
    microbatches=microbatches,
    optimizer=optimizer,
    pack=dict(tokens=4096, window=8192, too_long="drop", bad_rows="drop"),
    **settings,
  )


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "pretrain"
  config.seed = 0
  config.mesh = dict(data=1, fsdp=-1, tensor=1)
  config.pretrain_policy = dict(
    vision="Qwen/Qwen2.5-VL-3B-Instruct",
    language="Qwen/Qwen2.5-3B-Instruct",
    dtype="bfloat16",
    param_dtype="float32",
    remat=True,
    max_pixels=1280 * 28 * 28,
  )
  config.pretrain = dict(
    order=("align", "further", "instruct"),
    stages=dict(
      align=stage("blip_laion_cc_sbu_558k.json", 256, 1e-3, 1, trained="projector"),
      further=stage(None, 256, 4e-5, 4, trained="full"),
      instruct=stage("open-llava-next_instruct_mix1M.json", 128, 2e-5, 4, trained="full"),
    ),
    eval_rows=1000,
    output_dtype="bfloat16",
    checkpoint_every_steps=500,
  )
  config.pretrain.answer = dict(permutations=4, none_of_above=False, batch_size=8)
  return config
