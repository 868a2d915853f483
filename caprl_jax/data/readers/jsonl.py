"""JSON lines <-> rows."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from caprl_jax.atomic_files import whole_file, write_bytes
from caprl_jax.config import schema as configuration
from caprl_jax.data.json_rows import read_rows
from caprl_jax.data.option_letters import gold_index, options_in_order, without_letters
from caprl_jax.data.readers.image_spellings import find_image, spelled_image
from caprl_jax.data.rows import (
  BadRow,
  CaptionRow,
  ImageSource,
  QARow,
  Question,
  Row,
  check_question,
  check_rows,
  check_unicode,
  good_rows,
  image_bytes,
  image_place,
)
from caprl_jax.image_files import open_image
from caprl_jax.json_files import shown

PathLike = str | os.PathLike[str]


def read_jsonl(path: PathLike, image_root: PathLike | None = None) -> list[QARow]:
  """Reads questions, one image a line.

  A line is {"image": path, "questions": [{"stem", "options", "gold", "kind"?, "provenance"?}],
  "name"?, "facts"?}. Other layouts of the file: `json_rows.read_items`.
  Image paths are relative to `image_root`, by default the file's folder; `row_images.find_image`
  says how else an image may be written. A row without a name is named after the path. `gold` is the
  right option's index, letter or text (`option_letters.gold_index`); letters that the options carry
  are taken off (`option_letters.without_letters`).

  Raises:
    ValueError: an unreadable or empty file; or, with the file and line, an unknown, missing or
      ill-typed key, a gold that fits no option or two, a question that `check_question` refuses,
      or an image that is not there.
  """
  return good_rows(scan_jsonl(path, image_root))


def scan_jsonl(path: PathLike, image_root: PathLike | None = None) -> Iterator[QARow | BadRow]:
  """As `read_jsonl`, with a BadRow for each line it would refuse."""
  return _scan_rows(path, image_root, parse_row)


def write_jsonl(
  path: PathLike,
  rows: Sequence[QARow],
  image_root: PathLike | None = None,
  image_folder: PathLike | None = None,
) -> None:
  """Writes what `read_jsonl` reads. The file appears whole or not at all.

  Images that are no files of their own are saved in `image_folder`, named by their content.

  Raises ValueError for rows that `check_rows` refuses, and for such images without a folder.
  """
  check_rows(rows, str(path))
  _write_rows(path, rows, image_root, image_folder, _format_qa_row)


def read_caption_jsonl(path: PathLike, image_root: PathLike | None = None) -> list[CaptionRow]:
  """Reads captions, one image a line: {"image": path, "caption": text, "name"?}, and what mode
  `caption` writes.

  Paths, names and errors are those of `read_jsonl`; a caption that is empty, missing or cut is an
  error too.
  """
  return good_rows(scan_caption_jsonl(path, image_root))


def scan_caption_jsonl(
  path: PathLike, image_root: PathLike | None = None
) -> Iterator[CaptionRow | BadRow]:
  """As `read_caption_jsonl`, with a BadRow for each line it would refuse."""
  return _scan_rows(path, image_root, _parse_caption_row)


def write_caption_jsonl(
  path: PathLike, rows: Sequence[CaptionRow], image_root: PathLike | None = None
) -> None:
  """Writes what `read_caption_jsonl` reads. The file appears whole or not at all.

  Raises ValueError for no rows, an empty caption and images in memory.
  """
  if not rows:
    raise ValueError(f"{path}: no rows to write")
  for row in rows:
    where = f"{path}: row {shown(row.name)}"
    _check_caption(row.caption, where)
    check_unicode(row.caption, where)
    check_unicode(row.name, where)
  _write_rows(path, rows, image_root, None, lambda row: {"caption": row.caption})


# What a line may hold, by JSON type.
_QA_KEYS = {"image": object, "questions": list, "name": str, "facts": dict}
_QUESTION_KEYS = {"stem": str, "options": list, "gold": object, "kind": str, "provenance": str}
# of mode `caption`, too
_CAPTION_KEYS = {"image": object, "caption": str, "name": str, "tokens": list, "finish": str}
_CAPTION_KEYS |= {"error": str}  # null, in what pandas makes of our parquet
_TYPE_NAMES = {str: "a string", list: "a list", dict: "an object"}


def parse_row(item: Any, image_root: pathlib.Path, where: str, asked: bool = True) -> QARow:
  """A line of `read_jsonl`; unless questions are `asked`, it need not have any. Raises ValueError,
  starting with `where`."""
  _check_object(item, _QA_KEYS, ("image", "questions") if asked else ("image",), where)
  facts = item.get("facts")
  for key, value in (facts or {}).items():
    _check_type(value, str, f"{where}: facts.{key:.40}")
  given = item.get("questions")
  questions = parse_questions(given, f"{where}: questions") if asked or given else ()
  image, name = _image(item, image_root, where)
  return QARow(image, questions, name, facts, where)


def parse_question(item: Any, where: str) -> Question:
  """One of `plain_questions`, or as people write them. Raises ValueError, starting with `where`."""
  if isinstance(item, dict) and isinstance(item.get("options"), dict):
    item = item | {"options": options_in_order(item["options"])}
  _check_object(item, _QUESTION_KEYS, ("stem", "options", "gold"), where)
  for i, option in enumerate(item["options"]):
    _check_type(option, str, f"{where}: options[{i}]")
  options = without_letters(item["options"], where)
  gold = gold_index(item["gold"], options, where)
  kind, provenance = item.get("kind") or "", item.get("provenance") or ""
  question = Question(item["stem"], options, gold, kind, provenance)
  check_question(question, where)
  return question


def _parse_caption_row(item: Any, image_root: pathlib.Path, where: str) -> CaptionRow:
  if isinstance(item, dict) and item.get("error") is not None:
    raise ValueError(
      f"{where}: an error stands in the caption's place ({str(item['error']):.80}); caption "
      "it anew or drop it"
    )
  _check_object(item, _CAPTION_KEYS, ("image", "caption"), where)
  if item.get("finish") == "length":  # who learns from it would learn to stop there
    raise ValueError(
      f"{where}: the caption was cut at max_tokens; caption it with more or drop the row"
    )
  _check_caption(item["caption"], where)
  image, name = _image(item, image_root, where)
  return CaptionRow(image, item["caption"], name, where)


def _check_caption(caption: str, where: str) -> None:
  if not caption.strip():
    raise ValueError(f"{where}: caption is empty; write one or drop the row")


def _format_qa_row(row: QARow) -> dict[str, Any]:
  return {"questions": plain_questions(row)} | ({} if row.facts is None else {"facts": row.facts})


def plain_questions(row: QARow) -> list[dict[str, Any]]:
  """The row's questions as JSON has them; kind and provenance only where there is one."""
  return [
    {
      key: list(value) if isinstance(value, tuple) else value
      for key, value in dataclasses.asdict(question).items()
      if value != ""
    }
    for question in row.questions
  ]


