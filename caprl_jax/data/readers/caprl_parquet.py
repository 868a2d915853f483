"""Parquet files in the layout of the released CapRL-QA-75K <-> rows.

Columns of the release: id; image {bytes, path}; prompt [{role, content}]; data_source; reward_model
{ground_truth: [{question, choices ["A) red", ...], answer "A"}]}. What the release has no place for
(row names, kinds, provenance, facts) goes into one column more, `extra_info`, as JSON; other
readers leave it aside.
"""

import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from caprl_jax.data.readers.caprl_json import choices_of, question_of
from caprl_jax.data.readers.jsonl import image_suffix
from caprl_jax.data.rows import BadRow, CaptionRow, QARow, check_rows, image_bytes

INSTRUCTION = "Please describe this image in detail."  # what the release asks the captioner
SCHEMA = pa.schema(
  [
    ("id", pa.string()),
    ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ("data_source", pa.string()),
    (
      "reward_model",
      pa.struct(
        [
          (
            "ground_truth",
            pa.list_(
              pa.struct(
                [
                  ("question", pa.string()),
                  ("choices", pa.list_(pa.string())),
                  ("answer", pa.string()),
                ]
              )
            ),
          )
        ]
      ),
    ),
    ("extra_info", pa.string()),
  ]
)
ROWS_PER_GROUP = 100  # a row group is read as a whole: small ones make single images cheap
KEPT_BYTES = 1 << 30  # of decoded row groups


def parquet_files(source: str | os.PathLike[str]) -> list[pathlib.Path]:
  """The files of a .parquet path, a pattern ("train-*.parquet") or a folder, sorted. Raises
  ValueError for none.
  """
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    found = sorted(path.rglob("*.parquet"))
  else:
    found = [path] if path.is_file() else sorted(map(pathlib.Path, glob.glob(str(path))))
  if not found:
    raise ValueError(
      f"{source}: no parquet file there; name a .parquet file, a pattern such as "
      "'train-*.parquet', or a folder of them"
    )
  return found


def scan_parquet(source: str | os.PathLike[str]) -> Iterator[QARow | BadRow]:
  """Questions and where their images lie; the images themselves are read when they are needed.

  Raises ValueError for files that are no parquet or of another layout; a row that cannot be used is
  a BadRow.
  """
  for path in parquet_files(source):
    with _open(path) as file:
      _check_layout(file, path, ("image", "reward_model"))
      columns = [
        name for name in ("id", "reward_model", "extra_info") if name in file.schema_arrow.names
      ]
      places = _places(file)
      for number, (row, image) in enumerate(
        zip(_rows(file, columns), _pictures(file, path, places), strict=True)
      ):
        where = f"{path}, row {number}"
        try:
          yield _parse_row(row, image, where)
        except ValueError as error:
          yield BadRow(where, str(error))


def scan_images(source: str | os.PathLike[str]) -> Iterator[CaptionRow]:
  """The images of any parquet with a column `image` of {bytes, path} or of bytes, without captions.

  A row is named after the image's path in it, its id, or its file and number.
  """
  for path in parquet_files(source):
    with _open(path) as file:
      _check_layout(file, path, ("image",))
      columns = [name for name in ("id",) if name in file.schema_arrow.names]
      rows = _rows(file, columns) if columns else [{}] * file.metadata.num_rows
      for number, (row, image) in enumerate(
        zip(rows, _pictures(file, path, _places(file)), strict=True)
      ):
        yield CaptionRow(
          image, "", image.name or str(row.get("id") or "") or f"{path.name}/{number}"
        )


def write_parquet(path: str | os.PathLike[str], rows: Sequence[QARow]) -> None:
  """Writes what `scan_parquet` reads. The file appears whole or not at all; images are read one
  group at a time.

  Raises ValueError for rows that `check_rows` refuses or images that cannot be read.
  """
  path = pathlib.Path(path)
  check_rows(rows, str(path))
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    with pq.ParquetWriter(partial, SCHEMA) as writer:
      for start in range(0, len(rows), ROWS_PER_GROUP):
        writer.write_table(
          pa.Table.from_pylist(
            [_format_row(row) for row in rows[start : start + ROWS_PER_GROUP]], SCHEMA
          )
        )
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class ParquetImage:
  """An image in a row group of a parquet file. Reading one decodes its group, which is kept for its
  neighbours: read in order it is cheap, at random from large groups it is not (mode `dataset`
  converts)."""

  path: pathlib.Path
  group: int
  row: int  # within the group
  column: str  # "image.bytes", or "image" where the column is plain bytes
  name: str = ""

  @property
  def where(self) -> str:
    return f"{self.path}, row group {self.group}, row {self.row} in it"

  def read(self) -> bytes:
    return _groups.get(self)


