"""Tiny runs of a mode, killed again and again with SIGKILL: is the end that of a run that nobody
killed?

  python benchmarks/kills.py --mode train,sft,pretrain,prism,curate --kills 20 [--json FILE]

The same command goes on after each kill until the run is complete. A kill comes at a random time,
at a random moment while a checkpoint is written, or right before a random change of a file in the
workdir: a file that is opened to be written, a folder made or taken away, a rename, so also between
two renames. Then parameters, optimizer moments, the random key, the metrics of each step, captions,
answers and figures must be equal to the bit to those of the run that nobody killed: nothing
skipped, nothing doubled. Prints a table; the exit code is 1 where anything differs.

  --signal TERM     asks the run to stop, at such moments; it saves and ends with code 75
  --damage          half of the kills are followed by damage to the newest checkpoint, where there
                    is an older one: the run goes on from that
  --devices 1,2,4   each start has one of these numbers of devices, and so another mesh (modes train
                    and sft); the same rows and steps are asked for, and numbers that are close

20 kills of each of the five modes take about an hour on two cores, half of it for mode train.
"""

import argparse
import dataclasses
import gc
import importlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# Runs of a moment: compile fast, and once (tests/conftest.py says why only this release).
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  + " --xla_cpu_use_fusion_emitters=false"
  * importlib.metadata.version("jaxlib").startswith("0.10."),
)

MODES = ("train", "sft", "pretrain", "prism", "curate")
# Imported once, before children are forked. None of them starts jax's backend.
MODULES = ("caprl_jax.main", *(f"caprl_jax.modes.{mode}.run" for mode in MODES))
RUN_AGAIN = 75  # the exit code of a run that was asked to stop
DEVICES = ("train", "sft")  # modes whose batches can be split
CLOSE = 2e-3  # of numbers on other meshes: in float32 a sum's order shows in its last digits
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
LIFE = 5  # kills of one run, at most


@dataclasses.dataclass(frozen=True)
class Kill:
  """kind: "time", `delay` seconds after the start; "checkpoint", `delay` seconds after the
  `number`-th checkpoint was begun; "change", right before the `number`-th change of a file."""

  kind: str
  number: int = 0
  delay: float = 0.0


@dataclasses.dataclass
class Whole:
  """What the run that nobody killed was like: its changes of files, checkpoints and seconds."""

  changes: int
  checkpoints: int
  secs: float
  results: dict[str, Any]


class Watcher:
  """Counts what a run does, in its own process, and kills it where `kill` says."""

  def __init__(self, kill: Kill | None, workdir: pathlib.Path, report: int, sent: signal.Signals):
    """report: file descriptor to which a JSON line goes before the end. sent: the signal."""
    self.sent = sent
    self.kill, self.workdir, self.out = kill, str(workdir), report
    self.changes = self.checkpoints = 0
    self.began = time.monotonic()
    self._busy = threading.local()
    if kill and kill.kind == "time":
      self._later(kill.delay)
    sys.addaudithook(self._on_event)
    checkpoints = importlib.import_module("caprl_jax.harness.checkpoints").Checkpoints
    checkpoints.save = self._counted(checkpoints.save)

  def die(self, what: str) -> None:
    self.tell(what)
    os.kill(os.getpid(), self.sent)

  def tell(self, what: str) -> None:
    numbers = {"changes": self.changes, "checkpoints": self.checkpoints}
    secs = time.monotonic() - self.began
    os.write(self.out, (json.dumps({"what": what, "secs": secs, **numbers}) + "\n").encode())

  def _later(self, delay: float) -> None:
    timer = threading.Timer(delay, self.die, ["a moment"])
    timer.daemon = True
    timer.start()

  def _counted(self, save: Callable) -> Callable:
    def counted(checkpoints: Any, state: Any, *args: Any, **more: Any) -> None:
      self.checkpoints += 1
      if self.kill and self.kill.kind == "checkpoint" and self.checkpoints == self.kill.number:
        self._later(self.kill.delay)
      save(checkpoints, state, *args, **more)

    return counted

  def _on_event(self, event: str, args: tuple) -> None:
    if getattr(self._busy, "now", False) or not (event in CHANGES or event == "open"):
      return
    self._busy.now = True
    try:
      if event == "open" and not _writes(args):
        return
      if isinstance(args[0], int) or not os.fsdecode(args[0]).startswith(self.workdir):
        return
      self.changes += 1
      if self.kill and self.kill.kind == "change" and self.changes == self.kill.number:
        self.die(event)
    finally:
      self._busy.now = False


def _writes(args: tuple) -> bool:
  _, mode, flags = args
  if isinstance(mode, str):
    return any(letter in mode for letter in "wax+")
  return bool(flags & (os.O_WRONLY | os.O_RDWR))


