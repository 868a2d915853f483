"""Token embeddings, positions, prefixes -> hidden states: the decoder of the Llama, Qwen2 and Qwen3
families and their VLMs.

One definition serves the judge and the policy's language model. It owns no cache: it takes prefixes
(`attention.Prefix`) and returns the keys and values of the new tokens.

Letters: N branches, L new tokens, E slots in front of them in their row, D width, H query heads, J
key heads, h head width, Y layers, V vocabulary.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.json_files import shown
from caprl_jax.models.attention import (
  AttentionKind,
  EarlierTokens,
  OwnTokens,
  Prefix,
  Rounded,
  attend,
)
from caprl_jax.models.layers import GatedMLP, LoraConfig, RMSNorm, linear, rotary_tables, rotate
from caprl_jax.types import Params

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Architecture of a decoder, in the words of Hugging Face's config.json; `from_hf` reads one."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float
  rms_norm_eps: float
  tie_embeddings: bool
  qkv_bias: bool
  o_bias: bool = False
  qk_norm: bool = False  # RMSNorm of each query and key head (Qwen3)
  activation: str = "silu"
  mrope_sections: tuple[int, ...] | None = None
  mrope_interleaved: bool = False
  rope_scaling: "Llama3Rope | None" = None
  init_std: float = 0.02
  dtype: Any = jnp.float32  # of activations; parameters keep their own
  remat: bool = False  # recompute each layer in the backward pass
  attention: AttentionKind = "xla"
  lora: LoraConfig | None = None
  # The keys and values that tokens leave behind are `attention.Rounded`: for what has no gradient.
  int8_cache: bool = False

  @classmethod
  def from_hf(cls, config: dict, **overrides) -> "DecoderConfig":
    """Reads a config.json dict of a text model in `DECODERS`. Raises ValueError for others."""
    kind = config.get("model_type", "")
    if not isinstance(kind, str) or kind not in DECODERS:
      raise ValueError(
        f"model_type {shown(kind)} is not a decoder this version knows; it knows {sorted(DECODERS)}"
      )
    # Where a file has both, transformers takes the older one.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope", "llama3", "dynamic"):
      raise ValueError(
        f"rope type {shown(rope_type)} of model_type {kind!r} is not supported; "
        "supported: default, mrope, llama3, dynamic"
      )
    if config.get("use_sliding_window"):
      raise ValueError(
        "use_sliding_window: true is not supported; the checkpoints this package "
        "serves leave it off"
      )
    heads = config["num_attention_heads"]
    sections = rope.get("mrope_section")
    qkv_bias, qk_norm = DECODERS[kind]
    # transformers' Qwen2 does not read it: its three maps have biases and its output none.
    bias = bool(config.get("attention_bias", False)) and not qkv_bias
    return cls(
      **{
        **dict(
          vocab_size=config["vocab_size"],
          hidden_size=config["hidden_size"],
          intermediate_size=config["intermediate_size"],
          num_layers=config["num_hidden_layers"],
          num_heads=heads,
          num_kv_heads=config.get("num_key_value_heads") or heads,
          head_dim=config.get("head_dim") or (128 if qk_norm else config["hidden_size"] // heads),
          rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
          rms_norm_eps=config["rms_norm_eps"],
          tie_embeddings=bool(config.get("tie_word_embeddings", False)),
          qkv_bias=bias or qkv_bias,
          o_bias=bias,
          qk_norm=qk_norm,
          activation=config.get("hidden_act", "silu"),
          mrope_sections=tuple(sections) if sections else None,
          mrope_interleaved=kind == "qwen3_vl_text",
          rope_scaling=Llama3Rope.from_hf(rope) if rope_type == "llama3" else None,
          init_std=config.get("initializer_range", 0.02),
        ),
        **overrides,
      }
    )

  @property
  def frequency_h(self) -> np.ndarray:
    """Rotary frequencies, float32 [head_dim / 2]."""
    frequency = self.rope_theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
    return (self.rope_scaling.scale(frequency) if self.rope_scaling else frequency).astype(
      np.float32
    )


# model_type -> (queries, keys and values have biases whatever `attention_bias` says, heads are
# normed)
DECODERS = {
  "llama": (False, False),
  "qwen2": (True, False),
  "qwen2_5_vl_text": (True, False),
  "qwen3": (False, True),
  "qwen3_vl_text": (False, True),
}


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
  """Llama 3.1's stretched rotary frequencies: slow ones divided by `factor`, fast ones kept,
  between them blended.
  """

  factor: float
  low: float
  high: float
  original_length: int

  @classmethod
  def from_hf(cls, rope: dict) -> "Llama3Rope":
    return cls(
      rope["factor"],
      rope["low_freq_factor"],
      rope["high_freq_factor"],
      rope["original_max_position_embeddings"],
    )

  def scale(self, frequency: np.ndarray) -> np.ndarray:
    # in the length that the model was first trained on
    turns = self.original_length * frequency / (2 * np.pi)
    keep = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
    return keep * frequency + (1 - keep) * frequency / self.factor


class Attention(nn.Module):
  """Grouped-query self-attention with rotary positions over prefixes and own tokens."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x_NLD, cos_NLh, sin_NLh, tokens: OwnTokens, prefixes, earlier):
    cfg = self.cfg
    N, L, _ = x_NLD.shape
    options = dict(use_bias=cfg.qkv_bias, init_std=cfg.init_std, dtype=cfg.dtype, lora=cfg.lora)
    q = linear(cfg.num_heads * cfg.head_dim, ("embed", "heads"), "q_proj", **options)(x_NLD)
    k = linear(cfg.num_kv_heads * cfg.head_dim, ("embed", "kv_heads"), "k_proj", **options)(x_NLD)
    v = linear(cfg.num_kv_heads * cfg.head_dim, ("embed", "kv_heads"), "v_proj", **options)(x_NLD)
    q, k = (
      q.reshape(N, L, cfg.num_heads, cfg.head_dim),
      k.reshape(N, L, cfg.num_kv_heads, cfg.head_dim),
    )
    if cfg.qk_norm:
      q, k = (
        RMSNorm(cfg.rms_norm_eps, name="q_norm")(q),
        RMSNorm(cfg.rms_norm_eps, name="k_norm")(k),
      )
    q_NLHh, k_NLJh = rotate(q, cos_NLh, sin_NLh), rotate(k, cos_NLh, sin_NLh)
    v_NLJh = v.reshape(N, L, cfg.num_kv_heads, cfg.head_dim)
    keys_values = (k_NLJh, v_NLJh)
    if earlier is not None:
      keys_values = tuple(map(lambda *x: jnp.concatenate(x, axis=1), earlier, keys_values))
    out = attend(q_NLHh, keys_values, tokens, prefixes, cfg.attention).reshape(N, L, -1)
    out = linear(
      cfg.hidden_size,
      ("heads", "embed"),
      "o_proj",
      use_bias=cfg.o_bias,
      init_std=cfg.init_std,
      dtype=cfg.dtype,
      lora=cfg.lora,
    )(out)
    if cfg.int8_cache:
      return out, (Rounded.of(k_NLJh), Rounded.of(v_NLJh))
    return out, (k_NLJh, v_NLJh)


