"""Captions of images whose facts are known -> which facts they tell, and whether they say something
false.

What may be said at all is known from the facts of all images: the values of each fact, such as the
colours, and the sentences of descriptions. A caption tells a fact if it has its words side by side,
and says something false if it has those of another image's fact of that kind. So only statements in
the data's own words are found, a number that no image has is not, and what is denied counts as
said.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from caprl_jax.scoring.captions.words import normal_words

Facts = Mapping[str, str]

_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
_VALUE_WORDS = 3  # a fact of more words is read as sentences, each a statement
_MAX_VALUES = 100  # of a short fact: more are names of single images


class Told(NamedTuple):
  """Of one caption: the share of the image's facts that it tells, how many these are, and how many
  false statements it makes."""

  share: float
  facts: int
  false: int


class KnownFacts:
  """What can be said of the images of a data set, from the facts of all of them."""

  def __init__(self, rows: Iterable[Facts]):
    self.values: dict[str, set[tuple[str, ...]]] = {}
    long: set[str] = set()
    for facts in rows:
      for key, value in facts.items():
        self.values.setdefault(key, set()).update(_statements(value))
        if len(normal_words(value)) > _VALUE_WORDS:
          long.add(key)
    for key, found in [*self.values.items()]:
      if len(found) < 2 or (key not in long and len(found) > _MAX_VALUES):
        del self.values[key]

  def __bool__(self) -> bool:
    return bool(self.values)

  def told(self, caption: str, facts: Facts) -> Told | None:
    """What a caption says of the image with these facts; None where none of them can be told."""
    words = normal_words(caption)
    true = said = false = 0
    for key, values in self.values.items():
      if own := set(_statements(facts.get(key, ""))):
        found = _found(words, values)
        true, said, false = true + len(own), said + len(own & found), false + len(found - own)
    return Told(said / true, true, false) if true else None


def _found(words: list[str], values: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
  """The values whose words stand side by side. A word counts for the longest value that it is part
  of."""
  found, used = set(), [False] * len(words)
  for length in sorted({len(value) for value in values}, reverse=True):
    for start in range(len(words) - length + 1):
      place = slice(start, start + length)
      if not any(used[place]) and tuple(words[place]) in values:
        found.add(tuple(words[place]))
        used[place] = [True] * length
  return found


def _statements(value: str) -> list[tuple[str, ...]]:
  long = len(normal_words(value)) > _VALUE_WORDS
  parts = [normal_words(part) for part in (_SENTENCE.split(value) if long else [value])]
  return [tuple(part) for part in parts if part]
