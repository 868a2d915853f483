"""Finished rows, in order -> the output: JSON lines, parquet, text files beside images, a Hugging
Face dataset, WebDataset, TFDS.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from caprl_jax.data.rows import CaptionRow
from caprl_jax.json_files import shown
from caprl_jax.modes.caption.formats.hf import caption_columns, write_hf
from caprl_jax.modes.caption.formats.place import (
  Format,
  Place,
  Results,
  captioned,
  clean,
  line,
  whole,
)
from caprl_jax.modes.caption.formats.texts import LONGEST_NAME, check_texts, write_texts
from caprl_jax.modes.caption.formats.webdataset import write_webdataset

SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
ROWS_PER_GROUP = 10_000


@dataclasses.dataclass(frozen=True)
class Output(Place):
  """A place that can be checked and written."""

  def check(self, inputs: Sequence[CaptionRow]) -> None:
    """Before anything is captioned: raises ValueError where the output would overwrite, or could
    not be written.
    """
    if len(os.fsencode(self.path.name)) > LONGEST_NAME - 50:  # names beside it are longer
      raise ValueError(
        f"caption.output = {shown(str(self.path))}: its name is too long for a file beside it; "
        f"name it in {LONGEST_NAME - 50} bytes at most"
      )
    if self.kind == "caprl_2m" and (len(self.columns) > 1 or self.columns[0].captions > 1):
      raise ValueError(
        "caption.format = caprl_2m has one caption per image; write several prompts or captions "
        "into .jsonl, .parquet, hf or webdataset"
      )
    if self.kind == "txt":
      check_texts(self, inputs)
    elif self.path.exists():
      raise ValueError(
        f"{self.path} is there already, and not from this job; delete it, name another "
        f"caption.output, or caption only what is not in it: caption.filter.not_in={self.path}"
      )

  def write(self, found: Results) -> None:
    """Writes results in the order in which they come, reading them once. A file or a folder but of
    texts appears whole or not at all.
    """
    _WRITERS[self.kind](self, found)


def kind_of(path: pathlib.Path, asked: Format | None) -> Format:
  """The format asked for, or that of the suffix. Raises ValueError for a suffix that says
  nothing.
  """
  if asked is not None:
    return asked
  if path.suffix.lower() not in SUFFIXES:
    raise ValueError(
      f"caption.output = {str(path)!r} does not say its format; end it in .jsonl or "
      ".parquet, or set caption.format to txt, hf, webdataset, tfds (folders) or caprl_2m"
    )
  return SUFFIXES[path.suffix.lower()]


def _write_jsonl(place: Place, found: Results) -> None:
  with whole(place.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
    file.writelines(line(item.row) for item in found)


def _write_caprl_2m(place: Place, found: Results) -> None:
  with whole(place.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
    file.writelines(
      line({place.image_key: item.row["image"], place.caption_key: item.row[place.columns[0].name]})
      for item in captioned(place, found)
    )


def _write_parquet(place: Place, found: Results) -> None:
  import pyarrow as pa  # only here: JSON lines need none of it
  import pyarrow.parquet as pq

  schema = pa.schema([("image", pa.string()), *caption_columns(place), ("error", pa.string())])
  with whole(place.path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
    group: list[dict[str, Any]] = []

    def flush() -> None:
      writer.write_table(pa.Table.from_pylist(group, schema))  # an absent key is a null
      group.clear()

    for item in found:
      group.append(clean(item.row))
      if len(group) == ROWS_PER_GROUP:
        flush()
    flush()


def _write_tfds(place: Place, found: Results) -> None:
  from caprl_jax.modes.caption.formats import tfds  # only here: it brings tensorflow_datasets

  tfds.write_tfds(place, found)


_WRITERS = {
  "jsonl": _write_jsonl,
  "parquet": _write_parquet,
  "txt": write_texts,
  "hf": write_hf,
  "webdataset": write_webdataset,
  "tfds": _write_tfds,
  "caprl_2m": _write_caprl_2m,
}
