"""Kind, seed, number -> one input: files, arguments, and what was done to them."""

import base64
import dataclasses
import json
import os
import pathlib
import random

# Beside bytes, what may lie where a file is expected.
FOLDER, LOOP, DANGLING = "folder", "link to itself", "link to nothing"
File = bytes | str


@dataclasses.dataclass(frozen=True)
class Case:
  """files: path in the input's folder -> contents, or one of FOLDER, LOOP, DANGLING."""

  kind: str
  seed: int
  number: int
  files: dict[str, File]
  arguments: tuple[str, ...] = ()
  done: tuple[str, ...] = ()  # what was done to a good input, in words

  @property
  def name(self) -> str:
    return f"{self.kind}-{self.seed}-{self.number}"

  @property
  def rng(self) -> random.Random:
    """Random numbers that depend on kind, seed and number only."""
    return random.Random(f"{self.kind}/{self.seed}/{self.number}")

  def changed(self, done: str, **values) -> "Case":
    return dataclasses.replace(self, done=(*self.done, done), **values)

  def write(self, folder: pathlib.Path) -> None:
    """Puts the files into an empty folder."""
    for name, contents in self.files.items():
      path = folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      if isinstance(contents, bytes):
        path.write_bytes(contents)
      elif contents == FOLDER:
        path.mkdir()
      else:
        os.symlink(path.name if contents == LOOP else "nowhere", path)

  def to_json(self) -> str:
    files = {
      name: contents if isinstance(contents, str) else [base64.b64encode(contents).decode()]
      for name, contents in self.files.items()
    }
    return json.dumps(dataclasses.asdict(self) | {"files": files}, indent=1)

  @classmethod
  def from_json(cls, text: str) -> "Case":
    held = json.loads(text)
    files = {
      name: contents if isinstance(contents, str) else base64.b64decode(contents[0])
      for name, contents in held["files"].items()
    }
    return cls(
      held["kind"],
      held["seed"],
      held["number"],
      files,
      tuple(held["arguments"]),
      tuple(held["done"]),
    )
