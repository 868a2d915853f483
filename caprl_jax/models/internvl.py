"""Tiles -> image features: InternViT, pixel shuffle and MLP projector of InternVL3 and InternVL3.5.

A tile is a window of the layout of `image_processor.py`, and its patches lie 2x2 unit by unit, so
the tile's attention and the pixel shuffle are reshapes. Padded tiles are computed and read by
nobody.

Letters: B images, S patch slots, W tiles, U = S / 4 units, D width.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.json_files import shown
from caprl_jax.models.attention import AttentionKind, OwnTokens, attend
from caprl_jax.models.family import Family, Features, Keys
from caprl_jax.models.image_processor import CLIP_MEAN, CLIP_STD, Tiles
from caprl_jax.models.layers import ACTIVATIONS, MLP, LayerNorm, PatchEmbed, RMSNorm, linear
from caprl_jax.types import Images

Array = jax.Array
# what InternVL's own code normalises with
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _one(size) -> int:
  """A size given as one number or as a square's two."""
  sides = set(size) if isinstance(size, (list, tuple)) else {size}
  if len(sides) != 1:
    raise ValueError(f"vision_config: {size} is not square; InternVL's tiles and patches are")
  return sides.pop()


def _tiles(config: dict, pixels: dict) -> Tiles:
  """How images are cut, from config.json and preprocessor_config.json."""
  vision = config["vision_config"]
  tile, patch = _one(vision["image_size"]), _one(vision["patch_size"])
  size = pixels.get("size") or {}
  size = size if isinstance(size, dict) else dict(height=size, width=size)
  if size and (size.get("height"), size.get("width")) != (tile, tile):
    raise ValueError(
      f"preprocessor_config.json resizes to {size}, but the tower takes tiles of {tile} pixels"
    )
  pixels = {
    "min_patches": 1,
    "max_patches": 12,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    **config.get("tiles", {}),
    **{k: v for k, v in pixels.items() if v is not None},
  }
  return Tiles(
    tile,
    patch,
    round(1 / config.get("downsample_ratio", 0.5)),
    pixels["min_patches"],
    pixels["max_patches"],
    mean=tuple(pixels["image_mean"]),
    std=tuple(pixels["image_std"]),
  )


@dataclasses.dataclass(frozen=True)
class InternVisionConfig:
  """Architecture of tower and projector; `from_hf` reads Hugging Face's config.json and
  preprocessor_config.json.
  """

  pixels: Tiles
  depth: int
  hidden_size: int
  intermediate_size: int
  num_heads: int
  out_hidden_size: int
  qkv_bias: bool
  qk_norm: bool
  norm_type: str
  norm_eps: float
  final_norm: bool
  in_channels: int = 3
  activation: str = "gelu"
  projector_activation: str = "gelu"
  layer_scale: float = 0.1
  init_std: float = 0.02
  dtype: Any = jnp.float32
  remat: bool = False
  attention: AttentionKind = "xla"

  @classmethod
  def from_hf(
    cls, config: dict, preprocessor: dict | None = None, **overrides
  ) -> "InternVisionConfig":
    """Reads config.json and, for pixels, preprocessor_config.json."""
    vision, tiles = config["vision_config"], _tiles(config, preprocessor or {})
    if (
      config.get("vision_feature_layer", -1),
      config.get("vision_feature_select_strategy", "default"),
    ) != (-1, "default"):
      raise ValueError(
        "InternVL with another vision_feature_layer than -1, or another "
        "vision_feature_select_strategy than 'default', is not supported"
      )
    if not vision.get("use_absolute_position_embeddings", True):
      raise ValueError("InternVL without absolute position embeddings is not supported")
    return cls(
      **{
        **dict(
          pixels=tiles,
          depth=vision["num_hidden_layers"],
          hidden_size=vision["hidden_size"],
          intermediate_size=vision["intermediate_size"],
          num_heads=vision["num_attention_heads"],
          out_hidden_size=config["text_config"]["hidden_size"],
          qkv_bias=bool(vision.get("attention_bias", False)),
          qk_norm=bool(vision.get("use_qk_norm", False)),
          norm_type=vision.get("norm_type", "layer_norm"),
          norm_eps=vision.get("layer_norm_eps", 1e-6),
          final_norm=not vision.get("use_mean_pooling", True),
          in_channels=vision.get("num_channels", 3),
          activation=vision.get("hidden_act", "gelu"),
          projector_activation=config.get("projector_hidden_act", "gelu"),
          layer_scale=vision.get("layer_scale_init_value", 0.1),
          init_std=vision.get("initializer_range", 0.02),
        ),
        **overrides,
      }
    )

  def tower(self, name: str | None = None) -> "VisionTower":
    return VisionTower(self, name=name)

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def slots_multiple(self) -> int:
    """Patches of a tile."""
    return self.pixels.tile_patches

  def norm(self, name: str) -> nn.Module:
    return (LayerNorm if self.norm_type == "layer_norm" else RMSNorm)(self.norm_eps, name=name)


