"""What the engine runs on the device: prompts -> prefixes and first tokens (`prefill`), a prompt
into a free entry (`insert`), a block of tokens for all slots (`generate`). Pure functions of fixed
shapes.

The texts that are written lie in slots. A few slots share an entry: the prefix that an image and
its prompt left behind, which is run once for all captions of the image. Slot n reads entry n // F.
A slot's own keys and values are a cache of pages of `BLOCK` tokens: a block of tokens is written
into a page of its own, the same place for all slots, and put into their caches at its end. Every
text begins with a block, so its pages are filled the same way whatever stands in the other slots,
and a text depends on its prompt and its random key alone.

Letters: E entries, F slots of an entry, N = E * F slots, B prompts that are run together, H shards
of the batch, G texts of a prompt, C slots of a cache, K = BLOCK tokens of a block.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models.attention import KeysOrValues, Prefix, empty_cache, grown
from caprl_jax.models.decoder import Decoder, head_matrix
from caprl_jax.models.policy import Policy, last_hidden
from caprl_jax.rl.rollout import prefill_in_pieces, seen_tokens
from caprl_jax.rl.sampling import Sampler, SamplingConfig
from caprl_jax.types import Array, Batch, Images, Params, Prompts, Vocabulary

# Tokens that are written between two looks at what has ended. More of them cost slots that have
# nothing to do, fewer cost the device a wait for the host.
BLOCK = 8


@flax.struct.dataclass
class Request:
  """Prompts to be run together; those of a language model have no images."""

  images: Images | None
  prompts: Prompts
  number_B: Array  # int32, what the random keys of a prompt's texts are made of


@flax.struct.dataclass
class Prompted:
  """Prompts that were run: one batch of them, or what lies in the entries (E in the place of B)."""

  prefix: Prefix
  number_B: Array
  next_position_B: Array  # int32, of the first token after the prompt
  first_BG: Array  # int32, the first token of each of a prompt's texts
  seen_BV: Array | None  # bool, the prompt's tokens, where a repetition penalty asks for them


@flax.struct.dataclass
class Rows:
  """The slots."""

  key_YNCJh: KeysOrValues
  value_YNCJh: KeysOrValues
  token_N: Array  # int32, drawn last
  run_N: Array  # int32, tokens whose keys and values are in the cache
  caption_N: Array  # int32, which of its prompt's texts is written
  limit_N: Array  # int32, its longest length
  live_N: Array  # bool, it is being written
  seen_NV: Array | None


@flax.struct.dataclass
class Begin:
  """What begins in which slots."""

  caption_N: Array  # int32, number of the text among its prompt's; -1 where none begins
  limit_N: Array  # int32


@flax.struct.dataclass
class Block:
  """What a block of tokens came to."""

  first_N: Array  # int32, each slot's last token before the block
  tokens_NK: Array
  valid_NK: Array  # bool
  live_N: Array  # bool, the text goes on


@flax.struct.dataclass
class _Writing:
  """What changes while a block is written."""

  step: Any  # int32
  token_N: Array
  live_N: Array
  seen_NV: Array | None
  page: Prefix
  tokens_NK: Array
  valid_NK: Array

  @classmethod
  def begin(cls, rows: Rows) -> "_Writing":
    N = len(rows.token_N)
    none_NK = jnp.zeros((N, BLOCK))
    cache = Prefix(rows.key_YNCJh, rows.value_YNCJh, none_NK)
    return cls(
      step=jnp.int32(0),
      token_N=rows.token_N,
      live_N=rows.live_N,
      seen_NV=rows.seen_NV,
      page=empty_cache(cache, N, BLOCK),
      tokens_NK=none_NK.astype(jnp.int32),
      valid_NK=none_NK.astype(bool),
    )


@dataclasses.dataclass(frozen=True)
class EngineModel:
  """A model that writes texts.

  prefill: (parameters, request) -> what predicts the first token of each [B, D], and the prefix.
  extend: (parameters, tokens_N1, position_N1, valid_N1, prefixes) -> hidden states [N, 1, D], and
    the tokens' keys and values.
  head: parameters -> the unembedding [V, D].
  kv_heads: of the cache.
  """

  prefill: Callable[[Params, Request], tuple[Array, Prefix]]
  extend: Callable[..., tuple[Array, Prefix]]
  head: Callable[[Params], Array]
  kv_heads: int

  @classmethod
  def of_policy(cls, policy: Policy) -> "EngineModel":
    """A captioner."""

    def prefill(params: Params, request: Request) -> tuple[Array, Prefix]:
      batch: Any = Batch(request.images, request.prompts, None, request.number_B)
      return prefill_in_pieces(policy, params, batch)

    def extend(params: Params, *tokens: Any) -> tuple[Array, Prefix]:
      out: Any = policy.apply({"params": params}, *tokens, method="extend")
      return out

    cfg = policy.cfg.text
    head = lambda params: head_matrix(cfg, params["language_model"])
    return cls(prefill, extend, head, cfg.num_kv_heads)

  @classmethod
  def of_decoder(cls, decoder: Decoder) -> "EngineModel":
    """A language model without eyes; `Prompts.position_B3P` is not read."""

    def extend(params: Params, *tokens: Any) -> tuple[Array, Prefix]:
      out: Any = decoder.apply({"params": params}, *tokens, method="extend")
      return out

    def prefill(params: Params, request: Request) -> tuple[Array, Prefix]:
      tokens_BP, valid_BP = request.prompts.tokens_BP, request.prompts.valid_BP
      position = jnp.broadcast_to(jnp.arange(tokens_BP.shape[1]), tokens_BP.shape)
      hidden_BPD, prefix = extend(params, tokens_BP, position, valid_BP, ())
      return last_hidden(hidden_BPD, valid_BP), prefix

    head = lambda params: head_matrix(decoder.cfg, params)
    return cls(prefill, extend, head, decoder.cfg.num_kv_heads)


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
  """The programs of one engine, to be jitted.

  captions: G. fan: F. seed: with a prompt's number and a text's number among its prompt's, of its
    random key.
  """

  model: EngineModel
  vocabulary: Vocabulary
  sampling: SamplingConfig
  captions: int
  fan: int
  seed: int

  def _sampler(self, params: Params) -> Sampler:
    return Sampler(self.model.head(params), self.vocabulary, self.sampling)

  def _keys(self, number_N: Array, caption_N: Array) -> Array:
    def one(number: Array, caption: Array) -> Array:
      return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), number), caption)

    return jax.vmap(one)(number_N, caption_N)

  def prefill(self, params: Params, request: Request) -> Prompted:
    """Runs prompts, and draws the first token of each of their texts."""
    hidden_BD, prefix = self.model.prefill(params, request)
    (B, P), G = request.prompts.tokens_BP.shape, self.captions

    def many(x_B: Array) -> Array:
      return jnp.repeat(x_B, G, axis=0)

    seen_BV = None
    if self.sampling.repetition_penalty != 1:
      size = len(self.vocabulary.allowed_V)
      seen_BV = seen_tokens(request.prompts.tokens_BP, request.prompts.valid_BP, size)
    first_N, _ = self._sampler(params)(
      many(hidden_BD),
      self._keys(many(request.number_B), jnp.tile(jnp.arange(G), B)),
      jnp.int32(0),
      None if seen_BV is None else many(seen_BV),
    )
    return Prompted(
      grown(prefix, prefix_slots(P)),
      request.number_B,
      request.prompts.next_position_B,
      first_N.reshape(B, G),
      seen_BV,
    )

  def empty(self, like: Prompted, entries: int, slots: int) -> tuple[Prompted, Rows]:
    """Entries with nothing in them, for prompts of the length of `like`, and slots with caches of
    `slots` tokens."""
    N = entries * self.fan

    def zeros(x: Array, rows: int) -> Array:
      axis = row_axis(x)
      return jnp.zeros((*x.shape[:axis], rows, *x.shape[axis + 1 :]), x.dtype)

    prompted = jax.tree.map(lambda x: zeros(x, entries), like)
    cache = empty_cache(like.prefix, N, slots)
    number_N = jnp.zeros(N, jnp.int32)
    seen_NV = None if like.seen_BV is None else zeros(like.seen_BV, N)
    rows = Rows(cache.key_YRSJh, cache.value_YRSJh, *(number_N,) * 4, jnp.zeros(N, bool), seen_NV)
    return prompted, rows

  def insert(
    self, entries: Prompted, ready: Prompted, source_H: Array, target_H: Array
  ) -> Prompted:
    """Puts one prompt of each shard's share of `ready` into one entry of that shard: places within
    the shares, int32; target -1: none."""
    slots = entries.prefix.valid_RS.shape[1]
    ready = dataclasses.replace(ready, prefix=grown(ready.prefix, slots))
    return jax.tree.map(lambda old, new: _put_row(old, new, source_H, target_H), entries, ready)

  def with_slots(self, rows: Rows, slots: int) -> Rows:
    """The slots with caches of another length; what they hold must fit."""

    def sized(cache: Array) -> Array:
      more = max(slots - cache.shape[2], 0)
      return jnp.pad(cache, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0)))[:, :, :slots]

    key, value = jax.tree.map(sized, (rows.key_YNCJh, rows.value_YNCJh))
    return dataclasses.replace(rows, key_YNCJh=key, value_YNCJh=value)

  def with_prefix_slots(self, entries: Prompted, slots: int) -> Prompted:
    """The entries with room for longer prompts."""
    return dataclasses.replace(entries, prefix=grown(entries.prefix, slots))

  def generate(
    self, params: Params, entries: Prompted, rows: Rows, begin: Begin
  ) -> tuple[Rows, Block]:
    """Begins what is to begin, and writes up to `BLOCK` tokens in each slot: fewer where every text
    has ended."""
    rows = self._begun(params, entries, rows, begin)
    many = lambda x_E: jnp.repeat(x_E, self.fan, axis=0)
    key_N = self._keys(many(entries.number_B), rows.caption_N)
    position_N = many(entries.next_position_B) + rows.run_N
    sampler, C = self._sampler(params), rows.key_YNCJh.shape[2]
    earlier = Prefix(rows.key_YNCJh, rows.value_YNCJh, jnp.arange(C) < rows.run_N[:, None])

    def step(state: _Writing) -> _Writing:
      i, live_N, page = state.step, state.live_N, state.page
      hidden_N1D, new = self.model.extend(
        params,
        state.token_N[:, None],
        (position_N + i)[:, None],
        live_N[:, None],
        (entries.prefix, earlier, page),
      )
      token_N, _ = sampler(hidden_N1D[:, 0], key_N, rows.run_N + i + 1, state.seen_NV)
      ends_N = sampler.ends(token_N) | (rows.run_N + i + 2 >= rows.limit_N)
      put_one = lambda old, one, axis: jax.lax.dynamic_update_slice_in_dim(old, one, i, axis)
      put = lambda old, one, axis: jax.tree.map(lambda x, y: put_one(x, y, axis), old, one)
      return _Writing(
        step=i + 1,
        token_N=jnp.where(live_N, token_N, state.token_N),
        live_N=live_N & ~ends_N,
        seen_NV=_marked(state.seen_NV, token_N),
        page=Prefix(
          put(page.key_YRSJh, new.key_YRSJh, 2),
          put(page.value_YRSJh, new.value_YRSJh, 2),
          put(page.valid_RS, new.valid_RS, 1),
        ),
        tokens_NK=put(state.tokens_NK, token_N[:, None], 1),
        valid_NK=put(state.valid_NK, live_N[:, None], 1),
      )

    begun = _Writing.begin(rows)
    end = jax.lax.while_loop(lambda s: (s.step < BLOCK) & s.live_N.any(), step, begun)
    page_N = rows.run_N // BLOCK
    put_page = lambda cache, page: jax.tree.map(lambda x, y: _put_page(x, y, page_N), cache, page)
    block = Block(rows.token_N, end.tokens_NK, end.valid_NK, end.live_N)
    return dataclasses.replace(
      rows,
      key_YNCJh=put_page(rows.key_YNCJh, end.page.key_YRSJh),
      value_YNCJh=put_page(rows.value_YNCJh, end.page.value_YRSJh),
      token_N=end.token_N,
      run_N=rows.run_N + end.step,
      live_N=end.live_N,
      seen_NV=end.seen_NV,
    ), block

  def _begun(self, params: Params, entries: Prompted, rows: Rows, begin: Begin) -> Rows:
    """The slots with the texts that begin: their first token is known and has not run."""
    many = lambda x_E: jnp.repeat(x_E, self.fan, axis=0)
    begins_N = begin.caption_N >= 0
    caption_N = jnp.where(begins_N, begin.caption_N, rows.caption_N)
    first_N1 = jnp.take_along_axis(many(entries.first_BG), caption_N[:, None], axis=1)
    token_N = jnp.where(begins_N, first_N1[:, 0], rows.token_N)
    limit_N = jnp.where(begins_N, begin.limit_N, rows.limit_N)
    goes_on_N = ~self._sampler(params).ends(token_N) & (limit_N > 1)
    seen_NV = rows.seen_NV
    if entries.seen_BV is not None:
      fresh_NV = _marked(many(entries.seen_BV), token_N)
      seen_NV = jnp.where(begins_N[:, None], fresh_NV, seen_NV)
    return dataclasses.replace(
      rows,
      token_N=token_N,
      run_N=jnp.where(begins_N, 0, rows.run_N),
      caption_N=caption_N,
      limit_N=limit_N,
      live_N=jnp.where(begins_N, goes_on_N, rows.live_N),
      seen_NV=seen_NV,
    )


def prefix_slots(length: int) -> int:
  """A prompt's length rounded up, by little where it is long: prompts of like lengths share a
  program."""
  step = max(64, 1 << max(length.bit_length() - 4, 0))
  return -(-length // step) * step


def cache_sizes(max_tokens: int, smallest: int) -> tuple[int, ...]:
  """Lengths of the slots' caches, whole pages each: a block runs with the shortest that holds the
  longest text there is. None of a quarter or a half of the limit is below `smallest`."""
  parts = [max_tokens // part for part in (4, 2) if max_tokens // part >= smallest]
  return tuple(-(-size // BLOCK) * BLOCK for size in (*parts, max_tokens))


def _marked(seen_NV: Array | None, token_N: Array) -> Array | None:
  """With each row's token among those seen."""
  return None if seen_NV is None else seen_NV.at[jnp.arange(len(token_N)), token_N].set(True)


