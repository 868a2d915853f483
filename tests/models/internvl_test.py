"""InternVL's own file layout ("internvl_chat") against transformers', and the tile grid."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import oracle, tiny

from caprl_jax.hub import weights
from caprl_jax.hub.load import init_policy
from caprl_jax.hub.opened import _with_image_token
from caprl_jax.hub.tokenizer import Tokenizer, compact_tokenizer
from caprl_jax.models.image_processor import Tiles
from caprl_jax.models.internvl import FAMILY, from_chat
from caprl_jax.models.policy import PolicyConfig

# transformers' name -> that of InternVL's own code, as its conversion script pairs them.
NAMES = (
  ("lm_head.", "language_model.lm_head."),
  ("model.language_model.", "language_model.model."),
  ("model.multi_modal_projector.layer_norm.", "mlp1.0."),
  ("model.multi_modal_projector.linear_1.", "mlp1.1."),
  ("model.multi_modal_projector.linear_2.", "mlp1.3."),
  ("model.vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
  (
    "model.vision_tower.embeddings.position_embeddings",
    "vision_model.embeddings.position_embedding",
  ),
  (
    "model.vision_tower.embeddings.patch_embeddings.projection.",
    "vision_model.embeddings.patch_embedding.",
  ),
  ("model.vision_tower.encoder.layer.", "vision_model.encoder.layers."),
  (".attention.projection_layer.", ".attn.proj."),
  (".lambda_", ".ls"),
  (".layernorm_before.", ".norm1."),
  (".layernorm_after.", ".norm2."),
)


def chat_layout(pair):
  tensors = {}
  for name, value in pair.theirs.state_dict().items():
    new = name
    for ours, theirs in NAMES:
      new = new.replace(ours, theirs) if ours.startswith(".") or new.startswith(ours) else new
    tensors[new] = value.numpy()
  for name in [n for n in tensors if ".attention.q_proj." in n]:
    parts = [tensors.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
    tensors[name.replace(".attention.q_proj.", ".attn.qkv.")] = np.concatenate(parts)
  config = pair.theirs.config.to_dict()
  vision = config["vision_config"]
  return dict(
    model_type="internvl_chat",
    downsample_ratio=0.5,
    max_dynamic_patch=6,
    img_context_token_id=oracle.IMAGE,
    llm_config=config["text_config"],
    vision_config=dict(
      qkv_bias=True,
      qk_normalization=False,
      initializer_factor=0.1,
      image_size=56,
      patch_size=14,
      **{
        k: vision[k]
        for k in (
          "num_hidden_layers",
          "hidden_size",
          "intermediate_size",
          "num_attention_heads",
          "norm_type",
          "layer_norm_eps",
          "hidden_act",
        )
      },
    ),
  ), tensors


def test_the_own_layout_is_read():
  pair = oracle.make_pair("internvl-qwen3")
  config, tensors = chat_layout(pair)
  assert (
    any(re.search(r"layers\.0\.attn\.qkv\.bias", name) for name in tensors)
    and "mlp1.3.bias" in tensors
  )
  config, tensors = from_chat(config, tensors)
  cfg = PolicyConfig.from_hf(config)
  assert cfg.vision.pixels.max_tiles == 6 and cfg.vision.pixels.mean == (0.485, 0.456, 0.406)
  abstract = jax.eval_shape(lambda: nn.unbox(init_policy(cfg)(jax.random.key(0))["params"]))
  params = weights.params_from_tensors(abstract, tensors, FAMILY.keys, "internvl_chat")
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(pair.params), strict=True
  ):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
  "key, value",
  [
    ("use_thumbnail", False),
    ("ps_version", "v1"),
    ("select_layer", -2),
    ("pad2square", True),
    ("force_image_size", 112),
  ],
)
def test_settings_of_the_own_layout_that_are_not_read_are_refused(key, value):
  config, tensors = chat_layout(oracle.make_pair("internvl-qwen3"))
  with pytest.raises(ValueError, match=f"{key} = {value!r} in config.json"):
    from_chat(config | {key: value}, tensors)


def test_the_own_layout_without_tiles():
  config, tensors = chat_layout(oracle.make_pair("internvl-qwen3"))
  config, _ = from_chat(config | {"dynamic_image_size": False}, tensors)
  assert PolicyConfig.from_hf(config).vision.pixels.grid(1344, 1344) == (1, 1)


def test_the_own_layout_has_its_image_token_from_the_tokenizer(tmp_path):
  config, _ = chat_layout(oracle.make_pair("internvl-qwen3"))
  del config["img_context_token_id"]
  (tmp_path / "tokenizer.json").write_text(tiny.tokenizer(True).to_json())
  with pytest.raises(ValueError, match="the tokenizer has no <IMG_CONTEXT>"):
    _with_image_token(config, tmp_path)
  tokenizer = Tokenizer(compact_tokenizer(tiny.tokenizer(True), ["a"], ["<IMG_CONTEXT>"])[0])
  (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
  found = _with_image_token(config, tmp_path)["img_context_token_id"]
  assert found == tokenizer.id_of("<IMG_CONTEXT>")


@pytest.mark.parametrize(
  "size, grid",
  [
    ((448, 448), (1, 1)),
    ((896, 448), (2, 1)),
    ((100, 1200), (1, 12)),
    ((1344, 1344), (3, 3)),
    ((896, 896), (2, 2)),
    ((600, 800), (3, 4)),
  ],
)
def test_tile_grids(size, grid):
  """Height x width; 600 x 800 is 3:4, which only 3 x 4 is exactly."""
  assert Tiles(448, 14, 2).grid(*size) == grid
