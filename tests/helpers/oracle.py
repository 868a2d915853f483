"""transformers' own captioners with random weights, reduced in size, and ours with the same."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from caprl_jax.data.image_prompts import build_prompt, stack_prompts
from caprl_jax.hub import weights
from caprl_jax.hub.load import init_policy
from caprl_jax.models.image_processor import pad_image
from caprl_jax.models.policy import Policy, PolicyConfig
from caprl_jax.types import Images

# What the parity tests hold for: positions, processors and ties have moved within 5.x. To go on to
# another version, change it here and in setup.cfg's extra `test`, and run every test.
TRANSFORMERS = "5.24.0"


def check_version(installed: str = transformers.__version__) -> None:
  """Raises RuntimeError where another transformers than the tests hold for is installed."""
  if installed != TRANSFORMERS:
    raise RuntimeError(
      f"the parity tests hold for transformers {TRANSFORMERS}, and {installed} is installed: "
      f"pip install transformers=={TRANSFORMERS}"
    )


check_version()

SIZES = [(56, 56), (120, 84), (200, 60), (31, 170), (196, 196)]  # width, height
IMAGE, VOCAB = 120, 128
TEXT = dict(
  vocab_size=VOCAB,
  hidden_size=48,
  intermediate_size=80,
  num_attention_heads=4,
  num_key_value_heads=2,
  rms_norm_eps=1e-6,
  initializer_range=0.2,
  bos_token_id=1,
  eos_token_id=2,
)
QWEN_TOKENS = dict(
  image_token_id=IMAGE, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123
)


def _qwen25_vl(tied: bool):
  config = transformers.Qwen2_5_VLConfig(
    text_config=dict(
      TEXT,
      num_hidden_layers=3,
      rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2]),
    ),
    vision_config=dict(
      depth=4,
      hidden_size=32,
      intermediate_size=52,
      num_heads=2,
      out_hidden_size=48,
      patch_size=14,
      window_size=112,
      fullatt_block_indexes=[1, 3],
      initializer_range=0.2,
    ),
    tie_word_embeddings=tied,
    **QWEN_TOKENS,
  )
  return config, Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 64)


def _qwen3_vl(tied: bool):
  config = transformers.Qwen3VLConfig(
    text_config=dict(
      TEXT,
      num_hidden_layers=4,
      head_dim=16,
      rope_parameters=dict(
        rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2], mrope_interleaved=True
      ),
    ),
    vision_config=dict(
      depth=4,
      hidden_size=32,
      intermediate_size=52,
      num_heads=2,
      out_hidden_size=48,
      patch_size=16,
      num_position_embeddings=36,
      deepstack_visual_indexes=[0, 2],
      initializer_range=0.2,
    ),
    tie_word_embeddings=tied,
    **QWEN_TOKENS,
  )
  return config, Qwen2VLImageProcessorPil(
    patch_size=16,
    min_pixels=32 * 32,
    max_pixels=32 * 32 * 20,
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
  )


def _internvl(tied: bool, qk_norm: bool, text: str):
  config = transformers.InternVLConfig(
    text_config=dict(
      TEXT,
      model_type=text,
      num_hidden_layers=3,
      rope_parameters=dict(rope_type="default", rope_theta=10000.0),
      **(dict(head_dim=16) if text == "qwen3" else {}),
    ),
    vision_config=dict(
      num_hidden_layers=3,
      hidden_size=32,
      intermediate_size=52,
      num_attention_heads=2,
      image_size=[56, 56],
      patch_size=[14, 14],
      attention_bias=not qk_norm,
      use_qk_norm=qk_norm,
      norm_type="rms_norm" if qk_norm else "layer_norm",
      use_mean_pooling=not qk_norm,
      initializer_range=0.2,
    ),
    image_token_id=IMAGE,
    image_seq_length=4,
    tie_word_embeddings=tied,
  )
  return config, GotOcr2ImageProcessorPil(
    size=dict(height=56, width=56), crop_to_patches=True, max_patches=6
  )


CASES = {
  "qwen2_5_vl": functools.partial(_qwen25_vl, False),
  "qwen2_5_vl-tied": functools.partial(_qwen25_vl, True),
  "qwen3_vl": functools.partial(_qwen3_vl, False),
  "qwen3_vl-tied": functools.partial(_qwen3_vl, True),
  "internvl-qwen3": functools.partial(_internvl, False, False, "qwen3"),
  "internvl-qwen2-tied": functools.partial(_internvl, True, True, "qwen2"),
}


@dataclasses.dataclass(eq=False)
class Pair:
  """transformers' model, ours, and the same parameters."""

  theirs: torch.nn.Module
  processor: object
  ours: Policy
  params: dict

  @property
  def cfg(self) -> PolicyConfig:
    return self.ours.cfg

  def inputs(self, picture: Image.Image, ids: np.ndarray) -> dict:
    """transformers' keyword arguments for one image and unpadded token ids."""
    made = self.processor([picture], return_tensors="pt")
    ids = torch.tensor(np.asarray(ids)).long()[None]
    out = dict(
      input_ids=ids, pixel_values=made["pixel_values"], attention_mask=torch.ones_like(ids)
    )
    if "image_grid_thw" in made:
      out |= dict(image_grid_thw=made["image_grid_thw"], mm_token_type_ids=(ids == IMAGE).int())
    return out

  def features(self, picture: Image.Image):
    """The tower's features of one image, [tokens, width], and DeepStack's."""
    made = self.processor([picture], return_tensors="pt")
    kwargs = (
      dict(image_grid_thw=made["image_grid_thw"])
      if "image_grid_thw" in made
      else dict(vision_feature_layer=-1, vision_feature_select_strategy="default")
    )
    with torch.no_grad():
      out = self.theirs.model.get_image_features(made["pixel_values"], **kwargs)
    main = out.pooler_output
    main = (
      torch.cat(list(main)) if isinstance(main, (tuple, list)) else main.reshape(-1, main.shape[-1])
    )
    return main.numpy(), [
      (torch.cat(list(x)) if isinstance(x, (tuple, list)) else x).numpy()
      for x in getattr(out, "deepstack_features", None) or []
    ]