class DecoderLayer(nn.Module):
  """Pre-norm attention and gated MLP. Scanned over layers: prefix keys and values arrive without
  the layer axis.

  `deep_XNLD`: what layers 0 to X - 1 add to their output (DeepStack, arXiv 2406.04334), or None.
  """

  cfg: DecoderConfig

  @nn.compact
  def __call__(
    self,
    x_NLD,
    prefix_keys_values,
    earlier_keys_values,
    number,
    prefix_valid,
    cos_NLh,
    sin_NLh,
    tokens,
    deep_XNLD,
  ):
    cfg = self.cfg
    prefixes = tuple((k, v, valid) for (k, v), valid in zip(prefix_keys_values, prefix_valid))
    out, own = Attention(cfg, name="self_attn")(
      RMSNorm(cfg.rms_norm_eps, name="input_layernorm")(x_NLD),
      cos_NLh,
      sin_NLh,
      tokens,
      prefixes,
      earlier_keys_values,
    )
    x_NLD = x_NLD + out
    mlp = GatedMLP(
      cfg.intermediate_size, cfg.activation, False, cfg.init_std, cfg.dtype, cfg.lora, name="mlp"
    )
    x_NLD = x_NLD + mlp(RMSNorm(cfg.rms_norm_eps, name="post_attention_layernorm")(x_NLD))
    if deep_XNLD is not None:
      last = len(deep_XNLD) - 1

      def add_deep(x: Array) -> Array:
        deep_NLD = jax.lax.dynamic_index_in_dim(
          deep_XNLD, jnp.minimum(number, last), keepdims=False
        )
        return x + deep_NLD

      x_NLD = jax.lax.cond(number <= last, add_deep, lambda x: x, x_NLD)
    return x_NLD, own


