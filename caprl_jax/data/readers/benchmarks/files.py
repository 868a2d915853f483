"""CapRL's evaluation files -> benchmark questions, each with the place where a caption stands for
its image.

The files are internlm/CapRL-Evaluation-Files: json_file/lmm_eval_*.json, with the images in
bench_image_folder.zip. We have their description and the released code that reads them, not the
files. Known: a list of rows {image, prompt, answer}; `prompt` is a full ChatML text, in whose user
turn an image placeholder stands first; stage 2 puts a sentence with the caption in its place.
Assumed, and refused with a message where it does not hold: `image` is a path or a list of messages
with one image (the code hands it to qwen_vl_utils, which takes messages, and resizes the image
within the `min_pixels` and `max_pixels` that stand beside it); `answer` is a text, a number or a
list of such.
"""

import dataclasses
import math
import pathlib
import re
import string
from collections.abc import Iterable, Iterator
from typing import Any

from caprl_jax.data.json_rows import read_items
from caprl_jax.data.readers.benchmarks.images import (
  Finder,
  image_of,
  image_parts,
  open_images,
  pixel_limits,
)
from caprl_jax.data.readers.benchmarks.prompts import (
  PLACEHOLDERS,
  split_at_placeholder,
  split_options,
  user_text,
)
from caprl_jax.data.readers.benchmarks.row import BENCHMARKS, QUESTIONS, BenchmarkRow
from caprl_jax.data.readers.caprl_json import choices_of
from caprl_jax.data.rows import BadRow, QARow
from caprl_jax.json_files import shown


def benchmark_of(path: pathlib.Path) -> str:
  """The benchmark that a file holds, by its exact name. Raises ValueError, with the names there
  are, for another.
  """
  if path.stem not in BENCHMARKS or path.suffix not in (".json", ".jsonl"):
    raise ValueError(
      f"{path}: not the name of a benchmark's file; it must be one of "
      f"{', '.join(f'{stem}.json' for stem in BENCHMARKS)} (or the same as .jsonl)"
    )
  return BENCHMARKS[path.stem]


def read_benchmark(path: pathlib.Path, image_root: pathlib.Path) -> Iterator[BenchmarkRow | BadRow]:
  """The rows of an evaluation file, a JSON list or one row per line, in its order.

  `image_root` is the folder of images or a zip file of it. Image paths are relative to it; paths
  that begin with its name, or are absolute with its name somewhere in them, as another machine
  wrote them, are found too. A row that cannot be used is a BadRow with its place.

  Raises ValueError for a file of another name, one that cannot be read or has no rows, or an
  image_root that is not there.
  """
  benchmark = benchmark_of(path)
  find = open_images(image_root)
  number = -1
  for number, (where, item) in enumerate(read_items(path)):
    if isinstance(item, BadRow):
      yield item
      continue
    try:
      yield _row(item, find, benchmark, f"{benchmark}/{number}", where)
    except ValueError as error:
      yield BadRow(where, str(error))
  if number < 0:
    raise ValueError(f"{path}: no rows")


def from_qa_rows(rows: Iterable[QARow]) -> list[BenchmarkRow]:
  """Plain rows of questions as a benchmark: one row per question, options as lines "A) red", the
  gold's letter.

  The prompt is the placeholder, the stem and the options; the caller adds turns and how to answer.
  Raises ValueError for a question that spells a placeholder itself.
  """
  found = []
  for row in rows:
    for i, question in enumerate(row.questions):
      prompt = "\n".join([PLACEHOLDERS[1], question.stem, *choices_of(question)])
      name = row.name if len(row.questions) == 1 else f"{row.name}, question {i}"
      split_at_placeholder(prompt, f"row {shown(name)}")
      gold = string.ascii_uppercase[question.gold]
      found.append(
        BenchmarkRow(
          row.image,
          prompt,
          gold,
          question.options,
          QUESTIONS,
          name,
          question.kind,
          question.stem,
          facts=row.facts,
        )
      )
  return found


def _row(item: Any, find: Finder, benchmark: str, name: str, where: str) -> BenchmarkRow:
  if not isinstance(item, dict):
    raise ValueError(
      f"{where} is {shown(item)}, but it must be an object with image, prompt and answer"
    )
  missing = [key for key in ("image", "prompt", "answer") if key not in item]
  if missing:
    raise ValueError(f"{where}: no {' and no '.join(missing)}; it has {shown(sorted(item))}")
  prompt = item["prompt"]
  if not isinstance(prompt, str):
    raise ValueError(f"{where}: the prompt is {shown(prompt)}, but it must be a text in ChatML")
  split_at_placeholder(prompt, where)
  gold = _gold(item["answer"], where)
  parts = list(image_parts(item["image"], item))
  image = image_of(item["image"], parts, find, where)
  limits = pixel_limits(parts[0][1], where)
  row = BenchmarkRow(image, prompt, gold, (), benchmark, name, limits=limits)
  whole = user_text(row)
  stem, options = split_options(whole)
  letters = [
    one.strip()
    for one in ((gold,) if isinstance(gold, str) else gold)
    if re.fullmatch(r"\s*[A-Z]\s*", one)
  ]
  if any(letter not in string.ascii_uppercase[: len(options)] for letter in letters):
    stem, options = whole, ()  # not read right; the letter is still a gold
  return dataclasses.replace(row, options=options, stem=stem, years=_years(item))


def _years(item: dict[str, Any]) -> tuple[bool, ...] | None:
  """ChartQAPro's column "Year", YES or NO for each answer; of a conversation, the last."""
  flags = item.get("Year", item.get("year"))
  flags = [flags] if isinstance(flags, (str, bool)) else flags
  if not isinstance(flags, list) or not flags:
    return None
  if item.get("Question Type") == "Conversational":
    flags = flags[-1:]
  return tuple(flag is True or str(flag).strip().casefold() == "yes" for flag in flags)


def _gold(answer: Any, where: str) -> str | tuple[str, ...]:
  golds = answer if isinstance(answer, list) else [answer]
  for gold in golds:
    finite = not isinstance(gold, float) or math.isfinite(gold)  # NaN is pandas' way to say nothing
    text = isinstance(gold, (str, int, float)) and not isinstance(gold, bool) and str(gold).strip()
    if not text or not finite:
      raise ValueError(
        f"{where}: the answer is {shown(answer)}, but it must be a text, a number, or a list of "
        "them"
      )
  if not golds:
    raise ValueError(f"{where}: the list of answers is empty; give one or drop the row")
  return tuple(str(gold) for gold in golds) if isinstance(answer, list) else str(answer)
