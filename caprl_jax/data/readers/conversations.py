"""Captions, conversations and questions, by source -> turns of user and assistant to learn from."""

import dataclasses
import itertools
import logging
import pathlib
import string
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from caprl_jax.config.schema import did_you_mean
from caprl_jax.data.json_rows import read_items
from caprl_jax.data.question_texts import open_text, question_text, speaks_of_options
from caprl_jax.data.readers.conversation_rows import Conversation, Turn, scan_conversations
from caprl_jax.data.readers.qa_sources import JSON_SUFFIXES, parse_mixture, read_parts
from caprl_jax.data.rows import BadRows, ImageSource, QARow, Question, RowKeeper, good_rows
from caprl_jax.data.rows import kinds as kinds_of
from caprl_jax.json_files import shown

log = logging.getLogger("caprl_jax.data")


@dataclasses.dataclass(frozen=True)
class Asked:
  """Multiple-choice questions about an image, or about a `text` in its place; options come in
  another order at every visit. With `open_question`, a wording, they are not shown, and the right
  option is the answer."""

  image: ImageSource | None
  questions: tuple[Question, ...]
  name: str
  text: str = ""
  open_question: str | None = None
  where: str = dataclasses.field(default="", compare=False)


Example = Conversation | Asked


@dataclasses.dataclass(frozen=True)
class Asking:
  """Which questions of a row are asked, and how.

  questions: of one image in one conversation; None: all of them. More share the image's tokens, but
    later questions may then be answered from earlier ones.
  context_text: a template of facts, such as "The image shows a {color} shape.": questions are asked
    after this text and without the image, of rows that have such facts; how a language model can be
    taught to read.
  kinds: of questions; None: all.
  open_question: a wording such as "{question}\\nAnswer the question using a single word or
    phrase.", in which no options are shown and the assistant says the right one; None: they are,
    and the assistant says a letter.
  """

  questions: int | None = None
  context_text: str | None = None
  kinds: Sequence[str] | None = None
  open_question: str | None = None


_QA_KEYS = {"questions", "message", "qa_list", "image_path"}  # of rows that `qa_sources.py` reads


def read_examples(
  source: str,
  instruction: str,
  asking: Asking = Asking(),
  *,
  image_root: str | None = None,
  seed: int = 0,
  max_rows: int | None = None,
  bad_rows: BadRows | RowKeeper = "refuse",
) -> list[Example]:
  """Reads what a stage of pretraining learns from.

  A .jsonl file holds on each line, or a .json file in a list, {"image", "caption", "name"?, ...}:
    captions, of mode `caption` too; its rows with `error` are left out, with a
      count;
    {"conversations": [{"from": "human"|"gpt"|"system", "value"}], "image"?, "id"?, "system"?}:
      LLaVA's layout, in which `<image>` in a human's text is where the image goes (before the first
      text if it is nowhere); an empty image is none;
    {"messages": [{"role", "content"}], "image"? or "images"?, "id"?}: OpenAI's, the content a text
      like LLaVA's or a list of {"type": "text", "text"} and {"type": "image"};
    {"image", "questions"}, {"image_path", "qa_list"}, {"message"}: multiple choice, as every other
      source of `qa_sources.py`.
  " + " joins sources, row by row.

  Args:
    instruction: what the user says where a row has a caption only.
    asking: of rows with questions.
    image_root: what images' paths are relative to; None: the file's folder or, where they are not
      there, this folder.
    seed: of what a reader draws.
    max_rows: keeps the first rows only, of each source.

  Raises:
    ValueError: an unknown source, one without rows, or bad rows that are to be refused, with file
      and line; kinds, or facts of `context_text`, that no row of questions has.
  """
  facts = context_facts(asking.context_text)
  read = _read_parts(source, instruction, image_root, seed, max_rows, bad_rows)
  asked = [row for _, rows in read for row in rows if isinstance(row, QARow)]
  if asked:
    check_kinds(asked, asking.kinds)
    known = {fact for row in asked for fact in row.facts or ()}
    _check_known(f"context_text = {shown(asking.context_text)}", facts, known, "facts")
  found: list[Example] = []
  for name, rows in read:
    made = _pieces(rows, name, asking) if rows and isinstance(rows[0], QARow) else rows
    if not made:
      raise ValueError(f"{name}: no rows to learn from")
    found += made
  return found


def _read_parts(
  source: str,
  instruction: str,
  image_root: str | None,
  seed: int,
  max_rows: int | None,
  bad_rows: BadRows | RowKeeper,
) -> list[tuple[str, list[Conversation] | list[QARow]]]:
  """The rows of each part of a mixture, with the part's name."""
  parts = parse_mixture(source)
  if any(part.weight for part in parts):
    raise ValueError(
      f"{shown(source)}: weights are not supported here, every example is used once an "
      "epoch; leave them out"
    )
  read: list[tuple[str, list[Conversation] | list[QARow]]] = []
  for part in parts:
    path = pathlib.Path(part.source).expanduser()
    if path.suffix.lower() in JSON_SUFFIXES and not _QA_KEYS & _first(path).keys():
      scanned = itertools.islice(scan_conversations(path, instruction, image_root), max_rows)
      read.append((part.source, good_rows(scanned, bad_rows)))
    else:
      read += [(part.source, rows) for _, rows in read_parts(part.source, seed, max_rows, bad_rows)]
  return read


