"""Name of a dataset -> rows."""

import pathlib

from caprl_jax.data import jsonl, rows as rows_lib
from caprl_jax.data.easy_vqa import read_easy_vqa


def read_qa_rows(source: str, seed: int, max_rows: int | None = None) -> list[rows_lib.QARow]:
  """Reads and checks images with questions.

  Args:
    source: `easy_vqa:train`, `easy_vqa:test`, or a .jsonl file (`jsonl.read_jsonl`).
    seed: of what a reader draws (distractors).
    max_rows: keeps the first rows only.

  Raises:
    ValueError: an unknown source, or what `rows.check_rows` refuses.
  """
  if source.startswith("easy_vqa:"):
    found = read_easy_vqa(source.removeprefix("easy_vqa:"), seed)
  elif source.endswith(".jsonl"):
    found = jsonl.read_jsonl(pathlib.Path(source))
  else:
    raise ValueError(f"data source {source!r} is not known; use easy_vqa:train, easy_vqa:test or a .jsonl file")
  found = found[:max_rows]
  rows_lib.check_rows(found, source)
  return found


def read_caption_rows(source: str) -> list[rows_lib.CaptionRow]:
  """Reads images with captions from a .jsonl file (`jsonl.read_caption_jsonl`)."""
  if not source.endswith(".jsonl"):
    raise ValueError(f"caption source {source!r} is not known; use a .jsonl file of image and caption")
  return jsonl.read_caption_jsonl(pathlib.Path(source))
