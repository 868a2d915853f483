"""Images, prompt, caption tokens -> hidden states: the Qwen2.5-VL captioner.

The image and the prompt are a prefix (`prefill`) that the captions of a group share; captions `extend` it. Both
are differentiable, so rollout and loss run the same code.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from caprl_jax.models.attention import Prefix
from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.vision import VisionConfig, VisionTower
from caprl_jax.types import Images, Prompts

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """Architecture of a captioner and the ids that matter to it."""
  vision: VisionConfig
  text: DecoderConfig
  image_token: int

  @classmethod
  def from_hf(cls, config: dict, preprocessor: dict | None = None, **overrides) -> "PolicyConfig":
    """Reads a Qwen2.5-VL config.json, nested (transformers 5) or flat (the published files).

    `overrides` (dtype, remat) go to both towers. Raises ValueError for another model_type.
    """
    if config.get("model_type") != "qwen2_5_vl":
      raise ValueError(f"policy model_type {config.get('model_type')!r} is not supported; supported: qwen2_5_vl")
    text = {**config, **(config.get("text_config") or {})}
    text["model_type"] = "qwen2_5_vl_text"
    # Writers disagree about where the tie is said; transformers reads either.
    text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return cls(VisionConfig.from_hf(config["vision_config"], preprocessor, **overrides),
               DecoderConfig.from_hf(text, **overrides), config["image_token_id"])


def merge_image_features(x_BPD: Array, features_BUD: Array, unit_BI: Array, is_image_BP: Array) -> Array:
  """Puts the i-th image token's feature in its place: cumsum, gather, where; no scatter."""
  I = unit_BI.shape[1]
  order_BP = jnp.clip(jnp.cumsum(is_image_BP, axis=1) - 1, 0, I - 1)
  unit_BP = jnp.take_along_axis(unit_BI, order_BP, axis=1)
  feature_BPD = jnp.take_along_axis(features_BUD, unit_BP[..., None], axis=1)
  return jnp.where(is_image_BP[..., None], feature_BPD.astype(x_BPD.dtype), x_BPD)


class Policy(nn.Module):
  """The captioner. Parameters: `visual` and `language_model`."""
  cfg: PolicyConfig

  def setup(self):
    self.visual = VisionTower(self.cfg.vision)
    self.language_model = Decoder(self.cfg.text)

  def prefill(self, images: Images, prompts: Prompts) -> tuple[Array, Prefix]:
    """Encodes images and runs the prompt once an image: hidden [B, P, D] and the prefix (B rows)."""
    x_BPD = self.language_model.embed(prompts.tokens_BP)
    is_image_BP = (prompts.tokens_BP == self.cfg.image_token) & prompts.valid_BP
    x_BPD = merge_image_features(x_BPD, self.visual(images), images.unit_BI, is_image_BP)
    return self.language_model(x_BPD, prompts.position_B3P, prompts.valid_BP)

  def extend(self, tokens_NL: Array, position_NL: Array, valid_NL: Array,
             prefixes: tuple[Prefix, ...]) -> tuple[Array, Prefix]:
    """Runs caption tokens after their prefixes: hidden [N, L, D] and the tokens' own keys and values."""
    return self.language_model(self.language_model.embed(tokens_NL), position_NL, valid_NL, prefixes)

  def __call__(self, images: Images, prompts: Prompts) -> Array:
    """Creates all parameters when initialised."""
    return self.prefill(images, prompts)[0]


def last_hidden(hidden_BPD: Array, valid_BP: Array) -> Array:
  """The hidden state of each row's last valid token, [B, D]."""
  last_B = jnp.sum(valid_BP, axis=1) - 1
  return jnp.take_along_axis(hidden_BPD, last_B[:, None, None], axis=1)[:, 0]