class Decoder(nn.Module):
  """Token ids go through `extend`, or through `embed` and then `__call__` where embeddings are
  changed in between, as a captioner's image tokens are.

  Logits are `hidden @ head_matrix(params).T`, taken in chunks by whoever needs them.
  """

  cfg: DecoderConfig

  def setup(self):
    cfg = self.cfg
    table = nn.with_logical_partitioning(nn.initializers.normal(cfg.init_std), ("vocab", "embed"))
    self.embed_tokens = nn.Embed(
      cfg.vocab_size, cfg.hidden_size, embedding_init=table, dtype=cfg.dtype
    )
    layer = nn.remat(DecoderLayer, prevent_cse=False) if cfg.remat else DecoderLayer
    self.layers = nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=cfg.num_layers,
      in_axes=(0, 0, 0, *(nn.broadcast,) * 5),
      out_axes=0,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(cfg)
    self.norm = RMSNorm(cfg.rms_norm_eps)
    if not cfg.tie_embeddings:
      self.lm_head = self.param("lm_head", table, (cfg.vocab_size, cfg.hidden_size))

  def embed(self, tokens_NL: Array) -> Array:
    """Token ids -> embeddings [N, L, D] in the activations' dtype."""
    return self.embed_tokens(tokens_NL)

  def extend(
    self,
    tokens_NL: Array,
    position: Array,
    valid_NL: Array,
    prefixes: tuple[Prefix, ...] = (),
    segment_NL: Array | None = None,
    reach: int | None = None,
    earlier: EarlierTokens | None = None,
  ) -> tuple[Array, Prefix]:
    """`embed`, then `__call__`: runs new tokens, given as ids, after their prefixes."""
    x_NLD = self.embed(tokens_NL)
    return self(x_NLD, position, valid_NL, prefixes, None, segment_NL, reach, earlier)

  def __call__(
    self,
    x_NLD: Array,
    position: Array,
    valid_NL: Array,
    prefixes: tuple[Prefix, ...] = (),
    deep_XNLD: Array | None = None,
    segment_NL: Array | None = None,
    reach: int | None = None,
    earlier: EarlierTokens | None = None,
  ) -> tuple[Array, Prefix]:
    """Runs new tokens after their prefixes.

    Args:
      x_NLD: embeddings of the new tokens.
      position: int [N, L], or [N, 3, L] for M-RoPE.
      valid_NL: bool; an invalid token is seen by nobody, so padding may stand anywhere.
      prefixes: nearest last; each one's rows divide N.
      deep_XNLD: what the first X layers add to their output, where the model has a vision tower
        with DeepStack.
      segment_NL: int; among themselves, new tokens see only those of their own segment. None: all
        tokens of a row are one segment.
      reach: slots between the first and the last token of any segment, at most (`OwnTokens`).
      earlier: what stands in front of the new tokens in their rows; `segment_NL` is needed with it.

    Returns:
      Hidden states after the final norm [N, L, D], and the new tokens' keys and values as a Prefix
      with N rows.
    """
    cfg = self.cfg
    assert valid_NL.shape == x_NLD.shape[:2], (valid_NL.shape, x_NLD.shape)
    cos, sin = _rotary(cfg, position)
    keys_values = tuple((p.key_YRSJh, p.value_YRSJh) for p in prefixes)
    own = OwnTokens(valid_NL, segment_NL, reach=reach)
    if earlier is not None:
      assert not cfg.int8_cache, "rows that are run block by block are not rounded"
      own = OwnTokens(
        jnp.concatenate([earlier.valid_NE, valid_NL], axis=1),
        jnp.concatenate([earlier.segment_NE, segment_NL], axis=1),
        reach=reach,
        earlier=earlier.valid_NE.shape[1],
      )
    x_NLD, (key, value) = self.layers(
      x_NLD,
      keys_values,
      None if earlier is None else (earlier.key_YNEJh, earlier.value_YNEJh),
      jnp.arange(cfg.num_layers),
      tuple(p.valid_RS for p in prefixes),
      cos,
      sin,
      own,
      None if deep_XNLD is None else deep_XNLD.astype(x_NLD.dtype),
    )
    return self.norm(x_NLD), Prefix(key, value, valid_NL)


def _rotary(cfg: DecoderConfig, position: Array) -> tuple[Array, Array]:
  """Cosines and sines of positions as `Decoder` takes them, in the activations' dtype."""
  if cfg.mrope_sections is not None and position.ndim == 2:  # text: the three positions are one
    position = jnp.broadcast_to(position[:, None], (position.shape[0], 3, position.shape[1]))
  cos, sin = rotary_tables(position, cfg.frequency_h, cfg.mrope_sections, cfg.mrope_interleaved)
  return cos.astype(cfg.dtype), sin.astype(cfg.dtype)


def run_layer(
  cfg: DecoderConfig,
  params: Params,
  number: Array,
  x_NLD: Array,
  position: Array,
  valid_NL: Array,
  deep_XNLD: Array | None = None,
) -> Array:
  """One layer of a decoder by itself, for models that are read layer by layer: x after it.

  Args:
    params: the layer's, without the axis of layers.
    number: which layer it is.
    position, valid_NL, deep_XNLD: as of `Decoder`.
  """
  deep_XNLD = None if deep_XNLD is None else deep_XNLD.astype(x_NLD.dtype)
  own = OwnTokens(valid_NL, None, reach=None)
  given = (x_NLD, (), None, number, (), *_rotary(cfg, position), own, deep_XNLD)
  out: Any = DecoderLayer(cfg).apply({"params": params}, *given)
  return out[0]


def head_matrix(cfg: DecoderConfig, params) -> Array:
  """The unembedding [V, D] of a decoder's parameters."""
  return params["embed_tokens"]["embedding"] if cfg.tie_embeddings else params["lm_head"]
