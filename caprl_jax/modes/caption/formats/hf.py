"""Captions -> a folder that `datasets.load_dataset` reads, with the images or without."""

import json
import os
import pathlib
import shutil
from typing import Any

from caprl_jax.atomic_files import write_text
from caprl_jax.data.rows import image_bytes
from caprl_jax.modes.caption.columns import written
from caprl_jax.modes.caption.formats.place import Place, Results, captioned, clean

ROWS_PER_GROUP = 10_000
GROUP_BYTES = 32 << 20  # of images, in a row group: what a reader of one row has to decode
FILE_BYTES = 500 << 20


def caption_columns(place: Place) -> list[tuple[str, Any]]:
  """Names and Arrow types of the columns of captions."""
  import pyarrow as pa  # only here and below: JSON lines need none of it

  found = []
  for column in place.columns:
    kinds = pa.string(), pa.list_(pa.int32()), pa.string()
    found += [
      (key, pa.list_(kind) if column.captions > 1 else kind)
      for key, kind in zip(column.keys, kinds)
    ]
  return found


class _HfFiles:
  """The parquet files of a Hugging Face dataset, `FILE_BYTES` or a little more each."""

  def __init__(self, folder: pathlib.Path, schema: Any):
    self.folder, self.schema = folder, schema
    self.files = self.rows = self.bytes = 0
    self._writer, self._group, self._group_bytes, self._file_bytes = None, [], 0, 0

  def put(self, entry: dict[str, Any], size: int) -> None:
    """Adds a row of about `size` bytes."""
    self._group.append(entry)
    self._group_bytes += size
    self.rows, self.bytes = self.rows + 1, self.bytes + size
    if self._group_bytes >= GROUP_BYTES or len(self._group) == ROWS_PER_GROUP:
      self._flush()
      if self._file_bytes >= FILE_BYTES:
        self._end_file()

  def close(self) -> None:
    """Writes what is left, one empty file where nothing came, and gives the files their names, of
    which the total is a part.
    """
    if self._group or not self.files:
      self._flush()
    self._end_file()
    for i in range(self.files):
      name = f"train-{i:05d}-of-{self.files:05d}.parquet"
      os.rename(self.folder / f"{i}.parquet", self.folder / name)

  def _flush(self) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if self._writer is None:
      self._writer = pq.ParquetWriter(self.folder / f"{self.files}.parquet", self.schema)
      self.files += 1
    if self._group:
      self._writer.write_table(pa.Table.from_pylist(self._group, self.schema))
    self._file_bytes += self._group_bytes
    self._group, self._group_bytes = [], 0

  def _end_file(self) -> None:
    if self._writer is not None:
      self._writer.close()
    self._writer, self._file_bytes = None, 0


def _schema(place: Place) -> Any:
  """Columns, and the features that `datasets` reads from a single file, pictures among them."""
  import pyarrow as pa

  picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  schema = pa.schema(
    [
      ("image", picture if place.embed_images else pa.string()),
      *([("name", pa.string())] if place.embed_images else []),
      *caption_columns(place),
    ]
  )
  features = {field.name: _feature(field.type) for field in schema}
  if place.embed_images:
    features["image"] = {"_type": "Image"}
  return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: Any) -> dict[str, Any]:
  import pyarrow as pa

  if pa.types.is_list(kind):
    return {"feature": _feature(kind.value_type), "_type": "Sequence"}
  return {"dtype": "int32" if pa.types.is_integer(kind) else "string", "_type": "Value"}


def write_hf(place: Place, found: Results) -> None:
  """Writes the folder, which appears whole or not at all."""
  schema = _schema(place)
  temporary = place.path.with_name(f".{place.path.name}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    (temporary / "data").mkdir(parents=True)
    files = _HfFiles(temporary / "data", schema)
    for item in captioned(place, found):
      row = clean(item.row)
      entry = {key: row[key] for column in place.columns for key in column.keys}
      texts = list(written(row, place.columns))
      size = sum(len(one.text.encode()) + 4 * len(one.tokens) for one in texts) + len(row["image"])
      entry["image"] = row["image"]
      if place.embed_images:
        data, name = image_bytes(item.source), pathlib.PurePath(row["image"]).name
        entry |= {"image": {"bytes": data, "path": name}, "name": row["image"]}
        size += len(data)
      files.put(entry, size)
    files.close()
    write_text(temporary / "README.md", _card(place, schema, files.rows, files.bytes))
    shutil.rmtree(place.path, ignore_errors=True)  # `check` has seen that it is ours
    os.rename(temporary, place.path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)  # on a full disk it would be in the way


def _card(place: Place, schema: Any, rows: int, size: int) -> str:
  features = []
  for field in schema:
    kind = "dtype: image" if field.name == "image" and place.embed_images else _listed(field.type)
    features.append(f"  - name: {field.name}\n    {kind}\n")
  return (
    f"---\ntask_categories:\n- image-to-text\ndataset_info:\n  features:\n{''.join(features)}"
    f"  splits:\n  - name: train\n    num_bytes: {size}\n    num_examples: {rows}\n  "
    f"dataset_size: {size}\nconfigs:\n- config_name: default\n  data_files:\n  - split: "
    f"train\n    path: data/train-*\n---\n\n# {place.path.name}\n\n{rows:,} images "
    f"captioned by caprl_jax{place.about}.\n\n`tokens` are the ids that were sampled, the "
    "end token included; `finish` is `end`, or `length` for a caption that was cut.\n"
  )


def _listed(kind: Any) -> str:
  """A column's type in a dataset card."""
  import pyarrow as pa

  if not pa.types.is_list(kind):
    return "dtype: string"
  inner = kind.value_type
  if pa.types.is_list(inner):
    return "list:\n      list: int32"
  return "list: int32" if pa.types.is_integer(inner) else "list: string"
