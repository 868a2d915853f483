"""Work that takes minutes -> where it is and when it ends: a bar on a terminal, lines in a log."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger("caprl_jax.progress")

Item = TypeVar("Item")

EVERY_SECS = 30.0  # between two lines; work that is shorter has none


class Bar:
  """How much of a piece of work is done. Where standard error is no terminal the log says it, every
  half a minute; work that ends sooner leaves no trace. Inside `with` the log also says so once a
  minute while nothing moves, as while the first part compiles.

  Args:
    total: how much there is; None: unknown.
    what: names the work.
    unit: of what is counted.
    done: before this process began.
    shown: False counts only, as in all processes but the first.
  """

  def __init__(self, total: int | None, what: str, unit: str, *, done: int = 0, shown: bool = True):
    self.total, self.what = total, what
    self.units = unit + ("es" if unit.endswith(("s", "x", "ch", "sh")) else "s")
    self.done, self.before, self.shown = done, done, shown
    self.began = self.said = self.moved = time.monotonic()
    self._ended = threading.Event()
    self._bar = tqdm(
      total=total,
      initial=done,
      desc=what,
      unit=unit,
      leave=False,
      delay=2,
      disable=not (shown and sys.stderr.isatty()),
    )

  def update(self, count: int = 1) -> None:
    """So much more is done."""
    self.done += count
    self._bar.update(count)
    self.moved = now = time.monotonic()
    if self.shown and self._bar.disable and now - self.said >= EVERY_SECS:
      self.said = now
      log.info("%s", self._line(now))

  def _line(self, now: float) -> str:
    rate = (self.done - self.before) / (now - self.began)
    pace = f"{rate:.1f} per second" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"
    if self.total is None:
      return f"{self.what}: {self.done:,} {self.units}, {pace}"
    left = duration((self.total - self.done) / max(rate, 1e-9))
    return f"{self.what}: {self.done:,} of {self.total:,} {self.units}, {pace}, {left} left"

  def _watch(self) -> None:
    """Says where nothing moves; ends with the work."""
    said = self.moved
    while not self._ended.wait(EVERY_SECS):
      now = time.monotonic()
      if now - max(said, self.moved) >= 1.5 * EVERY_SECS:
        said = now
        of = "" if self.total is None else f" of {self.total:,}"
        still = duration(now - self.moved)
        log.info("%s: %s%s %s, no more for %s", self.what, f"{self.done:,}", of, self.units, still)

  def __enter__(self) -> "Bar":
    if self.shown:
      threading.Thread(target=self._watch, name="progress", daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self._ended.set()
    self._bar.close()


def counted(
  items: Iterable[Item], what: str, unit: str, total: int | None = None, *, shown: bool = True
) -> Iterator[Item]:
  """The items, with a `Bar` that counts them as they are done with."""
  if total is None and hasattr(items, "__len__"):
    total = len(items)  # type: ignore[arg-type]  as just asked
  with Bar(total, what, unit, shown=shown) as bar:
    for item in items:
      yield item
      bar.update()


@contextlib.contextmanager
def going_on(what: str) -> Iterator[None]:
  """Around work of which nothing can be counted, such as compiling: the log says every half a
  minute that it goes on, and for how long it has."""
  ended, began = threading.Event(), time.monotonic()

  def say() -> None:
    while not ended.wait(EVERY_SECS):
      log.info("%s, for %s so far", what, duration(time.monotonic() - began))

  thread = threading.Thread(target=say, name="progress", daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()


def duration(secs: float) -> str:
  """Seconds as people say them."""
  if secs < 90:
    return f"{secs:.0f} s"
  return f"{secs / 60:.0f} min" if secs < 5400 else f"{secs / 3600:.1f} h"


def ends_at(secs: float) -> str:
  """When work ends that takes so many seconds more: the hour, and the day if it is another."""
  now = time.time()
  then = now + min(secs, 10 * 365 * 86400)
  same_day = time.localtime(now)[:3] == time.localtime(then)[:3]
  return time.strftime("ends %H:%M" if same_day else "ends %a %d %b %H:%M", time.localtime(then))
