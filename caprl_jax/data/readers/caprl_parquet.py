"""Parquet files in the layout of the released CapRL-QA-75K <-> rows.

Columns of the release: id; image {bytes, path}; prompt [{role, content}]; data_source; reward_model
{ground_truth: [{question, choices ["A) red", ...], answer "A"}]}. What the release has no place for
(row names, kinds, provenance, facts) goes into one column more, `extra_info`, as JSON; other
readers leave it aside.

An image may also stand in a column of bytes, of paths (or what else `image_spellings` reads), or in
lists of one; the column may be called `images`. A path without bytes is a file's, relative to the
parquet's folder.
"""

import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import string
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from caprl_jax.atomic_files import whole_file
from caprl_jax.data.readers.caprl_json import choices_of, question_of
from caprl_jax.data.readers.image_spellings import find_image
from caprl_jax.data.readers.jsonl import image_suffix
from caprl_jax.data.rows import (
  BadRow,
  CaptionRow,
  ImageSource,
  QARow,
  Question,
  check_question,
  check_rows,
  image_bytes,
)
from caprl_jax.json_files import cut, parse_json, shown

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


Source = str | os.PathLike[str] | Sequence[pathlib.Path]


def parquet_files(source: Source) -> list[pathlib.Path]:
  """The files of a .parquet path, a pattern ("train-*.parquet"), a folder, sorted, or a list of
  files. Raises ValueError for none.
  """
  if not isinstance(source, (str, os.PathLike)):
    return list(source)
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


def scan_parquet(source: Source) -> Iterator[QARow | BadRow]:
  """Questions and where their images lie; the images themselves are read when they are needed.

  Raises ValueError for files that are no parquet or of another layout; a row that cannot be used is
  a BadRow.
  """
  for path in parquet_files(source):
    with _open(path) as file:
      column = _check_layout(file, path, ("reward_model",))
      columns = [
        name for name in ("id", "reward_model", "extra_info") if name in file.schema_arrow.names
      ]
      for number, (row, image) in enumerate(
        zip(_rows(file, path, columns), _pictures(file, path, column), strict=True)
      ):
        where = f"{path}, row {number}"
        try:
          if image.problem:
            raise ValueError(f"{where}: {image.problem}")
          yield _parse_row(row, image.source, image.name, where)
        except ValueError as error:
          yield BadRow(where, str(error))


def scan_images(source: Source) -> Iterator[CaptionRow]:
  """The images of any parquet with a column `image` (or `images`), without captions.

  A row is named after the image's path in it, its id, or its file and number.
  """
  for path in parquet_files(source):
    with _open(path) as file:
      column = _check_layout(file, path, ())
      columns = [name for name in ("id",) if name in file.schema_arrow.names]
      rows = _rows(file, path, columns) if columns else [{}] * file.metadata.num_rows
      for number, (row, image) in enumerate(zip(rows, _pictures(file, path, column), strict=True)):
        yield CaptionRow(
          image.source, "", image.name or str(row.get("id") or "") or f"{path.name}/{number}"
        )


def write_parquet(path: str | os.PathLike[str], rows: Sequence[QARow]) -> None:
  """Writes what `scan_parquet` reads. The file appears whole or not at all; images are read one
  group at a time.

  Raises ValueError for rows that `check_rows` refuses or images that cannot be read.
  """
  path = pathlib.Path(path)
  check_rows(rows, str(path))
  with whole_file(path) as partial, pq.ParquetWriter(partial, SCHEMA) as writer:
    for start in range(0, len(rows), ROWS_PER_GROUP):
      group = [_format_row(row) for row in rows[start : start + ROWS_PER_GROUP]]
      writer.write_table(pa.Table.from_pylist(group, SCHEMA))


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
    if isinstance(value, bytes):
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
      with _open(image.path) as file:
        return _read_column(file, image.group, image.column)
    except (OSError, pa.ArrowException, IndexError, KeyError) as error:
      raise ValueError(f"{image.where}: cannot be read any more: {error}") from error


_groups = _Groups()


