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
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from caprl_jax.atomic_files import whole_file
from caprl_jax.data.option_letters import options_in_order
from caprl_jax.data.readers.caprl_json import choices_of, question_of
from caprl_jax.data.readers.image_folders import PassedOver, folder_files
from caprl_jax.data.readers.inputs.options import NOTHING_MORE, ListingOptions
from caprl_jax.data.readers.jsonl import image_suffix
from caprl_jax.data.readers.parquet_images import (
  damaged,
  is_image,
  is_list,
  open_parquet,
  read_pictures,
)
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
from caprl_jax.json_files import parse_json, shown

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
LAYOUT = f"CapRL-QA's layout has {SCHEMA.names}"
CAPTIONED = "and mode caption takes the column that caption.column names"
ROWS_PER_GROUP = 100  # a row group is read as a whole: small ones make single images cheap


Source = str | os.PathLike[str] | Sequence[pathlib.Path]


def parquet_files(source: Source) -> list[pathlib.Path]:
  """The files of a .parquet path, a pattern ("train-*.parquet"), a folder, sorted, or a list of
  files. Raises ValueError for none.
  """
  if not isinstance(source, (str, os.PathLike)):
    return list(source)
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    passed = PassedOver()
    found = [file for file in folder_files(path, passed) if file.suffix.lower() == ".parquet"]
    passed.say(str(path))
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
    with open_parquet(path) as file:
      column = image_column(file, path, ("reward_model",), LAYOUT)
      columns = [
        name for name in ("id", "reward_model", "extra_info") if name in file.schema_arrow.names
      ]
      for number, (row, image) in enumerate(
        zip(read_columns(file, path, columns), read_pictures(file, path, column), strict=True)
      ):
        where = f"{path}, row {number}"
        try:
          if image.problem:
            raise ValueError(f"{where}: {image.problem}")
          yield _parse_row(row, image.source, image.name, where)
        except ValueError as error:
          yield BadRow(where, str(error))


def has_questions(source: Source) -> bool:
  """Whether the first of these files has a column of questions; False where there is no file.
  Raises ValueError for one that is no parquet."""
  try:
    first = parquet_files(source)[0]
  except ValueError:
    return False
  with open_parquet(first) as file:
    return "reward_model" in file.schema_arrow.names


def scan_images(source: Source, options: ListingOptions = NOTHING_MORE) -> Iterator[CaptionRow]:
  """The images of any parquet with a column `image` (or `images`), or `options.column`, without
  captions.

  A row is named after the image's path in it, its id, or its file and number. Fields are columns.
  """
  for path in parquet_files(source):
    with open_parquet(path) as file:
      column = image_column(file, path, (), CAPTIONED, options.column)
      names = [name for name in file.schema_arrow.names if name != column]
      columns = [name for name in names if name == "id" or name in options.fields]
      rows = read_columns(file, path, columns) if columns else [{}] * file.metadata.num_rows
      pictures = read_pictures(file, path, column, options.fetch)
      for number, (row, image) in enumerate(zip(rows, pictures, strict=True)):
        yield CaptionRow(
          image.source,
          "",
          image.name or str(row.get("id") or "") or f"{path.name}/{number}",
          fields=options.kept(dict.fromkeys(names) | row),
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


def image_column(
  file: pq.ParquetFile,
  path: pathlib.Path,
  needed: Sequence[str],
  layout: str,
  asked: str | None = None,
) -> str:
  """The name of the image column: `asked`, or image or images. Raises ValueError where it, or one
  of `needed`, is missing.

  layout: in words, what the file should have.
  """
  names = file.schema_arrow.names
  twice = next((name for name in (asked, "image", "images") if names.count(name) > 1), None)
  if twice is not None:
    raise ValueError(f"{path}: two columns are called {shown(twice)}; rename one of them")
  if asked is not None and asked not in names:
    raise ValueError(
      f"{path}: no column {asked!r}, which caption.column names; it has {shown(names, 400)}"
    )
  column = asked or next((name for name in ("image", "images") if name in names), None)
  lacking = [] if column else ["image"]
  lacking += [name for name in needed if name not in names]
  if column is None or lacking:
    videos = " (videos are not supported)" if "videos" in names else ""
    raise ValueError(
      f"{path}: the columns {lacking} are missing{videos}; it has {shown(names, 400)}, {layout}"
    )
  kind = file.schema_arrow.field(column).type
  if not is_image(kind.value_type if is_list(kind) else kind):
    raise ValueError(
      f"{path}: the column {column!r} is {str(kind):.80}; it must be bytes, paths, or a struct of "
      "bytes and path"
    )
  return column


def read_columns(
  file: pq.ParquetFile, path: pathlib.Path, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
  """Some columns of all rows, in order. Raises ValueError for a damaged file."""
  try:
    for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
      yield from batch.to_pylist()
  except (OSError, pa.ArrowException) as error:
    raise damaged(path, error) from error


def _parse_row(row: dict[str, Any], image: ImageSource, named: str, where: str) -> QARow:
  extra = _extra_info(row, where)
  model = row["reward_model"]
  if isinstance(model, str):
    model = parse_json(model, f"{where}: reward_model")
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
  choices = options_in_order(choices)
  if not (stem and choices and answer not in (None, "")):
    raise ValueError(
      f"{where}: question, choices and answer must all be there, not {shown(item or None)}"
    )
  texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
  if not isinstance(stem, str) or not texts:
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