def parse_questions(items: Any, where: str) -> tuple[Question, ...]:
  """The questions of `plain_questions`. Raises ValueError, starting with `where`."""
  _check_type(items, list, where)
  if not items:
    raise ValueError(f"{where} is empty; add some or drop the row")
  return tuple(parse_question(item, f"{where}[{i}]") for i, item in enumerate(items))


def _image(
  item: Mapping[str, Any], image_root: pathlib.Path, where: str
) -> tuple[ImageSource, str]:
  """The row's image, and the name of the row."""
  remedy = "correct it or pass the image_root that the paths are relative to"
  found = find_image(item["image"], [image_root], where, remedy)
  return found.image, found.name if item.get("name") is None else item["name"]


def _check_object(item: Any, types: Mapping[str, Any], required: Iterable[str], where: str) -> None:
  """Raises ValueError unless `item` is an object of `types`' keys and types, all `required` in;
  null stands for a key that is not there.
  """
  _check_type(item, dict, where)
  listed = ", ".join(types)
  for key, value in item.items():
    if key not in types:
      hint = configuration.did_you_mean(key, types)
      raise ValueError(f"{where}: {shown(key)} is not a known key{hint} (known keys: {listed})")
    if types[key] is not object and (value is not None or key in required):
      _check_type(value, types[key], f"{where}: {key}")
  for key in required:
    if key not in item:
      raise ValueError(f"{where}: the key {key!r} is missing (known keys: {listed})")


