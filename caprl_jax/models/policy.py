"""Images, prompt, caption tokens -> hidden states: the captioner, of any family.

The image and the prompt are a prefix (`prefill`) that the captions of a group share; captions
`extend` it. Both are differentiable, so rollout and loss run the same code.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from caprl_jax.models.attention import EarlierTokens, Prefix
from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.families import family_of
from caprl_jax.models.family import Family, Features, VisionConfig
from caprl_jax.models.image_processor import SmartResize
from caprl_jax.models.layers import LoraConfig
from caprl_jax.types import Images, Prompts, SeenImages

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Remat:
  """Of which part of a captioner the backward pass makes a layer's activations again. That saves
  memory and costs time."""

  tower: bool = False
  decoder: bool = False

  @classmethod
  def of(cls, both: bool, tower: bool | None = None, decoder: bool | None = None) -> "Remat":
    """Both parts alike, but for those that have a value of their own."""
    return cls(both if tower is None else tower, both if decoder is None else decoder)


NO_REMAT = Remat()


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """Architecture of a captioner and the ids that matter to it."""

  vision: VisionConfig
  text: DecoderConfig
  image_token: int
  family: Family = dataclasses.field(repr=False)

  @classmethod
  def from_hf(
    cls,
    config: dict,
    preprocessor: dict | None = None,
    lora: LoraConfig | None = None,
    remat: Remat = NO_REMAT,
    **overrides,
  ) -> "PolicyConfig":
    """Reads config.json (and preprocessor_config.json) of a family in `families.py`.

    `overrides` (dtype) go to tower and decoder, `lora` to the decoder. Raises ValueError for
    another model_type.
    """
    family = family_of(config)
    try:
      return cls(
        family.vision(config, preprocessor, remat=remat.tower, **overrides),
        DecoderConfig.from_hf(family.text(config), lora=lora, remat=remat.decoder, **overrides),
        config[family.image_token],
        family,
      )
    except KeyError as error:
      raise ValueError(
        f"config.json (model_type {family.model_type!r}) lacks the key {error}; "
        "take the whole file of the checkpoint"
      ) from error
    except (AttributeError, TypeError, ZeroDivisionError, OverflowError) as error:
      raise ValueError(
        f"config.json (model_type {family.model_type!r}) has a value of another kind than is "
        f"needed ({str(error)[:80]}); take the whole file of the checkpoint"
      ) from error


def limit_pixels(
  cfg: PolicyConfig, min_pixels: int | None, max_pixels: int | None
) -> tuple[PolicyConfig, str]:
  """The config with other limits on image size (None: its own), and what must be said about them:
  "" where nothing must. A family that cuts images into tiles has no such limits."""
  if not (min_pixels or max_pixels):
    return cfg, ""
  if not isinstance(cfg.vision.pixels, SmartResize):
    return cfg, (
      f"min_pixels and max_pixels change nothing: {cfg.family.model_type} cuts images "
      "into tiles of one size"
    )
  pixels, notice = cfg.vision.pixels.limited(min_pixels, max_pixels)
  return dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, pixels=pixels)), notice


def check_pixel_limits(min_pixels: int | None, max_pixels: int | None) -> None:
  """Raises ValueError for limits that no image can keep."""
  for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
    if value is not None and value < 1:
      raise ValueError(f"{name} = {value} must be at least 1; None is the checkpoint's own")
  if min_pixels and max_pixels and min_pixels > max_pixels:
    raise ValueError(f"min_pixels = {min_pixels} is more than max_pixels = {max_pixels}")


def merge_image_features(
  x_BPD: Array, features_BUD: Array, unit_BI: Array, is_image_BP: Array
) -> Array:
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

  def see(self, images: Images) -> SeenImages:
    """The images' features, for several prefills."""
    features = self.visual(images)
    deep = features.deep_XBUD
    deep = None if deep is None else jnp.swapaxes(deep, 0, 1)
    return SeenImages(features.main_BUD, deep, images.unit_BI)

  def prefill(self, images: Images | SeenImages, prompts: Prompts) -> tuple[Array, Prefix]:
    """Encodes images, unless that was done, and runs the prompt once per image: hidden [B, P, D],
    and the prefix with B rows.
    """
    seen = images if isinstance(images, SeenImages) else self.see(images)
    deep = None if seen.deep_BXUD is None else jnp.swapaxes(seen.deep_BXUD, 0, 1)
    return self._run(Features(seen.main_BUD, deep), seen.unit_BI, prompts)

  def packed(self, images: Images | None, prompts: Prompts, segment_BP: Array) -> Array:
    """Runs rows in which several examples stand one after the other: hidden [B, P, D].

    Args:
      images: M per row, B * M in all, row after row; None where no example has one. Its `unit_BI`
        has B rows: for a row's i-th image token the unit that holds it, those of the row's m-th
        image counted from m * U on.
      prompts: whole rows; each example's positions begin at 0. `next_position_B` is not read.
      segment_BP: int, the example that a token belongs to; it sees no other's.
    """
    if images is None:
      return self._run(None, None, prompts, segment_BP)[0]
    features = self.visual(images)
    B = prompts.tokens_BP.shape[0]

    def join(x: Array) -> Array:  # the units of a row's images are one another's neighbours
      return x.reshape(B, -1, x.shape[-1])

    deep = features.deep_XBUD
    return self._run(
      Features(join(features.main_BUD), None if deep is None else jax.vmap(join)(deep)),
      images.unit_BI,
      prompts,
      segment_BP,
    )[0]

  def _run(
    self,
    features: Features | None,
    unit_BI: Array | None,
    prompts: Prompts,
    segment_BP: Array | None = None,
  ) -> tuple[Array, Prefix]:
    """Puts features where the image tokens stand, and runs the decoder."""
    x_BPD, position, deep_XBPD = self._embed(features, unit_BI, prompts)
    return self.language_model(x_BPD, position, prompts.valid_BP, (), deep_XBPD, segment_BP)

  def embed(self, images: Images, prompts: Prompts) -> tuple[Array, Array, Array | None]:
    """What the decoder is given of images and prompts: embeddings [B, P, D], positions, and what
    its first layers add (DeepStack) or None."""
    features = self.visual(images)
    return self._embed(features, images.unit_BI, prompts)

  def _embed(
    self, features: Features | None, unit_BI: Array | None, prompts: Prompts
  ) -> tuple[Array, Array, Array | None]:
    x_BPD, deep_XBPD = self.language_model.embed(prompts.tokens_BP), None
    if features is not None:
      is_image_BP = (prompts.tokens_BP == self.cfg.image_token) & prompts.valid_BP
      place = functools.partial(merge_image_features, unit_BI=unit_BI, is_image_BP=is_image_BP)
      if features.deep_XBUD is not None:
        deep_XBPD = jax.vmap(lambda deep: place(jnp.zeros_like(x_BPD), deep))(features.deep_XBUD)
      x_BPD = place(x_BPD, features.main_BUD)
    mrope = self.cfg.text.mrope_sections is not None
    position = prompts.position_B3P if mrope else prompts.position_B3P[:, 0]
    return x_BPD, position, deep_XBPD

  def extend(
    self,
    tokens_NL: Array,
    position_NL: Array,
    valid_NL: Array,
    prefixes: tuple[Prefix, ...],
    segment_NL: Array | None = None,
    reach: int | None = None,
    earlier: EarlierTokens | None = None,
  ) -> tuple[Array, Prefix]:
    """Runs caption tokens after their prefixes: hidden [N, L, D] and the tokens' own keys and
    values. `segment_NL`, `reach` and `earlier`: as of `Decoder`.
    """
    return self.language_model.extend(
      tokens_NL, position_NL, valid_NL, prefixes, segment_NL, reach, earlier
    )

  def __call__(self, images: Images, prompts: Prompts) -> Array:
    """Creates all parameters when initialised."""
    return self.prefill(images, prompts)[0]


def last_hidden(hidden_BPD: Array, valid_BP: Array) -> Array:
  """The hidden state of each row's last valid token (of the first where none is), [B, D]. There may
  be invalid ones between valid ones."""
  last_B = jnp.where(valid_BP, jnp.arange(valid_BP.shape[1]), 0).max(1)
  return jnp.take_along_axis(hidden_BPD, last_B[:, None, None], axis=1)[:, 0]