class VisionAttention(nn.Module):
  """Attention among the patches of a tile and its class token."""

  cfg: InternVisionConfig

  @nn.compact
  def __call__(self, x_NSD):
    cfg = self.cfg
    N, S, D = x_NSD.shape
    options = dict(init_std=cfg.init_std, dtype=cfg.dtype)
    q, k, v = (
      linear(D, ("vision_embed", "heads"), f"{n}_proj", use_bias=cfg.qkv_bias, **options)(x_NSD)
      for n in "qkv"
    )
    if cfg.qk_norm:
      q, k = RMSNorm(1e-6, name="q_norm")(q), RMSNorm(1e-6, name="k_norm")(k)
    q, k, v = (x.reshape(N, S, cfg.num_heads, cfg.head_dim) for x in (q, k, v))
    own = OwnTokens(jnp.ones((N, S), bool), causal=False)
    out = attend(q, (k, v), own, (), cfg.attention).reshape(N, S, D)
    return linear(D, ("heads", "vision_embed"), "projection_layer", use_bias=True, **options)(out)


class VisionLayer(nn.Module):
  """Pre-norm attention and MLP, each scaled by a learned vector; scanned over layers."""

  cfg: InternVisionConfig

  @nn.compact
  def __call__(self, x_NSD, _):
    cfg = self.cfg
    init = nn.with_logical_partitioning(nn.initializers.constant(cfg.layer_scale), ("norm",))

    def scale(name: str) -> Array:
      return self.param(name, init, (cfg.hidden_size,)).astype(cfg.dtype)

    x_NSD = x_NSD + scale("lambda_1") * VisionAttention(cfg, name="attention")(
      cfg.norm("layernorm_before")(x_NSD)
    )
    mlp = MLP(
      cfg.intermediate_size,
      cfg.hidden_size,
      cfg.activation,
      ("fc1", "fc2"),
      ("vision_embed", "vision_embed"),
      cfg.init_std,
      cfg.dtype,
      name="mlp",
    )
    return x_NSD + scale("lambda_2") * mlp(cfg.norm("layernorm_after")(x_NSD)), None


class Projector(nn.Module):
  """Each unit's 2x2 patches -> one feature of the language model's width."""

  cfg: InternVisionConfig

  @nn.compact
  def __call__(self, x_BUD: Array) -> Array:
    cfg = self.cfg
    options = dict(use_bias=True, init_std=cfg.init_std, dtype=cfg.dtype)
    x_BUD = LayerNorm(1e-5, name="layer_norm")(x_BUD)
    x_BUD = linear(cfg.out_hidden_size, ("vision_embed", "mlp"), "linear_1", **options)(x_BUD)
    return linear(cfg.out_hidden_size, ("mlp", "embed"), "linear_2", **options)(
      ACTIVATIONS[cfg.projector_activation](x_BUD)
    )


