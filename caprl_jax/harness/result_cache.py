"""Results by key, in a file that grows: what an interrupted evaluation has done is there when it
goes on.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any


class ResultCache(Mapping):
  """key -> JSON value, for one kind of work under given settings: other settings have a file of
  their own.

  A line is [key, value]; the first line says the settings. A line that a kill has torn is dropped.
  """

  def __init__(self, folder: pathlib.Path, kind: str, settings: dict[str, Any]):
    text = json.dumps(settings, sort_keys=True)
    self.path = folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    self._values: dict[str, Any] = {}
    folder.mkdir(parents=True, exist_ok=True)
    end = 0
    with open(self.path, "a+b") as file:
      file.seek(0)
      for number, line in enumerate(file):
        try:
          item = json.loads(line)
          if not line.endswith(b"\n"):
            break
          if number:
            key, value = item
            self._values[key] = value
        except ValueError:
          break
        end += len(line)
      file.truncate(end)
      if end == 0:
        file.write((text + "\n").encode())

  def __getitem__(self, key: str) -> Any:
    return self._values[key]

  def __contains__(self, key: object) -> bool:
    return key in self._values

  def __iter__(self) -> Iterator[str]:
    return iter(self._values)

  def __len__(self) -> int:
    return len(self._values)

  def put(self, found: Mapping[str, Any]) -> None:
    """Adds values; a kill after this does not lose them."""
    self._values.update(found)
    with open(self.path, "ab") as file:
      file.write("".join(json.dumps([key, value]) + "\n" for key, value in found.items()).encode())
