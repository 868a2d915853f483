"""Numbers and samples of a run -> TensorBoard and Weights & Biases.

Extras that a config names: metrics.jsonl and samples/ are written without them. Their packages are
optional and are imported only where a tracker is opened.
"""

import abc
import html
import importlib.util
import json
import logging
import math
import os
import pathlib
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from caprl_jax.atomic_files import write_text

log = logging.getLogger("caprl_jax.harness.trackers")

NAMES = ("tensorboard", "wandb")
WANDB_MODES = ("offline", "online", "disabled")
WANDB_ID_FILE = "wandb_id.txt"
_STAGING = "WANDB_DATA_DIR"
COLUMNS = ("image", "caption", "reward", "advantage", "question", "gold", "chosen", "right")


def check_trackers(names: Sequence[str]) -> None:
  """Raises ValueError for a name that does not exist or comes twice, and where its package is not
  installed.
  """
  for i, name in enumerate(names):
    if name not in NAMES or name in names[:i]:
      fault = "is named twice" if name in NAMES else "does not exist"
      raise ValueError(
        f"trackers = {list(names)}: {name!r} {fault}; choose from {', '.join(map(repr, NAMES))}"
      )
    package = {"tensorboard": "tensorboardX"}.get(name, name)
    if importlib.util.find_spec(package) is None:
      raise _missing(name, ImportError(f"No module named {package!r}"))


def open_trackers(
  names: Sequence[str],
  workdir: pathlib.Path,
  config: dict,
  start_step: int,
  wandb_mode: str = "offline",
  project: str = "caprl_jax",
) -> "list[Tracker]":
  """Opens the trackers that `names` lists, each at most once. On several hosts only process 0 may
  call it.

  Args:
    names: of "tensorboard" and "wandb".
    config: plain values; W&B shows it next to the run.
    start_step: last step that the checkpoint knows, 0 for a new run. TensorBoard forgets all later
      steps. W&B cannot: there a resumed run adds to the same run, and steps that a crash made it
      repeat are drawn twice.
    wandb_mode: "offline" writes below workdir/wandb and touches no network; `wandb sync` uploads
    it.

  Raises:
    ValueError: a name or mode that does not exist, a package that is not installed, or W&B does not
    start.
  """
  check_trackers(names)
  if wandb_mode not in WANDB_MODES:
    raise ValueError(
      f"wandb_mode = {wandb_mode!r}: choose from {', '.join(map(repr, WANDB_MODES))}"
    )
  workdir.mkdir(parents=True, exist_ok=True)
  trackers = []
  try:
    for name in names:
      trackers.append(
        TensorBoard(workdir, start_step)
        if name == "tensorboard"
        else WandB(workdir, config, wandb_mode, project)
      )
  except BaseException:
    for tracker in trackers:
      tracker.close()
    raise
  return trackers


class Tracker(abc.ABC):
  """Takes the numbers and samples of a run.

  Once open it never stops the run: whatever fails in `write`, `samples` or `close` is a warning in
  the log, the first time that this method fails, and is lost to this tracker alone.
  """

  name: str

  def __init__(self):
    self._warned = set()

  def write(self, step: int, numbers: Mapping[str, float | None]) -> None:
    """Takes the numbers of one step. Those that are None or not finite are left out."""
    self._try("numbers", self._write, step, numbers)

  def samples(self, step: int, path: pathlib.Path) -> None:
    """Takes a samples/*.json of `samples.save_samples` as a table with a line a caption and
    question.

    Its columns are `COLUMNS`. "-" was chosen where no option stood out or the question was not
    scored.
    """
    self._try("samples", self._samples, step, path)

  def close(self) -> None:
    """Writes out what is left. Nothing may come after it."""
    self._try("the last numbers", self._close)

  @abc.abstractmethod
  def _write(self, step: int, numbers: Mapping[str, float | None]) -> None:
    """`write`, which may fail."""

  @abc.abstractmethod
  def _samples(self, step: int, path: pathlib.Path) -> None:
    """`samples`, which may fail."""

  @abc.abstractmethod
  def _close(self) -> None:
    """`close`, which may fail."""

  def _try(self, what: str, method: Callable[..., None], *args) -> None:
    try:
      method(*args)
    except Exception as error:  # noqa: BLE001  of any kind: a broken extra must not cost a run
      if what not in self._warned:
        self._warned.add(what)
        log.warning(
          "%s did not take %s (%s: %s); the run goes on, metrics.jsonl and samples/ have "
          "all, and this is said only once",
          self.name,
          what,
          type(error).__name__,
          error,
        )


class TensorBoard(Tracker):
  """Event files in workdir/tensorboard.

  Written on this thread and flushed each time, by the parts of tensorboardX below its
  SummaryWriter. That one writes on a thread which a full disk kills; from the eleventh event on it
  then blocks the run for good (2.6.5).
  """

  name = "tensorboard"

  def __init__(self, workdir: pathlib.Path, start_step: int):
    super().__init__()
    try:
      from tensorboardX import summary
      from tensorboardX.event_file_writer import EventsWriter
      from tensorboardX.proto import event_pb2 as proto
    except ImportError as error:
      raise _missing(self.name, error) from error
    # Generated code: its names are made at import, where no type checker sees them.
    self._summary, self._event = summary, getattr(proto, "Event")  # noqa: B009
    session = getattr(proto, "SessionLog")  # noqa: B009
    folder = workdir / "tensorboard"
    folder.mkdir(exist_ok=True)
    # Readers take the files by name, which holds the second: the suffix tells files of one second
    # apart.
    self._file = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
    # A start makes readers drop all events from its step on, also those of a run that died before
    # its first checkpoint.
    self._add(start_step + 1 if start_step else 0, session_log=session(status=session.START))

  def _write(self, step, numbers):
    values = [
      self._summary.scalar(name, number).value[0] for name, number in _finite(numbers).items()
    ]
    self._add(step, summary={"value": values})

  def _samples(self, step, path):
    stage, rows = _read_samples(path)
    for i, row in enumerate(rows):
      pixels = np.asarray(Image.open(path.parent / row["image"]).convert("RGB"))
      self._add(
        step, summary=self._summary.image(f"samples/{stage}/{i}", pixels, dataformats="HWC")
      )
    self._add(step, summary=self._summary.text(f"samples/{stage}", _markdown(rows)))

  def _close(self):
    if self._file is not None:
      self._file.close()

  def _add(self, step: int, **content) -> None:
    if self._file is None:
      return
    try:
      self._file.write_event(self._event(step=int(step), wall_time=time.time(), **content))
      self._file.flush()
    except OSError:
      self._file = None  # no reader gets past half an event, so nothing can follow it
      raise


