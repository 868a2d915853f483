"""What a mode wants of a listing of images besides the images: a column, fields of rows, addresses
fetched.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

from caprl_jax.data.rows import StoredImage

ADDRESS = ("http://", "https://")
_PLACE_KEYS = ("url", "image_url", "path")
_BYTES_KEYS = ("bytes", "base64", "data", "b64_json")
_NESTED = 4  # lists and objects inside one another that are looked into


class Fetch(Protocol):
  """Makes an address on the web an image that is fetched when it is read."""

  def image(self, address: str, where: str) -> StoredImage: ...


class SeenFields:
  """The names of the fields that rows have, in the order in which they were met."""

  def __init__(self):
    self._names: dict[str, None] = {}

  def add(self, names: Iterable[str]) -> None:
    self._names.update(dict.fromkeys(names))

  def __iter__(self):
    return iter(self._names)


@dataclasses.dataclass(frozen=True)
class ListingOptions:
  """column: the key or column that names the image; None: the reader's own choice.
  fields: the fields of a row that are to be kept with it, of those it has.
  fetch: what makes of addresses images; None: such rows fail when they are read.
  seen: gathers the names of the fields that rows have.
  """

  column: str | None = None
  fields: Collection[str] = ()
  fetch: Fetch | None = None
  seen: SeenFields = dataclasses.field(default_factory=SeenFields, compare=False)

  def kept(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a row's values those that are asked for; None for none."""
    if not self.fields:
      return None
    self.seen.add(key for key in values if isinstance(key, str))
    found = {key: values[key] for key in self.fields if values.get(key) is not None}
    return found or None


NOTHING_MORE = ListingOptions()


def is_address(value: Any) -> bool:
  """Whether a text is an address on the web."""
  return isinstance(value, str) and value.strip().lower().startswith(ADDRESS)


def address_of(value: Any) -> str | None:
  """The address on the web that a row names as its image: a text, an object with one in `url`,
  `image_url` or `path` and no bytes, or a list of one of these; None where it names none.
  """
  for _ in range(_NESTED):
    if isinstance(value, (list, tuple)) and len(value) == 1:
      value = value[0]
    elif isinstance(value, dict) and not any(value.get(key) for key in _BYTES_KEYS):
      value = next((value[key] for key in _PLACE_KEYS if value.get(key)), None)
  return value.strip() if is_address(value) else None