def _open(path: pathlib.Path) -> pq.ParquetFile:
  try:
    return pq.ParquetFile(path)
  except (OSError, pa.ArrowException, UnicodeError) as error:
    why = cut(str(error).replace(f"'{path}'", "it"), 300)  # which is named already
    raise ValueError(
      f"{path}: cannot be read as parquet ({why}); check the path, or fetch the file again"
    ) from error


def _check_layout(file: pq.ParquetFile, path: pathlib.Path, needed: Sequence[str]) -> str:
  """The name of the image column. Raises ValueError for another layout."""
  names = file.schema_arrow.names
  column = next((name for name in ("image", "images") if name in names), None)
  lacking = [] if column else ["image"]
  lacking += [name for name in needed if name not in names]
  if column is None or lacking:
    videos = " (videos are not supported)" if "videos" in names else ""
    raise ValueError(
      f"{path}: the columns {lacking} are missing{videos}; it has {shown(names)}, "
      f"CapRL-QA's layout has {SCHEMA.names}"
    )
  kind = file.schema_arrow.field(column).type
  if not _is_image(kind.value_type if _is_list(kind) else kind):
    raise ValueError(
      f"{path}: the column {column!r} is {str(kind):.80}; it must be bytes, paths, or a struct of "
      "bytes and path"
    )
  return column


def _is_image(kind: pa.DataType) -> bool:
  kind = kind.value_type if pa.types.is_dictionary(kind) else kind
  held = (
    [kind.field(i) for i in range(kind.num_fields) if kind.field(i).name in ("bytes", "path")]
    if pa.types.is_struct(kind)
    else [kind]
  )
  types = [part if isinstance(part, pa.DataType) else part.type for part in held]
  return bool(types) and all(_is_bytes(one) or _is_text(one) for one in types)


