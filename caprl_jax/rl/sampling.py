"""Prefix, key -> tokens: the decode loop, which ends when every caption has ended.

Its work follows the captions, not their limit. All rows begin on a cache of a few slots that grows
by stages (the trunk), to a quarter of the limit at most. The rows that are still being written when
the trunk is full, or when no more than a chunk of them is left, go on in chunks of a part of the
rows (`chunks`), on caches that grow to the limit, as many chunks as it takes. So a cache of rows x
limit never exists.
A draw depends on its row's key and the token's number alone: tokens are the same whatever the
stages.

Letters: N captions, T caption tokens, D width, V vocabulary, C rows of a chunk.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.masked import NEGATIVE
from caprl_jax.models.attention import Prefix, empty_cache, grown
from caprl_jax.models.head import scaled_logits
from caprl_jax.types import Vocabulary

Array = jax.Array
Extend = Callable[[Array, Array, Array, tuple[Prefix, ...]], tuple[Array, Prefix]]
BLOCK = 256  # tokens whose probabilities are added up before one is searched for
SMALLEST_CACHE = 64  # slots; below, a further stage costs more to compile than it saves
SMALLEST_CHUNK = 8  # rows


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
  chunks: into how many a device's captions would be cut. Those that are still written when the
    small cache of all is full, or when one chunk would hold them, go on chunk by chunk, on caches
    of the whole length. More chunks take less memory and more time; the captions are the same.
  """

  max_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  repetition_penalty: float = 1.0
  chunks: int = 4

  def __post_init__(self):
    if self.max_tokens < 1 or self.chunks < 1:
      raise ValueError(
        f"max_tokens = {self.max_tokens}: a caption needs at least one token, and chunks = "
        f"{self.chunks} must be at least 1"
      )
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
  seen_NV: Array | None  # bool, tokens of prompt and caption; None without a repetition penalty
  cache: Prefix  # of the captions' tokens; slot t is written when token t has run


def draw(logits_NV: Array, uniform_N: Array, cfg: SamplingConfig) -> tuple[Array, Array]:
  """One token a row from scaled logits, int32 [N], and its log-probability before top-k and top-p,
  float32 [N].

  Args:
    uniform_N: float32 in [0, 1), the random numbers of the rows.
  """
  norm_N = None
  if cfg.temperature == 0:
    token_N = jnp.argmax(logits_NV, axis=-1).astype(jnp.int32)
  elif cfg.top_k or cfg.top_p < 1:
    token_N = inverse_cdf(_likeliest(logits_NV, cfg), uniform_N)[0]
  else:
    token_N, norm_N = inverse_cdf(logits_NV, uniform_N)
  if norm_N is None:
    norm_N = jax.nn.logsumexp(logits_NV, axis=-1)
  return token_N, jnp.take_along_axis(logits_NV, token_N[:, None], axis=1)[:, 0] - norm_N


def _likeliest(logits_NV: Array, cfg: SamplingConfig) -> Array:
  """The logits with what top-k and top-p leave out at `NEGATIVE`."""
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
  return logits_NV


