"""Members of a tar file beside an image (WebDataset) -> the fields of the image's row."""

import pathlib
import posixpath
from typing import Any

from caprl_jax.json_files import decode, parse_json, shown

_SUFFIXES = ("txt", "caption", "cls", "json")
_MOST_BYTES = 1 << 20  # of a member: what is larger is no text about an image


def sample_key(member: str) -> tuple[str, str]:
  """What members of one sample share, and what comes after it: a/001.seg.png -> a/001, seg.png."""
  folder, name = posixpath.split(member)
  stem, _, rest = name.partition(".")
  return posixpath.join(folder, stem), rest.lower()


class SampleTexts:
  """The texts of a tar file's samples, found as it is read through.

  A sample's fields are its members .txt, .caption and .cls by their suffix, and the keys of the
  object in its .json, which go before them.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._places: dict[str, dict[str, tuple[int, int]]] = {}

  def add(self, member: str, offset: int, size: int) -> None:
    """Takes note of a member that is no image."""
    key, suffix = sample_key(member)
    if suffix in _SUFFIXES and size <= _MOST_BYTES:
      self._places.setdefault(key, {})[suffix] = offset, size

  def of(self, member: str) -> dict[str, Any]:
    """The fields of the sample that an image belongs to. Raises ValueError for text that is no
    UTF-8 and JSON that is none, with file and member.
    """
    key, _ = sample_key(member)
    found: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for suffix, (offset, size) in self._places.get(key, {}).items():
      where = f"{self.path}, member {shown(f'{key}.{suffix}')}"
      with open(self.path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
      if suffix == "json":
        value = parse_json(data, where)
        values = value if isinstance(value, dict) else {}
        continue
      try:
        found[suffix] = decode(data).strip()
      except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not text in UTF-8 ({error}); save it so") from error
    return found | values
