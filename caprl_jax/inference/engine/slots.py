"""What the host knows of the engine's slots: which prompt lies in which entry, what is written in
which slot, and what has ended."""

import dataclasses
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Written(Generic[Item]):
  """A text: its prompt's item, its number among the texts of the prompt, and its token ids so far,
  the end token included. live: it goes on.
  """

  item: Item
  caption: int
  ids: list[int]
  live: bool = False


@dataclasses.dataclass
class _Entry(Generic[Item]):
  item: Item
  limit: int
  next: int = 0  # of its texts
  live: int = 0  # of its texts


@dataclasses.dataclass
class _Text:
  caption: int
  ids: list[int] = dataclasses.field(default_factory=list)


class Slots(Generic[Item]):
  """Entries in order, `fan` slots to each; an entry is free when all `captions` texts of its prompt
  have ended."""

  def __init__(self, entries: int, fan: int, captions: int):
    self.fan, self.captions = fan, captions
    self._entries: list[_Entry[Item] | None] = [None] * entries
    self._texts: list[_Text | None] = [None] * (entries * fan)

  @property
  def busy(self) -> bool:
    """Whether any prompt lies in an entry."""
    return any(entry is not None for entry in self._entries)

  def free(self, entries: range) -> int | None:
    """The first of these entries that is free."""
    return next((e for e in entries if self._entries[e] is None), None)

  def put(self, entry: int, item: Item, limit: int) -> None:
    """A prompt into a free entry; its texts have up to `limit` tokens."""
    assert self._entries[entry] is None
    self._entries[entry] = _Entry(item, limit)

  def begin(self) -> tuple[np.ndarray, np.ndarray]:
    """Gives every idle slot the next text of its entry, if any: its number, -1 for none, and its
    limit, int32 [N] each."""
    caption_N, limit_N = (np.full(len(self._texts), value, np.int32) for value in (-1, 0))
    for n, text in enumerate(self._texts):
      entry = self._entries[n // self.fan]
      if text is not None or entry is None or entry.next == self.captions:
        continue
      caption_N[n], limit_N[n] = entry.next, entry.limit
      self._texts[n] = _Text(entry.next)
      entry.next, entry.live = entry.next + 1, entry.live + 1
    return caption_N, limit_N

  def longest(self) -> int:
    """Tokens that the longest text has run: all but the last one of each have."""
    return max(
      (len(text.ids) - 1 for text in self._texts if text is not None and text.ids), default=0
    )

  def read(
    self, first_N: np.ndarray, tokens_NK: np.ndarray, valid_NK: np.ndarray, live_N: np.ndarray
  ) -> Iterator[Written[Item]]:
    """What a block (`programs.Block`) came to: each text that was written, those that have ended
    leave their slots."""
    for n, text in enumerate(self._texts):
      entry = self._entries[n // self.fan]
      if text is None or entry is None:
        continue
      if not text.ids:
        text.ids.append(int(first_N[n]))
      text.ids += tokens_NK[n][valid_NK[n]].tolist()
      live = bool(live_N[n])
      yield Written(entry.item, text.caption, list(text.ids) if live else text.ids, live)
      if live:
        continue
      self._texts[n] = None
      entry.live -= 1
      if not entry.live and entry.next == self.captions:
        self._entries[n // self.fan] = None