def _is_list(kind: pa.DataType) -> bool:
  return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_bytes(kind: pa.DataType) -> bool:
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
  return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _rows(
  file: pq.ParquetFile, path: pathlib.Path, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
  try:
    for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
      yield from batch.to_pylist()
  except (OSError, pa.ArrowException) as error:
    raise _damaged(path, error) from error


def _damaged(path: pathlib.Path, error: Exception) -> ValueError:
  return ValueError(f"{path}: its rows cannot be read ({str(error):.200}); fetch the file again")


def _read_column(file: pq.ParquetFile, group: int, column: str) -> pa.ChunkedArray:
  """A column of a row group, or the field `bytes` of one, named "image.bytes"."""
  name, _, field = column.partition(".")
  found = file.read_row_group(group, columns=[column])[name].combine_chunks()
  return found.field(field) if field else found


@dataclasses.dataclass(frozen=True)
class _Picture:
  """An image, what it is called, and what is wrong with it."""

  source: ImageSource
  name: str
  problem: str = ""


def _pictures(file: pq.ParquetFile, path: pathlib.Path, column: str) -> Iterator[_Picture]:
  """The images of all rows, in order. Those with bytes are not read."""
  kind = file.schema_arrow.field(column).type
  fields = (
    {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    if pa.types.is_struct(kind)
    else {}
  )
  lazy = f"{column}.bytes" if _is_bytes(fields.get("bytes", pa.null())) else column
  said = f"{column}.path" if lazy != column and "path" in fields else lazy
  plain = kind.value_type if pa.types.is_dictionary(kind) else kind
  unread = _is_bytes(plain) or (_is_list(kind) and not _is_text(kind.value_type))
  for group in range(file.metadata.num_row_groups):
    rows = file.metadata.row_group(group).num_rows
    if unread or said == f"{column}.bytes":
      yield from (_Picture(ParquetImage(path, group, row, lazy), "") for row in range(rows))
      continue
    try:
      paths = file.read_row_group(group, columns=[said])[column].combine_chunks()
      empty = _without_bytes(file, group, lazy) if lazy != column else [True] * rows
    except (OSError, pa.ArrowException) as error:
      raise _damaged(path, error) from error
    for row in range(rows):
      value = paths[row].as_py()
      value = value["path"] if isinstance(value, dict) and lazy != column else value
      image = ParquetImage(path, group, row, lazy, value if isinstance(value, str) else "")
      yield _of_path(image, value) if empty[row] else _Picture(image, image.name)


def _of_path(image: ParquetImage, value: Any) -> _Picture:
  """The file that a row names; an image that is spelled out in the column stays there."""
  try:
    found = find_image(value, [image.path.parent], "")
  except ValueError as error:
    return _Picture(image, image.name, str(error))
  if isinstance(found.image, bytes):
    return _Picture(dataclasses.replace(image, name=""), "")
  return _Picture(found.image, found.name)


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


def _parse_row(row: dict[str, Any], image: ImageSource, named: str, where: str) -> QARow:
  extra = _extra_info(row, where)
  model = row["reward_model"]
  asked = model.get("ground_truth") if isinstance(model, dict) else None
  if isinstance(asked, str):
    asked = parse_json(asked, f"{where}: reward_model.ground_truth")
  if not isinstance(asked, list) or not asked:
    raise ValueError(
      f"{where}: reward_model.ground_truth holds no questions; add some or drop the row"
    )
  kinds, provenances = (extra.get(key) or [""] * len(asked) for key in ("kinds", "provenances"))
  for held, name in ((kinds, "kinds"), (provenances, "provenances")):
    if not isinstance(held, list) or not all(isinstance(one, str) for one in held):
      raise ValueError(f"{where}: {name} of extra_info is {shown(held)}, not a list of texts")
  if not len(kinds) == len(provenances) == len(asked):
    raise ValueError(
      f"{where}: extra_info has {len(kinds)} kinds and {len(provenances)} "
      f"provenances for {len(asked)} questions"
    )
  questions = []
  for i, (item, kind, provenance) in enumerate(zip(asked, kinds, provenances, strict=True)):
    question = _parse_question(item, kind, "kinds" in extra, f"{where}, question {i}")
    questions.append(dataclasses.replace(question, provenance=provenance))
  name = extra.get("name")
  name = name if isinstance(name, str) else row.get("id") or named or where
  facts = extra.get("facts")
  return QARow(image, tuple(questions), str(name), facts if _are_texts(facts) else None, where)


def _are_texts(facts: Any) -> bool:
  return isinstance(facts, dict) and all(isinstance(fact, str) for fact in facts.values())


def _parse_question(item: Any, kind: str, ours: bool, where: str) -> Question:
  """ours: the file is `write_parquet`'s, whose texts are kept to the byte."""
  item = item if isinstance(item, dict) else {}
  stem, choices, answer = (item.get(key) for key in ("question", "choices", "answer"))
  if not (stem and choices and answer not in (None, "")):
    raise ValueError(
      f"{where}: question, choices and answer must all be there, not {shown(item or None)}"
    )
  if not isinstance(stem, str) or not all(isinstance(choice, str) for choice in choices):
    raise ValueError(f"{where}: question and choices must be texts, not {shown(item)}")
  marks = [f"{letter}) " for letter in string.ascii_uppercase[: len(choices)]]
  options = tuple(choice[3:] for choice in choices)
  letter = isinstance(answer, str) and answer in string.ascii_uppercase
  if ours and letter and [choice[:3] for choice in choices] == marks:
    question = Question(stem, options, string.ascii_uppercase.index(answer), kind)
    check_question(question, where)
    return question
  return question_of(stem, choices, answer, kind, where)


def _extra_info(row: dict[str, Any], where: str) -> dict[str, Any]:
  extra = row.get("extra_info")
  if not isinstance(extra, str):
    return {}  # another writer's, such as verl's struct
  extra = parse_json(extra, f"{where}: extra_info")
  return extra if isinstance(extra, dict) else {}


def _format_row(row: QARow) -> dict[str, Any]:
  data = image_bytes(row)
  image_suffix(data, f"row {shown(row.name)}")  # refuses what is no image
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
          "answer": string.ascii_uppercase[q.gold],
        }
        for q in row.questions
      ]
    },
    "extra_info": json.dumps(
      extra if row.facts is None else extra | {"facts": row.facts}, ensure_ascii=False
    ),
  }