def row_axis(x: Any) -> int:
  """Which axis of an array of `Prompted` or `Rows` is that of the rows: keys and values have their
  layers first."""
  return 1 if x.ndim == 5 else 0


def _put_row(old: Array, new: Array, source_H: Array, target_H: Array) -> Array:
  """A row of each shard's share of `new` in the place of one of that shard's share of `old`."""
  axis = row_axis(old)
  if len(source_H) == 1:  # in place
    row = jax.lax.dynamic_slice_in_dim(new, source_H[0], 1, axis)
    return jax.lax.dynamic_update_slice_in_dim(old, row, target_H[0], axis)

  def shares(x: Array) -> Array:
    x = jnp.moveaxis(x, axis, 0)
    return x.reshape(len(source_H), -1, *x.shape[1:])

  taken = jax.vmap(lambda x, i: x[i])(shares(new), source_H)[:, None]
  at_HE = jnp.arange(old.shape[axis] // len(target_H)) == target_H[:, None]
  made = jnp.where(at_HE.reshape(*at_HE.shape, *(1,) * (taken.ndim - 2)), taken, shares(old))
  return jnp.moveaxis(made.reshape(-1, *made.shape[2:]), 0, axis)


def _put_page(cache_YNCJh: Array, page_YNKJh: Array, page_N: Array) -> Array:
  """The caches with a page each: one pass over them for a block of tokens."""
  Y, N, C, J, h = cache_YNCJh.shape
  pages = cache_YNCJh.reshape(Y, N, C // BLOCK, BLOCK, J, h)
  at = (jnp.arange(C // BLOCK) == page_N[:, None])[None, :, :, None, None, None]
  return jnp.where(at, page_YNKJh[:, :, None], pages).reshape(cache_YNCJh.shape)
