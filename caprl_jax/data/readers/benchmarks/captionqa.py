"""CaptionQA's data (arXiv 2511.21025) -> benchmark questions, with the options as its authors show
them.

Seen of it: the program that asks (qa.py of bronyayang/CaptionQA, commit f729489) and the hub's
preview of the split `natural` of Borise/CaptionQA. A row is an image: `id` ("nat_001"), `images` (a
list of one), `questions` [{question, choices, answer (the text of a choice), category ["Attribute -
Color"], source}], `domain`, `image_paths`. Not seen: the other splits' columns, and in which order
the split `all` has the domains.
"""

import pathlib
import random
import string
from collections.abc import Iterator
from typing import Any

from caprl_jax import hub_datasets
from caprl_jax.data.json_rows import read_items
from caprl_jax.data.readers.benchmarks.prompts import PLACEHOLDERS, split_at_placeholder
from caprl_jax.data.readers.benchmarks.row import CAPTIONQA, BenchmarkRow
from caprl_jax.data.readers.caprl_parquet import image_column, parquet_files, read_columns
from caprl_jax.data.readers.image_spellings import find_image
from caprl_jax.data.readers.parquet_images import open_parquet, read_pictures
from caprl_jax.data.rows import BadRow, ImageSource
from caprl_jax.json_files import shown
from caprl_jax.scoring.captionqa import gold_of, question_text, shown_options

PREFIX = "captionqa:"  # of a source
HUB = "Borise/CaptionQA"
DOMAINS = ("natural", "document", "ecommerce", "embodiedai")
SOURCES = (
  f"{PREFIX}{'|'.join(DOMAINS)}|all for a split of {HUB} on the hub, {PREFIX}hf:OWNER/NAME:SPLIT "
  f"for another, or {PREFIX}PATH for a copy: a parquet file, a folder or pattern of such, or a "
  ".json or .jsonl of the same rows"
)
_LAYOUT = "CaptionQA's layout has id, images, questions and domain"
_SEED = 0  # of the authors' program

Item = tuple[str, dict[str, Any], ImageSource | ValueError]  # where, its row, its image


def read_captionqa(source: str) -> Iterator[BenchmarkRow | BadRow]:
  """The questions of a source (`SOURCES`, with or without `PREFIX`), in its order.

  Options are shuffled by one generator from the first question to the last, as the authors' program
  does when it is given the same rows: of `all`, that is the four domains in the order of `DOMAINS`.
  A question that its program passes over, because its answer is none of two or more choices, is a
  BadRow, and so is a row without an image that can be found.

  Raises ValueError for a source that is not there or of another layout.
  """
  rng = random.Random(_SEED)
  for where, item, image in _items(source.removeprefix(PREFIX)):
    questions = item.get("questions")
    if not isinstance(questions, list) or not questions:
      yield BadRow(
        where, f"{where}: questions is {shown(questions)}, but it must be a list of them"
      )
      continue
    for number, question in enumerate(questions):
      if isinstance(image, ValueError):
        yield BadRow(where, str(image))
        continue
      at = f"{where}, question {number}"
      try:
        yield _row(item, question, image, f"{item.get('id') or where}, question {number}", at, rng)
      except ValueError as error:
        yield BadRow(at, str(error))


def _items(source: str) -> Iterator[Item]:
  if source == "all":
    for domain in DOMAINS:
      yield from _items(domain)
    return
  if source in DOMAINS:
    source = f"hf:{HUB}:{source}"
  path = pathlib.Path(source).expanduser()
  if source.startswith("hf:"):
    yield from _parquet_items(hub_datasets.split_files(source))
  elif path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
    yield from _json_items(path)
  elif path.suffix.lower() == ".parquet" or path.is_dir():
    yield from _parquet_items(parquet_files(source))
  else:
    raise ValueError(f"{PREFIX}{shown(source)} is not known; it may be {SOURCES}")


def _parquet_items(files: list[pathlib.Path]) -> Iterator[Item]:
  for path in files:
    with open_parquet(path) as file:
      column = image_column(file, path, ("questions",), _LAYOUT)
      columns = [n for n in ("id", "questions", "domain") if n in file.schema_arrow.names]
      pictures = read_pictures(file, path, column)
      for number, (row, picture) in enumerate(
        zip(read_columns(file, path, columns), pictures, strict=True)
      ):
        where = f"{path}, row {number}"
        problem = ValueError(f"{where}: {picture.problem}") if picture.problem else None
        yield where, row, problem or picture.source


def _json_items(path: pathlib.Path) -> Iterator[Item]:
  empty = True
  for where, item in read_items(path):
    empty = False
    if not isinstance(item, dict):
      said = (
        item.message if isinstance(item, BadRow) else f"{where} is {shown(item)}, not an object"
      )
      yield where, {"questions": [{}]}, ValueError(said)
      continue
    value = next((item[key] for key in ("image", "images", "image_paths") if item.get(key)), None)
    try:
      yield where, item, find_image(value, [path.parent], where).image
    except ValueError as error:
      yield where, item, error
  if empty:
    raise ValueError(f"{path}: no rows; {_LAYOUT}")


def _row(
  item: dict[str, Any],
  question: Any,
  image: ImageSource,
  name: str,
  where: str,
  rng: random.Random,
) -> BenchmarkRow:
  asked = question if isinstance(question, dict) else {}
  stem, choices, answer = (asked.get(key) for key in ("question", "choices", "answer"))
  texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
  if not (isinstance(stem, str) and stem.strip() and texts and isinstance(answer, str)):
    raise ValueError(
      f"{where}: question, choices and answer must be a text, texts and a text, not "
      f"{shown(question)}"
    )
  gold = gold_of(choices, answer)
  if gold is None or not 2 <= len(choices) < len(string.ascii_uppercase):
    raise ValueError(
      f"{where}: the answer {shown(answer)} is none of two or more choices {shown(choices)}, and "
      "the benchmark does not ask it"
    )
  shuffled = shown_options(stem, choices, gold, rng)
  prompt = f"Caption:\n{PLACEHOLDERS[1]}\n\n{question_text(stem, shuffled.texts)}"
  split_at_placeholder(prompt, where)
  letter = string.ascii_uppercase[shuffled.gold]
  return BenchmarkRow(
    image,
    prompt,
    letter,
    shuffled.texts,
    CAPTIONQA,
    name,
    _kind(item, asked),
    stem,
    cannot=shuffled.cannot,
  )


def _kind(item: dict[str, Any], question: dict[str, Any]) -> str:
  """The domain and the first part of the question's first category: "natural: Attribute"."""
  category = question.get("category")
  category = category[0] if isinstance(category, list) and category else category
  top = category.split(" - ")[0].strip() if isinstance(category, str) else ""
  domain = item.get("domain")
  return ": ".join(part for part in (domain, top) if isinstance(part, str) and part)