def inverse_cdf(logits_NV: Array, uniform_N: Array) -> tuple[Array, Array]:
  """Draws a token a row where the cumulated probabilities pass the row's random number: one number
  a row, where Gumbel noise takes one for each token of the vocabulary.

  In two steps, over sums of blocks and then within one block, so that the vocabulary is read once.
  Returns the tokens, int32 [N], and the rows' log-sum-exp, float32 [N].
  """
  N, V = logits_NV.shape
  blocks = -(-V // BLOCK)
  top_N1 = jnp.max(logits_NV, axis=-1, keepdims=True)
  padded = jnp.pad(logits_NV, ((0, 0), (0, blocks * BLOCK - V)), constant_values=NEGATIVE)
  cut = padded.reshape(N, blocks, BLOCK)
  sums = jnp.exp(cut - top_N1[..., None]).sum(-1)
  mass_N = sums.sum(-1)

  def search(weight: Array, target_N: Array) -> tuple[Array, Array]:
    """The first place with a weight at which the cumulated weights pass the target (the last with
    one, where rounding leaves the target above all), and the weight before it."""
    total = jnp.cumsum(weight, axis=-1)
    some = weight > 0
    passed = some & (total > target_N[:, None])
    last = weight.shape[-1] - 1 - jnp.argmax(some[:, ::-1], axis=-1)
    place_N = jnp.where(passed.any(-1), jnp.argmax(passed, axis=-1), last)
    at = jnp.take_along_axis(total - weight, place_N[:, None], axis=-1)[:, 0]
    return place_N, at

  block_N, before_N = search(sums, uniform_N * mass_N)
  chosen = jnp.take_along_axis(cut, block_N[:, None, None], axis=1)[:, 0]
  inside_N, _ = search(jnp.exp(chosen - top_N1), uniform_N * mass_N - before_N)
  return (block_N * BLOCK + inside_N).astype(jnp.int32), top_N1[:, 0] + jnp.log(mass_N)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Hidden states that predict tokens -> those tokens. head_VD: the unembedding."""

  head_VD: Array
  vocabulary: Vocabulary
  cfg: SamplingConfig

  def __call__(
    self, hidden_ND: Array, key_N: Array, step: Array, seen_NV: Array | None = None
  ) -> tuple[Array, Array]:
    """Tokens and log-probabilities, as `draw`. A row's random number is of its key and of the
    token's number in its text alone: `step`, int32, of all rows or [N]."""
    cfg, allowed_V = self.cfg, self.vocabulary.allowed_V
    logits = scaled_logits(hidden_ND, self.head_VD, allowed_V, cfg.temperature or 1.0)
    if seen_NV is not None:
      penalty = cfg.repetition_penalty
      logits = jnp.where(seen_NV, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    key_N = jax.vmap(jax.random.fold_in, (0, 0 if step.ndim else None))(key_N, step)
    return draw(logits, jax.vmap(jax.random.uniform)(key_N), cfg)

  def ends(self, token_N: Array) -> Array:  # bool [N]
    return jnp.isin(token_N, jnp.asarray(self.vocabulary.end_ids, jnp.int32))


@dataclasses.dataclass(frozen=True)
class _Loop:
  """What stays the same while rows are decoded; arguments as of `decode`."""

  extend: Extend
  sampler: Sampler
  first_position_N: Array
  key_N: Array
  prefixes: tuple[Prefix, ...]
  length_N: Array | None

  def emit(self, state: DecodeState, hidden_ND: Array) -> DecodeState:
    """Draws the next token of each row from the hidden state that predicts it."""
    seen_NV, vocabulary = state.seen_NV, self.sampler.vocabulary
    token_N, logp_N = self.sampler(hidden_ND, self.key_N, state.step, seen_NV)
    if self.length_N is not None:
      now_N = state.step + 1 >= self.length_N
      token_N = jnp.where(now_N, vocabulary.end_ids[0], token_N)
    live_N = ~state.done_N
    ends_N = self.sampler.ends(token_N)
    if seen_NV is not None:
      seen_NV = seen_NV.at[jnp.arange(len(token_N)), token_N].set(True)

    def put(array_NT: Array, value_N: Array) -> Array:
      return array_NT.at[:, state.step].set(value_N)

    return dataclasses.replace(
      state,
      step=state.step + 1,
      done_N=state.done_N | ends_N,
      tokens_NT=put(state.tokens_NT, jnp.where(live_N, token_N, vocabulary.pad_id)),
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
      (*self.prefixes, state.cache),
    )
    cache = Prefix(
      jax.tree.map(write, state.cache.key_YRSJh, new.key_YRSJh),
      jax.tree.map(write, state.cache.value_YRSJh, new.value_YRSJh),
      jax.lax.dynamic_update_slice_in_dim(state.cache.valid_RS, new.valid_RS, last, axis=1),
    )
    return self.emit(dataclasses.replace(state, cache=cache), hidden_N1D[:, 0])

  def run(
    self, state: DecodeState, stages: tuple[int, ...], shards: int = 1, leave: int = 0
  ) -> DecodeState:
    """Decodes on caches of as many slots as the stages say, one after the other, until no device
    has more than `leave` rows that have not ended, or the last stage is full."""

    def goes_on(state: DecodeState, slots: int) -> Array:
      live_H = (~state.done_N).reshape(shards, -1).sum(1)
      return (state.step < slots) & (live_H.max() > leave)

    for slots in stages:
      state = dataclasses.replace(state, cache=grown(state.cache, slots))
      state = jax.lax.while_loop(functools.partial(goes_on, slots=slots), self.advance, state)
    return state

  def rows(self, pick: "_Pick") -> "_Loop":
    """The same for some of the rows."""
    return dataclasses.replace(
      self,
      first_position_N=pick.of(self.first_position_N),
      key_N=pick.of(self.key_N),
      prefixes=tuple(map(pick.of_prefix, self.prefixes)),
      length_N=None if self.length_N is None else pick.of(self.length_N),
    )


@dataclasses.dataclass(frozen=True)
class _Pick:
  """Some rows of each device's share: no row moves between devices.

  place_HC: int32 [shards, rows], places within a share.
  count: N, rows that are picked from.
  """

  place_HC: Array
  count: int

  def of(self, x_N: Array) -> Array:
    """[N, ...] -> [C, ...]."""
    shares = x_N.reshape(len(self.place_HC), -1, *x_N.shape[1:])
    return sharding.split_over_batch(
      jax.vmap(lambda x, i: x[i])(shares, self.place_HC).reshape(-1, *x_N.shape[1:])
    )

  def of_prefix(self, prefix: Prefix) -> Prefix:
    """The rows' own prefixes, each once a row; one that all rows share stays as it is."""
    R = prefix.valid_RS.shape[0]
    if R == 1:
      return prefix
    place_HC = self.place_HC // (self.count // R)

    def layers(x: Array) -> Array:
      shares = x.reshape(x.shape[0], len(place_HC), -1, *x.shape[2:])
      taken = jax.vmap(lambda x, i: x[:, i], in_axes=(1, 0), out_axes=1)(shares, place_HC)
      return taken.reshape(x.shape[0], -1, *x.shape[2:])

    key, value = jax.tree.map(layers, (prefix.key_YRSJh, prefix.value_YRSJh))
    return Prefix(key, value, _Pick(place_HC, R).of(prefix.valid_RS))

  def put(self, x_N: Array, new_C: Array, where_C: Array) -> Array:
    """`x_N` with the rows picked replaced by `new_C`, those that `where_C` names."""
    H, C = self.place_HC.shape
    shares = x_N.reshape(H, -1, *x_N.shape[1:])
    new = jnp.where(where_C.reshape(-1, *(1,) * (x_N.ndim - 1)), new_C, self.of(x_N))
    put = jax.vmap(lambda x, i, new: x.at[i].set(new))(
      shares, self.place_HC, new.reshape(H, C, *x_N.shape[1:])
    )
    return sharding.split_over_batch(put.reshape(x_N.shape))


def cache_stages(max_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Slots of the caches of the trunk, which all rows have, and of the chunks after it."""
  trunk = [max_tokens // part for part in (16, 8, 4) if max_tokens // part >= SMALLEST_CACHE]
  if not trunk:
    return (max_tokens,), ()
  return tuple(trunk), (trunk[-1], max_tokens // 2, max_tokens)


def decode(
  extend: Extend,
  head_VD: Array,
  first_hidden_ND: Array,
  first_position_N: Array,
  *,
  prefixes: tuple[Prefix, ...],
  vocabulary: Vocabulary,
  key: Array,
  cfg: SamplingConfig,
  seen_NV: Array | None = None,
  length_N: Array | None = None,
) -> DecodeState:
  """Draws up to `max_tokens` tokens per row.

  Args:
    extend: (tokens_N1, position_N1, valid_N1, prefixes) -> (hidden_N1D, new keys and values as a
      Prefix); the last of the prefixes is the rows' own cache.
    head_VD: unembedding.
    first_hidden_ND: the hidden state that predicts the first token.
    first_position_N: position of the first token.
    prefixes: what the rows branch from, at least one.
    key: consumed; folded with the row's number and the token's, so the same key gives the same
      captions. Or one key a row, [N], folded with the token's number.
    seen_NV: bool, the prompt's tokens, for a repetition penalty.
    length_N: int32, for measurements: a row's token of this number is an end token, whatever was
      drawn.

  Returns:
    The last state; its cache is that of the trunk. `logp_NT` is under the temperature and the
    allowed tokens (1 where greedy), before top-k and top-p.
  """
  N, T = first_hidden_ND.shape[0], cfg.max_tokens
  key_N = key if key.ndim else jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(N))
  sampler = Sampler(head_VD, vocabulary, cfg)
  loop = _Loop(extend, sampler, first_position_N, key_N, prefixes, length_N)
  trunk, chunks = cache_stages(T)
  state = DecodeState(
    step=jnp.int32(0),
    tokens_NT=jnp.full((N, T), vocabulary.pad_id, jnp.int32),
    logp_NT=jnp.zeros((N, T)),
    valid_NT=jnp.zeros((N, T), bool),
    done_N=jnp.zeros(N, bool),
    seen_NV=seen_NV,
    cache=empty_cache(prefixes[-1], N, trunk[0]),
  )
  state = loop.emit(state, first_hidden_ND)
  if not chunks:
    return loop.run(state, trunk)
  shards, rows = _chunk_size(N, prefixes, cfg.chunks)
  state = loop.run(state, trunk, shards, leave=rows)
  return _finish_in_chunks(loop, state, chunks, shards, rows)


def _chunk_size(N: int, prefixes: tuple[Prefix, ...], chunks: int) -> tuple[int, int]:
  """The parts that N rows lie in, one a device, and how many rows of each a chunk takes."""
  shards = sharding.batch_shards()
  together = [N] + [p.valid_RS.shape[0] for p in prefixes if p.valid_RS.shape[0] > 1]
  if any(rows % shards for rows in together):
    shards = 1
  share = N // shards
  return shards, max(-(-share // chunks), min(share, SMALLEST_CHUNK))


@flax.struct.dataclass
class _Written:
  """What chunks change of a `DecodeState`."""

  step: Any  # int32, the largest of the chunks'
  tokens_NT: Array
  logp_NT: Array
  valid_NT: Array
  done_N: Array

  @classmethod
  def of(cls, state: DecodeState) -> "_Written":
    return cls(state.step, state.tokens_NT, state.logp_NT, state.valid_NT, state.done_N)


def _finish_in_chunks(
  loop: _Loop, trunk: DecodeState, stages: tuple[int, ...], shards: int, rows: int
) -> DecodeState:
  """Decodes what is unfinished at the trunk's end to its own end, some rows at a time."""
  N = len(trunk.done_N)

  # The trunk's cache is read by every chunk and changed by none: it stays out of the loop's state.
  def chunk(carry: tuple[_Written, Array]) -> tuple[_Written, Array]:
    written, todo_N = carry
    order = jnp.argsort(~todo_N.reshape(shards, -1), axis=1, stable=True)
    pick = _Pick(order[:, :rows], N)
    todo_C = pick.of(todo_N)
    begun = DecodeState(
      step=trunk.step,
      tokens_NT=pick.of(written.tokens_NT),
      logp_NT=pick.of(written.logp_NT),
      valid_NT=pick.of(written.valid_NT),
      done_N=~todo_C,  # where fewer rows are left than a chunk has
      seen_NV=None if trunk.seen_NV is None else pick.of(trunk.seen_NV),
      cache=pick.of_prefix(trunk.cache),
    )
    end = loop.rows(pick).run(begun, stages)

    def put(old_N: Array, new_C: Array) -> Array:
      return pick.put(old_N, new_C, todo_C)

    new = _Written.of(end)
    written = dataclasses.replace(
      jax.tree.map(
        put, dataclasses.replace(written, step=None), dataclasses.replace(new, step=None)
      ),
      step=jnp.maximum(written.step, new.step),
    )
    return written, put(todo_N, jnp.zeros_like(todo_C))

  end, _ = jax.lax.while_loop(
    lambda carry: carry[1].any(), chunk, (_Written.of(trunk), ~trunk.done_N)
  )
  return dataclasses.replace(
    trunk,
    step=end.step,
    tokens_NT=end.tokens_NT,
    logp_NT=end.logp_NT,
    valid_NT=end.valid_NT,
    done_N=end.done_N,
  )
