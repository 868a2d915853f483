"""Images with questions or captions: the schema of a row, its validation, JSON lines in and out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import io
import json
import os
import pathlib
import string
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from caprl_jax import configuration

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Question:
  """A multiple-choice question. `gold` is the right option's index, `kind` a group for metrics."""
  stem: str
  options: tuple[str, ...]
  gold: int
  kind: str = ""


@dataclasses.dataclass(frozen=True)
class QARow:
  """An image (a file or an encoded file's bytes) and its questions.

  `name` stands for the row in every message. `facts` are true attributes of the image, such as
  {"color": "red"}, where the dataset knows them.
  """
  image: pathlib.Path | bytes
  questions: tuple[Question, ...]
  name: str
  facts: dict[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class CaptionRow:
  """An image and a caption to imitate."""
  image: pathlib.Path | bytes
  caption: str
  name: str


Row = TypeVar("Row", QARow, CaptionRow)


def kinds(rows: Iterable[QARow]) -> list[str]:
  """The kinds of all questions, sorted, each once."""
  return sorted({question.kind for row in rows for question in row.questions})


def check_question(question: Question, where: str) -> None:
  """Raises ValueError, starting with `where`, for a question that no judge could answer fairly.

  That is: no text, fewer than two options, an empty option, two options that differ at most in
  case and outer spaces, or a gold index that is no option's.
  """
  if not question.stem.strip():
    raise ValueError(f"{where}: the question has no text; write its stem or drop it")
  where = f"{where}: question {question.stem!r}"
  if len(question.options) < 2:
    raise ValueError(
      f"{where} has {len(question.options)} option(s) {list(question.options)}; give it at least 2"
    )
  first: dict[str, str] = {}
  for i, option in enumerate(question.options):
    if not option.strip():
      raise ValueError(f"{where}: option {i} is empty; write its text or remove it")
    if _folded(option) in first:
      raise ValueError(
        f"{where} has the options {first[_folded(option)]!r} and {option!r}, which differ at most "
        "in case and outer spaces; keep one of them"
      )
    first[_folded(option)] = option
  gold = question.gold
  if isinstance(gold, bool) or not isinstance(gold, int):
    raise ValueError(f"{where} has gold {gold!r}; it must be the index of the right option")
  if not 0 <= gold < len(question.options):
    raise ValueError(
      f"{where} has gold {gold}, but its {len(question.options)} options are numbered from 0 to "
      f"{len(question.options) - 1}"
    )


def check_rows(rows: Sequence[QARow], where: str) -> None:
  """Raises ValueError, starting with `where`, for no rows, a row without questions or a bad one."""
  if not rows:
    raise ValueError(f"{where}: no rows; check the path and any filter before it")
  for row in rows:
    if not row.questions:
      raise ValueError(f"{where}: row {row.name!r} has no questions; add some or drop the row")
    for question in row.questions:
      check_question(question, f"{where}: row {row.name!r}")


def read_image(row: QARow | CaptionRow) -> Image.Image:
  """The row's image in RGB, upright as its EXIF orientation asks.

  Transparency is laid over white, as transformers' `convert_to_rgb` does, so that pixels equal
  those of the Hugging Face processors. One-channel images of more than 8 bits, which PIL would
  cut off at 255, are scaled to 8 bits.

  Raises:
    ValueError: an image that cannot be read in full, with the row, the file and the reason.
  """
  in_memory = isinstance(row.image, bytes)
  try:
    with Image.open(io.BytesIO(row.image) if in_memory else row.image) as image:
      return _to_rgb(ImageOps.exif_transpose(image))
  # PIL's decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, IndexError…
  except Exception as error:
    source = f"{len(row.image)} bytes in memory" if in_memory else str(row.image)
    raise ValueError(
      f"row {row.name!r}: cannot read its image ({source}): {type(error).__name__}: {error}; "
      "replace the image or drop the row"
    ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode in ("I", "F") or image.mode.startswith("I;16"):
    return Image.fromarray(_to_8_bits(np.asarray(image), image.mode)).convert("RGB")
  if "A" in image.getbands() or image.info.get("transparency") is not None:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
  return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray, mode: str) -> np.ndarray:
  """16-bit, 32-bit or float grey values as uint8.

  Only 16-bit modes say what white is. For the others it is the smallest usual white that holds
  every value; values that no usual white fits are stretched from their least to their greatest.
  """
  pixels = pixels.astype(np.float64)
  if not np.isfinite(pixels).all():
    raise ValueError("it has pixels that are not finite")
  low, high = pixels.min(), pixels.max()
  usual = {"F": (1, 255, 65535), "I": (255, 65535)}.get(mode, (65535,))
  fitting = [white for white in usual if low >= 0 and high <= white]
  low, white = (0.0, fitting[0]) if fitting else (low, high)
  return np.round((pixels - low) * (255 / max(white - low, 1e-30))).astype(np.uint8)


def read_jsonl(path: PathLike, image_root: PathLike | None = None) -> list[QARow]:
  """Reads questions, one image a line.

  A line is {"image": path, "questions": [{"stem", "options", "gold", "kind"?}], "name"?, "facts"?}.
  Image paths are relative to `image_root`, by default the file's folder; a row without a name is
  named after that path. `gold` is the right option's index, letter ("B") or text.

  Raises:
    ValueError: an unreadable or empty file; or, with the file and line, an unknown, missing or
      ill-typed key, a gold that fits no option or two, a question that `check_question` refuses,
      or an image file that is not there.
  """
  return _read_rows(path, image_root, _parse_qa_row)


def write_jsonl(
  path: PathLike, rows: Sequence[QARow], image_root: PathLike | None = None
) -> None:
  """Writes what `read_jsonl` reads. The file appears whole or not at all.

  Raises ValueError for rows that `check_rows` refuses and for images in memory.
  """
  check_rows(rows, str(path))
  _write_rows(path, rows, image_root, _format_qa_row)


def read_caption_jsonl(path: PathLike, image_root: PathLike | None = None) -> list[CaptionRow]:
  """Reads captions, one image a line: {"image": path, "caption": text, "name"?}.

  Paths, names and errors are those of `read_jsonl`; an empty caption is an error too.
  """
  return _read_rows(path, image_root, _parse_caption_row)


def write_caption_jsonl(
  path: PathLike, rows: Sequence[CaptionRow], image_root: PathLike | None = None
) -> None:
  """Writes what `read_caption_jsonl` reads. The file appears whole or not at all.

  Raises ValueError for no rows, an empty caption and images in memory.
  """
  if not rows:
    raise ValueError(f"{path}: no rows to write")
  for row in rows:
    _check_caption(row.caption, f"{path}: row {row.name!r}")
  _write_rows(path, rows, image_root, lambda row: {"caption": row.caption})


# What a line may hold, by JSON type.
_QA_KEYS = {"image": str, "questions": list, "name": str, "facts": dict}
_QUESTION_KEYS = {"stem": str, "options": list, "gold": int | str, "kind": str}
_CAPTION_KEYS = {"image": str, "caption": str, "name": str}
_TYPE_NAMES = {
  str: "a string", list: "a list", dict: "an object", int | str: "an index, a letter or a text",
}  # fmt: skip


def _parse_qa_row(item: Any, image_root: pathlib.Path, where: str) -> QARow:
  _check_object(item, _QA_KEYS, ("image", "questions"), where)
  if not item["questions"]:
    raise ValueError(f"{where}: questions is empty; add some or drop the line")
  facts = item.get("facts")
  for key, value in (facts or {}).items():
    _check_type(value, str, f"{where}: facts.{key}")
  questions = tuple(
    _parse_question(question, f"{where}: questions[{i}]")
    for i, question in enumerate(item["questions"])
  )
  return QARow(_image_file(item, image_root, where), questions, _name(item), facts)


def _parse_question(item: Any, where: str) -> Question:
  _check_object(item, _QUESTION_KEYS, ("stem", "options", "gold"), where)
  for i, option in enumerate(item["options"]):
    _check_type(option, str, f"{where}: options[{i}]")
  options = tuple(item["options"])
  gold = item["gold"]
  if isinstance(gold, str):
    gold = _find_option(gold, options, where)
  question = Question(item["stem"], options, gold, item.get("kind", ""))
  check_question(question, where)
  return question


def _find_option(gold: str, options: Sequence[str], where: str) -> int:
  """The index of the option whose letter or text is `gold`, if there is exactly one."""
  letters = dict(enumerate(string.ascii_uppercase))
  found = [
    i for i, option in enumerate(options)
    if _folded(option) == _folded(gold) or letters.get(i) == gold.strip()
  ]  # fmt: skip
  if len(found) != 1:
    fits = " and ".join(repr(options[i]) for i in found) or "none"
    raise ValueError(
      f"{where}: gold {gold!r} fits {fits} of the options {list(options)}; it must be the letter "
      "(A for the first) or the text of exactly one, or an index from 0"
    )
  return found[0]


def _parse_caption_row(item: Any, image_root: pathlib.Path, where: str) -> CaptionRow:
  _check_object(item, _CAPTION_KEYS, ("image", "caption"), where)
  _check_caption(item["caption"], where)
  return CaptionRow(_image_file(item, image_root, where), item["caption"], _name(item))


def _check_caption(caption: str, where: str) -> None:
  if not caption.strip():
    raise ValueError(f"{where}: caption is empty; write one or drop the row")


def _format_qa_row(row: QARow) -> dict[str, Any]:
  questions = {"questions": [dataclasses.asdict(question) for question in row.questions]}
  return questions if row.facts is None else questions | {"facts": row.facts}


def _folded(option: str) -> str:
  return option.strip().casefold()


def _name(item: Mapping[str, Any]) -> str:
  return item.get("name", item["image"])


def _image_file(item: Mapping[str, Any], image_root: pathlib.Path, where: str) -> pathlib.Path:
  # Looked for now: otherwise a wrong root would show after the compile, in the middle of training.
  file = image_root / item["image"]
  if not file.is_file():
    raise ValueError(
      f"{where}: image {item['image']!r} is not a file in {image_root}; correct it or pass the "
      "image_root that the paths are relative to"
    )
  return file


def _check_object(
  item: Any, types: Mapping[str, Any], required: Iterable[str], where: str
) -> None:
  """Raises ValueError unless `item` is an object of `types`' keys and types, all `required` in."""
  _check_type(item, dict, where)
  listed = ", ".join(types)
  for key, value in item.items():
    if key not in types:
      hint = configuration.did_you_mean(key, types)
      raise ValueError(f"{where}: {key!r} is not a known key{hint} (known keys: {listed})")
    _check_type(value, types[key], f"{where}: {key}")
  for key in required:
    if key not in item:
      raise ValueError(f"{where}: the key {key!r} is missing (known keys: {listed})")


def _check_type(value: Any, expected: Any, where: str) -> None:
  if isinstance(value, bool) or not isinstance(value, expected):  # a bool is an int to Python
    raise ValueError(f"{where} is {value!r:.80}, but it must be {_TYPE_NAMES[expected]}")


def _read_rows(
  path: PathLike,
  image_root: PathLike | None,
  parse: Callable[[Any, pathlib.Path, str], Row],
) -> list[Row]:
  path = pathlib.Path(path)
  image_root = path.parent if image_root is None else pathlib.Path(image_root)
  rows = [parse(item, image_root, where) for where, item in _read_lines(path)]
  if not rows:
    raise ValueError(f"{path}: no rows; write one JSON object a line")
  return rows


def _read_lines(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields `file:line` and the line's JSON value; blank lines count but are skipped."""
  try:
    file = path.open("rb")
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}; check the path") from error
  with file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        item = json.loads(line)
      except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(
          f"{path}:{number}: not JSON ({error}); write one whole JSON object a line, in UTF-8"
        ) from error
      yield f"{path}:{number}", item


def _write_rows(
  path: PathLike,
  rows: Sequence[Row],
  image_root: PathLike | None,
  fields: Callable[[Row], dict[str, Any]],
) -> None:
  path = pathlib.Path(path)
  image_root = pathlib.Path(os.path.abspath(path.parent if image_root is None else image_root))
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    with partial.open("w", encoding="utf-8", newline="\n") as file:
      for row in rows:
        item = {"image": _relative_image(row, image_root), "name": row.name} | fields(row)
        file.write(json.dumps(item, ensure_ascii=False) + "\n")
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def _relative_image(row: QARow | CaptionRow, image_root: pathlib.Path) -> str:
  """The image's path from `image_root`; absolute for an image outside it."""
  if isinstance(row.image, bytes):
    raise ValueError(
      f"row {row.name!r} has its image in memory ({len(row.image)} bytes), but JSON lines hold "
      "paths; save it to a file first"
    )
  file = pathlib.Path(os.path.abspath(row.image))
  return (file.relative_to(image_root) if file.is_relative_to(image_root) else file).as_posix()
