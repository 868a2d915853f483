"""Patches -> image features at several depths: the Qwen3-VL vision tower.

Attention is over the whole image. A square grid of learned positions is stretched over each image's
own grid. Besides the last layer's features, those of a few inner layers go to the decoder's first
layers (DeepStack, arXiv 2406.04334).

Letters: B images, S patch slots, U = S / 4 units, D width, h head width, X inner layers whose
features are used.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from caprl_jax.models.attention import AttentionKind, OwnTokens, attend
from caprl_jax.models.family import Family, Features, Keys
from caprl_jax.models.image_processor import SmartResize
from caprl_jax.models.layers import MLP, LayerNorm, PatchEmbed, axial_tables, linear
from caprl_jax.models.qwen25_vl import rotated_qkv, smart_resize
from caprl_jax.types import Images

Array = jax.Array
HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Qwen3VisionConfig:
  """Architecture of the tower; `from_hf` reads Hugging Face's config.json and
  preprocessor_config.json.
  """

  pixels: SmartResize
  depth: int
  hidden_size: int
  intermediate_size: int
  num_heads: int
  out_hidden_size: int
  temporal_patch_size: int
  position_side: int  # of the square of learned positions
  deep_layers: tuple[int, ...]
  in_channels: int = 3
  activation: str = "gelu_pytorch_tanh"
  init_std: float = 0.02
  dtype: Any = jnp.float32
  remat: bool = False
  attention: AttentionKind = "xla"

  @classmethod
  def from_hf(
    cls, config: dict, preprocessor: dict | None = None, **overrides
  ) -> "Qwen3VisionConfig":
    """Reads config.json and, for pixels, preprocessor_config.json."""
    config = config["vision_config"]
    pixels = smart_resize(
      preprocessor,
      config["patch_size"],
      config.get("spatial_merge_size", 2),
      256 * 256,
      4096 * 4096,
      HALF,
      HALF,
    )
    return cls(
      **{
        **dict(
          pixels=pixels,
          depth=config["depth"],
          hidden_size=config["hidden_size"],
          intermediate_size=config["intermediate_size"],
          num_heads=config["num_heads"],
          out_hidden_size=config["out_hidden_size"],
          temporal_patch_size=config.get("temporal_patch_size", 2),
          position_side=round(config["num_position_embeddings"] ** 0.5),
          deep_layers=tuple(config["deepstack_visual_indexes"]),
          in_channels=config.get("in_channels", 3),
          activation=config.get("hidden_act", "gelu_pytorch_tanh"),
          init_std=config.get("initializer_range", 0.02),
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
    return self.pixels.merge_size**2


class VisionAttention(nn.Module):
  """Attention among the patches of an image."""

  cfg: Qwen3VisionConfig

  @nn.compact
  def __call__(self, x_BSD, cos_BSh, sin_BSh, valid_BS):
    cfg = self.cfg
    B, S, D = x_BSD.shape
    options = dict(use_bias=True, init_std=cfg.init_std, dtype=cfg.dtype)
    q, k, v = rotated_qkv(
      linear(3 * D, ("vision_embed", "heads"), "qkv", **options)(x_BSD), cfg, cos_BSh, sin_BSh
    )
    out = attend(q, (k, v), OwnTokens(valid_BS, causal=False), (), cfg.attention).reshape(B, S, D)
    return linear(D, ("heads", "vision_embed"), "proj", **options)(out)


class VisionBlock(nn.Module):
  """Pre-norm attention and MLP, scanned over layers. The carry's second part collects the inner
  layers' outputs.
  """

  cfg: Qwen3VisionConfig

  @nn.compact
  def __call__(self, carry, place, cos_BSh, sin_BSh, valid_BS):
    cfg = self.cfg
    x_BSD, deep_XBSD = carry
    x_BSD = x_BSD + VisionAttention(cfg, name="attn")(
      LayerNorm(1e-6, name="norm1")(x_BSD), cos_BSh, sin_BSh, valid_BS
    )
    mlp = MLP(
      cfg.intermediate_size,
      cfg.hidden_size,
      cfg.activation,
      ("linear_fc1", "linear_fc2"),
      ("vision_embed", "vision_embed"),
      cfg.init_std,
      cfg.dtype,
      name="mlp",
    )
    x_BSD = x_BSD + mlp(LayerNorm(1e-6, name="norm2")(x_BSD))
    if len(deep_XBSD):  # place: where this layer's output goes, -1 for nowhere

      def put(deep: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(deep, x_BSD, jnp.maximum(place, 0), 0)

      deep_XBSD = jax.lax.cond(place >= 0, put, lambda deep: deep, deep_XBSD)
    return (x_BSD, deep_XBSD), None


class PatchMerger(nn.Module):
  """Each unit's 2x2 patches -> one feature of the language model's width; normed patch by patch, or
  (`norm_units`) unit by unit.
  """

  cfg: Qwen3VisionConfig
  norm_units: bool

  @nn.compact
  def __call__(self, x_BSD: Array) -> Array:
    cfg = self.cfg
    B, S, D = x_BSD.shape
    unit = cfg.pixels.merge_size**2
    norm = LayerNorm(1e-6, name="norm")
    units = (B, S // unit, unit * D)
    x_BUD = norm(x_BSD.reshape(units)) if self.norm_units else norm(x_BSD).reshape(units)
    options = dict(use_bias=True, init_std=cfg.init_std, dtype=cfg.dtype)
    x_BUD = linear(unit * D, ("vision_embed", "mlp"), "linear_fc1", **options)(x_BUD)
    return linear(cfg.out_hidden_size, ("mlp", "embed"), "linear_fc2", **options)(
      jax.nn.gelu(x_BUD, approximate=False)
    )


def stretched_positions(table_ND: Array, side: int, position_BS2: Array, valid_BS: Array) -> Array:
  """The square of learned positions stretched (bilinearly, corners on corners) over each image's
  grid, [B, S, D].
  """
  valid = valid_BS[..., None]
  # the grid's last row and column
  last = jnp.max(jnp.where(valid, position_BS2, 0), axis=1, keepdims=True)
  # As torch.linspace does it: the step first, and the second half counted from the end.
  step = (side - 1) / jnp.maximum(last, 1).astype(jnp.float32)
  position = position_BS2.astype(jnp.float32)
  place = jnp.where(
    position < (last + 1) // 2, position * step, (side - 1) - (last - position) * step
  )
  place = jnp.where(last == 0, 0.0, place)
  low = jnp.floor(place).astype(jnp.int32)
  high = jnp.minimum(low + 1, side - 1)
  share = place - low
  out = 0.0
  for row, row_share in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
    for column, column_share in ((low[..., 1], 1 - share[..., 1]), (high[..., 1], share[..., 1])):
      index = jnp.clip(row * side + column, 0, side * side - 1)
      out += table_ND[index] * (row_share * column_share)[..., None].astype(table_ND.dtype)
  return out


class VisionTower(nn.Module):
  """Images -> features [B, U, out_hidden_size] in raster order of units, and X more for the
  decoder's first layers.
  """

  cfg: Qwen3VisionConfig

  def setup(self):
    cfg = self.cfg
    self.patch_embed = PatchEmbed(
      cfg.hidden_size,
      cfg.in_channels,
      cfg.pixels.patch_size,
      cfg.temporal_patch_size,
      True,
      cfg.pixels.mean,
      cfg.pixels.std,
      cfg.init_std,
      cfg.dtype,
    )
    self.pos_embed = self.param(
      "pos_embed",
      nn.with_logical_partitioning(nn.initializers.normal(cfg.init_std), (None, "vision_embed")),
      (cfg.position_side**2, cfg.hidden_size),
    )
    block = nn.remat(VisionBlock, prevent_cse=False) if cfg.remat else VisionBlock
    self.blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=cfg.depth,
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(cfg)
    self.merger = PatchMerger(cfg, norm_units=False)
    if cfg.deep_layers:
      self.deepstack_merger_list = nn.vmap(
        PatchMerger,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        axis_size=len(cfg.deep_layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(cfg, True)

  def __call__(self, images: Images) -> Features:
    cfg = self.cfg
    cos, sin = axial_tables(images.position_BS2, cfg.head_dim)
    positions = stretched_positions(
      self.pos_embed, cfg.position_side, images.position_BS2, images.valid_BS
    )
    x_BSD = self.patch_embed(images.patches_BSE) + positions.astype(cfg.dtype)
    place = jnp.full(cfg.depth, -1, jnp.int32)
    for i, layer in enumerate(cfg.deep_layers):
      place = place.at[layer].set(i)
    deep_XBSD = jnp.zeros((len(cfg.deep_layers), *x_BSD.shape), x_BSD.dtype)
    (x_BSD, deep_XBSD), _ = self.blocks((x_BSD, deep_XBSD), place, cos, sin, images.valid_BS)
    return Features(
      self.merger(x_BSD), self.deepstack_merger_list(deep_XBSD) if cfg.deep_layers else None
    )


def text_config(config: dict) -> dict:
  """The decoder's part of config.json."""
  # transformers ties by the outer word alone.
  tied = bool(config.get("tie_word_embeddings"))
  return {**config["text_config"], "model_type": "qwen3_vl_text", "tie_word_embeddings": tied}


FAMILY = Family(
  "qwen3_vl",
  Qwen3VisionConfig.from_hf,
  text_config,
  projector=r"visual\.(merger|deepstack_merger_list)\.",
  keys=Keys(
    prefixes=(
      ("language_model.lm_head.", ("lm_head.",)),
      ("language_model.", ("model.language_model.", "model.", "language_model.model.")),
      ("visual.", ("model.visual.", "visual.")),
    ),
    renames=(
      (r"patch_embed\.proj$", "patch_embed.proj.weight"),
      (r"proj_bias$", "proj.bias"),
      (r"pos_embed$", "pos_embed.weight"),
    ),
    stacks=("layers", "blocks", "deepstack_merger_list"),
  ),
)
