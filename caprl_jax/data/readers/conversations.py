"""Captions, conversations and questions, by source -> turns of user and assistant to learn from."""

import dataclasses
import itertools
import logging
import pathlib
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from caprl_jax.config.schema import did_you_mean
from caprl_jax.data.question_texts import open_text, question_text, speaks_of_options
from caprl_jax.data.readers.caprl_json import read_items
from caprl_jax.data.readers.qa_sources import parse_mixture, read_parts
from caprl_jax.data.rows import BadRow, BadRows, ImageSource, QARow, Question, RowKeeper, good_rows
from caprl_jax.data.rows import kinds as kinds_of

log = logging.getLogger("caprl_jax.data")

Role = Literal["system", "user", "assistant"]
PLACE = "<image>"  # what LLaVA's data writes where the image goes
_ROLES = {
  "human": "user",
  "user": "user",
  "gpt": "assistant",
  "assistant": "assistant",
  "system": "system",
}


@dataclasses.dataclass(frozen=True)
class Turn:
  """What one side says; the image stands before `text[image_at:]`, where this turn has it."""

  role: Role
  text: str
  image_at: int | None = None


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Turns with at most one image. `ended`: False for a last answer that was cut, after which no end
  is to be learnt.
  """

  image: ImageSource | None
  turns: tuple[Turn, ...]
  name: str
  ended: bool = True
  where: str = dataclasses.field(default="", compare=False)

  def __post_init__(self):
    """Raises ValueError, which names no row, for turns that are not user, assistant, user, ...
    after a system's.
    """
    roles = [turn.role for turn in self.turns]
    asked = roles[1:] if roles[:1] == ["system"] else roles
    if not asked or asked != ["user", "assistant"] * (len(asked) // 2):
      raise ValueError(
        f"its turns are of {', '.join(roles) or 'nobody'}; after an optional system turn they "
        "must be user and assistant in turn, the assistant last"
      )
    if any(turn.role == "assistant" and not turn.text.strip() for turn in self.turns):
      raise ValueError("an assistant's turn is empty")
    places = sum(turn.image_at is not None for turn in self.turns)
    if places != (self.image is not None) or any(
      turn.image_at is not None and turn.role != "user" for turn in self.turns
    ):
      raise ValueError(
        f"it has {int(self.image is not None)} image(s) and {places} place(s) for one in the "
        "user's turns"
      )


@dataclasses.dataclass(frozen=True)
class Asked:
  """Multiple-choice questions about an image, or about a `text` that is told in its place; options
  come in another order at every visit. With `open_question`, a wording, they are not shown, and the
  right option is the answer."""

  image: ImageSource | None
  questions: tuple[Question, ...]
  name: str
  text: str = ""
  open_question: str | None = None
  where: str = dataclasses.field(default="", compare=False)


Example = Conversation | Asked
_QA_KEYS = {"questions", "message", "qa_list"}  # of rows that `qa_sources.py` reads


def read_examples(
  source: str,
  instruction: str,
  image_root: str | None = None,
  seed: int = 0,
  max_rows: int | None = None,
  bad_rows: BadRows | RowKeeper = "refuse",
  questions: int | None = None,
  told: str | None = None,
  kinds: Sequence[str] | None = None,
  open_question: str | None = None,
) -> list[Example]:
  """Reads what a stage of pretraining learns from.

  A .jsonl file holds on each line, or a .json file in a list, {"image", "caption", "name"?, ...}:
    captions, of mode `caption` too; its rows with `error` are left out, with a
      count;
    {"conversations": [{"from": "human"|"gpt"|"system", "value"}], "image"?, "id"?}: LLaVA's layout,
      in which `<image>` in a human's text is where the image goes (before the first text if it is
      nowhere);
    {"messages": [{"role", "content"}], "image"? or "images"?, "id"?}: OpenAI's, the content a text
      like LLaVA's or a list of {"type": "text", "text"} and {"type": "image"};
    {"image", "questions"}, {"image_path", "qa_list"}, {"message"}: multiple choice, as every other
      source of `qa_sources.py`.
  " + " joins sources, row by row.

  Args:
    instruction: what the user says where a row has a caption only.
    image_root: what images' paths are relative to; None: the file's folder or, where they are not
      there, this folder.
    seed: of what a reader draws.
    max_rows: keeps the first rows only, of each source.
    questions: of one image in one conversation; None: all of them. More share the image's tokens,
      but later questions may then be answered from earlier ones.
    told: a template of facts, such as "The image shows a {color} shape.": questions are asked after
      this text and without the image, of rows that know such facts; how a language model can be
      taught to read.
    kinds: of questions; None: all.
    open_question: a wording such as "{question}\\nAnswer the question using a single word or
      phrase.", in which no options are shown and the assistant says the right one; None: they are,
      and the assistant says a letter.

  Raises:
    ValueError: an unknown source, one without rows, or bad rows that are to be refused, with file
      and line; kinds, or facts to be told, that no row of questions has.
  """
  facts = told_facts(told)
  parts = parse_mixture(source)
  if any(part.weight for part in parts):
    raise ValueError(
      f"{source!r}: weights are not supported here, every example is used once an "
      "epoch; leave them out"
    )
  read: list[tuple[str, list[Conversation] | list[QARow]]] = []
  for part in parts:
    path = pathlib.Path(part.source).expanduser()
    if path.suffix in (".jsonl", ".json") and not _QA_KEYS & _first(path).keys():
      scanned = itertools.islice(scan_conversations(path, instruction, image_root), max_rows)
      read.append((part.source, good_rows(scanned, bad_rows)))
    else:
      read += [(part.source, rows) for _, rows in read_parts(part.source, seed, max_rows, bad_rows)]
  asked = [row for _, rows in read for row in rows if isinstance(row, QARow)]
  if asked:
    check_kinds(asked, kinds)
    _check_known(
      f"told = {told!r}", facts, {fact for row in asked for fact in row.facts or ()}, "facts"
    )
  found: list[Example] = []
  for name, rows in read:
    made = (
      _pieces(rows, name, questions, told, kinds, open_question)
      if rows and isinstance(rows[0], QARow)
      else rows
    )
    if not made:
      raise ValueError(f"{name}: no rows to learn from")
    found += made
  return found


def _first(path: pathlib.Path) -> Mapping:
  """The first row that is an object."""
  return next((item for _, item in read_items(path) if isinstance(item, dict)), {})


def told_facts(told: str | None) -> set[str]:
  """The facts that a template names. Raises ValueError for a place that names none, such as {}."""
  remedy = (
    "each place must name a fact and nothing else, as in 'The image shows a {color} {shape}.'"
  )
  try:
    places = [rest for _, *rest in string.Formatter().parse(told or "") if rest[0] is not None]
  except ValueError as error:
    raise ValueError(f"told = {told!r}: {error}; {remedy}") from error
  if any(not name or spec or conversion for name, spec, conversion in places):
    raise ValueError(f"told = {told!r}: {remedy}")
  return {name for name, _, _ in places}


def check_kinds(rows: Sequence[QARow], wanted: Sequence[str] | None, place: str = "kinds") -> None:
  """Raises ValueError, starting with `place`, for a kind of questions that no row has."""
  _check_known(f"{place} = {wanted}", wanted or (), kinds_of(rows), "kinds")


def _check_known(setting: str, wanted: Iterable[str], known: Iterable[str], what: str) -> None:
  """Raises ValueError, starting with `setting`, where something is wanted that no row has."""
  known = sorted(known)
  for name in wanted:
    if name not in known:
      raise ValueError(
        f"{setting}: no row has {name!r}{did_you_mean(name, known)} ({what}: "
        f"{', '.join(map(repr, known)) or 'none'})"
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


def _pieces(
  rows: Sequence[QARow],
  source: str,
  questions: int | None,
  told: str | None,
  kinds: Sequence[str] | None,
  open_question: str | None,
) -> list[Asked]:
  """The rows' questions of these kinds; of rows that know what is to be told. Logs how many rows
  are left out.
  """
  some, facts = of_kinds(rows, kinds), told_facts(told)
  knowing = [row for row in some if facts <= (row.facts or {}).keys()]
  for setting, before, after in (
    (f"kinds = {kinds}", rows, some),
    (f"told = {told!r}", some, knowing),
  ):
    if len(after) < len(before):
      log.info(
        "%s: %s leaves out %d of %d rows", source, setting, len(before) - len(after), len(before)
      )
  if open_question:
    warn_of_options(knowing, source)
  return [piece for row in knowing for piece in _asked(row, questions, told, open_question)]


def _asked(
  row: QARow, questions: int | None, told: str | None, open_question: str | None
) -> list[Asked]:
  """The row cut into some of its questions each."""
  size = questions or len(row.questions)
  return [
    Asked(
      None if told else row.image,
      row.questions[i : i + size],
      row.name if size >= len(row.questions) else f"{row.name}, questions from {i}",
      told.format(**(row.facts or {})) + "\n" if told else "",
      open_question,
      row.where,
    )
    for i in range(0, len(row.questions), size)
  ]


def conversation_of(example: Example, rng: np.random.Generator | None = None) -> Conversation:
  """Turns of an example. Questions, and each one's options, come in an order that `rng` draws
  (None: their own), one turn a question; the assistant answers with the letter alone, or the
  option. The image, or what is told, stands before the first."""
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


def scan_conversations(
  path: pathlib.Path, instruction: str, image_root: str | None = None
) -> Iterator[Conversation | BadRow]:
  """The captions and conversations of a file (`read_examples`), with a BadRow for each row that is
  neither.
  """
  failed, empty = 0, True
  for where, item in read_items(path):
    empty = False
    if isinstance(item, BadRow):
      yield item
    elif isinstance(item, dict) and "error" in item and "caption" not in item:
      failed += 1
    else:
      try:
        made = _parse(item, instruction, path.parent, image_root)
        yield dataclasses.replace(made, where=where)
      except ValueError as error:
        yield BadRow(where, f"{where}: {error}")
  if empty:
    raise ValueError(f"{path}: no rows; write one JSON object a line")
  if failed:
    log.warning("%s: left out %d rows that have an error in place of a caption", path, failed)


def _parse(
  item: Any, instruction: str, folder: pathlib.Path, image_root: str | None
) -> Conversation:
  if not isinstance(item, dict):
    raise ValueError(f"{item!r:.80} is no JSON object")
  images = item.get("images")
  images = (
    [item["image"]] if item.get("image") is not None else images if images is not None else []
  )
  if isinstance(images, str):
    images = [images]
  if not isinstance(images, list) or any(not isinstance(image, str) for image in images):
    raise ValueError(f"image {images!r:.80} must be a path, images a list of them")
  if "caption" in item:
    turns = [Turn("user", instruction, 0), Turn("assistant", _text(item["caption"], "caption"))]
  elif "conversations" in item:
    turns = [_turn(turn, "from", "value") for turn in _list(item["conversations"], "conversations")]
  elif "messages" in item:
    messages = _list(item["messages"], "messages")
    turns = [_turn(turn, "role", "content") for turn in messages]
    images = images or _image_parts(messages)
  else:
    raise ValueError(
      f"it has the keys {sorted(item)}; one of caption, conversations and messages must be there"
    )
  if len(images) > 1:
    raise ValueError(
      f"it has {len(images)} images; conversations with one image at most are supported"
    )
  # nowhere said: before the user's first words
  if images and all(turn.image_at is None for turn in turns):
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
    turns[first : first + 1] = [
      dataclasses.replace(turn, image_at=0) for turn in turns[first : first + 1]
    ]
  image = _image_file(images[0], folder, image_root) if images else None
  name = item.get("name", item.get("id", images[0] if images else ""))
  return Conversation(image, tuple(turns), str(name), item.get("finish") != "length")


def _image_file(name: str, folder: pathlib.Path, image_root: str | None) -> pathlib.Path:
  roots = [pathlib.Path(image_root).expanduser()] if image_root else [folder, pathlib.Path()]
  for root in roots:
    if (root / name).is_file():
      return root / name
  raise ValueError(
    f"image {name!r} is not a file in {' or '.join(str(root.absolute()) for root in roots)}; "
    "correct it or set image_root to the folder that the paths are relative to"
  )


def _turn(turn: Any, role_key: str, text_key: str) -> Turn:
  """One turn of either layout; an image that it holds is placed, and its sign taken out of the
  text.
  """
  if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str):
    raise ValueError(f"{turn!r:.80} is no turn with {role_key!r} and {text_key!r}")
  if turn[role_key] not in _ROLES:
    raise ValueError(f"{role_key} {turn[role_key]!r} is not one of {', '.join(_ROLES)}")
  role, content = _ROLES[turn[role_key]], turn.get(text_key)
  if isinstance(content, list):  # there, `<image>` is text
    texts, at = [], None
    for part in content:
      if _is_image(part):
        if at is not None:
          raise ValueError(
            "a turn has two images; conversations with one image at most are supported"
          )
        at = sum(map(len, texts))
      else:
        texts.append(
          _text(part.get("text") if isinstance(part, dict) else None, "a part of the content")
        )
    return Turn(role, "".join(texts), at)
  text = _text(content, text_key)
  if role != "user" or PLACE not in text:
    return Turn(role, text)
  before, _, after = text.partition(PLACE)
  if PLACE in after:
    raise ValueError(
      f"a turn has {PLACE} {text.count(PLACE)} times; conversations with one image at most are "
      "supported"
    )
  # the template puts its own around the image
  before, after = before.removesuffix("\n"), after.removeprefix("\n")
  return Turn(role, before + after, len(before))


def _is_image(part: Any) -> bool:
  return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _image_parts(messages: list) -> list[str]:
  """Paths that the content's own parts give."""
  found = []
  for part in (
    p for m in messages if isinstance(m.get("content"), list) for p in m["content"] if _is_image(p)
  ):
    value = part.get("image", part.get("image_url", part.get("path")))
    value = value.get("url") if isinstance(value, dict) else value
    if not isinstance(value, str) or value.startswith(("http:", "https:", "data:")):
      raise ValueError(f"image {value!r:.60} is no path of a file; save it as one")
    found.append(value.removeprefix("file://"))
  return found


def _list(value: Any, key: str) -> list:
  if not isinstance(value, list) or not value:
    raise ValueError(f"{key} is {value!r:.80}, but it must be a list of turns")
  return value


def _text(value: Any, key: str) -> str:
  if not isinstance(value, str):
    raise ValueError(f"{key} is {value!r:.80}, but it must be a text")
  return value
