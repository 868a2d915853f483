"""Where captions go and what every format shares: names beside the output, files that appear whole,
rows that failed.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TextIO

from caprl_jax.data.rows import CaptionRow
from caprl_jax.harness.row_shards import RowResult
from caprl_jax.modes.caption.columns import ONE, Column

Results = Iterable[RowResult[CaptionRow]]
Format = Literal["jsonl", "parquet", "txt", "hf", "webdataset", "tfds", "caprl_2m"]
Existing = Literal["skip", "overwrite", "append", "prepend", "refuse"]
FOLDERS = ("txt", "hf", "webdataset", "tfds")  # formats that are one


@dataclasses.dataclass(frozen=True)
class Place:
  """Where captions go, and in which layout.

  kind: `jsonl`: every row; `parquet`: every row, columns image, caption, tokens, finish, error;
    `txt`: `path` is a folder with the images' own tree, a/b.png -> a/b.txt, beside the images where
    it is their own folder; `hf`: a folder that `datasets.load_dataset` reads; `webdataset`: a
    folder of tar files with each image, its caption as .txt and its row as .json; `tfds`: a
    TFDS dataset with a split `train`; `caprl_2m`: JSON lines of image and caption alone, as
    `image_key` and `caption_key`. What failed has no row in the last five: it stands, with its
    reason, in `failed_path`.
  base: the folder that a `txt` tree mirrors from.
  columns: of captions. A `txt` tree has a file for each: a/b.txt for the only one and for the one
    called caption, a/b.NAME.txt for others; where an image has several captions of one prompt, each
    is a line.
  existing: what becomes of texts and captions that are there, as `caption.existing`.
  about: for the dataset card: which model, asked what.
  """

  path: pathlib.Path
  kind: Format
  base: pathlib.Path
  embed_images: bool = True
  image_key: str = "image"
  caption_key: str = "caption"
  about: str = ""
  columns: Sequence[Column] = ONE
  existing: Existing | None = None

  def beside(self, suffix: str) -> pathlib.Path:
    """A file next to the output: captions.jsonl -> captions.stats.json; a folder keeps its whole
    name.
    """
    stem = self.path.name if self.kind in FOLDERS else self.path.stem
    return self.path.with_name(stem + suffix)

  @property
  def failed_path(self) -> pathlib.Path:
    return self.beside(".failed.jsonl")


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary path that takes the place of `path` once all has been written."""
  path.parent.mkdir(parents=True, exist_ok=True)
  # of a known name: what a kill leaves is written over
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    yield temporary
    with open(temporary, "rb") as file:
      os.fsync(file.fileno())  # the shards are removed next
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)  # on a full disk it would be in the way


def line(value: dict[str, Any]) -> str:
  """A row as a line of JSON."""
  return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def clean(value: Any) -> Any:
  """A value, or all in a row or list, without what Arrow has no form for: the lone surrogates of
  file names that are no UTF-8.
  """
  if isinstance(value, str):
    return value.encode("utf-8", "replace").decode()
  if isinstance(value, dict):
    return {key: clean(inner) for key, inner in value.items()}
  return [clean(inner) for inner in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _failures(place: Place) -> Iterator[Callable[[dict[str, Any]], None]]:
  """Takes failed rows to `failed_path`, which is there only if there are any."""
  place.failed_path.unlink(missing_ok=True)
  file: TextIO | None = None
  temporary = place.failed_path.with_name(f".{place.failed_path.name}.tmp")

  def put(row: dict[str, Any]) -> None:
    nonlocal file
    file = file or open(temporary, "w", encoding="utf-8")  # noqa: SIM115  closed below
    file.write(line(row))

  yield put
  if file:
    file.close()
    os.replace(temporary, place.failed_path)


def captioned(place: Place, found: Results) -> Iterator[RowResult[CaptionRow]]:
  """The rows with a caption; the others go to `failed_path`."""
  with _failures(place) as failed:
    for item in found:
      if "error" in item.row:
        failed(item.row)
      else:
        yield item
