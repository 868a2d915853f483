"""Parquet files -> the images in them, which are read when they are needed."""

import dataclasses
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from caprl_jax.data.readers.image_spellings import find_image
from caprl_jax.data.readers.inputs.options import Fetch, is_address
from caprl_jax.data.rows import ImageSource
from caprl_jax.image_files import HEAD_BYTES, sniff
from caprl_jax.json_files import cut, shown

KEPT_BYTES = 1 << 30  # of decoded row groups


@dataclasses.dataclass(frozen=True)
class ParquetImage:
  """An image in a row group of a parquet file. Reading one decodes its group, which is kept for its
  neighbours: read in order it is cheap, at random from large groups it is not (mode `dataset`
  converts)."""

  path: pathlib.Path
  group: int
  row: int  # within the group
  column: str  # "image.bytes", or "image" where the column is no struct
  name: str = ""

  @property
  def where(self) -> str:
    return f"{self.path}, row group {self.group}, row {self.row} in it"

  def read(self) -> bytes:
    """Raises ValueError, with `where`, for a row without an image, or one that cannot be read."""
    value = _groups.get(self)
    if isinstance(value, bytes) and (sniff(value[:HEAD_BYTES]) or not value):
      return value
    if value is None:
      named = f", and {shown(self.name)} is no file beside it" if self.name else ""
      raise ValueError(f"{self.where}: no image bytes{named}; drop the row")
    found = find_image(value, [self.path.parent], self.where).image
    return found.read_bytes() if isinstance(found, pathlib.Path) else found


class _Groups:
  """Decoded image columns, the latest used up to `KEPT_BYTES`, for all threads."""

  def __init__(self):
    self.kept: dict[tuple, pa.ChunkedArray] = {}
    self.lock = threading.Lock()

  def get(self, image: ParquetImage) -> Any:
    try:
      written = image.path.stat().st_mtime_ns  # another file may come to lie there
    except OSError as error:
      raise ValueError(f"{image.where}: {error.strerror}; put the file back") from error
    key = image.path, written, image.group, image.column
    with self.lock:  # held while reading: two threads that want one group read it once
      column = self.kept.pop(key, None)
      if column is None:
        column = self._read(image)
        while (
          self.kept and sum(kept.nbytes for kept in self.kept.values()) + column.nbytes > KEPT_BYTES
        ):
          self.kept.pop(next(iter(self.kept)))
      self.kept[key] = column
    return column[image.row].as_py()

  def _read(self, image: ParquetImage) -> pa.ChunkedArray:
    try:
      with open_parquet(image.path) as file:
        return _read_column(file, image.group, image.column)
    except (OSError, pa.ArrowException, IndexError, KeyError) as error:
      raise ValueError(f"{image.where}: cannot be read any more: {error}") from error


_groups = _Groups()


def open_parquet(path: pathlib.Path) -> pq.ParquetFile:
  try:
    return pq.ParquetFile(path)
  except (OSError, pa.ArrowException, UnicodeError) as error:
    why = cut(str(error).replace(f"'{path}'", "it"), 300)  # which is named already
    raise ValueError(
      f"{path}: cannot be read as parquet ({why}); check the path, or fetch the file again"
    ) from error


def is_image(kind: pa.DataType) -> bool:
  kind = kind.value_type if pa.types.is_dictionary(kind) else kind
  held = (
    [kind.field(i) for i in range(kind.num_fields) if kind.field(i).name in ("bytes", "path")]
    if pa.types.is_struct(kind)
    else [kind]
  )
  types = [part if isinstance(part, pa.DataType) else part.type for part in held]
  return bool(types) and all(_is_bytes(one) or _is_text(one) for one in types)


def is_list(kind: pa.DataType) -> bool:
  return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_bytes(kind: pa.DataType) -> bool:
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
  tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
  return any(is_kind(kind) for is_kind in tests)


def damaged(path: pathlib.Path, error: Exception) -> ValueError:
  return ValueError(f"{path}: its rows cannot be read ({str(error):.200}); fetch the file again")


def _read_column(file: pq.ParquetFile, group: int, column: str) -> pa.ChunkedArray:
  """A column of a row group, or the field `bytes` of one, named "image.bytes"."""
  whole = column in file.schema_arrow.names  # which may have a dot in its name
  name, field = (column, "") if whole else column.rsplit(".", 1)
  found = file.read_row_group(group, columns=[column])[name].combine_chunks()
  return found.field(field) if field else found


@dataclasses.dataclass(frozen=True)
class Picture:
  """An image, what it is called, and what is wrong with it."""

  source: ImageSource
  name: str
  problem: str = ""


def read_pictures(
  file: pq.ParquetFile, path: pathlib.Path, column: str, fetch: Fetch | None = None
) -> Iterator[Picture]:
  """The images of all rows, in order. Those with bytes are not read; addresses are `fetch`'s."""
  kind = file.schema_arrow.field(column).type
  fields = (
    {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    if pa.types.is_struct(kind)
    else {}
  )
  lazy = f"{column}.bytes" if _is_bytes(fields.get("bytes", pa.null())) else column
  said = f"{column}.path" if lazy != column and "path" in fields else lazy
  plain = kind.value_type if pa.types.is_dictionary(kind) else kind
  unread = _is_bytes(plain) or (is_list(kind) and not _is_text(kind.value_type))
  for group in range(file.metadata.num_row_groups):
    rows = file.metadata.row_group(group).num_rows
    if unread or said == f"{column}.bytes":
      yield from (Picture(ParquetImage(path, group, row, lazy), "") for row in range(rows))
      continue
    try:
      paths = file.read_row_group(group, columns=[said])[column].combine_chunks()
      empty = _without_bytes(file, group, lazy) if lazy != column else [True] * rows
    except (OSError, pa.ArrowException) as error:
      raise damaged(path, error) from error
    for row in range(rows):
      try:
        value = paths[row].as_py()
      except UnicodeDecodeError as error:
        value = ParquetImage(path, group, row, lazy)
        yield Picture(value, "", f"its path is no UTF-8 ({error.reason} at {error.start})")
        continue
      value = value["path"] if isinstance(value, dict) and lazy != column else value
      image = ParquetImage(path, group, row, lazy, value if isinstance(value, str) else "")
      if fetch is not None and empty[row] and is_address(value):
        yield Picture(fetch.image(value.strip(), image.where), value.strip())
      else:
        yield _of_path(image, value) if empty[row] else Picture(image, image.name)


def _of_path(image: ParquetImage, value: Any) -> Picture:
  """The file that a row names; an image that is spelled out in the column stays there."""
  try:
    found = find_image(value, [image.path.parent], "")
  except ValueError as error:
    return Picture(image, image.name, str(error))
  if isinstance(found.image, bytes):
    return Picture(dataclasses.replace(image, name=""), "")
  return Picture(found.image, found.name)


def _without_bytes(file: pq.ParquetFile, group: int, column: str) -> Sequence[bool]:
  """Of each row, whether there is nothing in `column`; read only where the file's statistics do not
  say.
  """
  held = file.metadata.row_group(group)
  chunks = (held.column(i) for i in range(held.num_columns))
  found = next(chunk.statistics for chunk in chunks if chunk.path_in_schema == column)
  if found is not None and found.has_null_count and found.null_count in (0, held.num_rows):
    return [found.null_count > 0] * held.num_rows
  return _read_column(file, group, column).is_null().to_pylist()