def hf_preprocessor(processor) -> dict:
  """What `PolicyConfig.from_hf` reads of a processor, as in preprocessor_config.json."""
  made = processor.to_dict()
  return {
    k: made[k]
    for k in (
      "size",
      "image_mean",
      "image_std",
      "min_patches",
      "max_patches",
      "min_pixels",
      "max_pixels",
    )
    if k in made
  }


def randomise(model: torch.nn.Module) -> torch.nn.Module:
  """Biases and norm weights start at 0 and 1, which would hide a missing one."""
  with torch.no_grad():
    for name, p in model.named_parameters():
      if p.ndim == 1 or "position_embeddings" in name or "cls_token" in name:
        p.add_(0.3 * torch.randn_like(p))
  return model.eval()


@functools.cache
def make_pair(case: str) -> Pair:
  """The pair of one of `CASES`, with random weights; made once per process."""
  torch.manual_seed(0)
  config, processor = CASES[case]()
  theirs = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
  theirs = randomise(theirs.float())
  cfg = PolicyConfig.from_hf(config.to_dict(), hf_preprocessor(processor))
  state = {k: v.numpy() for k, v in theirs.state_dict().items()}
  abstract = jax.eval_shape(lambda: nn.unbox(init_policy(cfg)(jax.random.key(0))["params"]))
  return Pair(
    theirs,
    processor,
    Policy(cfg),
    weights.params_from_tensors(abstract, state, cfg.family.keys, "random"),
  )


def pictures() -> list[Image.Image]:
  """Noise, one image of each of `SIZES`."""
  rng = np.random.default_rng(0)
  return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def batch(cfg: PolicyConfig, which=slice(None), extra: int = 1):
  """All sizes in one batch, prompts of several lengths, padded by `extra` more than there is
  need.
  """
  patches = [cfg.vision.pixels.patchify(picture) for picture in pictures()]
  prompts = [
    build_prompt(
      [5, 6, 7, 122],
      p.grid_units,
      [123, *range(8, 9 + i)],
      cfg.image_token,
      cfg.text.mrope_sections is not None,
    )
    for i, p in enumerate(patches)
  ]
  patches, prompts = patches[which], prompts[which]
  slots = max(len(p.valid_S) for p in patches) + extra * cfg.vision.slots_multiple
  tokens = max(p.num_tokens for p in patches) + 3 * extra
  padded = [pad_image(p, slots, tokens) for p in patches]
  images = Images(**{k: jnp.stack([p[k] for p in padded]) for k in padded[0]})
  return images, jax.tree.map(
    jnp.asarray, stack_prompts(prompts, max(len(p.tokens) for p in prompts) + 5 * extra)
  )


def relative_error(ours, theirs) -> float:
  """The largest difference, as a share of the largest value of `theirs`."""
  return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
