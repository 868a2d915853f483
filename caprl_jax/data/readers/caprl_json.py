"""Questions as CapRL's released data writes them <-> `rows.Question`, and the JSON files of its
first release.
"""

import ast
import dataclasses
import json
import os
import pathlib
import re
import string
from collections.abc import Iterator, Sequence
from typing import Any

from caprl_jax.atomic_files import write_text
from caprl_jax.data.json_rows import read_rows
from caprl_jax.data.option_letters import are_names, gold_index, labelled, without_letters
from caprl_jax.data.readers.image_spellings import find_image
from caprl_jax.data.readers.jsonl import relative_image, save_image
from caprl_jax.data.rows import BadRow, QARow, Question, check_question, check_rows
from caprl_jax.json_files import parse_json, shown

# what the release adds to the options; not "Cannot answer: it is cut off"
_ABSTAIN = re.compile(
  r"\s*can\s?not (?:be )?answer(?:ed)?(?: (?:the question )?(?:based (?:up)?on|from|with)"
  r" [\w' ]{1,40})?\s*(?:\.\s*)?",
  re.IGNORECASE,
)


def parse_question(text: str, answer: Any, kind: str = "", where: str = "question") -> Question:
  """A question in one string: a stem of any number of lines, then one line per option
  ("   - A) red", "B. blue").

  A line "can not answer based on the caption" is left out: it is the judge's to add. `answer` is
  the right option's letter, or what else `option_letters.gold_index` reads.

  Raises:
    ValueError: no option lines, letters that do not begin with A or leave one out, an answer that
    is no option's, or as `rows.check_question`.
  """
  lines = text.strip().replace("\r\n", "\n").split("\n")
  first = len(lines)
  while first and (not lines[first - 1].strip() or labelled(lines[first - 1])):
    first -= 1
  # The stem may hold lines that look like options: the options begin with A.
  labels = [(i, part[0]) for i in range(first, len(lines)) if (part := labelled(lines[i]))]
  starts = [i for i, letter in labels if letter == "A"]
  first = starts[0] if starts else (labels[0][0] if labels else len(lines))
  choices = [line for line in lines[first:] if line.strip()]
  return question_of("\n".join(lines[:first]).rstrip(), choices, answer, kind, where)


def question_of(
  stem: str, choices: Sequence[str], answer: Any, kind: str = "", where: str = "question"
) -> Question:
  """A question with its choices apart, each with its letter ("A) red" or "A. red"), or none of them
  with one. Raises as `parse_question`.
  """
  asked = shown(stem)
  found = [labelled(choice) for choice in choices]
  parts = [(part[0], part[1]) for part in found if part]
  if parts and len(parts) < len(choices) and any(_is_marked(choice) for choice in choices):
    i = found.index(None)
    raise ValueError(
      f"{where}: {shown(choices[i])} of {asked} has no letter; write it as "
      f"{shown(f'{string.ascii_uppercase[i % 26]}) {choices[i].strip()}')}"
    )
  if len(parts) < len(choices) or are_names(choices):  # no letters
    parts = [("", choice) for choice in choices]
  for i, (letter, option) in enumerate(parts):
    twice = next((other for name, other in parts[:i] if letter and name == letter), None)
    if twice is not None:
      raise ValueError(
        f"{where}: {asked} has two options {letter!r}: {shown(twice)} and {shown(option)}"
      )
  all_letters = sorted(letter for letter, _ in parts)
  kept = [(letter, option) for letter, option in parts if not _ABSTAIN.fullmatch(option)]
  letters = "".join(letter for letter, _ in kept)
  if letters and not any(
    held == list(string.ascii_uppercase[: len(held)]) for held in (all_letters, sorted(letters))
  ):
    raise ValueError(
      f"{where}: the options of {asked} have the letters {', '.join(letters)}, not A, B, C ... "
      "without a gap; an option must stand on one line"
    )
  options = without_letters([option for _, option in kept], where)
  try:
    if len(kept) < len(parts) and (not letters or not isinstance(answer, str)):
      # An index, and a letter where none is written, count all choices.
      places = [i for i, (_, option) in enumerate(parts) if not _ABSTAIN.fullmatch(option)]
      gold = places.index(gold_index(answer, [option for _, option in parts], where))
    else:
      gold = gold_index(answer, options, where, letters)
  except ValueError:
    names = sorted(letters) or list(options)
    if not choices:
      raise ValueError(
        f"{where}: no option stands behind {asked}; write each on a line of its own, as in 'A) red'"
      ) from None
    raise ValueError(
      f"{where}: the answer {shown(answer)} of {asked} is none of its options "
      f"{shown(names)}, or fits several; correct it or drop the question"
    ) from None
  question = Question(stem, options, gold, kind)
  check_question(question, where)
  return question


def _is_marked(choice: str) -> bool:
  """Whether a choice begins with a letter in parentheses, which is no initial."""
  return re.match(r"\s*(?:[-*•]\s+)?(?:[(\[]\s*)?[A-Za-z]\s*[)\]]", choice) is not None


def choices_of(question: Question) -> list[str]:
  """The options with letters, "A) red", as `question_of` reads them."""
  return [f"{letter}) {option}" for letter, option in zip(string.ascii_uppercase, question.options)]


