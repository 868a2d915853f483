"""Rows <-> a TFDS dataset in ArrayRecord, written and read without TensorFlow.

A record holds the encoded image, the row's name, and the rest as JSON, all in `Text` features:
TFDS's own `Image` and sequence features would need TensorFlow to write.
"""

import dataclasses
import functools
import io
import json
import os
import pathlib
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from caprl_jax.data.readers.inputs.options import NOTHING_MORE, ListingOptions
from caprl_jax.data.readers.jsonl import image_suffix, parse_questions, plain_questions
from caprl_jax.data.rows import BadRow, CaptionRow, QARow, check_rows, image_bytes
from caprl_jax.json_files import parse_json, shown


class CaprlQa(tfds.core.GeneratorBasedBuilder):
  """Images with multiple-choice questions.

  `CaprlQa(rows={"train": [...], "test": [...]}, data_dir=FOLDER).download_and_prepare()` writes
  FOLDER/caprl_qa/<config>/<version>; `tfds:` and that folder is then a source
  (`qa_sources.read_qa_rows`). Records keep the order of the rows: shuffling is the training
  pipeline's, by its seed.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "image, name and qa (JSON: questions, facts)."}

  def __init__(
    self, *, rows: Mapping[str, Sequence[QARow]] | None = None, dataset: str = "default", **kwargs
  ):
    """dataset: the config's name, part of the path. kwargs: of the builder, above all data_dir."""
    self.rows = dict(rows or {})
    kwargs = {"file_format": "array_record"} | kwargs
    super().__init__(config=tfds.core.BuilderConfig(name=dataset, version=self.VERSION), **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    text = lambda doc: tfds.features.Text(doc=doc)
    return tfds.core.DatasetInfo(
      builder=self,
      description="Images with multiple-choice questions, for training captioners "
      "by their answers.",
      features=tfds.features.FeaturesDict(
        {
          "image": text("the encoded image (JPEG, PNG, ...), as bytes"),
          "name": text("stands for the row in messages"),
          "qa": text("JSON: questions [{stem, options, gold, kind?, provenance?}], facts?"),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterable]:
    del dl_manager  # nothing is downloaded
    if not self.rows:
      raise ValueError(
        "CaprlQa has no rows to write; make it as CaprlQa(rows={'train': [...]}, data_dir=...)"
      )
    for split, rows in self.rows.items():
      check_rows(rows, split)
    return {split: self._generate_examples(rows) for split, rows in self.rows.items()}

  def _generate_examples(self, rows: Sequence[QARow]) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, row in enumerate(rows):
      data = image_bytes(row)
      image_suffix(data, f"row {shown(row.name)}")
      qa = {"questions": plain_questions(row)} | ({} if row.facts is None else {"facts": row.facts})
      yield i, {"image": data, "name": row.name, "qa": json.dumps(qa, ensure_ascii=False)}


def dataset_folder(folder: str | os.PathLike[str], dataset: str = "default") -> pathlib.Path:
  """Where `write_tfds` puts a dataset."""
  return pathlib.Path(CaprlQa(dataset=dataset, data_dir=os.fspath(folder)).data_path)


def write_tfds(
  folder: str | os.PathLike[str], rows: Mapping[str, Sequence[QARow]], dataset: str = "default"
) -> pathlib.Path:
  """Writes splits of rows under `folder` and returns the dataset's own folder, which appears whole
  or not at all.

  Raises ValueError for rows that `check_rows` refuses, images that cannot be read, and a dataset
  that is there already.
  """
  for split in rows:
    if not split or set(split) - set(string.ascii_letters + string.digits + "_"):
      raise ValueError(f"split name {split!r} may have letters, digits and underscores only")
  builder = CaprlQa(rows=rows, dataset=dataset, data_dir=os.fspath(folder))
  target = pathlib.Path(builder.data_path)
  if target.exists():
    raise ValueError(f"{target} holds a dataset already; delete it, or write to another folder")
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
  )
  _source.cache_clear()
  return target


def scan_tfds(folder: str, split: str) -> Iterator[QARow | BadRow]:
  """The rows of a split that `write_tfds` wrote; images stay in the file until they are read.

  Raises ValueError for a folder that holds no such dataset; a record that cannot be used is a
  BadRow.
  """
  source = _source(folder, split)
  if not {"image", "name", "qa"} <= set(source.dataset_info.features or ()):
    raise ValueError(
      f"{folder}: its features are {sorted(source.dataset_info.features)}, not "
      "image, name and qa as CaprlQa writes; convert it to JSON lines first"
    )
  for i in range(len(source)):
    where = f"{folder}:{split}, record {i}"
    try:
      record = source[i]
      qa = parse_json(record["qa"], f"{where}: qa")
      row = QARow(
        RecordImage(folder, split, i),
        parse_questions(qa["questions"], f"{where}: questions"),
        record["name"].decode("utf-8"),
        qa.get("facts"),
        where,
      )
    except (ValueError, KeyError, TypeError) as error:
      message = str(error)
      row = BadRow(
        where,
        message
        if message.startswith(where)
        else f"{where}: {type(error).__name__}: {message:.200}",
      )
    yield row


def scan_images(
  folder: str, split: str, options: ListingOptions = NOTHING_MORE
) -> Iterator[CaptionRow]:
  """The images of a split of any TFDS dataset with a feature `image`, named by their `name` or by
  their number. Fields are its other features that are texts or numbers.
  """
  source = _source(folder, split)
  if "image" not in (source.dataset_info.features or ()):
    raise ValueError(
      f"{folder}: no feature 'image' in {sorted(source.dataset_info.features or ())}"
    )
  named = "name" in source.dataset_info.features
  for i in range(len(source)):
    record = source[i] if named or options.fields else {}
    name = record["name"].decode("utf-8") if named else f"{split}/{i}"
    values = {
      key: value.decode("utf-8", "replace") if isinstance(value, bytes) else value
      for key, value in record.items()
      if key != "image" and isinstance(value, (bytes, str, int, float, np.number))
    }
    yield CaptionRow(RecordImage(folder, split, i), "", name, fields=options.kept(values))


@dataclasses.dataclass(frozen=True)
class RecordImage:
  """An image in a TFDS dataset."""

  folder: str
  split: str
  index: int

  @property
  def where(self) -> str:
    return f"{self.folder}:{self.split}, record {self.index}"

  def read(self) -> bytes:
    image = _source(self.folder, self.split)[self.index]["image"]
    if isinstance(image, bytes):
      return image
    file = io.BytesIO()  # a feature `Image` that holds pixels
    Image.fromarray(np.squeeze(image)).save(file, "PNG")
    return file.getvalue()


@functools.lru_cache(maxsize=16)
def _source(folder: str, split: str):
  """The opened split, shared by all its images."""
  path = pathlib.Path(folder).expanduser()
  if not (path / "dataset_info.json").is_file():
    inside = (
      sorted({str(p.parent) for p in path.rglob("dataset_info.json")}) if path.is_dir() else []
    )
    hint = f"; did you mean {inside[0]}" if inside else ""
    raise ValueError(
      f"{folder}: no TFDS dataset there (no dataset_info.json){hint}; name the folder that holds it"
    )
  builder = tfds.builder_from_directory(os.fspath(path))
  if split not in builder.info.splits:
    raise ValueError(f"{folder}: no split {split!r}; it has {sorted(builder.info.splits)}")
  if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
    raise ValueError(
      f"{folder}: its files are {builder.info.file_format.value}; only array_record "
      "can be read at random. Prepare it again with file_format='array_record'"
    )
  features = builder.info.features or {}
  # The file's own bytes: pixels would have to be encoded again.
  skip = "image" in features and isinstance(features["image"], tfds.features.Image)
  return builder.as_data_source(
    split, decoders={"image": tfds.decode.SkipDecoding()} if skip else None
  )
