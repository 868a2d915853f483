"""FLOPs of matrix products in a compiled program's text, loops counted as often as they run."""

import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(?.*?\)?) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|branch_computations)=\{?((?:%[\w.-]+(?:, )?)+)"
)


def dot_flops(text: str) -> float:
  """Of one device: `compiled.as_text()` is the program that each of them runs. (`cost_analysis`
  counts every loop's body once; here only that of one that may end early, such as decoding.)

  Raises ValueError for a product in a call of a library, whose sizes the text does not give.
  """
  lines: dict[str, list[str]] = {}
  entry = here = ""
  for line in text.splitlines():
    match = _COMPUTATION.match(line)
    if match:
      here = match.group(2)
      entry = here if match.group(1) else entry
      lines[here] = []
    elif here:
      lines[here].append(line)
  known: dict[str, float] = {}

  def count(name: str) -> float:
    if name not in known:
      known[name] = sum(_of_lines(lines[name], count))
    return known[name]

  return count(entry)


def _of_lines(lines: list[str], count) -> Iterator[float]:
  shapes: dict[str, list[int]] = {}
  for line in lines:
    match = _INSTRUCTION.match(line)
    if not match:
      continue
    name, kind, operation, rest = match.groups()
    shapes[name] = _sizes(kind)
    if operation == "dot":
      left = shapes[re.findall(r"%([\w.-]+)", rest)[0]]
      over = [
        int(i)
        for i in re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest).group(1).split(",")
        if i
      ]
      yield 2.0 * math.prod(shapes[name]) * math.prod(left[i] for i in over)
    elif operation == "custom-call" and re.search(r"matmul|gemm", rest):
      raise ValueError(f"a library's product: {line[:200]}")
    called = [
      one.strip().lstrip("%")
      for found in _CALLED.findall(rest)
      for one in found.split(",")
      if one.strip()
    ]
    times = 1
    if operation == "while":
      trips = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', rest)
      times = int(trips.group(1)) if trips else 1
    yield from (times * count(one) for one in called)


def _sizes(kind: str) -> list[int]:
  match = _SHAPE.match(kind)
  return [int(n) for n in match.group(1).split(",") if n] if match else []
