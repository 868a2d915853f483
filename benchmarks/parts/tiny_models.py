"""A small captioner and a small judge as their config.json would say them; weights are random."""

DECODER = dict(
  hidden_size=256,
  intermediate_size=704,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
)
# The captioner's text and vision without their vocabulary: it is that of the tokenizer.
TEXT = dict(
  **DECODER,
  rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12]),
)
VISION = dict(
  depth=4,
  hidden_size=128,
  intermediate_size=256,
  num_heads=4,
  out_hidden_size=DECODER["hidden_size"],
  patch_size=14,
  window_size=56,
  fullatt_block_indexes=[1, 3],
)

CAPTIONER = dict(
  model_type="qwen2_5_vl",
  image_token_id=3,
  tie_word_embeddings=True,
  text_config=dict(TEXT, model_type="qwen2_5_vl_text", vocab_size=49_156, rms_norm_eps=1e-6),
  vision_config=dict(VISION, model_type="qwen2_5_vl_vision"),
)
JUDGE = dict(
  DECODER, model_type="llama", vocab_size=49_152, rms_norm_eps=1e-5, tie_word_embeddings=True
)