def _check_type(value: Any, expected: Any, where: str) -> None:
  if isinstance(value, bool) or not isinstance(value, expected):  # a bool is an int to Python
    raise ValueError(f"{where} is {shown(value)}, but it must be {_TYPE_NAMES[expected]}")


def _scan_rows(
  path: PathLike,
  image_root: PathLike | None,
  parse: Callable[[Any, pathlib.Path, str], Row],
) -> Iterator[Row | BadRow]:
  path = pathlib.Path(path)
  root = path.parent if image_root is None else pathlib.Path(image_root)
  yield from read_rows(path, lambda item, where: parse(item, root, where))


def _write_rows(
  path: PathLike,
  rows: Sequence[Row],
  image_root: PathLike | None,
  image_folder: PathLike | None,
  fields: Callable[[Row], dict[str, Any]],
) -> None:
  path = pathlib.Path(path)
  image_root = pathlib.Path(os.path.abspath(path.parent if image_root is None else image_root))
  if image_folder is not None:
    rows = [save_image(row, pathlib.Path(image_folder)) for row in rows]
  with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
    for row in rows:
      item = {"image": relative_image(row, image_root), "name": row.name} | fields(row)
      file.write(json.dumps(item, ensure_ascii=False) + "\n")


def save_image(row: Row, folder: pathlib.Path, copy: bool = False) -> Row:
  """The row with its image as a file: its own unless `copy`, or one in `folder`, named by its
  content.

  Raises ValueError for an image that is in no format we know.
  """
  if isinstance(row.image, pathlib.Path) and not copy:
    return row
  data = image_bytes(row)
  suffix = image_suffix(data, f"row {shown(row.name)}")
  file = folder / (hashlib.sha256(data).hexdigest()[:24] + suffix)
  if not file.exists():
    write_bytes(file, data)
  return dataclasses.replace(row, image=file)


_SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}


def image_suffix(data: bytes, where: str) -> str:
  """The file suffix of an encoded image, ".jpg" for JPEG. Raises ValueError, starting with
  `where`.
  """
  try:
    with open_image(data) as image:
      return _SUFFIXES.get(image.format or "", f".{image.format}".lower())
  except Exception as error:  # decoders raise whatever they stumble over
    raise ValueError(
      f"{where}: its image ({len(data)} bytes) is in no known format: {str(error):.200}; "
      "replace it or drop the row"
    ) from error


def relative_image(row: QARow | CaptionRow, image_root: pathlib.Path) -> str:
  """The image's path from `image_root`, as `find_image` reads it; absolute for an image outside.

  Raises ValueError for an image that is no file, and a file's name that is not UTF-8.
  """
  where = f"row {shown(row.name)}"
  if not isinstance(row.image, pathlib.Path):
    raise ValueError(
      f"{where} has its image in memory or in an archive ({image_place(row)}), but JSON "
      "lines hold paths; pass an image_folder to save it in"
    )
  image_root = pathlib.Path(os.path.abspath(image_root))
  file = pathlib.Path(os.path.abspath(row.image))
  followed = row.image.resolve()
  same = not followed.exists() or (file.exists() and file.samefile(followed))
  if ".." in row.image.parts and not same:
    file = followed  # there is a link before the two dots
  check_unicode(str(file), f"{where}: its image's path")
  relative = file.relative_to(image_root) if file.is_relative_to(image_root) else file
  text = relative.as_posix()
  for spelled in (text, f"./{text}"):
    try:
      if spelled_image(spelled, image_root, "").image == image_root / relative:
        return spelled
    except ValueError:
      continue
  return text