def scan_json(
  path: str | os.PathLike[str], image_root: pathlib.Path | None = None
) -> Iterator[QARow | BadRow]:
  """Reads the JSON of the first release, laid out as `json_rows.read_items` says, in either of its
  two forms:

    {"image_path": path, "qa_list": [{"question": stem and option lines, "answer": letter}]}, what
    curation writes; {"message": three turns}, what the OpenRLHF trainer reads: the image stands in
    the user's turn, and the turn of role
      "answer" holds a Python list of (stem and option lines, letter), here read as a literal and
      never run.

  The first may also have what `write_json` adds: "name" and "facts" of a row, "kind" and
  "provenance" of a question. Image paths are relative to `image_root`, by default the file's
  folder. A row that cannot be used is a BadRow with file and line (or number in the list). Raises
  ValueError for a file that cannot be read or has no rows.
  """
  path = pathlib.Path(path)
  root = path.parent if image_root is None else image_root
  yield from read_rows(path, lambda item, where: parse_row(item, root, where))


def write_json(
  path: pathlib.Path, rows: Sequence[QARow], image_folder: pathlib.Path | None = None
) -> None:
  """Writes rows as {"image_path", "qa_list"}, what `scan_json` reads. Names, kinds, facts and
  provenance, for which the release has no keys, stand in keys of our own.

  The file appears whole or not at all. Raises ValueError as `jsonl.write_jsonl`, and for a question
  that would not read back equal: one with an option of several lines, or with outer spaces."""
  check_rows(rows, str(path))
  check_questions(rows, str(path))
  items = []
  for row in rows if image_folder is None else (save_image(row, image_folder) for row in rows):
    image = relative_image(row, path.parent)
    asked = [_format_question(q, str(path)) for q in row.questions]
    added = {} if row.name == image else {"name": row.name}
    added |= {} if row.facts is None else {"facts": row.facts}
    items.append({"image_path": image, "qa_list": asked} | added)
  write_text(path, json.dumps(items, indent=1, ensure_ascii=False) + "\n")


def check_questions(rows: Sequence[QARow], where: str) -> None:
  """Raises ValueError, starting with `where`, for a question that `write_json` cannot write."""
  for row in rows:
    for question in row.questions:
      _format_question(question, f"{where}: row {shown(row.name)}")


def question_pair(question: Question) -> tuple[str, str]:
  """A question as one text, its options a line each, and the right one's letter."""
  text = "\n".join([question.stem, *(f"   - {choice}" for choice in choices_of(question))])
  return text, string.ascii_uppercase[question.gold]


def _format_question(question: Question, where: str) -> dict[str, str]:
  text, answer = question_pair(question)
  try:
    read = parse_question(text, answer)
  except ValueError:
    read = None
  same = read and (read.stem, read.options, read.gold)
  if same != (question.stem, question.options, question.gold):
    raise ValueError(
      f"{where}: question {shown(question.stem)} would not read back equal from a text with one "
      "line per option (line breaks, outer spaces, or an option 'Can not answer ...'); reword it, "
      "or write .jsonl or .parquet"
    )
  added = {"kind": question.kind, "provenance": question.provenance}
  return {"question": text, "answer": answer} | {k: v for k, v in added.items() if v}


def parse_row(item: Any, root: pathlib.Path, where: str, asked: bool = True) -> QARow:
  """A row of `scan_json`; unless questions are `asked`, it need not have any. Raises ValueError,
  starting with `where`."""
  if not isinstance(item, dict):
    raise ValueError(
      f"{where} is {shown(item)}, but it must be an object with image_path and qa_list, or message"
    )
  image, given = (
    _of_message(item["message"], where)
    if "message" in item
    else (item.get("image_path"), item.get("qa_list"))
  )
  if not image:
    raise ValueError(
      f"{where}: no image path (image_path, or an image in the user's turn of "
      f"message); it has {shown(sorted(item))}"
    )
  if not asked and not given:
    given = []
  elif not isinstance(given, list) or not given:
    raise ValueError(
      f"{where}: no questions (qa_list, or a turn of role 'answer' in message); it "
      f"has {shown(sorted(item))}"
    )
  questions = tuple(_parse_pair(qa, f"{where}, question {i}") for i, qa in enumerate(given))
  remedy = "correct it, or move the JSON to where its paths begin"
  found = find_image(image, [root], where, remedy)
  name, facts = item.get("name"), item.get("facts")
  held = facts if isinstance(facts, dict) else {}
  if not all(isinstance(fact, str) for fact in held.values()):
    raise ValueError(f"{where}: facts is {shown(facts)}, but it must be an object of texts")
  return QARow(
    found.image,
    questions,
    name if isinstance(name, str) else found.name,
    facts if isinstance(facts, dict) else None,
    where,
  )


def _parse_pair(qa: Any, where: str) -> Question:
  added = qa if isinstance(qa, dict) else {}
  pair = (qa.get("question"), qa.get("answer")) if isinstance(qa, dict) else qa
  if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str):
    raise ValueError(
      f"{where} is {shown(qa)}, but it must have a question and an answer, both texts"
    )
  if pair[1] is None:
    raise ValueError(f"{where} is {shown(qa)}, but it must have a question and an answer")
  kind, provenance = (added.get(key) or "" for key in ("kind", "provenance"))
  if not isinstance(kind, str) or not isinstance(provenance, str):
    raise ValueError(f"{where} is {shown(qa)}, but its kind and provenance must be texts")
  question = parse_question(*pair, kind=kind, where=where)
  return dataclasses.replace(question, provenance=provenance)


def _of_message(message: Any, where: str) -> tuple[Any, Any]:
  """Image and (question, answer) pairs of the trainer's three turns."""
  try:
    turns = parse_json(message, "message") if isinstance(message, str) else message
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
  except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
    raise ValueError(
      f"{where}: message is not a list of turns of role and content, with a list of "
      f"(question, letter) in the turn 'answer' ({type(error).__name__}: "
      f"{str(error):.80})"
    ) from error