class VisionTower(nn.Module):
  """Images -> features [B, U, out_hidden_size], tile after tile."""

  cfg: InternVisionConfig

  def setup(self):
    cfg = self.cfg
    self.embeddings = PatchEmbed(
      cfg.hidden_size,
      cfg.in_channels,
      cfg.pixels.patch_size,
      0,
      True,
      cfg.pixels.mean,
      cfg.pixels.std,
      cfg.init_std,
      cfg.dtype,
    )
    learned = nn.with_logical_partitioning(
      nn.initializers.normal(cfg.init_std), (None, None, "vision_embed")
    )
    self.cls_token = self.param("cls_token", learned, (1, 1, cfg.hidden_size))
    self.position_embeddings = self.param(
      "position_embeddings", learned, (1, cfg.pixels.tile_patches + 1, cfg.hidden_size)
    )
    layer = nn.remat(VisionLayer, prevent_cse=False) if cfg.remat else VisionLayer
    self.layer = nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=cfg.depth,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(cfg)
    if cfg.final_norm:
      self.layernorm = LayerNorm(cfg.norm_eps)  # whatever norm_type says, as in transformers
    self.multi_modal_projector = Projector(cfg)

  def __call__(self, images: Images) -> Features:
    cfg = self.cfg
    B, S, _ = images.patches_BSE.shape
    slots = cfg.slots_multiple
    assert S % slots == 0, f"{S} patch slots are not whole tiles of {slots}"
    side = cfg.pixels.tile_size // cfg.pixels.patch_size
    positions_PD = self.position_embeddings[0].astype(cfg.dtype)
    order_BS = images.position_BS2[..., 0] * side + images.position_BS2[..., 1] + 1
    x_BSD = self.embeddings(images.patches_BSE) + positions_PD[order_BS]
    x_NSD = x_BSD.reshape(B * S // slots, slots, -1)
    first = jnp.broadcast_to(
      self.cls_token[0].astype(cfg.dtype) + positions_PD[:1], (len(x_NSD), 1, x_NSD.shape[-1])
    )
    x_NSD, _ = self.layer(jnp.concatenate([first, x_NSD], axis=1), None)
    if cfg.final_norm:
      x_NSD = self.layernorm(x_NSD)
    unit = cfg.pixels.merge_size**2
    return Features(self.multi_modal_projector(x_NSD[:, 1:].reshape(B, S // unit, -1)))


def text_config(config: dict) -> dict:
  """The decoder's part of config.json; a Qwen2, Qwen3 or Llama model."""
  # transformers ties by the outer word alone, and where nothing is said.
  tied = config.get("tie_word_embeddings")
  return {**config["text_config"], "tie_word_embeddings": True if tied is None else bool(tied)}


# The published files of the models' own repository ("internvl_chat") -> transformers' names.
_CHAT_NAMES = (
  (r"^language_model\.lm_head\.", "lm_head."),
  (r"^language_model\.model\.", "model.language_model."),
  (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
  (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
  (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
  (r"^vision_model\.embeddings\.class_embedding$", "model.vision_tower.embeddings.cls_token"),
  (
    r"^vision_model\.embeddings\.position_embedding$",
    "model.vision_tower.embeddings.position_embeddings",
  ),
  (
    r"^vision_model\.embeddings\.patch_embedding\.",
    "model.vision_tower.embeddings.patch_embeddings.projection.",
  ),
  (r"^vision_model\.encoder\.layers\.", "model.vision_tower.encoder.layer."),
  (r"\.attn\.proj\.", ".attention.projection_layer."),
  (r"\.attn\.([qk])_norm\.", r".attention.\1_norm."),
  (r"\.attn\.qkv\.", ".attention.{}_proj."),
  (r"\.ls([12])$", r".lambda_\1"),
  (r"\.norm1\.", ".layernorm_before."),
  (r"\.norm2\.", ".layernorm_after."),
)


class _ChatTensors(Mapping):
  """The tensors of an "internvl_chat" checkpoint under transformers' names; queries, keys and
  values are cut apart.
  """

  def __init__(self, tensors: Mapping[str, np.ndarray]):
    self.tensors, self.sources = tensors, {}
    for name in tensors:
      new = name
      for pattern, replacement in _CHAT_NAMES:
        new = re.sub(pattern, replacement, new)
      for i, letter in enumerate("qkv" if "{}" in new else ("",)):
        self.sources[new.format(letter) if letter else new] = (name, i if letter else None)

  def __getitem__(self, name: str) -> np.ndarray:
    source, part = self.sources[name]
    tensor = self.tensors[source]
    return tensor if part is None else np.split(np.asarray(tensor), 3)[part]

  def __iter__(self) -> Iterator[str]:
    return iter(self.sources)

  def __len__(self) -> int:
    return len(self.sources)


# What changes a result of InternVL's own code: key -> the values that are read here, the default
# first.
_CHAT: dict[str, tuple] = {
  "use_thumbnail": (True,),
  "ps_version": ("v2",),
  "select_layer": (-1,),
  "pad2square": (False,),
}


def from_chat(config: dict, tensors: Mapping) -> tuple[dict, Mapping]:
  """An "internvl_chat" checkpoint (InternVL's own code) as a transformers one.

  config: with `img_context_token_id`, which not all published files have.

  Raises:
    ValueError: a setting that changes the result and is not read here.
  """
  if config.get("model_type") != "internvl_chat":
    return config, tensors
  for key, read in _CHAT.items():
    if config.get(key, read[0]) not in read:
      raise ValueError(
        f"{key} = {shown(config[key])} in config.json; {shown(read[0])} alone is supported"
      )
  vision, text = dict(config["vision_config"]), dict(config["llm_config"])
  if config.get("force_image_size") not in (None, vision.get("image_size")):
    raise ValueError(
      f"force_image_size = {shown(config['force_image_size'])} in config.json, but the tower's "
      f"image_size is {shown(vision.get('image_size'))}; only the same is supported"
    )
  tiled = config.get("dynamic_image_size", True)
  vision |= dict(
    attention_bias=vision.pop("qkv_bias", True),
    use_qk_norm=vision.pop("qk_normalization", False),
    layer_scale_init_value=vision.get("initializer_factor", 0.1),
    model_type="internvl_vision",
    use_mean_pooling=True,
  )
  new = {
    "model_type": "internvl",
    "architectures": ["InternVLForConditionalGeneration"],
    "vision_config": vision,
    "text_config": text,
    "downsample_ratio": config.get("downsample_ratio", 0.5),
    "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
    "image_token_id": config["img_context_token_id"],
    "tiles": {
      "min_patches": config.get("min_dynamic_patch", 1) if tiled else 1,
      "max_patches": config.get("max_dynamic_patch", 12) if tiled else 1,
      "image_mean": IMAGENET_MEAN,
      "image_std": IMAGENET_STD,
    },
  }
  return new, _ChatTensors(tensors)


FAMILY = Family(
  "internvl",
  InternVisionConfig.from_hf,
  text_config,
  projector=r"visual\.multi_modal_projector\.",
  marker="<IMG_CONTEXT>",
  after_marker="\n",
  open="<img>",
  close="</img>",
  aliases=("internvl_chat",),
  adapt=from_chat,
  keys=Keys(
    prefixes=(
      ("language_model.lm_head.", ("lm_head.", "language_model.lm_head.")),
      ("language_model.", ("model.language_model.", "language_model.model.")),
      ("visual.multi_modal_projector.", ("model.multi_modal_projector.", "multi_modal_projector.")),
      ("visual.", ("model.vision_tower.", "vision_tower.")),
    ),
    renames=(
      (r"^visual\.(cls_token|position_embeddings)$", r"visual.embeddings.\1"),
      (r"embeddings\.proj$", "embeddings.patch_embeddings.projection.weight"),
      (r"embeddings\.proj_bias$", "embeddings.patch_embeddings.projection.bias"),
      (r"^visual\.layer\.", "visual.encoder.layer."),
    ),
    stacks=("layers", "layer"),
  ),
)
