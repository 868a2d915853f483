"""Patches in window-major order -> image features: the Qwen2.5-VL vision tower.

The host lays patches out window by window with a fixed number of slots a window (`data/images.py`), so windowed
attention is block-diagonal by a reshape, [B, S] -> [B * W, slots], instead of an S x S mask; the four patches of
a merge unit are neighbours, so the 2x2 merger is a reshape as well. Layers are scanned; each one picks windowed
or full attention with a conditional.

Letters: B images, S patch slots, W windows, U = S / 4 units, E numbers in a patch, D width, H heads, h head width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from caprl_jax.models.attention import attend
from caprl_jax.models.layers import GatedMLP, RMSNorm, linear, rotate
from caprl_jax.types import Images

Array = jax.Array

# OpenAI CLIP's pixel statistics: what Qwen2.5-VL's processor normalises with when its file names no others.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Architecture of the tower; `from_hf` reads Hugging Face's vision_config and preprocessor_config."""
  depth: int
  hidden_size: int
  intermediate_size: int
  num_heads: int
  out_hidden_size: int
  patch_size: int
  temporal_patch_size: int
  merge_size: int
  window_size: int  # pixels
  full_attention_layers: tuple[int, ...]
  in_channels: int = 3
  activation: str = "silu"
  image_mean: tuple[float, float, float] = CLIP_MEAN
  image_std: tuple[float, float, float] = CLIP_STD
  min_pixels: int = 56 * 56
  max_pixels: int = 28 * 28 * 1280
  init_std: float = 0.02
  dtype: Any = jnp.float32
  remat: bool = False

  @classmethod
  def from_hf(cls, config: dict, preprocessor: dict | None = None, **overrides) -> "VisionConfig":
    """Reads `vision_config` of config.json and, for pixels, preprocessor_config.json."""
    pixels = preprocessor or {}
    size = pixels.get("size") or {}
    return cls(**{**dict(
        depth=config["depth"], hidden_size=config["hidden_size"], intermediate_size=config["intermediate_size"],
        num_heads=config["num_heads"], out_hidden_size=config["out_hidden_size"], patch_size=config["patch_size"],
        temporal_patch_size=config.get("temporal_patch_size", 2), merge_size=config.get("spatial_merge_size", 2),
        window_size=config["window_size"], full_attention_layers=tuple(config["fullatt_block_indexes"]),
        in_channels=config.get("in_channels", config.get("in_chans", 3)), activation=config.get("hidden_act", "silu"),
        image_mean=tuple(pixels.get("image_mean") or CLIP_MEAN), image_std=tuple(pixels.get("image_std") or CLIP_STD),
        min_pixels=pixels.get("min_pixels") or size.get("shortest_edge") or cls.min_pixels,
        max_pixels=pixels.get("max_pixels") or size.get("longest_edge") or cls.max_pixels,
        init_std=config.get("initializer_range", 0.02)), **overrides})

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def window_units(self) -> int:
    """Merge units along one side of a window."""
    return self.window_size // self.merge_size // self.patch_size

  @property
  def window_slots(self) -> int:
    """Patch slots that one window takes."""
    return (self.window_units * self.merge_size) ** 2


