"""A job's units, an image and a prompt each -> results: what is there is kept or joined, prompts
and texts are filled in.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from caprl_jax.data.rows import CaptionRow, failure_reason
from caprl_jax.harness.row_shards import RowResult
from caprl_jax.inference.captioner import CaptionerOutput, NumberedRow, WrittenCaption
from caprl_jax.modes.caption.columns import CAPTION, EXISTING, SHORTENED, Column
from caprl_jax.modes.caption.formats.place import Place
from caprl_jax.modes.caption.formats.texts import text_there
from caprl_jax.modes.caption.inputs import own_caption
from caprl_jax.modes.caption.texts import TextConfig, fill, finished, joined

# Numbered rows -> their captions, batch by batch: `inference.captioner.Captioner`.
Captions = Callable[[Iterable[NumberedRow]], Iterator[list[CaptionerOutput]]]
Results = list[RowResult[CaptionRow]]


@dataclasses.dataclass(frozen=True)
class Captioning:
  """What is done with units. captioner: opens one for a prompt. skip_bad_images: a failed image is
  a row, and does not end the job.
  """

  place: Place
  text: TextConfig
  captioner: Callable[[str], Captions]
  skip_bad_images: bool

  def __call__(self, units: Sequence[tuple[int, CaptionRow]]) -> Iterator[Results]:
    """Results of numbered units, in any order. Raises ValueError at the first one that fails,
    unless such are skipped.
    """
    by_prompt: dict[str, list[tuple[int, CaptionRow]]] = collections.defaultdict(list)
    done: Results = []
    for number, row in units:
      column = self._column(number)
      try:
        if self.place.existing == "skip" and (there := self._there(row, column)) is not None:
          done.append(RowResult(number, row, kept(row, there, column), {}))
        else:
          by_prompt[fill(column.prompt, row)].append((number, row))
      except ValueError as error:
        done.append(self._failed(number, row, error))
    if done:
      yield done
    for prompt, numbered in by_prompt.items():
      for batch in self.captioner(prompt)(numbered):
        yield [self._result(output) for output in batch]

  def _column(self, number: int) -> Column:
    return self.place.columns[number % len(self.place.columns)]

  def _there(self, row: CaptionRow, column: Column) -> str | None:
    if self.place.kind != "txt":
      return own_caption(row, column)
    if self.place.existing in ("append", "prepend"):
      return text_there(self.place, row, column)
    try:
      return text_there(self.place, row, column)
    except ValueError:
      return ""  # it stays as it is, whatever it holds

  def _result(self, output: CaptionerOutput) -> RowResult[CaptionRow]:
    number, row = output.number, output.row
    if output.error is not None:
      return self._failed(number, row, output.error)
    try:
      return RowResult(number, row, self._row(row, self._column(number), output), output.about())
    except ValueError as error:
      return self._failed(number, row, error)

  def _row(self, row: CaptionRow, column: Column, output: CaptionerOutput) -> dict[str, Any]:
    found = [self._finished(caption, row) for caption in output.captions]
    texts, tokens, ends = (
      [text for text, _, _ in found],
      [t for _, t, _ in found],
      [e for *_, e in found],
    )
    if self.place.existing in ("append", "prepend") and (old := self._there(row, column)):
      texts = joined(old, texts, self.place.existing, self.text.separator)
      if len(texts) > len(tokens):  # it is one more
        at = 0 if self.place.existing == "append" else len(tokens)
        tokens.insert(at, [])
        ends.insert(at, EXISTING)
    several = column.captions > 1
    return {
      "image": row.name,
      CAPTION: texts if several else texts[0],
      "tokens": tokens if several else tokens[0],
      "finish": ends if several else ends[0],
    }

  def _finished(self, caption: WrittenCaption, row: CaptionRow) -> tuple[str, list[int], str]:
    text, shortened = finished(caption.text, row, self.text)
    return text, caption.tokens, SHORTENED if shortened else caption.finish

  def _failed(self, number: int, row: CaptionRow, error: ValueError) -> RowResult[CaptionRow]:
    if not self.skip_bad_images:
      raise ValueError(f"{error} (caption.skip_bad_images=True records it and goes on)") from error
    about = {"reason": failure_reason(error)}
    return RowResult(number, row, {"image": row.name, "error": str(error)}, about)


def kept(row: CaptionRow, text: str, column: Column) -> dict[str, Any]:
  """The unit of a caption that was there."""
  several = column.captions > 1
  return {
    "image": row.name,
    CAPTION: [text] if several else text,
    "tokens": [[]] if several else [],
    "finish": [EXISTING] if several else EXISTING,
  }