class _Groups:
  """Decoded image columns, the latest used up to `KEPT_BYTES`, for all threads."""

  def __init__(self):
    self.kept: dict[tuple[pathlib.Path, int], pa.ChunkedArray] = {}
    self.lock = threading.Lock()

  def get(self, image: ParquetImage) -> bytes:
    key = image.path, image.group
    with self.lock:  # held while reading: two threads that want one group read it once
      column = self.kept.pop(key, None)
      if column is None:
        column = self._read(image)
        while (
          self.kept and sum(kept.nbytes for kept in self.kept.values()) + column.nbytes > KEPT_BYTES
        ):
          self.kept.pop(next(iter(self.kept)))
      self.kept[key] = column
    value = column[image.row].as_py()
    if value is None:
      raise ValueError(f"{image.where}: no image bytes; drop the row")
    return value

  def _read(self, image: ParquetImage) -> pa.ChunkedArray:
    try:
      with _open(image.path) as file:
        column = file.read_row_group(image.group, columns=[image.column])["image"].combine_chunks()
    except (OSError, pa.ArrowException, IndexError, KeyError) as error:
      raise ValueError(f"{image.where}: cannot be read any more: {error}") from error
    return column.field("bytes") if pa.types.is_struct(column.type) else column


_groups = _Groups()


def _open(path: pathlib.Path) -> pq.ParquetFile:
  try:
    return pq.ParquetFile(path)
  except (OSError, pa.ArrowException) as error:
    raise ValueError(
      f"{path}: cannot be read as parquet ({error}); check the path, or fetch the file again"
    ) from error


def _check_layout(file: pq.ParquetFile, path: pathlib.Path, needed: Sequence[str]) -> None:
  names = file.schema_arrow.names
  lacking = [name for name in needed if name not in names]
  if lacking:
    videos = " (videos are not supported)" if "videos" in names else ""
    raise ValueError(
      f"{path}: the columns {lacking} are missing{videos}; it has {names}, "
      f"CapRL-QA's layout has {SCHEMA.names}"
    )
  kind = file.schema_arrow.field("image").type
  plain = kind.value_type if pa.types.is_dictionary(kind) else kind
  if not (pa.types.is_struct(plain) and plain.get_field_index("bytes") >= 0) and not _is_bytes(
    plain
  ):
    raise ValueError(
      f"{path}: the column 'image' is {plain}; it must be bytes, or a struct of bytes and path"
    )


def _is_bytes(kind: pa.DataType) -> bool:
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _places(file: pq.ParquetFile) -> list[tuple[int, int]]:
  """Row group and row in it, of every row."""
  groups = range(file.metadata.num_row_groups)
  return [
    (group, row) for group in groups for row in range(file.metadata.row_group(group).num_rows)
  ]


def _rows(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
  for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
    yield from batch.to_pylist()


def _pictures(file: pq.ParquetFile, path: pathlib.Path, places) -> Iterator[ParquetImage]:
  kind = file.schema_arrow.field("image").type
  if not pa.types.is_struct(kind):
    yield from (ParquetImage(path, *place, "image") for place in places)
    return
  names = [None] * len(places)
  if kind.get_field_index("path") >= 0:
    names = [row["image"]["path"] if row["image"] else None for row in _rows(file, ["image.path"])]
  for place, name in zip(places, names, strict=True):
    yield ParquetImage(path, *place, "image.bytes", name or "")


def _parse_row(row: dict[str, Any], image: ParquetImage, where: str) -> QARow:
  extra = _extra_info(row, where)
  asked = (row["reward_model"] or {}).get("ground_truth")
  if not isinstance(asked, list) or not asked:
    raise ValueError(
      f"{where}: reward_model.ground_truth holds no questions; add some or drop the row"
    )
  kinds, provenances = (extra.get(key) or [""] * len(asked) for key in ("kinds", "provenances"))
  if not len(kinds) == len(provenances) == len(asked):
    raise ValueError(
      f"{where}: extra_info has {len(kinds)} kinds and {len(provenances)} "
      f"provenances for {len(asked)} questions"
    )
  questions = []
  for i, (item, kind, provenance) in enumerate(zip(asked, kinds, provenances, strict=True)):
    at = f"{where}, question {i}"
    if not item["question"] or not item["choices"] or not item["answer"]:
      raise ValueError(f"{at}: question, choices and answer must all be there, not {item!r:.200}")
    question = question_of(item["question"], item["choices"], item["answer"], kind, at)
    questions.append(dataclasses.replace(question, provenance=provenance))
  name = extra.get("name") or row.get("id") or image.name or where
  return QARow(image, tuple(questions), str(name), extra.get("facts"), where)


def _extra_info(row: dict[str, Any], where: str) -> dict[str, Any]:
  extra = row.get("extra_info")
  if not isinstance(extra, str):
    return {}  # another writer's, such as verl's struct
  try:
    extra = json.loads(extra)
  except ValueError as error:
    raise ValueError(f"{where}: extra_info is not JSON ({error})") from error
  return extra if isinstance(extra, dict) else {}


def _format_row(row: QARow) -> dict[str, Any]:
  data = image_bytes(row)
  image_suffix(data, f"row {row.name!r}")  # refuses what is no image
  extra = {
    "name": row.name,
    "kinds": [q.kind for q in row.questions],
    "provenances": [q.provenance for q in row.questions],
  }
  return {
    "id": hashlib.md5(data).hexdigest(),
    "image": {"bytes": data, "path": None},
    "prompt": [{"role": "user", "content": f"<image> {INSTRUCTION}"}],
    "data_source": "image_caption_rl",
    "reward_model": {
      "ground_truth": [
        {
          "question": q.stem,
          "choices": choices_of(q),
          "answer": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[q.gold],
        }
        for q in row.questions
      ]
    },
    "extra_info": json.dumps(
      extra if row.facts is None else extra | {"facts": row.facts}, ensure_ascii=False
    ),
  }
