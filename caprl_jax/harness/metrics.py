"""Numbers of a step -> metrics.jsonl, a progress bar, the log."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import numpy as np
import tqdm

from caprl_jax.atomic_files import write_text
from caprl_jax.json_files import cut, parse_json, shown
from caprl_jax.progress import duration

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
  """Appends one JSON object a step to `workdir/metrics.jsonl`.

  A step that has returned from `write` survives the death of the process. Only one process may
  write: on several hosts that is process 0. Opening repairs a last line that a crash has torn; a
  resumed run then calls `truncate_after(step of the checkpoint)`, because the crash may have come
  after lines that the checkpoint does not know.
  """

  def __init__(self, workdir: str | os.PathLike):
    self.path = pathlib.Path(workdir) / FILE_NAME
    self.path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_metrics(self.path) if self.path.exists() else []
    self._last_step = rows[-1]["step"] if rows else None
    if self.path.exists() and not _ends_in_newline(self.path):
      _replace(self.path, rows)
    self._open()

  def truncate_after(self, step: int) -> int:
    """Drops the lines of all steps after `step`, atomically; returns how many."""
    self._file.close()
    rows = read_metrics(self.path)
    kept = [row for row in rows if row["step"] <= step]
    if len(kept) < len(rows):
      _replace(self.path, kept)
    self._last_step = kept[-1]["step"] if kept else None
    self._open()
    return len(rows) - len(kept)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes the numbers of one step; a number that is not finite becomes null.

    Args:
      step: greater than every step in the file.
      metrics: name (`stage/name`) to a scalar: Python, NumPy or an array of shape ().
    """
    step = int(step)
    if self._last_step is not None and step <= self._last_step:
      raise ValueError(
        f"step {step} cannot follow step {self._last_step} in {self.path}; a resumed run calls "
        "truncate_after(step of its checkpoint) first, a new run needs a new workdir"
      )
    if "step" in metrics:
      raise ValueError(f"metric 'step' of step {step} would hide the step itself; rename it")
    row: dict[str, float | None] = {"step": step}
    row.update((name, _plain(value, name, step)) for name, value in metrics.items())
    self._file.write(json.dumps(row, allow_nan=False) + "\n")
    self._last_step = step

  def amend(self, metrics: Mapping[str, Any]) -> None:
    """Adds numbers to the line of the last step, atomically. Arguments as of `write`."""
    self._file.close()
    rows = read_metrics(self.path)
    row = rows[-1]
    row.update((name, _plain(value, name, row["step"])) for name, value in metrics.items())
    _replace(self.path, rows)
    self._open()

  @property
  def last_step(self) -> int:
    """The last step that has a line; 0 where none has."""
    return self._last_step or 0

  def lacks(self, step: int, prefix: str) -> bool:
    """Whether `step` is the last that has a line, and no name in it begins so."""
    if step != self.last_step or not step:
      return False
    return not any(name.startswith(prefix) for name in read_metrics(self.path)[-1])

  def settle(self) -> None:
    """Closes the file and opens it again: a bucket that is mounted as a folder (gcsfuse) keeps what
    was written when a file is closed. One that is closed stays so."""
    if self._file.closed:
      return
    os.fsync(self._file.fileno())
    self._file.close()
    self._open()

  def close(self) -> None:
    self._file.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()

  def _open(self):
    # Open as long as the run: `close` closes it. Buffered by the line.
    try:
      self._file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    except OSError as error:
      raise ValueError(f"{self.path}: cannot be written: {error.strerror}") from error


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The steps of a `metrics.jsonl`, oldest first. Null (not finite) is None.

  The last line is ignored where a crash has torn it (no newline, no JSON). Any other line that is
  not a JSON object with a `step` raises ValueError with file and line number.
  """
  rows = []
  try:
    lines = pathlib.Path(path).read_bytes().splitlines(keepends=True)
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}; check the path") from error
  for number, line in enumerate(lines, 1):
    try:
      rows.append(_row(line))
    except ValueError as error:
      if number == len(lines) and not line.endswith(b"\n"):
        break
      raise ValueError(
        f"{path}:{number}: {shown(line)} is not a line of metrics ({error}); "
        "delete that line or restore the file"
      ) from error
  return rows


def _row(line: bytes) -> dict[str, Any]:
  row = parse_json(line, "this line")
  if not isinstance(row, dict) or type(row.get("step")) is not int:
    raise ValueError("no JSON object with an integer 'step'")
  for name, value in row.items():
    if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
      raise ValueError(f"{cut(name)} is {shown(value)}: neither a finite number nor null")
  return row


class Progress:
  """How far a loop is, its reward (exponential mean) and the time left.

  A bar where standard error is a terminal; elsewhere (a log file, a batch job) one plain line
  about every ten seconds, and always one for the first and the last step.
  """

  def __init__(
    self,
    total: int,
    initial: int = 0,
    what: str = "train",
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
    every_secs: float = 10.0,
  ):
    """total, initial: steps in all and steps done before this process. The rest is for tests."""
    self.total, self.done, self.what = total, initial, what
    self.reward = None  # exponential mean, None until a finite reward came
    self._stream = sys.stderr if stream is None else stream
    self._clock, self._every_secs = clock, every_secs
    self._step_secs = None
    self._last_time, self._last_line_time = None, None
    self._bar = None
    if self._stream.isatty():
      # Our own time left, not tqdm's: its mean starts with the step that compiles.
      self._bar = tqdm.tqdm(
        total=total,
        initial=initial,
        desc=what,
        file=self._stream,
        dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {postfix}",
      )

  def update(self, reward: float | None = None) -> None:
    """One more step is done. A reward that is None or not finite leaves the mean as it is."""
    self.done += 1
    now = self._clock()
    if self._last_time is not None:  # the first step compiles: its time says nothing about the next
      self._step_secs = _blend(self._step_secs, now - self._last_time)
    self._last_time = now
    if reward is not None and math.isfinite(reward):
      self.reward = _blend(self.reward, float(reward))
    if self._bar is not None:
      self._bar.set_postfix_str(self._numbers(), refresh=False)
      self._bar.update(1)
    elif self._line_is_due(now):
      self._last_line_time = now
      line = f"{self.what} {self.done}/{self.total} {self._numbers()}"
      print(line.rstrip(), file=self._stream, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()

  def _line_is_due(self, now: float) -> bool:
    if self._last_line_time is None or self.done >= self.total:
      return True
    return now - self._last_line_time >= self._every_secs

  def _numbers(self) -> str:
    words = []
    if self.reward is not None:
      words.append(f"reward {self.reward:.3f}")
    if self._step_secs is not None:
      words.append(f"{self._step_secs:.2f} s/step")
      if self.done < self.total:
        words.append(f"{duration(self._step_secs * (self.total - self.done))} left")
    return ", ".join(words)


class StageClock:
  """Wall seconds a stage: `with clock("gate"): ...`; `clock.secs` is {"gate": 12.3}.

  A stage entered again adds to its seconds, also where it ends in an exception. jax computes
  asynchronously: block on the results before the stage ends, or the next stage pays.
  """

  def __init__(
    self, secs: Mapping[str, float] | None = None, *, clock: Callable[[], float] = time.monotonic
  ):
    """secs: what earlier processes of this run have used, from its summary."""
    self.secs = dict(secs or {})
    self._clock = clock

  @contextlib.contextmanager
  def __call__(self, stage: str) -> Iterator[None]:
    start = self._clock()
    try:
      yield
    finally:
      self.secs[stage] = self.secs.get(stage, 0.0) + self._clock() - start


def _plain(value: Any, name: str, step: int) -> int | float | None:
  array = np.asarray(value)
  if array.shape != () or not np.can_cast(array.dtype, np.float64, "same_kind"):
    raise ValueError(
      f"metric {name!r} of step {step} is {value!r}, not a real scalar; reduce it "
      "to one number in the step, or leave it to samples/"
    )
  if np.issubdtype(array.dtype, np.bool_) or np.issubdtype(array.dtype, np.integer):
    return int(array)
  number = float(array)
  return number if math.isfinite(number) else None


def _ends_in_newline(path: pathlib.Path) -> bool:
  data = path.read_bytes()
  return not data or data.endswith(b"\n")


def _replace(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """Atomic: a crash leaves the old file or the new one."""
  write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _blend(mean: float | None, value: float, weight: float = 0.1) -> float:
  return value if mean is None else (1 - weight) * mean + weight * value
