"""Patches in window-major order -> image features: the Qwen2.5-VL vision tower.

The host lays patches out window by window with a fixed number of slots per window
(`image_processor.py`), so windowed attention is block-diagonal by a reshape, [B, S] -> [B * W,
slots], instead of an S x S mask; the four patches of a merge unit are neighbours, so the 2x2 merger
is a reshape as well. Layers are scanned; each one picks windowed or full attention with a
conditional.

Letters: B images, S patch slots, W windows, U = S / 4 units, E numbers in a patch, D width, H
heads, h head width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from caprl_jax.models.attention import AttentionKind, OwnTokens, attend, takes_kernel
from caprl_jax.models.family import Family, Features, Keys
from caprl_jax.models.image_processor import CLIP_MEAN, CLIP_STD, SmartResize
from caprl_jax.models.layers import GatedMLP, PatchEmbed, RMSNorm, axial_tables, linear, rotate
from caprl_jax.types import Images

Array = jax.Array


def smart_resize(
  preprocessor: dict | None,
  patch_size: int,
  merge_size: int,
  min_pixels: int,
  max_pixels: int,
  mean,
  std,
  window_units: int | None = None,
) -> SmartResize:
  """What preprocessor_config.json says of pixels, and the family's defaults for what it leaves
  out.
  """
  pixels = preprocessor or {}
  size = pixels.get("size") or {}
  return SmartResize(
    patch_size,
    merge_size,
    min_pixels=pixels.get("min_pixels") or size.get("shortest_edge") or min_pixels,
    max_pixels=pixels.get("max_pixels") or size.get("longest_edge") or max_pixels,
    window_units=window_units,
    mean=tuple(pixels.get("image_mean") or mean),
    std=tuple(pixels.get("image_std") or std),
  )


@dataclasses.dataclass(frozen=True)
class Qwen25VisionConfig:
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
  full_attention_layers: tuple[int, ...]
  in_channels: int = 3
  activation: str = "silu"
  init_std: float = 0.02
  dtype: Any = jnp.float32
  remat: bool = False
  attention: AttentionKind = "xla"

  @classmethod
  def from_hf(
    cls, config: dict, preprocessor: dict | None = None, **overrides
  ) -> "Qwen25VisionConfig":
    """Reads config.json and, for pixels, preprocessor_config.json."""
    config = config["vision_config"]
    patch, merge = config["patch_size"], config.get("spatial_merge_size", 2)
    pixels = smart_resize(
      preprocessor,
      patch,
      merge,
      56 * 56,
      28 * 28 * 1280,
      CLIP_MEAN,
      CLIP_STD,
      window_units=config["window_size"] // merge // patch,
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
          full_attention_layers=tuple(config["fullatt_block_indexes"]),
          in_channels=config.get("in_channels", config.get("in_chans", 3)),
          activation=config.get("hidden_act", "silu"),
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
    """Patch slots that one window takes."""
    return (self.pixels.window_units * self.pixels.merge_size) ** 2


def rotated_qkv(qkv_BSE: Array, cfg, cos_BSh: Array, sin_BSh: Array) -> tuple[Array, Array, Array]:
  """The fused map's output cut into queries, keys and values [B, S, H, h], the first two
  rotated.
  """
  B, S, _ = qkv_BSE.shape
  q, k, v = jnp.moveaxis(qkv_BSE.reshape(B, S, 3, cfg.num_heads, cfg.head_dim), 2, 0)
  return (
    rotate(q, cos_BSh, sin_BSh).astype(cfg.dtype),
    rotate(k, cos_BSh, sin_BSh).astype(cfg.dtype),
    v,
  )


class VisionAttention(nn.Module):
  """Attention among the patches of a window, or of the whole image."""

  cfg: Qwen25VisionConfig

  @nn.compact
  def __call__(self, x_BSD, cos_BSh, sin_BSh, valid_BS, is_full):
    cfg = self.cfg
    B, S, D = x_BSD.shape
    options = dict(use_bias=True, init_std=cfg.init_std, dtype=cfg.dtype)
    q, k, v = rotated_qkv(
      linear(3 * D, ("vision_embed", "heads"), "qkv", **options)(x_BSD), cfg, cos_BSh, sin_BSh
    )

    def within(slots: int):
      def run(q, k, v, valid):
        q, k, v = (x.reshape(-1, slots, cfg.num_heads, cfg.head_dim) for x in (q, k, v))
        own = OwnTokens(valid.reshape(-1, slots), causal=False)
        return attend(q, (k, v), own).reshape(B, S, D)

      return run

    if takes_kernel(cfg.attention, S, S):  # a window is a segment, and one kernel serves both
      window_S = jnp.where(is_full, 0, jnp.arange(S) // cfg.slots_multiple)
      own = OwnTokens(valid_BS, jnp.broadcast_to(window_S, (B, S)), causal=False)
      out = attend(q, (k, v), own, (), cfg.attention).reshape(B, S, D)
    else:
      out = jax.lax.cond(is_full, within(S), within(cfg.slots_multiple), q, k, v, valid_BS)
    return linear(D, ("heads", "vision_embed"), "proj", **options)(out)


class VisionBlock(nn.Module):
  """Pre-norm attention and gated MLP, scanned over layers."""

  cfg: Qwen25VisionConfig

  @nn.compact
  def __call__(self, x_BSD, is_full, cos_BSh, sin_BSh, valid_BS):
    cfg = self.cfg
    x_BSD = x_BSD + VisionAttention(cfg, name="attn")(
      RMSNorm(1e-6, name="norm1")(x_BSD), cos_BSh, sin_BSh, valid_BS, is_full
    )
    mlp = GatedMLP(cfg.intermediate_size, cfg.activation, True, cfg.init_std, cfg.dtype, name="mlp")
    return x_BSD + mlp(RMSNorm(1e-6, name="norm2")(x_BSD)), None


class PatchMerger(nn.Module):
  """Each unit's 2x2 patches -> one feature of the language model's width."""

  cfg: Qwen25VisionConfig

  @nn.compact
  def __call__(self, x_BSD: Array) -> Array:
    cfg = self.cfg
    B, S, D = x_BSD.shape
    unit = cfg.pixels.merge_size**2
    x_BUD = RMSNorm(1e-6, name="ln_q")(x_BSD).reshape(B, S // unit, unit * D)
    options = dict(use_bias=True, init_std=cfg.init_std, dtype=cfg.dtype)
    x_BUD = linear(unit * D, ("vision_embed", "mlp"), "mlp_0", **options)(x_BUD)
    return linear(cfg.out_hidden_size, ("mlp", "embed"), "mlp_2", **options)(
      jax.nn.gelu(x_BUD, approximate=False)
    )


class VisionTower(nn.Module):
  """Images -> features [B, U, out_hidden_size] in window order."""

  cfg: Qwen25VisionConfig

  def setup(self):
    cfg = self.cfg
    self.patch_embed = PatchEmbed(
      cfg.hidden_size,
      cfg.in_channels,
      cfg.pixels.patch_size,
      cfg.temporal_patch_size,
      False,
      cfg.pixels.mean,
      cfg.pixels.std,
      cfg.init_std,
      cfg.dtype,
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
    self.merger = PatchMerger(cfg)

  def __call__(self, images: Images) -> Features:
    cfg = self.cfg
    S = images.patches_BSE.shape[1]
    assert S % cfg.slots_multiple == 0, (
      f"{S} patch slots are not whole windows of {cfg.slots_multiple}"
    )
    cos, sin = axial_tables(images.position_BS2, cfg.head_dim)
    is_full = jnp.zeros(cfg.depth, bool).at[jnp.asarray(cfg.full_attention_layers, int)].set(True)
    x_BSD, _ = self.blocks(self.patch_embed(images.patches_BSE), is_full, cos, sin, images.valid_BS)
    return Features(self.merger(x_BSD))


def text_config(config: dict) -> dict:
  """The decoder's part of config.json, nested (transformers 5) or flat (the published files)."""
  text = {**(config.get("text_config") or config), "model_type": "qwen2_5_vl_text"}
  # Writers disagree about where the tie is said; transformers reads either.
  text["tie_word_embeddings"] = bool(
    config.get("tie_word_embeddings") or text.get("tie_word_embeddings")
  )
  return text


FAMILY = Family(
  "qwen2_5_vl",
  Qwen25VisionConfig.from_hf,
  text_config,
  projector=r"visual\.merger\.",
  keys=Keys(
    prefixes=(
      ("language_model.lm_head.", ("lm_head.",)),
      ("language_model.", ("model.", "model.language_model.", "language_model.model.")),
      ("visual.", ("visual.", "model.visual.")),
    ),
    renames=((r"merger\.mlp_", "merger.mlp."), (r"patch_embed\.proj$", "patch_embed.proj.weight")),
  ),
)
