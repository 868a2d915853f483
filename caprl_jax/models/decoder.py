"""Token embeddings, positions, prefixes -> hidden states: the decoder of the Llama, Qwen2 and Qwen2.5-VL families.

One definition serves the judge and the policy's language model. It owns no cache: it takes prefixes
(`attention.Prefix`) and returns the keys and values of the new tokens.

Letters: N branches, L new tokens, D width, H query heads, J key heads, h head width, Y layers, V vocabulary.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from caprl_jax.models.attention import Prefix, attend, causal_mask
from caprl_jax.models.layers import GatedMLP, RMSNorm, linear, rotary_tables, rotate

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
  activation: str = "silu"
  mrope_sections: tuple[int, ...] | None = None
  init_std: float = 0.02
  dtype: Any = jnp.float32  # of activations; parameters keep their own
  remat: bool = False  # recompute each layer in the backward pass

  @classmethod
  def from_hf(cls, config: dict, **overrides) -> "DecoderConfig":
    """Reads a config.json dict of model_type llama, qwen2 or qwen2_5_vl(_text). Raises ValueError for others."""
    kind = config.get("model_type", "")
    biased = {"llama": False, "qwen2": True, "qwen2_5_vl": True, "qwen2_5_vl_text": True}
    if kind not in biased:
      raise ValueError(f"model_type {kind!r} is not a decoder this version knows; it knows {sorted(biased)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
      raise ValueError(f"rope type {rope_type!r} of model_type {kind!r} is not supported; supported: default, mrope")
    if config.get("use_sliding_window"):
      raise ValueError("use_sliding_window: true is not supported; the checkpoints this package serves leave it off")
    heads = config["num_attention_heads"]
    sections = rope.get("mrope_section")
    return cls(**{**dict(
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"], num_layers=config["num_hidden_layers"], num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        rms_norm_eps=config["rms_norm_eps"], tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bool(config.get("attention_bias", False)) or biased[kind],
        activation=config.get("hidden_act", "silu"), mrope_sections=tuple(sections) if sections else None,
        init_std=config.get("initializer_range", 0.02)), **overrides})


class Attention(nn.Module):
  """Grouped-query self-attention with rotary positions over prefixes and own tokens."""
  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x_NLD, cos_NLh, sin_NLh, own_mask_NLL, prefixes):
    cfg = self.cfg
    N, L, _ = x_NLD.shape
    options = dict(use_bias=cfg.qkv_bias, init_std=cfg.init_std, dtype=cfg.dtype)
    q = linear(cfg.num_heads * cfg.head_dim, ("embed", "heads"), "q_proj", **options)(x_NLD)
    k = linear(cfg.num_kv_heads * cfg.head_dim, ("embed", "kv_heads"), "k_proj", **options)(x_NLD)
    v = linear(cfg.num_kv_heads * cfg.head_dim, ("embed", "kv_heads"), "v_proj", **options)(x_NLD)
    q_NLHh = rotate(q.reshape(N, L, cfg.num_heads, cfg.head_dim), cos_NLh, sin_NLh)
    k_NLJh = rotate(k.reshape(N, L, cfg.num_kv_heads, cfg.head_dim), cos_NLh, sin_NLh)
    v_NLJh = v.reshape(N, L, cfg.num_kv_heads, cfg.head_dim)
    out = attend(q_NLHh, (k_NLJh, v_NLJh), own_mask_NLL, prefixes).reshape(N, L, -1)
    out = linear(cfg.hidden_size, ("heads", "embed"), "o_proj", use_bias=False, init_std=cfg.init_std,
                 dtype=cfg.dtype)(out)
    return out, (k_NLJh, v_NLJh)


class DecoderLayer(nn.Module):
  """Pre-norm attention and gated MLP. Scanned over layers: prefix keys and values arrive without the layer axis."""
  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x_NLD, prefix_keys_values, prefix_valid, cos_NLh, sin_NLh, own_mask_NLL):
    cfg = self.cfg
    prefixes = tuple((k, v, valid) for (k, v), valid in zip(prefix_keys_values, prefix_valid))
    out, own = Attention(cfg, name="self_attn")(
        RMSNorm(cfg.rms_norm_eps, name="input_layernorm")(x_NLD), cos_NLh, sin_NLh, own_mask_NLL, prefixes)
    x_NLD = x_NLD + out
    mlp = GatedMLP(cfg.intermediate_size, cfg.activation, False, cfg.init_std, cfg.dtype, name="mlp")
    return x_NLD + mlp(RMSNorm(cfg.rms_norm_eps, name="post_attention_layernorm")(x_NLD)), own


class Decoder(nn.Module):
  """`embed` then `__call__`; logits are `hidden @ head_matrix(params).T`, taken in chunks by whoever needs them."""
  cfg: DecoderConfig

  def setup(self):
    cfg = self.cfg
    table = nn.with_logical_partitioning(nn.initializers.normal(cfg.init_std), ("vocab", "embed"))
    self.embed_tokens = nn.Embed(cfg.vocab_size, cfg.hidden_size, embedding_init=table, dtype=cfg.dtype)
    layer = nn.remat(DecoderLayer, prevent_cse=False) if cfg.remat else DecoderLayer
    self.layers = nn.scan(
        layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=cfg.num_layers,
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast), out_axes=0,
        metadata_params={nn.PARTITION_NAME: "layers"})(cfg)
    self.norm = RMSNorm(cfg.rms_norm_eps)
    if not cfg.tie_embeddings:
      self.lm_head = self.param("lm_head", table, (cfg.vocab_size, cfg.hidden_size))

  def embed(self, tokens_NL: Array) -> Array:
    """Token ids -> embeddings [N, L, D] in the activations' dtype."""
    return self.embed_tokens(tokens_NL)

  def __call__(self, x_NLD: Array, position: Array, valid_NL: Array,
               prefixes: tuple[Prefix, ...] = ()) -> tuple[Array, Prefix]:
    """Runs new tokens after their prefixes.

    Args:
      x_NLD: embeddings of the new tokens.
      position: int [N, L], or [N, 3, L] for M-RoPE.
      valid_NL: bool; an invalid token is seen by nobody, so padding may stand anywhere.
      prefixes: nearest last; each one's rows divide N.

    Returns:
      Hidden states after the final norm [N, L, D], and the new tokens' keys and values as a Prefix with N rows.
    """
    cfg = self.cfg
    assert valid_NL.shape == x_NLD.shape[:2], (valid_NL.shape, x_NLD.shape)
    if cfg.mrope_sections is not None and position.ndim == 2:  # text: the three positions are one
      position = jnp.broadcast_to(position[:, None], (position.shape[0], 3, position.shape[1]))
    cos, sin = rotary_tables(position, cfg.head_dim, cfg.rope_theta, cfg.mrope_sections)
    cos, sin = cos.astype(cfg.dtype), sin.astype(cfg.dtype)
    keys_values = tuple((p.key_YRSJh, p.value_YRSJh) for p in prefixes)
    x_NLD, (key, value) = self.layers(
        x_NLD, keys_values, tuple(p.valid_RS for p in prefixes), cos, sin, causal_mask(valid_NL))
    return self.norm(x_NLD), Prefix(key, value, valid_NL)


def head_matrix(cfg: DecoderConfig, params) -> Array:
  """The unembedding [V, D] of a decoder's parameters."""
  return params["embed_tokens"]["embedding"] if cfg.tie_embeddings else params["lm_head"]


def concat_prefixes(first: Prefix, second: Prefix) -> Prefix:
  """Two prefixes with the same rows as one, along the slots."""
  join = lambda a, b, axis: jnp.concatenate([a, b], axis=axis)
  return Prefix(join(first.key_YRSJh, second.key_YRSJh, 2), join(first.value_YRSJh, second.value_YRSJh, 2),
                join(first.valid_RS, second.valid_RS, 1))