def axial_tables(position_BS2: Array, head_dim: int) -> tuple[Array, Array]:
  """Rotary cosines and sines [B, S, h]: half of the frequencies turn with the row, half with the column."""
  frequency = 10_000.0 ** (-jnp.arange(0, head_dim // 2, 2, dtype=jnp.float32) / (head_dim // 2))
  angle = (position_BS2.astype(jnp.float32)[..., None] * frequency).reshape(*position_BS2.shape[:2], -1)
  angle = jnp.concatenate([angle, angle], axis=-1)
  return jnp.cos(angle), jnp.sin(angle)


class PatchEmbed(nn.Module):
  """uint8 pixels -> normalised -> linear. A still image is its frame repeated `temporal_patch_size` times, so the
  3-D convolution of the checkpoint is a product with the kernel summed over time."""
  cfg: VisionConfig

  @nn.compact
  def __call__(self, patches_BSE: Array) -> Array:
    cfg = self.cfg
    shape = (cfg.hidden_size, cfg.in_channels, cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
    kernel = self.param("proj", nn.with_logical_partitioning(
        nn.initializers.normal(cfg.init_std), ("vision_embed", None, None, None, None)), shape)
    B, S, E = patches_BSE.shape
    assert E == cfg.in_channels * cfg.patch_size ** 2, (patches_BSE.shape, cfg)
    pixels = patches_BSE.reshape(B, S, cfg.in_channels, -1).astype(jnp.float32) / 255.0
    mean, std = (jnp.asarray(x, jnp.float32)[:, None] for x in (cfg.image_mean, cfg.image_std))
    pixels = ((pixels - mean) / std).reshape(B, S, E).astype(cfg.dtype)
    return pixels @ kernel.astype(cfg.dtype).sum(2).reshape(cfg.hidden_size, E).T


class VisionAttention(nn.Module):
  """Attention among the patches of a window, or of the whole image."""
  cfg: VisionConfig

  @nn.compact
  def __call__(self, x_BSD, cos_BSh, sin_BSh, valid_BS, is_full):
    cfg = self.cfg
    B, S, D = x_BSD.shape
    options = dict(use_bias=True, init_std=cfg.init_std, dtype=cfg.dtype)
    qkv = linear(3 * D, ("vision_embed", "heads"), "qkv", **options)(x_BSD)
    q, k, v = jnp.moveaxis(qkv.reshape(B, S, 3, cfg.num_heads, cfg.head_dim), 2, 0)
    q, k = rotate(q, cos_BSh, sin_BSh).astype(cfg.dtype), rotate(k, cos_BSh, sin_BSh).astype(cfg.dtype)

    def within(slots: int):
      def run(q, k, v, valid):
        q, k, v = (x.reshape(-1, slots, cfg.num_heads, cfg.head_dim) for x in (q, k, v))
        valid = valid.reshape(-1, 1, slots)
        return attend(q, (k, v), jnp.broadcast_to(valid, (q.shape[0], slots, slots))).reshape(B, S, D)
      return run

    out = jax.lax.cond(is_full, within(S), within(cfg.window_slots), q, k, v, valid_BS)
    return linear(D, ("heads", "vision_embed"), "proj", **options)(out)


class VisionBlock(nn.Module):
  """Pre-norm attention and gated MLP, scanned over layers."""
  cfg: VisionConfig

  @nn.compact
  def __call__(self, x_BSD, is_full, cos_BSh, sin_BSh, valid_BS):
    cfg = self.cfg
    x_BSD = x_BSD + VisionAttention(cfg, name="attn")(
        RMSNorm(1e-6, name="norm1")(x_BSD), cos_BSh, sin_BSh, valid_BS, is_full)
    mlp = GatedMLP(cfg.intermediate_size, cfg.activation, True, cfg.init_std, cfg.dtype, name="mlp")
    return x_BSD + mlp(RMSNorm(1e-6, name="norm2")(x_BSD)), None


class PatchMerger(nn.Module):
  """Each unit's 2x2 patches -> one feature of the language model's width."""
  cfg: VisionConfig

  @nn.compact
  def __call__(self, x_BSD: Array) -> Array:
    cfg = self.cfg
    B, S, D = x_BSD.shape
    unit = cfg.merge_size ** 2
    x_BUD = RMSNorm(1e-6, name="ln_q")(x_BSD).reshape(B, S // unit, unit * D)
    options = dict(use_bias=True, init_std=cfg.init_std, dtype=cfg.dtype)
    x_BUD = linear(unit * D, ("vision_embed", "mlp"), "mlp_0", **options)(x_BUD)
    return linear(cfg.out_hidden_size, ("mlp", "embed"), "mlp_2", **options)(jax.nn.gelu(x_BUD, approximate=False))


class VisionTower(nn.Module):
  """Images -> features [B, U, out_hidden_size] in window order; padded units hold numbers that nobody reads."""
  cfg: VisionConfig

  def setup(self):
    cfg = self.cfg
    self.patch_embed = PatchEmbed(cfg)
    block = nn.remat(VisionBlock, prevent_cse=False) if cfg.remat else VisionBlock
    self.blocks = nn.scan(
        block, variable_axes={"params": 0}, split_rngs={"params": True}, length=cfg.depth,
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        metadata_params={nn.PARTITION_NAME: "layers"})(cfg)
    self.merger = PatchMerger(cfg)

  def __call__(self, images: Images) -> Array:
    cfg = self.cfg
    S = images.patches_BSE.shape[1]
    assert S % cfg.window_slots == 0, f"{S} patch slots are not whole windows of {cfg.window_slots}"
    cos, sin = axial_tables(images.position_BS2, cfg.head_dim)
    is_full = jnp.zeros(cfg.depth, bool).at[jnp.asarray(cfg.full_attention_layers, int)].set(True)
    x_BSD, _ = self.blocks(self.patch_embed(images.patches_BSE), is_full, cos, sin, images.valid_BS)
    return self.merger(x_BSD)
