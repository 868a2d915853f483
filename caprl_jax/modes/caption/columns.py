"""Several prompts in one pass: a job's units, an image and a prompt each, <-> rows with a column
per prompt.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from caprl_jax.data.rows import CaptionRow
from caprl_jax.harness.row_shards import RowResult

CAPTION = "caption"  # the column of a job with one prompt, and the key of a unit's text
EXISTING = "existing"  # `finish` of a caption that was there
SHORTENED = "shortened"  # `finish` of one that was cut at a sentence


@dataclasses.dataclass(frozen=True)
class Column:
  """name: of the column; prompt: what is asked, which may have {fields}; captions: so many of each
  image, and the column holds a list of them where there are several.
  """

  name: str = CAPTION
  prompt: str = ""
  captions: int = 1

  @property
  def tokens(self) -> str:
    """The column of the captions' token ids."""
    return "tokens" if self.name == CAPTION else f"{self.name}_tokens"

  @property
  def finish(self) -> str:
    """The column that says how the captions ended."""
    return "finish" if self.name == CAPTION else f"{self.name}_finish"

  @property
  def keys(self) -> tuple[str, str, str]:
    return self.name, self.tokens, self.finish


ONE = (Column(),)


class Written(NamedTuple):
  """A caption in a row: its column, text, token ids and how it ended."""

  column: Column
  text: str
  tokens: list[int]
  finish: str


class Units(Sequence):
  """The rows of a job, each so often as there are columns: unit n is of row n // columns and column
  n % columns.
  """

  def __init__(self, rows: Sequence[CaptionRow], columns: int):
    self.rows, self.columns = rows, columns

  def __len__(self) -> int:
    return len(self.rows) * self.columns

  def __getitem__(self, number):
    return self.rows[number // self.columns]


def assembled(
  units: Iterable[RowResult[CaptionRow]], columns: Sequence[Column]
) -> Iterator[RowResult[CaptionRow]]:
  """Rows of units that come in order. A row with a unit that failed has `error`, and the columns
  that did not.
  """
  parts: list[RowResult[CaptionRow]] = []
  for unit in units:
    parts.append(unit)
    if len(parts) == len(columns):
      yield _row(parts, columns)
      parts = []


def _row(parts: list[RowResult[CaptionRow]], columns: Sequence[Column]) -> RowResult[CaptionRow]:
  row: dict[str, Any] = {"image": parts[0].row["image"]}
  about = dict(parts[0].about)
  if any("secs" in part.about for part in parts):
    about["secs"] = sum(part.about.get("secs", 0.0) for part in parts)
  for part, column in zip(parts, columns):
    if "error" in part.row:
      row.setdefault("error", part.row["error"])
      about["reason"] = about.get("reason", part.about.get("reason", "other"))
    else:
      row |= {new: part.row[key] for new, key in zip(column.keys, (CAPTION, "tokens", "finish"))}
  return RowResult(parts[0].number // len(columns), parts[0].source, row, about)


def units_of(row: dict[str, Any], columns: Sequence[Column]) -> list[dict[str, Any] | None]:
  """The units that an output's row was assembled of; None for one that is not in it or not whole.
  Ids and ends that the output's format does not hold are empty, and the caption is one that was
  there.
  """
  found: list[dict[str, Any] | None] = []
  for column in columns:
    text, tokens, finish = (row.get(key) for key in column.keys)
    texts = text if isinstance(text, list) else [text]
    if texts and all(isinstance(one, str) for one in texts):
      several = isinstance(text, list)
      empty: tuple[Any, Any] = (
        ([[]] * len(texts), [EXISTING] * len(texts)) if several else ([], EXISTING)
      )
      unit = {"image": row["image"], CAPTION: text}
      whole = tokens is not None and finish is not None
      found.append(unit | dict(zip(("tokens", "finish"), (tokens, finish) if whole else empty)))
    elif isinstance(row.get("error"), str):
      found.append({"image": row["image"], "error": row["error"]})
    else:
      found.append(None)
  return found


def written(row: dict[str, Any], columns: Sequence[Column]) -> Iterator[Written]:
  """The captions in a row, column by column."""
  for column in columns:
    text, tokens, finish = (row.get(key) for key in column.keys)
    if isinstance(text, list):
      yield from (Written(column, *one) for one in zip(text, tokens, finish))
    elif text is not None:
      yield Written(column, text, tokens, finish)


def texts_of(row: dict[str, Any], column: Column) -> list[str]:
  """The captions of a column."""
  return [one.text for one in written(row, [column])]


def is_kept(row: dict[str, Any], column: Column) -> bool:
  """Whether a column holds what was there and nothing new."""
  found = [one.finish for one in written(row, [column])]
  return bool(found) and all(finish == EXISTING for finish in found)