class WandB(Tracker):
  """A run of Weights & Biases, local files in workdir/wandb. Its id is kept in workdir, so a
  resumed run is the same.

  W&B's own step counter only grows; so `step` is a number like any other, and the axis of all of
  them. Offline each start has a folder of its own. wandb notes there, from 0.31 on, that it
  resumes; `wandb sync` then makes them one run.
  """

  name = "wandb"

  def __init__(self, workdir: pathlib.Path, config: dict, mode: str, project: str):
    super().__init__()
    if mode == "offline":
      # or it sends telemetry when the run ends, offline too (0.31)
      os.environ["WANDB_ERROR_REPORTING"] = "false"
    try:
      import wandb
    except ImportError as error:
      raise _missing(self.name, error) from error
    self._wandb = wandb
    # Where openai or the like happens to be imported, W&B advertises its tracer for them.
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
    try:
      self._run = wandb.init(
        project=project,
        dir=str(workdir.resolve()),
        mode=mode,  # pyright: ignore[reportArgumentType]  checked by `open_trackers`
        config=config,
        id=_wandb_id(workdir),
        resume="allow",
        reinit="create_new",
        settings=wandb.Settings(console="off", silent=True),
      )
    except wandb.Error as error:
      raise ValueError(
        f"wandb_mode = {mode!r}: W&B does not start: {error} Run `wandb login` "
        "once; or take wandb_mode 'offline' and upload with `wandb sync` "
        "later"
      ) from error
    # W&B stages the pictures of tables, and keeps them until they are uploaded, in the home
    # directory.
    self._stages = _STAGING not in os.environ
    if self._stages:
      os.environ[_STAGING] = str(workdir.resolve() / "wandb")
    self._run.define_metric("step")
    self._run.define_metric("*", step_metric="step")
    log.info("W&B run %s, %s, below %s", self._run.id, mode, workdir / "wandb")

  def _write(self, step, numbers):
    self._run.log({**_finite(numbers), "step": int(step)})

  def _samples(self, step, path):
    stage, rows = _read_samples(path)
    table = self._wandb.Table(columns=list(COLUMNS))
    for row in rows:
      image = self._wandb.Image(str(path.parent / row["image"]), caption=row["name"])
      for caption, asked in _lines(row):
        for question in asked:
          table.add_data(image, *caption, *question)
    self._run.log({f"samples/{stage}": table, "step": int(step)})

  def _close(self):
    if self._stages:
      os.environ.pop(_STAGING, None)
    self._run.finish()


def _missing(name: str, error: ImportError) -> ValueError:
  return ValueError(
    f"tracker {name!r} needs a package that cannot be imported ({error}); `pip "
    f"install -e .[{name}]`, or leave it out of the trackers"
  )


def _wandb_id(workdir: pathlib.Path) -> str:
  path = workdir / WANDB_ID_FILE
  if not path.exists():
    write_text(path, uuid.uuid4().hex[:12] + "\n")
  found = path.read_text(encoding="utf-8").strip()
  if not re.fullmatch(r"[\w-]{1,64}", found):
    raise ValueError(
      f"{path} holds {found[:80]!r}, not the id of a W&B run; delete it to start a new W&B run"
    )
  return found


def _finite(numbers: Mapping[str, float | None]) -> dict[str, float]:
  return {
    name: float(number)
    for name, number in numbers.items()
    if number is not None and math.isfinite(number)
  }


def _read_samples(path: pathlib.Path) -> tuple[str, list[dict[str, Any]]]:
  content = json.loads(path.read_text(encoding="utf-8"))
  return content["stage"], content["rows"]


def _lines(row: Mapping[str, Any]) -> Iterator[tuple[tuple, list[tuple]]]:
  """For each caption of an image its three columns, and for each question that it was asked the
  other four.
  """
  for caption in row["captions"]:
    asked = []
    for answer in caption["answers"]:
      question, chosen = row["questions"][answer["question"]], answer["choice"]
      options = question["options"]
      asked.append(
        (
          question["stem"],
          options[question["gold"]],
          "-" if chosen < 0 else options[chosen],
          answer["correct"] if answer["valid"] else None,
        )
      )
    yield (caption["text"], caption["reward"], caption.get("advantage")), asked or [(None,) * 4]


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """A table with a line a caption and question; image and caption stand in the first line of a
  caption only.
  """
  lines = [COLUMNS, ("---",) * len(COLUMNS)]
  for row in rows:
    for caption, asked in _lines(row):
      for i, question in enumerate(asked):
        lines.append(
          [*(_cell(x) if i == 0 else "" for x in (row["name"], *caption)), *map(_cell, question)]
        )
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: str | float | bool | None) -> str:
  """Captions are a model's: none may end its cell or become markup."""
  if value is None:
    return "-"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, str):
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(" ".join(value.split()), quote=False))
  return f"{value:.3f}"
