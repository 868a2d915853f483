"""The captioner against transformers' own PyTorch Qwen2.5-VL with random weights: module by module, and whole."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from caprl_jax.data import images as images_lib
from caprl_jax.data.prompts import build_prompt, stack_prompts
from caprl_jax.models import weights
from caprl_jax.models.policy import Policy, PolicyConfig
from caprl_jax.types import Images

SIZES = [(56, 56), (120, 84), (200, 60), (31, 170), (196, 196)]  # width, height


def hf_config(tied: bool) -> Qwen2_5_VLConfig:
  return Qwen2_5_VLConfig(
      text_config=dict(
          vocab_size=128, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
          num_key_value_heads=2, rms_norm_eps=1e-6, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
          rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2])),
      vision_config=dict(
          depth=4, hidden_size=32, intermediate_size=52, num_heads=2, out_hidden_size=48, patch_size=14,
          window_size=112, fullatt_block_indexes=[1, 3], initializer_range=0.2),
      image_token_id=120, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123,
      tie_word_embeddings=tied)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request):
  """transformers' model, ours, and the same parameters."""
  torch.manual_seed(0)
  config = hf_config(request.param)
  theirs = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
  with torch.no_grad():  # biases and norm weights start at 0 and 1, which would hide a missing one
    for p in theirs.parameters():
      if p.ndim == 1:
        p.add_(0.3 * torch.randn_like(p))
  cfg = PolicyConfig.from_hf(config.to_dict(), dict(min_pixels=28 * 28, max_pixels=28 * 28 * 64))
  ours = Policy(cfg)
  state = {k: v.numpy() for k, v in theirs.state_dict().items()}
  images, prompts = batch(cfg)
  abstract = jax.eval_shape(lambda: meta_free(ours.init(jax.random.key(0), images, prompts)["params"]))
  params = weights.params_from_tensors(abstract, state, weights.QWEN25_VL_KEYS, "random weights")
  return theirs, ours, params


def meta_free(params):
  import flax.linen as nn
  return nn.unbox(params)


def pictures():
  rng = np.random.default_rng(0)
  return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def batch(cfg):
  """All sizes in one batch, padded beyond need."""
  patches = [images_lib.patchify(picture, cfg.vision) for picture in pictures()]
  slots = max(len(p.valid_S) for p in patches) + cfg.vision.window_slots
  tokens = max(p.num_tokens for p in patches) + 3
  padded = [images_lib.pad_image(p, slots, tokens) for p in patches]
  images = Images(**{k: jnp.stack([p[k] for p in padded]) for k in padded[0]})
  prompts = [build_prompt([5, 6, 7, 122], p.grid_units, [123, 8 + i], cfg.image_token)
             for i, p in enumerate(patches)]
  return images, jax.tree.map(jnp.asarray, stack_prompts(prompts, max(len(p.tokens) for p in prompts) + 5))


def relative_error(ours, theirs):
  return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def hf_inputs():
  processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 64)
  out = processor(pictures(), return_tensors="pt")
  return out["pixel_values"], out["image_grid_thw"]


def test_vision_tower_matches_for_several_sizes_in_one_padded_batch(pair):
  theirs, ours, params = pair
  pixels, grid = hf_inputs()
  with torch.no_grad():
    expected = theirs.model.get_image_features(pixels, grid).pooler_output
  images, _ = batch(ours.cfg)
  features = ours.apply({"params": params}, images, method=lambda m, x: m.visual(x))
  for i, want in enumerate(expected):
    got = np.asarray(features[i])[np.asarray(images.unit_BI[i][:len(want)])]
    assert relative_error(got, want.numpy()) < 1e-4, (i, SIZES[i])


