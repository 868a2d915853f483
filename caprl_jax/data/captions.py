"""Captions, and templates of facts -> the texts that a captioner is taught, as token ids."""

import string
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from caprl_jax.data.rows import QARow
from caprl_jax.data.usable_rows import Check, ImageFacts, RowError
from caprl_jax.hub.tokenizer import Tokenizer


def caption_ids(
  tokenizer: Tokenizer, row, caption: str, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
  """Ids of a caption of `row` with its end token, padded to int32 [max_tokens], and which are no
  padding. Raises RowError for one that is too long.
  """
  ids = [*tokenizer.encode_plain(caption), tokenizer.end_ids[0]]
  if len(ids) > max_tokens:
    raise RowError(
      f"row {row.name!r}: its caption has {len(ids)} tokens, more than "
      f"sft.max_tokens = {max_tokens}; raise it or shorten the caption",
      "caption too long",
    )
  padded = np.pad(np.array(ids, np.int32), (0, max_tokens - len(ids)), constant_values=ids[-1])
  return padded, np.arange(max_tokens) < len(ids)


def places(templates: Iterable[str]) -> set[str]:
  """Names of the {fact} places in templates."""
  return {place for template in templates for place in stems(template)}


def stems(template: str) -> dict[str, str]:
  """Each {fact} in a template, and the text before it."""
  names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
  return {name: template[: template.index("{" + name + "}")] for name in names}


def taught(templates: Sequence[tuple[float, str]], row: Any) -> set[str]:
  """All that may be said of a row: its facts in each of the weighted templates, or, without any,
  its caption."""
  return {template.format(**row.facts) for _, template in templates} or {row.caption}


def captions_fit(
  phases: Sequence[Sequence[tuple[float, str]]], tokenizer: Tokenizer, max_tokens: int
) -> Check:
  """A check that all that any phase, with its templates, may teach of a row is short enough."""

  short: set[str] = set()  # texts of templates come again and again

  def check(row: Any, _: ImageFacts) -> None:
    texts = {text for templates in phases for text in taught(templates, row)}
    for caption in sorted(texts - short):
      caption_ids(tokenizer, row, caption, max_tokens)
      short.add(caption)

  return check


def recognition_fits(
  template: str, rows: Sequence[QARow], tokenizer: Tokenizer, max_tokens: int
) -> Check:
  """A check that all that is asked about a row is short enough: each text before a fact, with each
  value that the fact takes among the rows."""
  before = stems(template)
  values = {place: {row.facts[place] for row in rows} for place in before}
  short: set[str] = set()

  def check(row: QARow, _: ImageFacts) -> None:
    texts = {
      stem.format(**row.facts) + value for place, stem in before.items() for value in values[place]
    }
    for text in sorted(texts - short):
      caption_ids(tokenizer, row, text, max_tokens)
      short.add(text)

  return check
