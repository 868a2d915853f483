"""Rows that cannot be used, of all sources of a run -> one list, one decision: refuse or drop."""

import dataclasses
import json
import logging
import pathlib
import threading
from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

import jax

from caprl_jax.atomic_files import write_text
from caprl_jax.data.rows import BadRow, BadRows
from caprl_jax.json_files import listed

log = logging.getLogger("caprl_jax.data")

SHOWN = 20  # in messages and in the log; the file holds all
ROOM = 4000  # characters that the shown ones may take

Row = TypeVar("Row")


class BadRowList:
  """Takes note of bad rows while a run reads and checks its rows, and decides about them in
  `settle`, so that one message lists all of them.

  Every process has the same list, but for rows that fail later (`late`), each in the process whose
  turn it was. The first one writes the list; others write what failed there into files of their
  own, bad_rows.1.jsonl beside bad_rows.jsonl.

  Args:
    rule: "refuse" ends the run with an error, "drop" goes on without them.
    path: the file that lists them all, one JSON object with `where`, `message` and `reason` per
      line; None writes none. There is no such file where there is no bad row.
    key: of the config, for messages.
  """

  def __init__(self, rule: BadRows, path: pathlib.Path | None, key: str = "bad_rows"):
    self.rule, self.path, self.key = rule, path, key
    self.rows: list[BadRow] = []
    self._seen = 0  # rows, good and bad
    self._settled = 0  # bad rows that `settle` has told of
    self._late: dict[tuple[str, str], BadRow] = {}
    self._lock = threading.Lock()
    self._all = [self]  # whose rows the file lists

  def another(self, rule: BadRows, key: str) -> "BadRowList":
    """A list with a rule of its own, for other rows of the same run, in the same file."""
    made = BadRowList(rule, self.path, key)
    made._all = self._all
    made._all.append(made)
    return made

  def keep(self, found: Iterable[Row | BadRow]) -> list[Row]:
    """The good rows; the bad ones are noted. Raises ValueError, as `settle`, where there are only
    bad ones."""
    good: list[Row] = []
    bad = 0
    for row in found:
      self._seen += 1
      if isinstance(row, BadRow):
        self.rows.append(row)
        bad += 1
      else:
        good.append(row)
    if bad and not good:
      self._write()
      raise ValueError(self._listed(f"none of {bad} rows can be used"))
    return good

  def check(self, checked: Iterable[Row | BadRow]) -> list[Row]:
    """As `keep`, of rows that `keep` has counted already."""
    before = self._seen
    good = self.keep(checked)
    self._seen = before
    return good

  def note(self, rows: Iterable[BadRow]) -> None:
    """Adds bad rows that `keep` has counted already."""
    self.rows += rows

  def settle(self, what: str = "rows", of: int | None = None) -> None:
    """Says what was found since the last time: one line in the log where bad rows are dropped.

    Args:
      of: how many there were, where other things are counted than `keep` has seen.

    Raises:
      ValueError: there are bad rows, and they are to be refused. It shows the first of them.
    """
    new, of = self.rows[self._settled :], of or self._seen
    self._settled = len(self.rows)
    self._write()
    if not new:
      return
    if self.rule == "refuse":
      if len(set(self.rows)) == 1:
        raise ValueError(f"{self.rows[0].message} ({self.key}=drop leaves it out)")
      bad = f"{len(self.rows)} bad {what} of {of}"
      raise ValueError(self._listed(f"{bad} ({self.key}=drop leaves them out)"))
    for row in [*dict.fromkeys(new)][:SHOWN]:
      log.warning("dropped: %s", row.message)
    listed = f"; all are in {self.path}" if self.path else ""
    log.warning(
      "dropped %d of %d %s (%s)%s (%s=drop)",
      len(new),
      of,
      what,
      reasons_text(new),
      listed,
      self.key,
    )

  def late(self, row: BadRow) -> None:
    """A row that failed after the check, when it was to be used: dropped, and noted once. May be
    called by several threads.

    Raises:
      ValueError: it is to be refused.
    """
    if self.rule == "refuse":
      raise ValueError(f"{row.message} ({self.key}=drop leaves it out)")
    with self._lock:
      if (row.where, row.message) in self._late:
        return
      self._late[row.where, row.message] = row
      self.rows.append(row)
      self._settled = len(self.rows)
      self._write()
    log.warning("dropped, though it could be read when the run began: %s", row.message)

  def _listed(self, first: str) -> str:
    """The first of the bad rows below a line that says what is wrong."""
    rows = [*dict.fromkeys(self.rows)]
    shown = listed([row.message for row in rows], SHOWN, room=ROOM)
    every = f"\n  all of them are in {self.path}" if len(rows) > 1 and self.path else ""
    return f"{first}: {reasons_text(self.rows)}{shown}{every}"

  def _write(self) -> None:
    if self.path is None:
      return
    process = jax.process_index()
    path = self.path.with_name(f"{self.path.stem}.{process}.jsonl") if process else self.path
    if process == 0:
      _remove_others(self.path, jax.process_count())
    rows = dict.fromkeys(
      row for some in self._all for row in (some._late.values() if process else some.rows)
    )
    if not rows:
      path.unlink(missing_ok=True)
      return
    # one that two splits have stands there once
    lines = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in rows)
    text = "".join(f"{line}\n" for line in lines)
    write_text(path, text.encode("utf-8", "backslashreplace").decode())


def _remove_others(path: pathlib.Path, count: int) -> None:
  """Takes away what processes of a larger run than this one of `count` have left."""
  for other in path.parent.glob(f"{path.stem}.*.jsonl"):
    number = other.name.removeprefix(f"{path.stem}.").removesuffix(".jsonl")
    if number.isdecimal() and int(number) >= count:
      other.unlink(missing_ok=True)


def reasons_text(rows: Iterable[BadRow]) -> str:
  """How many rows there are of each reason, the most frequent first."""
  counted = Counter(row.reason for row in rows).most_common()
  return ", ".join(f"{reason}: {number}" for reason, number in counted)