def test_patches_are_the_processors(pair):
  _, ours, _ = pair
  pixels, grid = hf_inputs()
  images, _ = batch(ours.cfg)
  start = 0
  cfg = ours.cfg.vision
  for i, (t, h, w) in enumerate(grid.tolist()):
    want = pixels[start:start + h * w].numpy().reshape(h * w, 3, 2, 14 * 14)[:, :, 0].reshape(h * w // 4, -1)
    start += h * w
    pixels_i = np.asarray(images.patches_BSE[i]).reshape(-1, 3, 14 * 14) / np.float32(255)
    pixels_i = (pixels_i - np.array(cfg.image_mean)[:, None]) / np.array(cfg.image_std)[:, None]
    got = pixels_i.reshape(-1, want.shape[1])[np.asarray(images.unit_BI[i][:h * w // 4])]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_logits_match_for_several_images_and_prompt_lengths_in_one_batch(pair):
  theirs, ours, params = pair
  images, prompts = batch(ours.cfg)
  hidden, _ = ours.apply({"params": params}, images, prompts, method="prefill")
  from caprl_jax.models.decoder import head_matrix
  logits = np.asarray(hidden @ head_matrix(ours.cfg.text, params["language_model"]).T)
  pixels, grid = hf_inputs()
  start = 0
  for i, (t, h, w) in enumerate(grid.tolist()):
    valid = np.asarray(prompts.valid_BP[i])
    ids = torch.tensor(np.asarray(prompts.tokens_BP[i])[valid])[None]
    with torch.no_grad():
      want = theirs(input_ids=ids, pixel_values=pixels[start:start + h * w], image_grid_thw=grid[i:i + 1],
                    mm_token_type_ids=(ids == 120).int()).logits[0].numpy()
    start += h * w
    assert relative_error(logits[i][valid], want) < 1e-4, (i, SIZES[i])


def test_positions_match(pair):
  theirs, ours, _ = pair
  _, prompts = batch(ours.cfg)
  _, grid = hf_inputs()
  ids = torch.tensor(np.asarray(prompts.tokens_BP)).long()
  valid = torch.tensor(np.asarray(prompts.valid_BP))
  want, delta = theirs.model.get_rope_index(ids, (ids == 120).int() * valid, image_grid_thw=grid,
                                            attention_mask=valid.int())
  got = np.asarray(prompts.position_B3P).transpose(1, 0, 2)
  np.testing.assert_array_equal(got * valid.numpy(), want.numpy() * valid.numpy())
  np.testing.assert_array_equal(np.asarray(prompts.next_position_B), (valid.sum(1) + delta[:, 0]).numpy())


def test_checkpoint_keys_round_trip_and_are_complete(pair):
  theirs, ours, params = pair
  tensors = weights.tensors_from_params(params, weights.QWEN25_VL_KEYS)
  again = weights.params_from_tensors(params, tensors, weights.QWEN25_VL_KEYS, "ours")
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
  broken = dict(tensors)
  del broken["visual.blocks.2.attn.qkv.weight"]
  with pytest.raises(ValueError, match="1 tensors are missing.*visual.blocks.2.attn.qkv.weight"):
    weights.params_from_tensors(params, broken, weights.QWEN25_VL_KEYS, "ours")
  with pytest.raises(ValueError, match="fit no parameter.*surprise"):
    weights.params_from_tensors(params, {**tensors, "surprise": np.zeros(1)}, weights.QWEN25_VL_KEYS, "ours")
  wrong = {**tensors, "model.norm.weight": np.zeros(7, np.float32)}
  with pytest.raises(ValueError, match=r"model.norm.weight has shape \(7,\).*\(48,\)"):
    weights.params_from_tensors(params, wrong, weights.QWEN25_VL_KEYS, "ours")


def test_batch_composition_does_not_matter(pair):
  _, ours, params = pair
  images, prompts = batch(ours.cfg)
  whole, _ = ours.apply({"params": params}, images, prompts, method="prefill")
  one = jax.tree.map(lambda x: x[2:3], (images, prompts))
  alone, _ = ours.apply({"params": params}, *one, method="prefill")
  valid = np.asarray(prompts.valid_BP[2])
  np.testing.assert_allclose(np.asarray(whole[2])[valid], np.asarray(alone[0])[valid], rtol=2e-4, atol=2e-4)
