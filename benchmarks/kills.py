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
  --damage          a kill is followed by damage to the newest checkpoint, where there is an older
                    one: the run goes on from that. Runs have more steps, to have older ones
  --processes 2     as a run of so many processes, of which one is killed: the others must end
                    within a minute, with code 75 and, after SIGKILL, a message that names it
  --devices 2       of each process
  --set KEY=VALUE   of the config, as policy.trainable=lora; may be given several times

Where several numbers of processes or devices are given, as in --devices 1,2,4, each start has one
of them, and so another mesh (modes train and sft): the same rows and steps are asked for, and
numbers that are close; the table has the largest difference of two.

20 kills of each of the five modes take 13 minutes on two cores, 5 of them for mode train; of
several processes a kill takes half a minute more, until it is seen.
"""

import argparse
import collections
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
import time
from collections.abc import Callable, Sequence
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

from benchmarks.parts.killed import Ended, Kill, run_processes  # noqa: E402  found by now

MODES = ("train", "sft", "pretrain", "prism", "curate")
# Imported once, before children are forked. None of them starts jax's backend.
MODULES = ("caprl_jax.main", *(f"caprl_jax.modes.{mode}.run" for mode in MODES))
RUN_AGAIN = 75  # the exit code of a run that was asked to stop
ANY_MESH = ("train", "sft")  # modes that go on with another number of devices
SPLIT = 4  # the most devices: batches can be split over as many
END_SECS = 60.0  # from the end of a process that is killed to that of the last other one
CLOSE = 2e-3  # of numbers on other meshes: in float32 a sum's order shows in its last digits
LIFE = 5  # kills of one run, at most
LONGER = 6  # more steps of each run, phase and stage, where checkpoints are damaged


@dataclasses.dataclass
class Whole:
  """What the run that nobody killed was like: of each process its changes of files, checkpoints
  and seconds; and what it found, which is read with what the first other run has."""

  workdir: pathlib.Path
  told: list[dict[str, Any]]
  results: dict[str, Any] = dataclasses.field(default_factory=dict)


def run_mode(
  mode: str, folder: pathlib.Path, workdir: pathlib.Path, args: argparse.Namespace
) -> int:
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
  rows = SPLIT if max(args.processes) * max(args.devices) > 1 else 1
  return main.main(tiny_runs.command(mode, folder, workdir, rows, args.set))


def write_results(workdirs: Sequence[pathlib.Path], output: pathlib.Path) -> int:
  """Writes what runs have found, in a child."""
  from helpers import tiny_runs

  output.write_text(json.dumps([tiny_runs.results(workdir) for workdir in workdirs]))
  return 0


def inputs(folder: pathlib.Path, longer: int) -> int:
  """Writes models, data and configs, in a child."""
  from helpers import tiny_runs

  tiny_runs.write(folder, longer)
  return 0


def must(work: Callable[[], int], log: pathlib.Path) -> None:
  """Does work in a child, which has to end well."""
  (end,) = run_processes(work, log, pathlib.Path("/nowhere"))
  if end.code:
    sys.exit(f"a child ended with code {end.code}:\n{end.said[-4000:]}")


def read_results(workdir: pathlib.Path, whole: Whole) -> dict[str, Any]:
  """What a complete run has found; what the whole one has goes to it, where it is not there yet."""
  output, log = workdir.with_name(f"{workdir.name}.json"), workdir.with_suffix(".log")
  workdirs = [workdir] if whole.results else [workdir, whole.workdir]
  must(lambda: write_results(workdirs, output), log)
  found, *of_whole = json.loads(output.read_text())
  if of_whole:
    whole.results = of_whole[0]
    for key, steps in whole.results.items():
      if key.endswith(" steps") and steps != list(range(1, len(steps) + 1)):
        sys.exit(f"{whole.workdir}: {key} are {steps}")
  return found


def whole_run(mode: str, folder: pathlib.Path, args: argparse.Namespace) -> Whole:
  """The run that nobody kills."""
  log, workdir = folder / f"{mode}.log", folder / f"{mode}_whole"
  work = lambda: run_mode(mode, folder, workdir, args)
  size = dict(processes=args.processes[0], devices=args.devices[0])
  ends = run_processes(work, log, workdir, **size)
  for end in ends:
    if end.code:
      sys.exit(f"mode {mode} ended with code {end.code}:\n{end.said[-4000:]}")
  return Whole(workdir, [end.told for end in ends])


def draw(rng: np.random.Generator, whole: Whole, processes: int, done: dict[str, Any]) -> Kill:
  """A random kill in what is left of a run: half of them before a change of a file.

  done: what the starts before have counted. A start does what sets it up anew, so at least the
    difference to the whole run is left.
  """
  process = int(rng.integers(processes))
  told = whole.told[min(process, len(whole.told) - 1)]
  told = {name: told[name] - done.get(name, 0) for name in ("changes", "checkpoints", "secs")}
  kind = rng.choice(["change", "change", "checkpoint", "time"])
  if kind == "checkpoint" and told["checkpoints"] > 0:
    number = int(rng.integers(1, told["checkpoints"] + 1))
    return Kill(kind, number, rng.uniform(0, 0.1), process)
  if kind == "change" and told["changes"] > 0:
    return Kill(kind, int(rng.integers(1, told["changes"] + 1)), process=process)
  secs = max(told["secs"], 1.0)  # of a start that compiles more than a later one
  return Kill("time", delay=rng.uniform(0.05, 0.5) * secs, process=process)


def wrong_ends(ends: list[Ended], kill: Kill | None, sent: signal.Signals) -> list[str]:
  """What is wrong with how the processes of one start have ended."""
  if kill is None or ends[kill.process].code == 0:
    return [f"exit code {end.code}: {end.said[-2000:]}" for end in ends if end.code]
  died, found = ends[kill.process], []
  if died.code not in (-sent, RUN_AGAIN):
    found.append(f"exit code {died.code} after {kill}: {died.said[-2000:]}")
  for number, end in enumerate(ends):
    if number == kill.process or end.code == 0:  # it was at its end
      continue
    who = f"process {number}, when {kill.process} was killed ({kill}),"
    if end.code != RUN_AGAIN:
      found.append(f"{who} ended with code {end.code}: {end.said[-2000:]}")
    if end.at - died.at > END_SECS:
      found.append(f"{who} ended after {end.at - died.at:.0f} s")
    if f"process {kill.process} (" not in end.said:
      found.append(f"{who} does not name it: {end.said[-2000:]}")
  return found


def damage_newest(workdir: pathlib.Path, rng: np.random.Generator) -> bool:
  """Damages the newest checkpoint of a run in some way, where it has an older one. Not of a stage
  of `pretrain` that has ended: nobody reads those again, but the comparison (`run_mode`)."""
  from helpers.faults.damages import DAMAGES

  record = workdir / "pretrain.json"
  stages = json.loads(record.read_text())["stages"] if record.exists() else {}
  ended = {name for name, stage in stages.items() if stage.get("finished")}
  for place in sorted(workdir.rglob("checkpoints")):
    if ended & set(place.parts) or place.parent.name == "kept":
      continue
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
    f"{said}, {far:.2g} apart" for said, far in numbers_of(whole, found) if not far <= CLOSE
  ]


def numbers_of(whole: dict[str, Any], found: dict[str, Any]) -> list[tuple[str, float]]:
  """Of each number of metrics and figures: its name and values, and how far they are apart, as a
  part of the larger one where that is above 1."""
  pairs = [
    (f"{key} {name}: {theirs} and {ours}", theirs, ours)
    for key, values in whole.items()
    if isinstance(values, dict) and not key.endswith("_rows.json")
    for name, theirs in values.items()
    for ours in [(found.get(key) or {}).get(name, float("inf"))]
    if isinstance(theirs, float)
  ]
  return [(said, abs(a - b) / max(1.0, abs(a), abs(b))) for said, a, b in pairs]


def kill_mode(
  mode: str, folder: pathlib.Path, args: argparse.Namespace, rng: np.random.Generator
) -> dict:
  """Runs that are killed, until there were so many kills: counts, and what differs."""
  sent = signal.Signals[f"SIG{args.signal}"]
  began = time.monotonic()
  whole = whole_run(mode, folder, args)
  row: dict[str, Any] = dict(
    mode=mode, kills=0, runs=0, starts=0, before_changes=0, before_renames=0
  )
  row |= dict(in_checkpoints=0, damaged=0, last_end_secs=0.0, keys=0)
  row |= dict(largest_difference=0.0, differences=[])
  while row["kills"] < args.kills:
    workdir = folder / f"{mode}_{row['runs']}"
    row["runs"] += 1
    if not until_complete(mode, folder, workdir, args, rng, whole, row, sent):
      continue
    found = read_results(workdir, whole)
    row["keys"] = len(whole.results)
    differ = differing(whole.results, found, close=not args.same_mesh)
    row["differences"] += [f"{workdir.name}: {key}" for key in differ]
    farthest = max((far for _, far in numbers_of(whole.results, found)), default=0.0)
    row["largest_difference"] = max(row["largest_difference"], float(f"{farthest:.2g}"))
    if not differ:
      shutil.rmtree(workdir)
  return row | {"secs": round(time.monotonic() - began, 1)}


def until_complete(
  mode: str,
  folder: pathlib.Path,
  workdir: pathlib.Path,
  args: argparse.Namespace,
  rng: np.random.Generator,
  whole: Whole,
  row: dict,
  sent: signal.Signals,
) -> bool:
  """Starts one run until it is complete, and counts in `row` what is done to it. False where it
  ended as it must not."""
  most, done = row["kills"] + min(LIFE, args.kills - row["kills"]), collections.Counter()
  work = lambda: run_mode(mode, folder, workdir, args)
  while True:
    processes, devices = int(rng.choice(args.processes)), int(rng.choice(args.devices))
    kill = draw(rng, whole, processes, done) if row["kills"] < most else None
    size = dict(processes=processes, devices=devices)
    ends = run_processes(work, workdir.with_suffix(".log"), workdir, kill=kill, sent=sent, **size)
    row["starts"] += 1
    if wrong := wrong_ends(ends, kill, sent):
      row["differences"] += wrong
      return False
    if kill and ends[kill.process].code:
      count(row, ends, kill, workdir)
      told = ends[kill.process].told
      done.update({name: told[name] for name in ("changes", "checkpoints", "secs")})
      if args.damage:
        row["damaged"] += damage_newest(workdir, rng)
    else:
      return True


def count(row: dict, ends: list[Ended], kill: Kill, workdir: pathlib.Path) -> None:
  """Adds a kill to the counts."""
  died = ends[kill.process]
  row["kills"] += 1
  row["before_changes"] += died.told["what"] != "a moment"
  row["before_renames"] += died.told["what"] == "os.rename"
  row["in_checkpoints"] += any(workdir.rglob("*.orbax-checkpoint-tmp*"))
  last = max(end.at for end in ends) - died.at
  row["last_end_secs"] = round(max(row["last_end_secs"], last), 1)


def table(rows: list[dict]) -> str:
  """As Markdown."""
  lines = [
    "| mode | kills | right before a change of a file | of these renames | while a checkpoint was "
    "written | checkpoints damaged | last other process ended after, s | runs | values compared "
    "per run | largest difference of two numbers | that differ |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    names = ("mode", "kills", "before_changes", "before_renames", "in_checkpoints", "damaged")
    names += ("last_end_secs", "runs", "keys", "largest_difference")
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
  for name, of in (("processes", "a run"), ("devices", "a process")):
    parser.add_argument(f"--{name}", default="1", help=f"of {of}; several: each start has one")
  parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--json", type=pathlib.Path, help="where the table goes as JSON, too")
  parser.add_argument("--workdir", type=pathlib.Path, help="kept, where it is given")
  args = parser.parse_args()
  modes = args.mode.split(",")
  if unknown := set(modes) - set(MODES):
    parser.error(f"--mode: {', '.join(sorted(unknown))}: use some of {', '.join(MODES)}")
  args.processes, args.devices = (
    [int(number) for number in numbers.split(",")] for numbers in (args.processes, args.devices)
  )
  if max(args.processes) * max(args.devices) > SPLIT:
    parser.error(f"--processes, --devices: together at most {SPLIT} devices")
  args.same_mesh = len({*args.processes}) == len({*args.devices}) == 1
  if not args.same_mesh and set(modes) - set(ANY_MESH):
    parser.error(f"several numbers of devices: --mode must be among {', '.join(ANY_MESH)}")
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
  must(lambda: inputs(folder, LONGER if args.damage else 0), folder / "inputs.log")
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