def child(
  work: Callable[[], int],
  log: pathlib.Path,
  kill: Kill | None,
  workdir: pathlib.Path,
  sent: signal.Signals = signal.SIGKILL,
  devices: int = 1,
) -> tuple[int, dict[str, Any]]:
  """Runs `work` in a process of its own. Its exit code (negative: the signal), and what its watcher
  has told."""
  read, write = os.pipe()
  pid = os.fork()
  if pid == 0:
    code = 70
    try:
      os.close(read)
      os.setsid()
      file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
      os.dup2(file, 1), os.dup2(file, 2)
      os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
      watcher = Watcher(kill, workdir, write, sent)
      code = work()
      watcher.tell("the end")
    except BaseException:  # noqa: BLE001  a child must not go on as its parent
      traceback.print_exc()
    finally:
      sys.stderr.flush()
      os._exit(code)
  os.close(write)
  with os.fdopen(read, encoding="utf-8") as told:
    lines = told.read().splitlines()
  _, status = os.waitpid(pid, 0)
  return os.waitstatus_to_exitcode(status), json.loads(lines[0]) if lines else {}


def run_mode(mode: str, folder: pathlib.Path, workdir: pathlib.Path) -> int:
  """The mode, in a child. Stages of `pretrain` keep their last checkpoint, to be compared."""
  from helpers import tiny_runs

  from caprl_jax import main
  from caprl_jax.modes.pretrain import run as pretrain

  class Keeping:
    @staticmethod
    def rmtree(path: pathlib.Path, **more: Any) -> None:
      if path.exists() and not (kept := path.with_name("kept") / path.name).exists():
        shutil.copytree(path, kept.with_name("copy"), dirs_exist_ok=True)
        kept.parent.mkdir(exist_ok=True)
        kept.with_name("copy").rename(kept)
      shutil.rmtree(path, **more)

  pretrain.shutil = Keeping
  return main.main(tiny_runs.command(mode, folder, workdir))


def compare(workdir: pathlib.Path, output: pathlib.Path) -> int:
  """Writes what a run has found, in a child."""
  from helpers import tiny_runs

  output.write_text(json.dumps(tiny_runs.results(workdir)))
  return 0


def inputs(folder: pathlib.Path) -> int:
  """Writes models, data and configs, in a child."""
  from helpers import tiny_runs

  tiny_runs.write(folder)
  return 0


def must(work: Callable[[], int], log: pathlib.Path, devices: int = 1) -> dict[str, Any]:
  """What the child tells, which has to end well."""
  code, told = child(work, log, None, pathlib.Path("/nowhere"), devices=devices)
  if code:
    sys.exit(f"a run ended with code {code}:\n{log.read_text()[-4000:]}")
  return told


def read_results(workdir: pathlib.Path, log: pathlib.Path, devices: int = 1) -> dict[str, Any]:
  """What a complete run has found. devices: at least as many as its last start had."""
  output = workdir.with_name(f"{workdir.name}.json")
  must(lambda: compare(workdir, output), log, devices)
  return json.loads(output.read_text())


def whole_run(mode: str, folder: pathlib.Path) -> Whole:
  """The run that nobody kills."""
  log, workdir = folder / f"{mode}.log", folder / f"{mode}_whole"
  code, told = child(lambda: run_mode(mode, folder, workdir), log, None, workdir)
  if code:
    sys.exit(f"mode {mode} ended with code {code}:\n{log.read_text()[-4000:]}")
  results = read_results(workdir, log)
  for key, steps in results.items():
    if key.endswith(" steps") and steps != list(range(1, len(steps) + 1)):
      sys.exit(f"mode {mode}: {key} are {steps}")
  return Whole(told["changes"], told["checkpoints"], told["secs"], results)


def draw(rng: np.random.Generator, whole: Whole) -> Kill:
  """A random kill: half of them before a change of a file."""
  kind = rng.choice(["change", "change", "checkpoint", "time"])
  if kind == "checkpoint" and whole.checkpoints:
    return Kill(kind, int(rng.integers(1, whole.checkpoints + 1)), rng.uniform(0, 0.1))
  if kind == "time":
    return Kill(kind, delay=rng.uniform(0.05, 0.5) * whole.secs)  # that run compiled, too
  return Kill("change", int(rng.integers(1, whole.changes + 1)))


