"""An output of mode `caption`, whole or damaged -> its rows."""

import glob
import logging
import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

from caprl_jax.json_files import json_lines, parse_json, shown
from caprl_jax.modes.caption.formats.place import Place

log = logging.getLogger("caprl_jax.modes.caption.formats.read_back")

_DATA = "data"  # the folder of a Hugging Face dataset's files


def read_rows(place: Place) -> Iterator[dict[str, Any]]:
  """The rows of an output that can be read, `image` their names; what is damaged is left out and
  said. Those that failed come last, where they stand apart.
  """
  path, kind = place.path, place.kind
  if kind == "caprl_2m":
    for row in _lines(path):
      name, text = row.get(place.image_key), row.get(place.caption_key)
      yield {"image": name, place.columns[0].name: text}
  else:
    yield from _READERS[kind](path)
  if place.failed_path.is_file():
    yield from (row for row in _lines(place.failed_path) if "error" in row)


def guess_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The rows of a job's output, whose format shows: a file of JSON lines or parquet, a `hf` or
  `webdataset` folder. Raises ValueError for another.
  """
  if path.is_file():
    yield from _READERS["parquet" if path.suffix.lower() == ".parquet" else "jsonl"](path)
  elif (path / _DATA).is_dir():
    yield from _hf(path)
  elif path.is_dir() and any(path.glob("*.tar")):
    yield from _webdataset(path)
  elif (path / "dataset_info.json").is_file():
    yield from _tfds(path)
  else:
    raise ValueError(
      f"{shown(str(path))} is no output of mode caption that can be read back: no file of JSON "
      "lines or parquet, nor a folder of hf, webdataset or txt"
    )


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  bad = 0
  for _, value in json_lines(path, halves=True):
    if isinstance(value, dict) and isinstance(value.get("image"), str) or _other_keys(value):
      yield value
    else:
      bad += 1
  if bad:
    log.warning("%s: %d lines are damaged", path, bad)


def _other_keys(value: Any) -> bool:
  """Whether a line may be one of `caprl_2m`."""
  return (
    isinstance(value, dict) and len(value) == 2 and all(isinstance(v, str) for v in value.values())
  )


def _parquet(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  import pyarrow as pa  # only here: JSON lines need none of it
  import pyarrow.parquet as pq

  try:
    with pq.ParquetFile(path) as file:
      names = list(file.schema_arrow.names)
      if "name" in names:
        names.remove("image")  # the picture
      for group in range(file.num_row_groups):
        for row in file.read_row_group(group, columns=names).to_pylist():
          row = {key: value for key, value in row.items() if value is not None}
          yield row | ({"image": row.pop("name")} if "name" in row else {})
  except (OSError, pa.ArrowException) as error:
    log.warning("%s cannot be read, or not to its end (%.200s)", path, error)


def _hf(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  for file in sorted((path / _DATA).glob("*.parquet")):
    yield from _parquet(file)


def _webdataset(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  for file in sorted(glob.glob(os.path.join(glob.escape(str(path)), "*.tar"))):
    try:
      with tarfile.open(file, "r:") as tar:
        for member in tar:
          tar.members = []  # it would keep them all
          if member.name.endswith(".json"):
            data = tar.extractfile(member)
            value = parse_json(data.read() if data else b"", f"{file}, {member.name}", halves=True)
            if isinstance(value, dict):
              yield value
    except (OSError, tarfile.TarError, ValueError) as error:
      log.warning("%s cannot be read, or not to its end (%.200s)", file, error)


def _tfds(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  from caprl_jax.modes.caption.formats import tfds  # only here: it brings tensorflow_datasets

  try:
    yield from tfds.read_records(path)
  except Exception as error:  # noqa: BLE001  TFDS and ArrayRecord raise anything
    log.warning("%s cannot be read, or not to its end (%.200s)", path, error)


_READERS = {
  "jsonl": _lines,
  "parquet": _parquet,
  "hf": _hf,
  "webdataset": _webdataset,
  "tfds": _tfds,
}
