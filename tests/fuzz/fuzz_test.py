"""Inputs of every kind, damaged, odd or hostile: each is read, or refused with one short error.

More of them, with other seeds: python benchmarks/fuzz.py --count 20000 --seed 1
"""

import re
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from fuzz import kinds, limits
from fuzz.cases import Case

COUNT = 1200  # in about a minute on two cores


def fuzz(*arguments: str) -> subprocess.CompletedProcess:
  """The program, in a process of its own: it forks, which one with running threads must not."""
  program = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py")]
  return subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=600)


def test_every_input_is_read_or_refused_with_one_short_error(tmp_path):
  kept = tmp_path / "kept"
  done = fuzz(f"--count={COUNT}", f"--keep={kept}")
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| 0 \|$", done.stdout, re.MULTILINE)
  assert {name for name, *_ in rows} == {*kinds.KINDS, "all"}
  assert int(rows[-1][1]) >= 1000
  # Neither is all of a kind refused, which would test little, nor all of it read.
  assert all(int(refused) for *_, refused in rows)
  assert all(int(read) for _, _, read, _ in rows)
  assert not any(kept.iterdir())


def test_an_input_comes_again_by_its_number_and_from_its_file():
  files = kinds.base_files("rows")
  first, again = (kinds.make_case("rows", 3, 17, files) for _ in range(2))
  assert first == again and first.done and first.files != files
  assert kinds.make_case("rows", 4, 17, files) != first
  assert Case.from_json(first.to_json()) == first


@pytest.mark.parametrize(
  "message, fault",
  [
    ("/in/rows.jsonl:3: gold 7 is no index", ""),
    ("gold 7 is no index", "names no place"),
    ("/in/rows.jsonl:3: /in/rows.jsonl:3: no", "names a place twice"),
    ("/in/rows.jsonl: not JSON (/in/rows.jsonl: empty)", "names a place twice"),
    ("rows.jsonl: a value: a value: 3", "repeats itself"),
    ("/in/rows.jsonl:3: " + "x" * 2000, "too long"),
  ],
)
def test_what_a_message_must_be(message, fault):
  case = Case("rows", 0, 0, {"rows.jsonl": b""})
  assert limits._fault_of(message, case, "/in") == fault


ENDS = """
import os, sys
sys.path[:0] = sys.argv[1:3]
from fuzz import kinds, limits
from fuzz.cases import Case

def target(folder, arguments):
  how = arguments[0]
  if how == "leak":
    raise KeyError("a")
  if how == "not ours":
    raise ValueError("a.jsonl: from elsewhere")
  if how == "grows":
    bytearray(8 << 30)
  while how == "spins":
    pass
  if how == "dies":
    os.abort()
  return ["bad, but where?"] if how == "left out" else []

kinds.KINDS["own"] = kinds.Kind(dict, {}, target, arguments=("well",))
limits.BASES["own"], limits.CPU_SECS = {"a.jsonl": b""}, 0.3
cases = [Case("own", 0, i, {"a.jsonl": b""}, (how,)) for i, how in enumerate(sys.argv[3:])]
found = sorted(limits.run(cases, jobs=2), key=lambda outcome: outcome.case.number)
print("\\n".join(outcome.status for outcome in found))
"""


def test_how_an_input_can_end():
  """What kills its process does not keep the next input from being tried."""
  ends = {
    "well": "read",
    "leak": "leak",
    "not ours": "leak",
    "left out": "bad row's message names no place",
    "grows": "out of memory",
    "spins": "out of time",
    "dies": "crash (SIGABRT)",
    "well again": "read",
  }
  command = [sys.executable, "-c", ENDS, str(ROOT), str(ROOT / "tests"), *ends]
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert done.stdout.splitlines() == list(ends.values()), done.stderr
