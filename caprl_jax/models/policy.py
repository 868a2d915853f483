"""Images, prompt, caption tokens -> hidden states: the captioner, of any family.

The image and the prompt are a prefix (`prefill`) that the captions of a group share; captions `extend` it. Both
are differentiable, so rollout and loss run the same code.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from caprl_jax.models.attention import Prefix
from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.families import family_of
from caprl_jax.models.family import Family, VisionConfig
from caprl_jax.models.layers import LoraConfig
from caprl_jax.types import Images, Prompts

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """Architecture of a captioner and the ids that matter to it."""
  vision: VisionConfig
  text: DecoderConfig
  image_token: int
  family: Family = dataclasses.field(repr=False)

  @classmethod
  def from_hf(cls, config: dict, preprocessor: dict | None = None, lora: LoraConfig | None = None,
              **overrides) -> "PolicyConfig":
    """Reads config.json (and preprocessor_config.json) of a family in `families.py`.

    `overrides` (dtype, remat) go to tower and decoder, `lora` to the decoder. Raises ValueError for another
    model_type.
    """
    family = family_of(config)
    try:
      return cls(family.vision(config, preprocessor, **overrides),
                 DecoderConfig.from_hf(family.text(config), lora=lora, **overrides), config[family.image_token], family)
    except KeyError as error:
      raise ValueError(f"config.json (model_type {family.model_type!r}) lacks the key {error}; take the whole file of "
                       "the checkpoint") from error


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
    self.visual = self.cfg.vision.tower()
    self.language_model = Decoder(self.cfg.text)

  def prefill(self, images: Images, prompts: Prompts) -> tuple[Array, Prefix]:
    """Encodes images and runs the prompt once an image: hidden [B, P, D] and the prefix (B rows)."""
    x_BPD = self.language_model.embed(prompts.tokens_BP)
    is_image_BP = (prompts.tokens_BP == self.cfg.image_token) & prompts.valid_BP
    features = self.visual(images)
    x_BPD = merge_image_features(x_BPD, features.main_BUD, images.unit_BI, is_image_BP)
    deep_XBPD = None
    if features.deep_XBUD is not None:
      place = lambda deep: merge_image_features(jnp.zeros_like(x_BPD), deep, images.unit_BI, is_image_BP)
      deep_XBPD = jax.vmap(place)(features.deep_XBUD)
    mrope = self.cfg.text.mrope_sections is not None
    position = prompts.position_B3P if mrope else prompts.position_B3P[:, 0]
    return self.language_model(x_BPD, position, prompts.valid_BP, (), deep_XBPD)

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
