"""Prefix, key -> tokens: the decode loop, which ends when every caption has ended.

Letters: N captions, T caption tokens, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.masked import NEGATIVE
from caprl_jax.models.attention import Prefix
from caprl_jax.models.head import scaled_logits
from caprl_jax.types import Vocabulary

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How tokens are drawn.

  max_tokens: longest caption.
  temperature: 0 is greedy.
  top_k: the likeliest tokens that are drawn from; 0: all.
  top_p: the likeliest tokens that have this probability together are drawn from; 1: all.
  repetition_penalty: logits of tokens that prompt or caption hold are divided by it where
    positive, multiplied where negative (Keskar et al., arXiv 1909.05858), as transformers does; 1
    leaves them. Not for training.
  """

  max_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  repetition_penalty: float = 1.0

  def __post_init__(self):
    if self.max_tokens < 1:
      raise ValueError(f"max_tokens = {self.max_tokens}: a caption needs at least one token")
    if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
      raise ValueError(
        f"temperature = {self.temperature} must be >= 0, top_p = {self.top_p} in "
        f"(0, 1] and top_k = {self.top_k} >= 0"
      )
    if self.repetition_penalty <= 0:
      raise ValueError(
        f"repetition_penalty = {self.repetition_penalty} must be positive; 1 is none"
      )


@flax.struct.dataclass
class DecodeState:
  """Everything that changes while decoding."""

  step: Array  # int32, tokens drawn so far
  tokens_NT: Array
  logp_NT: Array
  valid_NT: Array
  done_N: Array  # bool, the end token was drawn
  # bool, tokens of prompt and caption, where a repetition penalty asks for them
  seen_NV: Array | None
  # keys and values of the captions' tokens, T slots; slot t is written when token t has run
  cache: Prefix


def draw(logits_NV: Array, key: Array, cfg: SamplingConfig) -> Array:
  """One token a row from scaled logits, int32 [N]. The key is consumed."""
  if cfg.temperature == 0:
    return jnp.argmax(logits_NV, axis=-1).astype(jnp.int32)
  if cfg.top_k:
    floor = jax.lax.top_k(logits_NV, cfg.top_k)[0][:, -1:]
    logits_NV = jnp.where(logits_NV < floor, NEGATIVE, logits_NV)
  if cfg.top_p < 1:
    ordered = jnp.sort(logits_NV, axis=-1, descending=True)
    share = jax.nn.softmax(ordered, axis=-1)
    # mass of the likelier tokens; the first is always kept
    before = jnp.cumsum(share, axis=-1) - share
    floor = jnp.min(jnp.where(before < cfg.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    logits_NV = jnp.where(logits_NV < floor, NEGATIVE, logits_NV)
  return jax.random.categorical(key, logits_NV).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Loop:
  """What stays the same while decoding; arguments as of `decode`."""

  extend: Callable[[Array, Array, Array, Prefix], tuple[Array, Prefix]]
  head_VD: Array
  first_position_N: Array
  vocabulary: Vocabulary
  key: Array
  cfg: SamplingConfig

  def emit(self, state: DecodeState, hidden_ND: Array) -> DecodeState:
    """Draws the next token of each row from the hidden state that predicts it."""
    cfg, seen_NV = self.cfg, state.seen_NV
    logits = scaled_logits(
      hidden_ND, self.head_VD, self.vocabulary.allowed_V, cfg.temperature or 1.0
    )
    if seen_NV is not None:
      penalty = cfg.repetition_penalty
      logits = jnp.where(seen_NV, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    token_N = draw(logits, jax.random.fold_in(self.key, state.step), cfg)
    logp_N = jnp.take_along_axis(jax.nn.log_softmax(logits), token_N[:, None], axis=1)[:, 0]
    live_N = ~state.done_N
    ends_N = jnp.isin(token_N, jnp.asarray(self.vocabulary.end_ids, jnp.int32))
    if seen_NV is not None:
      seen_NV = seen_NV.at[jnp.arange(len(token_N)), token_N].set(True)

    def put(array_NT: Array, value_N: Array) -> Array:
      return array_NT.at[:, state.step].set(value_N)

    return dataclasses.replace(
      state,
      step=state.step + 1,
      done_N=state.done_N | ends_N,
      tokens_NT=put(state.tokens_NT, jnp.where(live_N, token_N, self.vocabulary.pad_id)),
      logp_NT=put(state.logp_NT, jnp.where(live_N, logp_N, 0.0)),
      valid_NT=put(state.valid_NT, live_N),
      seen_NV=seen_NV,
    )

  def advance(self, state: DecodeState) -> DecodeState:
    """Runs the token drawn last, which leaves keys and values in the cache, and draws the next."""
    last = state.step - 1

    def column(x_NT: Array) -> Array:
      return jax.lax.dynamic_slice_in_dim(x_NT, last, 1, axis=1)

    def write(old: Array, new: Array) -> Array:
      return jax.lax.dynamic_update_slice_in_dim(old, new, last, axis=2)

    hidden_N1D, new = self.extend(
      column(state.tokens_NT),
      (self.first_position_N + last)[:, None],
      column(state.valid_NT),
      state.cache,
    )
    cache = Prefix(
      write(state.cache.key_YRSJh, new.key_YRSJh),
      write(state.cache.value_YRSJh, new.value_YRSJh),
      jax.lax.dynamic_update_slice_in_dim(state.cache.valid_RS, new.valid_RS, last, axis=1),
    )
    return self.emit(dataclasses.replace(state, cache=cache), hidden_N1D[:, 0])


def decode(
  extend: Callable[[Array, Array, Array, Prefix], tuple[Array, Prefix]],
  head_VD: Array,
  first_hidden_ND: Array,
  first_position_N: Array,
  *,
  cache: Prefix,
  vocabulary: Vocabulary,
  key: Array,
  cfg: SamplingConfig,
  seen_NV: Array | None = None,
) -> DecodeState:
  """Draws up to `max_tokens` tokens per row.

  Args:
    extend: (tokens_N1, position_N1, valid_N1, cache) -> (hidden_N1D, new keys and values as a
      Prefix).
    head_VD: unembedding.
    first_hidden_ND: the hidden state that predicts the first token.
    first_position_N: position of the first token.
    cache: empty Prefix with N rows and T = max_tokens slots.
    key: folded with the token's number; the same key gives the same captions.
    seen_NV: bool, the prompt's tokens, for a repetition penalty.

  Returns:
    The last state. `logp_NT` is under the temperature and the allowed tokens (1 where greedy),
    before top-k and top-p.
  """
  loop = _Loop(extend, head_VD, first_position_N, vocabulary, key, cfg)
  N, T = first_hidden_ND.shape[0], cfg.max_tokens
  state = DecodeState(
    step=jnp.int32(0),
    tokens_NT=jnp.full((N, T), vocabulary.pad_id, jnp.int32),
    logp_NT=jnp.zeros((N, T)),
    valid_NT=jnp.zeros((N, T), bool),
    done_N=jnp.zeros(N, bool),
    seen_NV=seen_NV,
    cache=cache,
  )
  state = loop.emit(state, first_hidden_ND)
  return jax.lax.while_loop(lambda s: (s.step < T) & ~jnp.all(s.done_N), loop.advance, state)
