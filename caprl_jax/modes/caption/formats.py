"""Finished rows, in order -> the output: JSON lines, parquet, text files beside images, a Hugging
Face dataset.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TextIO

from caprl_jax.atomic_files import write_text
from caprl_jax.data.readers.image_sources import mirrored
from caprl_jax.data.rows import CaptionRow, image_bytes
from caprl_jax.harness.row_shards import RowResult
from caprl_jax.json_files import shown

Results = Iterable[RowResult[CaptionRow]]
Format = Literal["jsonl", "parquet", "txt", "hf", "caprl_2m"]
SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
ROWS_PER_GROUP = 10_000
GROUP_BYTES = 32 << 20  # of images, in a row group: what a reader of one row has to decode
LONGEST_NAME = 255  # bytes of a file's name, on most file systems
FILE_BYTES = 500 << 20  # of a file of a Hugging Face dataset


@dataclasses.dataclass(frozen=True)
class Output:
  """Where captions go, and in which layout.

  kind: `jsonl`: every row; `parquet`: every row, columns image, caption, tokens, finish, error;
    `txt`: `path` is a folder with the images' own tree, a/b.png -> a/b.txt, beside the images where
    it is their own folder; `hf`: a folder that `datasets.load_dataset` reads; `caprl_2m`: JSON
    lines of image and caption alone, as `image_key` and `caption_key`. What failed has no row in
    the last three: it stands, with its reason, in `failed_path`.
  base: the folder that a `txt` tree mirrors from.
  """

  path: pathlib.Path
  kind: Format
  base: pathlib.Path
  embed_images: bool = True
  image_key: str = "image"
  caption_key: str = "caption"
  about: str = ""  # for the dataset card: which model, asked what

  def beside(self, suffix: str) -> pathlib.Path:
    """A file next to the output: captions.jsonl -> captions.stats.json; a folder keeps its whole
    name.
    """
    stem = self.path.name if self.kind in ("txt", "hf") else self.path.stem
    return self.path.with_name(stem + suffix)

  @property
  def failed_path(self) -> pathlib.Path:
    return self.beside(".failed.jsonl")

  def check(self, inputs: Sequence[CaptionRow]) -> None:
    """Before anything is captioned: raises ValueError where the output would overwrite, or could
    not be written.
    """
    if len(os.fsencode(self.path.name)) > LONGEST_NAME - 50:  # names beside it are longer
      raise ValueError(
        f"caption.output = {shown(str(self.path))}: its name is too long for a file beside it; "
        f"name it in {LONGEST_NAME - 50} bytes at most"
      )
    if self.kind == "txt":
      _check_texts(self, inputs)
    elif self.path.exists():
      raise ValueError(
        f"{self.path} is there already, and not from this job; delete it or name "
        "another caption.output"
      )

  def write(self, found: Results) -> None:
    """Writes results in the order in which they come, reading them once. A file or a `hf` folder
    appears whole or not at all.
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
      ".parquet, or set caption.format to txt, hf (folders) or caprl_2m"
    )
  return SUFFIXES[path.suffix.lower()]


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary path that takes the place of `path` once all has been written."""
  path.parent.mkdir(parents=True, exist_ok=True)
  # of a known name: what a kill leaves is written over
  temporary = path.with_name(f".{path.name}.tmp")
  yield temporary
  with open(temporary, "rb") as file:
    os.fsync(file.fileno())  # the shards are removed next
  os.replace(temporary, path)


def _line(value: dict[str, Any]) -> str:
  return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def _clean(row: dict[str, Any]) -> dict[str, Any]:
  """Without what Arrow has no form for: the lone surrogates of file names that are no UTF-8."""
  clean = lambda value: (
    value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
  )
  return {key: clean(value) for key, value in row.items()}


@contextlib.contextmanager
def _failures(output: Output) -> Iterator[Callable[[dict[str, Any]], None]]:
  """Takes failed rows to `failed_path`, which is there only if there are any."""
  output.failed_path.unlink(missing_ok=True)
  file: TextIO | None = None
  temporary = output.failed_path.with_name(f".{output.failed_path.name}.tmp")

  def put(row: dict[str, Any]) -> None:
    nonlocal file
    file = file or open(temporary, "w", encoding="utf-8")  # noqa: SIM115  closed below
    file.write(_line(row))

  yield put
  if file:
    file.close()
    os.replace(temporary, output.failed_path)


def _captioned(output: Output, found: Results) -> Iterator[RowResult[CaptionRow]]:
  """The rows with a caption; the others go to `failed_path`."""
  with _failures(output) as failed:
    for item in found:
      if "error" in item.row:
        failed(item.row)
      else:
        yield item


def _write_jsonl(output: Output, found: Results) -> None:
  with _whole(output.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
    file.writelines(_line(item.row) for item in found)


def _write_caprl_2m(output: Output, found: Results) -> None:
  with _whole(output.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
    file.writelines(
      _line({output.image_key: item.row["image"], output.caption_key: item.row["caption"]})
      for item in _captioned(output, found)
    )


def _write_parquet(output: Output, found: Results) -> None:
  import pyarrow as pa  # only here and below: JSON lines need none of it
  import pyarrow.parquet as pq

  schema = pa.schema(
    [
      ("image", pa.string()),
      ("caption", pa.string()),
      ("tokens", pa.list_(pa.int32())),
      ("finish", pa.string()),
      ("error", pa.string()),
    ]
  )
  with _whole(output.path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
    group: list[dict[str, Any]] = []

    def flush() -> None:
      writer.write_table(pa.Table.from_pylist(group, schema))  # an absent key is a null
      group.clear()

    for item in found:
      group.append(_clean(item.row))
      if len(group) == ROWS_PER_GROUP:
        flush()
    flush()


def _check_texts(output: Output, inputs: Sequence[CaptionRow]) -> None:
  """Every text has a place of its own, where nothing is yet."""
  first: dict[pathlib.Path, str] = {}
  for row in inputs:
    path = _text_path(output, row)
    if path in first:
      raise ValueError(
        f"{first[path]!r} and {row.name!r} would both be captioned in {path}; "
        "rename one, or caption into .jsonl or .parquet"
      )
    if len(os.fsencode(path.name)) > LONGEST_NAME:
      raise ValueError(
        f"{shown(row.name)} would be captioned in a file whose name has more than {LONGEST_NAME} "
        "bytes; rename it, or caption into .jsonl or .parquet"
      )
    first[path] = row.name
  there: list[pathlib.Path] = []
  for folder in sorted({path.parent for path in first}):
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if not above.is_dir():
      raise ValueError(
        f"{folder} cannot be made for texts: {above} is a file; name another caption.output"
      )
    if above == folder:
      there += [folder / name for name in os.listdir(folder) if folder / name in first]
  if there:
    raise ValueError(
      f"{len(there)} of the texts to write are there already, such as {min(there)}; "
      "move them or name another caption.output"
    )


def _text_path(output: Output, row: CaptionRow) -> pathlib.Path:
  return (output.path / mirrored(row, output.base)).with_suffix(".txt")


def _write_texts(output: Output, found: Results) -> None:
  output.path.mkdir(parents=True, exist_ok=True)
  for item in _captioned(output, found):
    caption = item.row["caption"].encode("utf-8", "replace").decode()
    write_text(_text_path(output, item.source), caption + "\n")


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


def _hf_schema(embed_images: bool) -> Any:
  """Columns, and the features that `datasets` reads from a single file, pictures among them."""
  import pyarrow as pa

  picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  schema = pa.schema(
    [
      ("image", picture if embed_images else pa.string()),
      *([("name", pa.string())] if embed_images else []),
      ("caption", pa.string()),
      ("tokens", pa.list_(pa.int32())),
      ("finish", pa.string()),
    ]
  )
  text = {"dtype": "string", "_type": "Value"}
  ids = {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "Sequence"}
  features = {name: ids if name == "tokens" else text for name in schema.names}
  if embed_images:
    features["image"] = {"_type": "Image"}
  return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _write_hf(output: Output, found: Results) -> None:
  schema = _hf_schema(output.embed_images)
  temporary = output.path.with_name(f".{output.path.name}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  (temporary / "data").mkdir(parents=True)
  files = _HfFiles(temporary / "data", schema)
  for item in _captioned(output, found):
    row = _clean(item.row)
    entry = {key: row[key] for key in ("image", "caption", "tokens", "finish")}
    size = len(row["caption"].encode()) + 4 * len(row["tokens"]) + len(row["image"])
    if output.embed_images:
      data, name = image_bytes(item.source), pathlib.PurePath(row["image"]).name
      entry |= {"image": {"bytes": data, "path": name}, "name": row["image"]}
      size += len(data)
    files.put(entry, size)
  files.close()
  write_text(temporary / "README.md", _card(output, list(schema.names), files.rows, files.bytes))
  shutil.rmtree(output.path, ignore_errors=True)  # `check` has seen that it is ours
  os.rename(temporary, output.path)


def _card(output: Output, names: list[str], rows: int, size: int) -> str:
  features = []
  for name in names:
    kind = "dtype: image" if name == "image" and output.embed_images else "dtype: string"
    kind = "list: int32" if name == "tokens" else kind
    features.append(f"  - name: {name}\n    {kind}\n")
  return (
    f"---\ntask_categories:\n- image-to-text\ndataset_info:\n  features:\n{''.join(features)}"
    f"  splits:\n  - name: train\n    num_bytes: {size}\n    num_examples: {rows}\n  "
    f"dataset_size: {size}\nconfigs:\n- config_name: default\n  data_files:\n  - split: "
    f"train\n    path: data/train-*\n---\n\n# {output.path.name}\n\n{rows:,} images "
    f"captioned by caprl_jax{output.about}.\n\n`tokens` are the ids that were sampled, the "
    "end token included; `finish` is `end`, or `length` for a caption that was cut.\n"
  )


_WRITERS = {
  "jsonl": _write_jsonl,
  "parquet": _write_parquet,
  "txt": _write_texts,
  "hf": _write_hf,
  "caprl_2m": _write_caprl_2m,
}
