"""Rows, facts about their images -> a digest of each row's contents, wherever it lies."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from caprl_jax.data.usable_rows import HasImage, ImageFacts

_PLACES = ("image", "where")  # fields that say where something lies, not what it is


def row_digests(rows: Iterable[HasImage], facts: Iterable[ImageFacts]) -> list[str]:
  """The digest of each row (of any kind: questions, captions, conversations), 16 characters.

  Args:
    facts: of each row's image, in the same order.
  """
  return [_digest([_contents(row), about.sha256]) for row, about in zip(rows, facts, strict=True)]


def digest_of_all(digests: Sequence[str]) -> str:
  """One digest of several, in their order."""
  return _digest(list(digests))


def _digest(value: Any) -> str:
  text = json.dumps(value, sort_keys=True)  # ASCII, also where a name is no UTF-8
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _contents(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    fields = [field.name for field in dataclasses.fields(value) if field.name not in _PLACES]
    return [type(value).__name__, [_contents(getattr(value, name)) for name in fields]]
  if isinstance(value, (list, tuple)):
    return [_contents(item) for item in value]
  return value