def damage_newest(workdir: pathlib.Path, rng: np.random.Generator) -> bool:
  """Damages the newest checkpoint of a run in some way, where it has an older one."""
  from helpers.faults.damages import DAMAGES

  for place in sorted(workdir.rglob("checkpoints")):
    steps = sorted((p for p in place.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    if len(steps) > 1:
      DAMAGES[rng.choice(list(DAMAGES))](steps[-1])
      return True
  return False


def differing(whole: dict[str, Any], found: dict[str, Any], close: bool) -> list[str]:
  """The keys that differ. With `close`, numbers may by `CLOSE`, and digests of what is made of such
  numbers are not compared."""
  if not close:
    return [key for key in {**whole, **found} if found.get(key) != whole.get(key)]
  exact = [key for key in whole if key.endswith((" steps", " newest", " complete", "_rows.json"))]
  return [key for key in exact if found.get(key) != whole[key]] + [
    f"{key} {name}: {theirs} and {ours}"
    for key, values in whole.items()
    if isinstance(values, dict) and key not in exact
    for name, theirs in values.items()
    for ours in [found.get(key, {}).get(name)]
    if isinstance(theirs, float) and not np.isclose(ours, theirs, rtol=CLOSE, atol=CLOSE)
  ]


def kill_mode(
  mode: str, folder: pathlib.Path, args: argparse.Namespace, rng: np.random.Generator
) -> dict:
  """Runs that are killed, until there were so many kills: counts, and what differs."""
  kills, sent = args.kills, signal.Signals[f"SIG{args.signal}"]
  began, whole = time.monotonic(), whole_run(mode, folder)
  row = dict(mode=mode, kills=0, runs=0, starts=0, before_changes=0, before_renames=0)
  row |= dict(in_checkpoints=0, damaged=0, keys=len(whole.results), differences=[])
  while row["kills"] < kills:
    workdir = folder / f"{mode}_{row['runs']}"
    log, done = workdir.with_name(f"{workdir.name}.log"), False
    row["runs"] += 1
    most = row["kills"] + min(LIFE, kills - row["kills"])
    while not done:
      kill = draw(rng, whole) if row["kills"] < most else None
      devices = int(rng.choice(args.devices))
      work = lambda at=workdir: run_mode(mode, folder, at)
      code, told = child(work, log, kill, workdir, sent, devices)
      row["starts"] += 1
      if kill and code in (-sent, RUN_AGAIN):
        row["kills"] += 1
        row["before_changes"] += told["what"] != "a moment"
        row["before_renames"] += told["what"] == "os.rename"
        row["in_checkpoints"] += any(workdir.rglob("*.orbax-checkpoint-tmp*"))
        if args.damage and rng.random() < 0.5:
          row["damaged"] += damage_newest(workdir, rng)
      elif code:
        row["differences"].append(f"exit code {code} after {kill}: {log.read_text()[-2000:]}")
        break
      done = code == 0
    if done:
      found = read_results(workdir, log, max(args.devices))
      differ = differing(whole.results, found, close=args.devices != [1])
      row["differences"] += [f"{workdir.name}: {key}" for key in differ]
      if not differ:
        shutil.rmtree(workdir)
  return row | {"secs": round(time.monotonic() - began, 1)}


def table(rows: list[dict]) -> str:
  """As Markdown."""
  lines = [
    "| mode | kills | right before a change of a file | of these renames | while a checkpoint was "
    "written | checkpoints damaged | runs | values compared per run | that differ |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    names = ("mode", "kills", "before_changes", "before_renames", "in_checkpoints", "damaged")
    names += ("runs", "keys")
    cells = [str(row[name]) for name in names]
    lines.append(f"| {' | '.join([*cells, str(len(row['differences']))])} |")
  return "\n".join(lines)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--mode", default=",".join(MODES))
  parser.add_argument("--kills", type=int, default=20, help="of each mode")
  parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
  parser.add_argument("--damage", action="store_true", help="damages checkpoints, too")
  parser.add_argument(
    "--devices", default="1", help="numbers of devices, one of which each start has"
  )
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--json", type=pathlib.Path, help="where the table goes as JSON, too")
  parser.add_argument("--workdir", type=pathlib.Path, help="kept, where it is given")
  args = parser.parse_args()
  modes = args.mode.split(",")
  if unknown := set(modes) - set(MODES):
    parser.error(f"--mode: {', '.join(sorted(unknown))}: use some of {', '.join(MODES)}")
  args.devices = [int(number) for number in args.devices.split(",")]
  if args.devices != [1] and set(modes) - set(DEVICES):
    parser.error(f"--devices={args.devices}: --mode must be among {', '.join(DEVICES)}")
  folder = args.workdir or pathlib.Path(tempfile.mkdtemp(prefix="caprl_jax_kills_"))
  folder.mkdir(parents=True, exist_ok=True)
  if any(folder.iterdir()):
    parser.error(f"--workdir={folder} is not empty; name another")
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  for module in MODULES:
    importlib.import_module(module)
  gc.freeze()  # children share what is imported, and do not search it
  gc.set_threshold(100_000, 50, 100)
  must(lambda: inputs(folder), folder / "inputs.log")
  rows = []
  for number, mode in enumerate(modes):
    rng = np.random.default_rng([args.seed, number])
    rows.append(kill_mode(mode, folder, args, rng))
    print(f"{mode}: {rows[-1]['kills']} kills in {rows[-1]['secs']} s", flush=True)
    for difference in rows[-1]["differences"]:
      print(f"  DIFFERS {difference}", flush=True)
  print(table(rows))
  if args.json:
    args.json.write_text(json.dumps(rows, indent=1) + "\n")
  failed = any(row["differences"] for row in rows)
  if not failed and not args.workdir:
    shutil.rmtree(folder)
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())
