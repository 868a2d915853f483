"""config.json of the published checkpoints that the shipped configs name, as far as shapes and
positions depend on it.

So that a run can be planned, and a step compiled, on a machine without the checkpoint. Loading
reads the real file.
"""

_QWEN25_VISION = dict(
  depth=32,
  hidden_size=1280,
  intermediate_size=3420,
  num_heads=16,
  patch_size=14,
  window_size=112,
  fullatt_block_indexes=[7, 15, 23, 31],
  spatial_merge_size=2,
  temporal_patch_size=2,
  in_channels=3,
  hidden_act="silu",
)


def _qwen25_vl(**text) -> dict:
  width = text["hidden_size"]
  return dict(
    model_type="qwen2_5_vl",
    image_token_id=151655,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    rope_theta=1e6,
    rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
    vision_config=dict(_QWEN25_VISION, out_hidden_size=width),
    **text,
  )


def _qwen3_vl(vision: dict, tied: bool, **text) -> dict:
  text = dict(
    model_type="qwen3_vl_text",
    vocab_size=151936,
    head_dim=128,
    num_key_value_heads=8,
    rms_norm_eps=1e-6,
    rope_theta=5e6,
    rope_scaling=dict(rope_type="default", mrope_section=[24, 20, 20], mrope_interleaved=True),
    **text,
  )
  return dict(
    model_type="qwen3_vl",
    image_token_id=151655,
    tie_word_embeddings=tied,
    text_config=text,
    vision_config=dict(
      num_heads=16,
      patch_size=16,
      spatial_merge_size=2,
      temporal_patch_size=2,
      in_channels=3,
      num_position_embeddings=2304,
      out_hidden_size=text["hidden_size"],
      **vision,
    ),
  )


_SMALL_TOWER = dict(
  depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17]
)
_LARGE_TOWER = dict(
  depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24]
)
_QWEN3 = dict(
  model_type="qwen3",
  vocab_size=151936,
  head_dim=128,
  num_key_value_heads=8,
  rms_norm_eps=1e-6,
  rope_theta=1e6,
)
_QWEN2 = dict(model_type="qwen2", rms_norm_eps=1e-6, rope_theta=1e6)


def _internvl35(**text) -> dict:
  return dict(
    model_type="internvl",
    image_token_id=151671,
    tie_word_embeddings=False,
    downsample_ratio=0.5,
    text_config=dict(_QWEN3, **text),
    vision_config=dict(
      num_hidden_layers=24,
      hidden_size=1024,
      intermediate_size=4096,
      num_attention_heads=16,
      image_size=[448, 448],
      patch_size=[14, 14],
      attention_bias=True,
      use_qk_norm=False,
      norm_type="layer_norm",
      layer_norm_eps=1e-6,
      use_mean_pooling=True,
    ),
  )


CONFIGS = {
  "Qwen/Qwen2.5-VL-3B-Instruct": _qwen25_vl(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    tie_word_embeddings=True,
  ),
  "Qwen/Qwen2.5-VL-7B-Instruct": _qwen25_vl(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
  ),
  "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl(
    _SMALL_TOWER,
    True,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
  ),
  "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(
    _SMALL_TOWER,
    True,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
  ),
  "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(
    _LARGE_TOWER,
    False,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
  ),
  "OpenGVLab/InternVL3_5-1B-HF": _internvl35(
    hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16
  ),
  "OpenGVLab/InternVL3_5-2B-HF": _internvl35(
    hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16
  ),
  "OpenGVLab/InternVL3_5-4B-HF": _internvl35(
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32
  ),
  "OpenGVLab/InternVL3_5-8B-HF": _internvl35(
    hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32
  ),
  "Qwen/Qwen2.5-0.5B-Instruct": dict(
    _QWEN2,
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
  ),
  "Qwen/Qwen2.5-1.5B-Instruct": dict(
    _QWEN2,
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
  ),
  "Qwen/Qwen2.5-3B-Instruct": dict(
    _QWEN2,
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    tie_word_embeddings=True,
  ),
  "Qwen/Qwen3-0.6B": dict(
    _QWEN3,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    tie_word_embeddings=True,
  ),
  "Qwen/Qwen3-4B": dict(
    _QWEN3,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    tie_word_embeddings=True,
  ),
  "Qwen/Qwen3-4B-Instruct-2507": dict(
    _QWEN3,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    max_position_embeddings=262144,
    rope_theta=5_000_000,
    tie_word_embeddings=True,
  ),
}
