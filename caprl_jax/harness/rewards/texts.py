"""Captions as ids, rows -> what a reward function of texts makes of them, on the host.

It is called as TRL calls its reward functions: with keyword lists that have an item for each
caption, the captions of an image next to each other.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from caprl_jax.data.readers.jsonl import plain_questions
from caprl_jax.data.rows import QARow, read_image
from caprl_jax.errors import UserError
from caprl_jax.harness.rewards.function import CustomReward
from caprl_jax.hub.tokenizer import Tokenizer
from caprl_jax.json_files import shown

log = logging.getLogger("caprl_jax.harness.rewards.texts")

ACCURACY = "accuracy"  # what a judge answered right
# The columns beside each row's facts. `image` is opened only for a function that names it.
COLUMNS = (
  "prompts",
  "completions",
  "completion_ids",
  "name",
  ACCURACY,
  "questions",
  "facts",
  "image",
)
SHOWN_WARNINGS = 20
_SEARCH_SECS = 10.0  # at most, for the caption that a function fails on


class TextReward:
  """Calls a reward function of texts.

  Args:
    rows: that `row_B` counts.
    tokenizer: the captioner's. prompt: what the captioner is asked.
    judged: there is a judge; without one, there is no column `accuracy`.

  Raises UserError for a parameter without a default that no column is named as.
  """

  def __init__(
    self,
    custom: CustomReward,
    rows: Sequence[QARow],
    tokenizer: Tokenizer,
    prompt: str,
    judged: bool = True,
  ):
    self.custom, self.rows, self.tokenizer, self.prompt = custom, rows, tokenizer, prompt
    self.facts = tuple(dict.fromkeys(name for row in rows for name in row.facts or {}))
    needed = [
      one.name
      for one in inspect.signature(custom.function).parameters.values()
      if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ]
    columns = [name for name in COLUMNS if judged or name != ACCURACY]
    known = (*columns, *self.facts)
    if absent := [name for name in needed if name not in known]:
      only = "" if judged or ACCURACY not in absent else f"; {ACCURACY} is a judge's (judge.source)"
      raise UserError(
        f"reward.custom = {custom.spec} wants {', '.join(absent)}, which these rows do not have "
        f"(columns: {', '.join(known)}){only}"
      )
    self._warnings = 0

  def __call__(
    self,
    row_B: np.ndarray,
    tokens_BGT: np.ndarray,
    valid_BGT: np.ndarray,
    accuracy_BG: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray]:
    """The reward of each caption and whether there is one, float32 and bool [B, G].

    Args:
      accuracy_BG: the judge's, NaN where it could not be read or there is none.

    Raises UserError, which names the row, for what the function raises, another number of values
    than of captions, and a value that is neither a number nor None.
    """
    B, G, _ = tokens_BGT.shape
    rows = [self.rows[int(index)] for index in row_B]
    columns = self._columns(rows, tokens_BGT, valid_BGT, accuracy_BG)
    owners = [row for row in rows for _ in range(G)]
    try:
      values = self._call(columns)
    except Exception as error:  # noqa: BLE001  a function of the user's raises anything
      self.custom.fail(error, f"; {self._blamed(columns, owners, error)}")
    found = self._numbers(values, owners, columns["completions"])
    return found.reshape(B, G), np.isfinite(found).reshape(B, G)

  def _columns(
    self,
    rows: Sequence[QARow],
    tokens_BGT: np.ndarray,
    valid_BGT: np.ndarray,
    accuracy_BG: np.ndarray,
  ) -> dict[str, list[Any]]:
    """All that the function may be given, and is given where it names it or takes everything."""
    G = tokens_BGT.shape[1]
    ids = [tokens_BGT[place][valid_BGT[place]].tolist() for place in np.ndindex(len(rows), G)]
    each = lambda values: [value for value in values for _ in range(G)]
    facts = [dict(row.facts or {}) for row in rows]
    made = {name: each([one.get(name) for one in facts]) for name in self.facts}
    made |= {
      "prompts": [self.prompt] * len(ids),
      "completions": [self.tokenizer.decode(one) for one in ids],
      "completion_ids": ids,
      "name": each([row.name for row in rows]),
      "accuracy": [None if np.isnan(one) else float(one) for one in accuracy_BG.ravel()],
      "questions": each([plain_questions(row) for row in rows]),
      "facts": each(facts),
    }
    if "image" in self.custom.names:
      made["image"] = each([read_image(row) for row in rows])
    return made

  def _call(self, columns: Mapping[str, list[Any]]) -> Any:
    names = self.custom.names
    given = {
      name: list(column)
      for name, column in columns.items()
      if self.custom.takes_all or name in names
    }
    found = self.custom.function(**given)
    return asyncio.run(found) if inspect.iscoroutine(found) else found

  def _blamed(
    self, columns: Mapping[str, list[Any]], owners: Sequence[QARow], error: Exception
  ) -> str:
    """The first caption on which the function fails in the same way when it is given that one
    alone; without one, the rows of the batch."""
    until = time.monotonic() + _SEARCH_SECS
    for number, row in enumerate(owners):
      if time.monotonic() > until:
        break
      try:
        self._call({name: column[number : number + 1] for name, column in columns.items()})
      except type(error):
        text = columns["completions"][number]
        return f"it fails on a caption of row {shown(row.name)}: {shown(text)}"
      except Exception:  # noqa: BLE001  another one: not what is looked for
        continue
    names = list(dict.fromkeys(row.name for row in owners))
    return f"it was given captions of the rows {', '.join(map(shown, names[:8]))}" + (
      f" and {len(names) - 8} more" if len(names) > 8 else ""
    )

  def _numbers(
    self, values: Any, owners: Sequence[QARow], completions: Sequence[str]
  ) -> np.ndarray:
    """float32 [N]: NaN where there is no reward."""
    spec = self.custom.spec
    try:
      values = list(values)
    except TypeError as error:
      raise UserError(
        f"reward.custom = {spec} returned {shown(values)}; it must return a list with a number or "
        "None for each caption"
      ) from error
    if len(values) != len(owners):
      raise UserError(
        f"reward.custom = {spec} returned {len(values)} values for {len(owners)} captions (of the "
        f"rows from {shown(owners[0].name)} to {shown(owners[-1].name)}); it must return one for "
        "each, in order"
      )
    found = np.full(len(values), np.nan, np.float32)
    for i, value in enumerate(values):
      if value is None:
        continue
      try:
        if isinstance(value, (str, bytes)):
          raise TypeError("a text")
        found[i] = float(value)
      except (TypeError, ValueError) as error:
        raise UserError(
          f"reward.custom = {spec} returned {shown(value)} for a caption of row "
          f"{shown(owners[i].name)}: {shown(completions[i])}; a reward is a number, or None"
        ) from error
      if not np.isfinite(found[i]):
        found[i] = np.nan
        self._warn(value, owners[i], completions[i])
    return found

  def _warn(self, value: Any, row: QARow, text: str) -> None:
    self._warnings += 1
    if self._warnings > SHOWN_WARNINGS:
      return
    log.warning(
      "reward.custom = %s returned %s for a caption of row %s, which is left out as for None: %s%s",
      self.custom.spec,
      value,
      shown(row.name),
      shown(text),
      "; further ones are counted in reward/unscored" if self._warnings == SHOWN_WARNINGS else "",
    )
