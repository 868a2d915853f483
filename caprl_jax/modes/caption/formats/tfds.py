"""Captions -> a TFDS dataset in ArrayRecord, written and read without TensorFlow."""

import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from caprl_jax.data.rows import image_bytes
from caprl_jax.modes.caption.columns import texts_of
from caprl_jax.modes.caption.formats.place import Place, Results, captioned, clean


class CaprlCaptions(tfds.core.GeneratorBasedBuilder):
  """Images with captions: `tfds:` and its folder is a source of images again."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "image, name, caption and row (JSON)."}

  def __init__(self, *, rows: Iterable[dict[str, Any]] = (), **kwargs):
    """rows: records, read once. kwargs: of the builder, above all data_dir."""
    self.rows = rows
    super().__init__(**({"file_format": "array_record"} | kwargs))

  def _info(self) -> tfds.core.DatasetInfo:
    text = lambda doc: tfds.features.Text(doc=doc)
    return tfds.core.DatasetInfo(
      builder=self,
      description="Images captioned by caprl_jax.",
      features=tfds.features.FeaturesDict(
        {
          "image": text("the encoded image (JPEG, PNG, ...), as bytes"),
          "name": text("the image's path, or its place in its source"),
          "caption": text("of the first prompt; several of one image are lines"),
          "row": text("JSON: all captions, their token ids, how they ended"),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterable]:
    del dl_manager  # nothing is downloaded
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from enumerate(self.rows)


def write_tfds(place: Place, found: Results) -> None:
  """Writes the dataset's folder, with a split `train`; it appears whole or not at all."""
  temporary = place.path.with_name(f".{place.path.name}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    temporary.mkdir(parents=True)
    builder = CaprlCaptions(rows=_records(place, found), data_dir=os.fspath(temporary))
    skip = tfds.download.ComputeStatsMode.SKIP
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(compute_stats=skip))
    shutil.rmtree(place.path, ignore_errors=True)  # `check` has seen that it is ours
    os.rename(builder.data_path, place.path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _records(place: Place, found: Results) -> Iterator[dict[str, Any]]:
  for item in captioned(place, found):
    row = clean(item.row)
    texts = texts_of(row, place.columns[0])
    if len(texts) > 1:
      texts = [" ".join(text.split()) for text in texts]
    yield {
      "image": image_bytes(item.source),
      "name": row["image"],
      "caption": "\n".join(texts),
      "row": json.dumps(row, ensure_ascii=False),
    }


def read_records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The rows of such a dataset. Raises whatever TFDS stumbles over in a damaged one."""
  source = tfds.builder_from_directory(os.fspath(path)).as_data_source("train")
  for i in range(len(source)):
    yield json.loads(source[i]["row"])
