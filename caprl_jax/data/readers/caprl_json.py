"""Questions as CapRL's released data writes them <-> `rows.Question`, and the JSON files of its
first release.
"""

import ast
import json
import pathlib
import re
import string
from collections.abc import Iterator, Sequence
from typing import Any

from caprl_jax.atomic_files import write_text
from caprl_jax.data.readers.jsonl import read_lines, relative_image, save_image
from caprl_jax.data.rows import BadRow, QARow, Question, check_question, check_rows

_LABEL = re.compile(r"^\s*(?:-\s*)?\(?([A-Z])[).:]\s+(\S.*?)\s*$")
_ABSTAIN = re.compile(r"^\s*can\s?not answer\b", re.IGNORECASE)


def parse_question(text: str, answer: str, kind: str = "", where: str = "question") -> Question:
  """A question in one string: a stem of any number of lines, then one line per option
  ("   - A) red", "B. blue").

  A "can not answer" line is left out: it is the judge's to add. `answer` is the right option's
  letter.

  Raises:
    ValueError: no option lines, a letter twice, an answer that is no option's letter, or as
    `rows.check_question`.
  """
  lines = [line for line in text.strip().splitlines() if line.strip()]
  first = len(lines)
  while first and _LABEL.match(lines[first - 1]):
    first -= 1
  # The stem may hold lines that look like options: the options begin with A.
  starts = [i for i in range(first, len(lines)) if _LABEL.match(lines[i]).group(1) == "A"]
  first = starts[0] if starts else first
  return question_of("\n".join(lines[:first]), lines[first:], answer, kind, where)


def question_of(
  stem: str, choices: Sequence[str], answer: str, kind: str = "", where: str = "question"
) -> Question:
  """A question with its choices apart, each with its letter ("A) red" or "A. red"). Raises as
  `parse_question`.
  """
  found: dict[str, str] = {}
  for choice in choices:
    match = _LABEL.match(choice)
    if not match:
      raise ValueError(
        f"{where}: {choice!r} of {stem!r} has no letter; write it as 'A) {choice.strip()}'"
      )
    letter, option = match.groups()
    if letter in found:
      raise ValueError(
        f"{where}: {stem!r} has two options {letter!r}: {found[letter]!r} and {option!r}"
      )
    found[letter] = option
  options = {letter: option for letter, option in found.items() if not _ABSTAIN.match(option)}
  letter = answer.strip().removesuffix(")").removesuffix(".")
  if letter not in options:
    raise ValueError(
      f"{where}: the answer {answer!r} of {stem!r} is none of its options "
      f"{sorted(options)}; correct it or drop the question"
    )
  question = Question(stem, tuple(options.values()), list(options).index(letter), kind)
  check_question(question, where)
  return question


def choices_of(question: Question) -> list[str]:
  """The options with letters, "A) red", as `question_of` reads them."""
  return [f"{letter}) {option}" for letter, option in zip(string.ascii_uppercase, question.options)]


def scan_json(
  path: pathlib.Path, image_root: pathlib.Path | None = None
) -> Iterator[QARow | BadRow]:
  """Reads the JSON of the first release, a list of rows or one row per line, in either of its two
  forms:

    {"image_path": path, "qa_list": [{"question": stem and option lines, "answer": letter}]}, what
    curation writes; {"message": three turns}, what the OpenRLHF trainer reads: the image stands in
    the user's turn, and the turn of role
      "answer" holds a Python list of (stem and option lines, letter), here read as a literal and
      never run.

  Image paths are relative to `image_root`, by default the file's folder. A row that cannot be used
  is a BadRow with file and line (or number in the list). Raises ValueError for a file that cannot
  be read or has no rows.
  """
  root = path.parent if image_root is None else image_root
  empty = True
  for where, item in read_items(path):
    empty = False
    if isinstance(item, BadRow):
      yield item
      continue
    try:
      yield _json_row(item, root, where)
    except ValueError as error:
      yield BadRow(where, str(error))
  if empty:
    raise ValueError(f"{path}: no rows")


def write_json(
  path: pathlib.Path, rows: Sequence[QARow], image_folder: pathlib.Path | None = None
) -> None:
  """Writes rows as {"image_path", "qa_list"}, what `scan_json` reads. Kinds, facts and provenance
  have no place there.

  The file appears whole or not at all. Raises ValueError as `jsonl.write_jsonl`."""
  check_rows(rows, str(path))
  items = []
  for row in rows if image_folder is None else (save_image(row, image_folder) for row in rows):
    answers = [
      {
        "question": "\n".join([q.stem, *(f"   - {choice}" for choice in choices_of(q))]),
        "answer": string.ascii_uppercase[q.gold],
      }
      for q in row.questions
    ]
    items.append({"image_path": relative_image(row, path.parent), "qa_list": answers})
  write_text(path, json.dumps(items, indent=1, ensure_ascii=False) + "\n")


def read_items(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Place and value of each row of a JSON file, a list of rows or one row per line; a BadRow for a
  line that is no JSON.
  """
  try:
    with path.open("rb") as file:
      start = file.read(64).lstrip()
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}; check the path") from error
  if not start.startswith(b"["):
    yield from read_lines(path)
    return
  try:
    items = json.loads(path.read_text("utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error})") from error
  for number, item in enumerate(items):
    yield f"{path}, item {number}", item


def _json_row(item: Any, root: pathlib.Path, where: str) -> QARow:
  if not isinstance(item, dict):
    raise ValueError(
      f"{where} is {item!r:.80}, but it must be an object with image_path and qa_list, or message"
    )
  image, asked = (
    _of_message(item["message"], where)
    if "message" in item
    else (item.get("image_path"), item.get("qa_list"))
  )
  if not isinstance(image, str) or not image:
    raise ValueError(
      f"{where}: no image path (image_path, or an image in the user's turn of "
      f"message); it has {sorted(item)}"
    )
  if not isinstance(asked, list) or not asked:
    raise ValueError(
      f"{where}: no questions (qa_list, or a turn of role 'answer' in message); it "
      f"has {sorted(item)}"
    )
  questions = []
  for i, qa in enumerate(asked):
    pair = (qa.get("question"), qa.get("answer")) if isinstance(qa, dict) else qa
    if (
      not isinstance(pair, (list, tuple))
      or len(pair) != 2
      or not all(isinstance(part, str) for part in pair)
    ):
      raise ValueError(
        f"{where}, question {i} is {qa!r:.120}, but it must have a question and an "
        "answer, both texts"
      )
    questions.append(parse_question(*pair, where=f"{where}, question {i}"))
  file = root / image.removeprefix("file://")
  if not file.is_file():
    raise ValueError(
      f"{where}: image {image!r} is not a file in {root}; correct it, or move the "
      "JSON to where its paths begin"
    )
  return QARow(file, tuple(questions), image, where=where)


def _of_message(message: Any, where: str) -> tuple[Any, Any]:
  """Image path and (question, letter) pairs of the trainer's three turns."""
  try:
    turns = json.loads(message) if isinstance(message, str) else message
    roles = {turn["role"]: turn["content"] for turn in turns}
    image = next(
      (
        part["image"]
        for part in roles.get("user", [])
        if isinstance(part, dict) and "image" in part
      ),
      None,
    )
    answers = roles.get("answer")
    return image, ast.literal_eval(answers) if isinstance(answers, str) else answers
  except (ValueError, SyntaxError, TypeError, KeyError) as error:
    raise ValueError(
      f"{where}: message is not a list of turns of role and content, with a list of "
      f"(question, letter) in the turn 'answer' ({type(error).__name__}: "
      f"{error})"
    ) from error
