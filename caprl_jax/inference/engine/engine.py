"""Prompts -> texts, as they end: continuous batching, driven from the host.

A fixed number of texts is written at once. Whenever one has ended, its slot takes the next, so no
text waits for a longer one. In each turn the host puts prompts into free entries, dispatches a
block of tokens for all slots, and while the device works it readies the next prompts and gives away
what ended in the block before. Only then it looks at what the block came to: the device waits for
no more than that look, and where prompts are ready it runs them meanwhile. All shapes are fixed:
once a bucket of prompts has been seen, nothing is compiled for it again.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import jax
import numpy as np

from caprl_jax import sharding
from caprl_jax.inference.engine.programs import (
  BLOCK,
  Begin,
  Block,
  EngineModel,
  Programs,
  Prompted,
  Request,
  Rows,
  cache_sizes,
)
from caprl_jax.inference.engine.slots import Slots, Written
from caprl_jax.models.attention import Prefix
from caprl_jax.rl.sampling import SMALLEST_CACHE, SamplingConfig
from caprl_jax.types import Params, Vocabulary

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """How many texts are written at once, and how.

  prompts: whose texts are written at once, where each has one. A prompt with several texts has half
    as many slots as texts, and there are twice as many prompts: a slot goes on to the prompt's next
    text, so that the prompt waits less for its longest one.
  captions: texts of each prompt.
  sampling: of each text; its `chunks` are not read.
  """

  prompts: int
  captions: int
  sampling: SamplingConfig

  @property
  def fan(self) -> int:
    """Slots that share a prompt's prefix."""
    return -(-self.captions // 2)

  @property
  def entries(self) -> int:
    return self.prompts * min(self.captions, 2)

  def prefilled(self, shards: int) -> int:
    """Prompts that are run together: a quarter of those that are written, and as many for each of
    `shards` parts of the batch."""
    return shards * -(-self.prompts // (4 * shards))


@dataclasses.dataclass(frozen=True)
class Asked(Generic[Item]):
  """Prompts of one shape.

  items: what the texts of each are for, in order.
  request: numpy, `EngineConfig.prefilled` rows; those beyond the items are not read.
  limits: the longest text of each; None: `max_tokens`.
  """

  items: list[Item]
  request: Request
  limits: list[int] | None = None


class Source(Protocol[Item]):
  """Where prompts come from."""

  def take(self, wait: bool) -> Asked[Item] | None:
    """The next prompts; None where there are none: with `wait` none any more, else none yet."""
    ...


class Listed(Generic[Item]):
  """A source of prompts that are there at once."""

  def __init__(self, asked: Iterable[Asked[Item]]):
    self._asked = iter(asked)

  def take(self, wait: bool) -> Asked[Item] | None:
    del wait
    return next(self._asked, None)


class Engine:
  """A model, ready to write; `__call__` may be begun again while another one is not at its end."""

  def __init__(
    self,
    model: EngineModel,
    params: Params,
    cfg: EngineConfig,
    *,
    vocabulary: Vocabulary,
    mesh: jax.sharding.Mesh,
    seed: int,
  ):
    self.params, self.cfg, self.mesh = params, cfg, mesh
    self.shards = sharding.batch_parts(mesh)
    self.cache_sizes = cache_sizes(cfg.sampling.max_tokens, SMALLEST_CACHE)
    programs = Programs(model, vocabulary, cfg.sampling, cfg.captions, cfg.fan, seed)
    # Said, not left to the compiler: what one program returns another one takes.
    rows: Any = sharding.batch_sharding(mesh)
    cache: Any = sharding.cache_sharding(mesh, model.kv_heads)
    seen = rows if cfg.sampling.repetition_penalty != 1 else None
    prompted = Prompted(Prefix(cache, cache, rows), rows, rows, rows, seen)
    slots = Rows(cache, cache, rows, rows, rows, rows, rows, seen)
    self.prefill = jax.jit(programs.prefill, out_shardings=prompted)
    self.empty = jax.jit(programs.empty, static_argnums=(1, 2), out_shardings=(prompted, slots))
    self.insert = jax.jit(programs.insert, donate_argnums=0, out_shardings=prompted)
    self.with_slots = jax.jit(programs.with_slots, static_argnums=1, out_shardings=slots)
    self.with_prefix_slots = jax.jit(
      programs.with_prefix_slots, static_argnums=1, out_shardings=prompted
    )
    self.generate = jax.jit(
      programs.generate, donate_argnums=2, out_shardings=(slots, sharding.replicated(mesh))
    )

  def __call__(self, source: Source[Item], partly: bool = False) -> Iterator[list[Written[Item]]]:
    """Writes the texts of all prompts; yields what ended, block by block, in no order.

    Args:
      partly: what goes on is yielded as well, after each block.
    """
    turn = _Turns(self, source)
    found: list[Written[Item]] = []
    while turn.fill():
      block = turn.dispatch()
      turn.stage()
      if found:
        yield found
      found = [text for text in turn.read(block) if partly or not text.live]
    if found:
      yield found


@dataclasses.dataclass(eq=False)
class _Ready(Generic[Item]):
  """Prompts that were run, and which of them wait for an entry: for each shard, places in its share
  with item and limit."""

  prompted: Prompted
  waiting: list[collections.deque[tuple[int, Item, int]]]


class _Turns(Generic[Item]):
  """One call of the engine: its entries and slots, and what has been readied for them."""

  def __init__(self, engine: Engine, source: Source[Item]):
    cfg = engine.cfg
    self.engine, self.source = engine, source
    self.slots: Slots[Item] = Slots(cfg.entries, cfg.fan, cfg.captions)
    self.staged: Asked[Item] | None = None  # its request is on the device
    self.ready: collections.deque[_Ready[Item]] = collections.deque()
    self.entries: Prompted | None = None
    self.rows: Rows | None = None
    share = cfg.entries // engine.shards
    self.shares = [range(h * share, (h + 1) * share) for h in range(engine.shards)]

  def fill(self) -> bool:
    """Puts prompts into free entries, as far as there are any; whether there is work."""
    while any(self.slots.free(share) is not None for share in self.shares):
      if self._insert():
        continue
      asked = self._next(wait=not self.slots.busy)
      if asked is None:
        break
      self.ready.append(self._prefill(asked))
    return self.slots.busy

  def stage(self) -> None:
    """Puts the next prompts on the device, where they are prepared, and lets it run them after the
    block where no others wait for an entry."""
    if self.staged is None:
      self.staged = self._next(wait=False)
    if self.staged is not None and not self.ready:
      asked, self.staged = self.staged, None
      self.ready.append(self._prefill(asked))
      self.staged = self._next(wait=False)

  def dispatch(self) -> Block:
    """Begins a block, and does not wait for it."""
    assert self.entries is not None and self.rows is not None
    need = self.slots.longest() + BLOCK
    slots = next(size for size in self.engine.cache_sizes if size >= need)
    if self.rows.key_YNCJh.shape[2] != slots:
      self.rows = self.engine.with_slots(self.rows, slots)
    begins: Any = self.slots.begin()
    begin = sharding.put_batch(Begin(*begins), self.engine.mesh)
    self.rows, block = self.engine.generate(self.engine.params, self.entries, self.rows, begin)
    return block

  def read(self, block: Block) -> Iterator[Written[Item]]:
    """Waits for a block; the texts that were written in it."""
    found = jax.device_get(block)
    return self.slots.read(found.first_N, found.tokens_NK, found.valid_NK, found.live_N)

  def _next(self, wait: bool) -> Asked[Item] | None:
    asked, self.staged = self.staged or self.source.take(wait), None
    if asked is None or isinstance(asked.request.number_B, jax.Array):
      return asked
    # Row by row to the shards in turn, so that a batch that is not full has some for each.
    H = self.engine.shards
    order = np.arange(len(asked.request.number_B)).reshape(-1, H).T.reshape(-1)
    request = jax.tree.map(lambda x: x[order], asked.request) if H > 1 else asked.request
    return dataclasses.replace(asked, request=sharding.put_batch(request, self.engine.mesh))

  def _prefill(self, asked: Asked[Item]) -> _Ready[Item]:
    H = self.engine.shards
    prompted = self.engine.prefill(self.engine.params, asked.request)
    limits = asked.limits or [self.engine.cfg.sampling.max_tokens] * len(asked.items)
    waiting = [collections.deque() for _ in range(H)]
    for i, (item, limit) in enumerate(zip(asked.items, limits, strict=True)):
      waiting[i % H].append((i // H, item, limit))
    return _Ready(prompted, waiting)

  def _insert(self) -> bool:
    """Puts at most one prompt of each shard into an entry; False where none can be."""
    for ready in self.ready:
      source_H = np.zeros(len(self.shares), np.int32)
      target_H = np.full(len(self.shares), -1, np.int32)
      for h, (share, waiting) in enumerate(zip(self.shares, ready.waiting)):
        entry = self.slots.free(share)
        if entry is not None and waiting:
          source_H[h], item, limit = waiting.popleft()
          target_H[h] = entry - share.start
          self.slots.put(entry, item, limit)
      if (target_H >= 0).any():
        self._room_for(ready.prompted)
        assert self.entries is not None
        self.entries = self.engine.insert(self.entries, ready.prompted, source_H, target_H)
        if not any(ready.waiting):
          self.ready.remove(ready)
        return True
    return False

  def _room_for(self, prompted: Prompted) -> None:
    """Makes entries, or makes them longer, so that they hold these prompts."""
    slots = prompted.prefix.valid_RS.shape[1]
    engine = self.engine
    if self.entries is None:
      self.entries, self.rows = engine.empty(prompted, engine.cfg.entries, engine.cache_sizes[0])
    elif self.entries.prefix.valid_RS.shape[1] < slots:
      self.entries = engine.with_prefix_slots(self.entries, slots)