def _first(path: pathlib.Path) -> Mapping:
  """The first row that is an object."""
  return next((item for _, item in read_items(path) if isinstance(item, dict)), {})


def context_facts(context_text: str | None) -> set[str]:
  """The facts that a template names. Raises ValueError for a place that names none, such as {}."""
  setting = f"context_text = {shown(context_text)}"
  remedy = (
    "each place must name a fact and nothing else, as in 'The image shows a {color} {shape}.'"
  )
  parsed = string.Formatter().parse(context_text or "")
  try:
    places = [rest for _, *rest in parsed if rest[0] is not None]
  except ValueError as error:
    raise ValueError(f"{setting}: {error}; {remedy}") from error
  if any(not name or spec or conversion for name, spec, conversion in places):
    raise ValueError(f"{setting}: {remedy}")
  return {name for name, _, _ in places}


def check_kinds(
  rows: Sequence[QARow], wanted: Sequence[str] | None, place: str = "kinds", remedy: str = ""
) -> None:
  """Raises ValueError, starting with `place`, for a kind of questions that no row has."""
  _check_known(f"{place} = {wanted}", wanted or (), kinds_of(rows), "kinds", remedy)


def _check_known(
  setting: str, wanted: Iterable[str], known: Iterable[str], what: str, remedy: str = ""
) -> None:
  """Raises ValueError, starting with `setting`, where something is wanted that no row has."""
  known = sorted(known)
  for name in wanted:
    if name not in known:
      raise ValueError(
        f"{setting}: no row has {shown(name)}{did_you_mean(name, known)} ({what}: "
        f"{', '.join(map(shown, known)) or 'none'}){remedy}"
      )


def warn_of_options(rows: Sequence[QARow], source: str) -> None:
  """Warns of open questions that cannot be understood without their options."""
  asked = [question for row in rows for question in row.questions]
  about = [question for question in asked if speaks_of_options(question)]
  if about:
    log.warning(
      "%s: %d of %d questions speak of options, which open_question does not show, such "
      "as %r; choose kinds",
      source,
      len(about),
      len(asked),
      about[0].stem,
    )


def of_kinds(rows: Sequence[QARow], kinds: Sequence[str] | None) -> list[QARow]:
  """The rows with their questions of some kinds only; None: all. Rows without any are left out."""
  if kinds is None:
    return list(rows)
  some = [
    dataclasses.replace(row, questions=tuple(q for q in row.questions if q.kind in kinds))
    for row in rows
  ]
  return [row for row in some if row.questions]


def _pieces(rows: Sequence[QARow], source: str, asking: Asking) -> list[Asked]:
  """The rows' questions of these kinds; of rows that have the facts of `context_text`. Logs how
  many rows are left out.
  """
  some, facts = of_kinds(rows, asking.kinds), context_facts(asking.context_text)
  knowing = [row for row in some if facts <= (row.facts or {}).keys()]
  for setting, before, after in (
    (f"kinds = {asking.kinds}", rows, some),
    (f"context_text = {shown(asking.context_text)}", some, knowing),
  ):
    if len(after) < len(before):
      log.info(
        "%s: %s leaves out %d of %d rows", source, setting, len(before) - len(after), len(before)
      )
  if asking.open_question:
    warn_of_options(knowing, source)
  return [piece for row in knowing for piece in _asked(row, asking)]


def _asked(row: QARow, asking: Asking) -> list[Asked]:
  """The row cut into some of its questions each."""
  size = asking.questions or len(row.questions)
  text = asking.context_text
  return [
    Asked(
      image=None if text else row.image,
      questions=row.questions[i : i + size],
      name=row.name if size >= len(row.questions) else f"{row.name}, questions from {i}",
      text=text.format(**(row.facts or {})) + "\n" if text else "",
      open_question=asking.open_question,
      where=row.where,
    )
    for i in range(0, len(row.questions), size)
  ]


def conversation_of(example: Example, rng: np.random.Generator | None = None) -> Conversation:
  """Turns of an example. Questions, and each one's options, come in an order that `rng` draws
  (None: their own), one turn a question; the assistant answers with the letter alone, or the
  option. The image, or the text in its place, stands before the first."""
  if isinstance(example, Conversation):
    return example
  draw = (lambda n: rng.permutation(n).tolist()) if rng else (lambda n: list(range(n)))
  turns = []
  for number in draw(len(example.questions)):
    question = example.questions[number]
    if example.open_question:
      text, answer = open_text(example.open_question, question), question.options[question.gold]
    else:
      order = draw(len(question.options))
      text = question_text(question, order, none_of_above=False)
      answer = string.ascii_uppercase[order.index(question.gold)]
    turns += [
      Turn("user", text)
      if turns
      else Turn("user", example.text + text, None if example.image is None else 0),
      Turn("assistant", answer),
    ]
  return Conversation(example.image, tuple(turns), example.name)
