"""A trace of some of a run's steps, and a table of where their time went."""

import collections
import glob
import logging
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax

from caprl_jax.atomic_files import write_text

log = logging.getLogger("caprl_jax.harness.training.profile")
SHOWN = 25  # operations in the table


class Profile:
  """Traces the calls of a step from the first to the last of `steps` into `folder`, for TensorBoard
  or ui.perfetto.dev; `table.txt` there says which operations took longest.

  Calls are counted from 1, which compiles. No steps: nothing is traced.
  """

  def __init__(self, steps: tuple[int, ...], folder: pathlib.Path):
    self.first, self.last = (steps[0], steps[-1]) if steps else (0, 0)
    self.folder, self.calls, self.begun = folder, 0, 0

  def of(self, step_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`step_fn`, traced."""
    if not self.first:
      return step_fn

    def run(*given: Any) -> Any:
      self.calls += 1
      if self.calls == self.first:
        jax.block_until_ready(given)  # the step before is not part of it
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would be most of the trace
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self.begun = self.calls
      out = step_fn(*given)
      if self.begun:
        jax.block_until_ready(out)  # a trace ends with what has run
      if self.calls == self.last:
        self.close()
      return out

    return run

  def close(self) -> None:
    """Writes the trace and its table, where one was begun: at its last step, or where the run ends
    before."""
    if not self.begun:
      return
    steps, self.begun = self.calls - self.begun + 1, 0
    jax.profiler.stop_trace()
    table = time_table(self.folder, steps)
    write_text(self.folder / "table.txt", table)
    log.info("%d steps in %s:\n%s", steps, self.folder, table)


def time_table(folder: pathlib.Path, steps: int) -> str:
  """The operations of the newest trace in `folder` that took longest, in milliseconds a step. On a
  CPU operations run in several threads at once, and their times add up."""
  found = sorted(glob.glob(str(folder / "plugins" / "profile" / "*" / "*.xplane.pb")))
  if not found:
    return "the profiler left no trace\n"
  spent = _operations(jax.profiler.ProfileData.from_file(found[-1]))
  total = sum(spent.values())
  if not total:
    return f"the trace has no operation of a device: {found[-1]}\n"
  lines = [f"{'ms a step':>10} {'share':>6}  operation"]
  for name, nanoseconds in spent.most_common(SHOWN):
    lines.append(f"{nanoseconds / 1e6 / steps:>10.1f} {nanoseconds / total:>6.1%}  {name}")
  lines.append(f"{total / 1e6 / steps:>10.1f} {'':>6}  all operations")
  return "\n".join(lines) + "\n"


def _operations(data: Any) -> collections.Counter[str]:
  """Nanoseconds by operation: of accelerators where there are some, else of the CPU's threads.
  Numbers at the end of names ("fusion.12") are left out, so that copies of one operation count
  together."""
  planes = list(data.planes)
  devices = [plane for plane in planes if re.match(r"/device:(TPU|GPU)", plane.name)]
  spent: collections.Counter[str] = collections.Counter()
  for plane in devices or planes:
    for line in plane.lines:
      if devices and "XLA Ops" not in line.name and not line.name.startswith("Stream"):
        continue
      for event in line.events:
        # Operations have small letters; a loop's time is that of the operations in it.
        if re.match(r"(?!while)[a-z][a-z0-9_-]*(\.\d+)*$", event.name):
          spent[re.sub(r"(\.\d+)+$", "", event.name)] += event.duration_ns
  return spent
