"""Damaged, odd and hostile inputs of every kind: how each ends.

  python benchmarks/fuzz.py --count 20000 [--seed 0] [--kind rows] [--jobs 2] [--keep runs/fuzz]
  python benchmarks/fuzz.py --replay runs/fuzz/rows-0-17.json

The inputs are those of tests/fuzz: good files to which one to three things were done (cut, flipped,
swapped, nested, numbers that are huge, types that are wrong, bombs, templates without an end). Each
must be read, or be refused with one ValueError of ours that is short and names its place, within 5
seconds of processor time (and one more for each 2 MB) and 2 GiB of memory. Prints a table of kinds
and outcomes, and of each fault the shortest input; writes faulty inputs to --keep, each a file that
--replay takes.
"""

import argparse
import collections
import importlib
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

from fuzz import kinds, limits  # noqa: E402  found through the line above
from fuzz.cases import Case  # noqa: E402

# Imported once, before children are forked. None of them starts jax's backend.
MODULES = (
  "caprl_jax.main",
  "caprl_jax.config.keys",
  "caprl_jax.harness.settings",
  "caprl_jax.hub.load",
  "caprl_jax.data.readers.caprl_parquet",
  "caprl_jax.data.chat_rendering",
  "caprl_jax.modes.gallery.run",
  "caprl_jax.modes.train.report",
  "caprl_jax.harness.training.summary",
  "transformers.utils.chat_template_utils",
  "jinja2",
  "gguf",
)


def numbers_of(count: int, names: list[str]) -> dict[str, int]:
  """How many inputs of each kind, by the kinds' shares."""
  total = sum(kinds.KINDS[name].share for name in names)
  return {name: max(1, round(count * kinds.KINDS[name].share / total)) for name in names}


def table(counts: dict[str, collections.Counter]) -> str:
  """Kinds and outcomes, as Markdown."""
  lines = ["| kind | inputs | read | refused | faults |", "|---|---|---|---|---|"]
  for name, count in {**counts, "all": sum(counts.values(), collections.Counter())}.items():
    good = count[limits.READ], count[limits.REFUSED]
    lines.append(
      f"| {name} | {count.total()} | {good[0]} | {good[1]} | {count.total() - sum(good)} |"
    )
  return "\n".join(lines)


def show_faults(faults: list[limits.Outcome], keep: pathlib.Path) -> None:
  """Of each fault the shortest input, in words; all of them as files."""
  alike = collections.defaultdict(list)
  for outcome in faults:
    alike[outcome.case.kind, outcome.signature].append(outcome)
  keep.mkdir(parents=True, exist_ok=True)
  for outcome in faults:
    (keep / f"{outcome.case.name}.json").write_text(outcome.case.to_json(), "utf-8", "replace")
  for (kind, signature), outcomes in sorted(alike.items()):
    least = min(outcomes, key=lambda o: (len(o.case.done), len("".join(o.case.done))))
    print(f"\n{kind}: {signature} ({len(outcomes)})")
    print(f"  {keep / least.case.name}.json: {'; '.join(least.case.done)!a:.300}")
    print(f"  {least.message!a:.400}")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--count", type=int, default=2000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--kind", action="append", choices=list(kinds.KINDS))
  parser.add_argument("--jobs", type=int, default=2)
  parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path("runs/fuzz"))
  parser.add_argument("--replay", type=pathlib.Path, nargs="+")
  args = parser.parse_args()
  for module in MODULES:
    importlib.import_module(module)
  if args.replay:
    found = [Case.from_json(path.read_text("utf-8")) for path in args.replay]
    names = list(dict.fromkeys(case.kind for case in found))
  else:
    names = args.kind or list(kinds.KINDS)
  limits.BASES |= limits.base_files(names)
  counts, faults, begun = {name: collections.Counter() for name in names}, [], time.monotonic()
  for name in names:
    if args.replay:
      cases = [case for case in found if case.kind == name]
    else:
      wanted = range(numbers_of(args.count, names)[name])
      cases = [kinds.make_case(name, args.seed, i, limits.BASES[name]) for i in wanted]
    for outcome in limits.run(cases, args.jobs):
      counts[name][outcome.status] += 1
      if args.replay:
        print(f"{outcome.case.name}: {outcome.status}: {outcome.message}")
      if not outcome.good:
        faults.append(outcome)
    print(f"{name}: {dict(counts[name])}, {time.monotonic() - begun:.0f} s", file=sys.stderr)
  print(table(counts))
  show_faults(faults, args.keep)
  return 1 if faults else 0


if __name__ == "__main__":
  sys.exit(main())
