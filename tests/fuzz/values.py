"""Odd JSON values, and odd changes to JSON texts."""

import json
import random
from typing import Any

LONG = "x" * 200_000
STRINGS = (
  "",
  " ",
  "\x00",
  "a\x00b",
  "\n",
  "a\nb",
  "\u2028",
  "\u202e",
  "\ufeff",
  "😀",
  "ﬁ①Ⅷ",
  "\ud800",
  "../../../etc/passwd",
  "/dev/zero",
  "/",
  ".",
  "~",
  "~nobody/x",
  "a" * 300,
  "a/" * 3000,
  "%s%n{}{0}{x}",
  "None",
  "NaN",
  "1e999",
  "<image>",
  "<|im_end|>",
  "A",
  "a)",
  "data:image/png;base64,AAAA",
  "data:image/png;base64,!!!",
  "file:///etc/hostname",
  "http://127.0.0.1:9/x.png",
  "C:\\x.png",
  LONG,
)
NUMBERS = (0, -1, 1, 2, 3.7, -0.0, 10**6, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e308, 1e-320)
OTHERS = (None, True, False, [], {}, [[]], [{}], [None], {"": 1}, {"a": {"b": []}}, ["a", "b"])
# Written into the text, because `json` would not write them.
RAW = (
  "NaN",
  "Infinity",
  "-Infinity",
  "1e400",
  "-1e400",
  "9" * 5000,
  "0x10",
  "01",
  "'a'",
  "undefined",
  "[" * 100_000,
  "[" * 2000 + "]" * 2000,
  '{"a":' * 3000 + "1" + "}" * 3000,
  '"\\ud800"',
  '"\\u0000"',
  '"a\tb"',
  '{"a": 1, "a": 2}',
  "",
)
_MARK = "\ue000raw\ue001"


def odd_value(rng: random.Random) -> Any:
  return rng.choice(rng.choice((STRINGS, NUMBERS, OTHERS)))


def _places(value: Any, path: tuple = ()) -> list[tuple]:
  """Where values stand, the whole first."""
  found = [path]
  if isinstance(value, dict):
    inner = list(value.items())
  else:
    inner = list(enumerate(value)) if isinstance(value, list) else []
  for key, item in inner:
    found += _places(item, (*path, key))
  return found


def _put(value: Any, path: tuple, new: Any) -> Any:
  if not path:
    return new
  copy = dict(value) if isinstance(value, dict) else list(value)
  copy[path[0]] = _put(copy[path[0]], path[1:], new)
  return copy


def _get(value: Any, path: tuple) -> Any:
  for key in path:
    value = value[key]
  return value


def _spelt(key: str, rng: random.Random) -> str:
  ways = (key + " ", key.upper(), key + "s", key[:-1], "_" + key, "", key + "\x00", LONG)
  return rng.choice(ways)


def mutate_json(text: str, rng: random.Random) -> tuple[str, str]:
  """Another JSON text (or one that is none any more) and what was done, in words."""
  value = json.loads(text)
  places = _places(value)
  path = rng.choice(places)
  inside = [p for p in places if p and isinstance(_get(value, p[:-1]), dict)]
  way = rng.choice(("odd", "odd", "odd", "raw", "raw", "drop", "rename", "wrap", "swap", "twice"))
  at = ".".join(map(str, path)) or "the whole"
  raw = None
  if way == "odd":
    new = odd_value(rng)
    value, done = _put(value, path, new), f"{at} = {new!r:.40}"
  elif way == "raw":
    raw = rng.choice(RAW)
    value, done = _put(value, path, _MARK), f"{at} = {raw[:40]} ({len(raw)})"
  elif way in ("drop", "rename", "twice") and inside:
    *above, key = rng.choice(inside)
    held = dict(_get(value, tuple(above)))
    done = f"{way} {'.'.join(map(str, [*above, key]))}"
    if way == "twice":
      again = json.dumps(held[key])
      held[key] = _MARK
      raw = f"{again}, {json.dumps(key)}: {again}"
    elif way == "drop":
      del held[key]
    else:
      held[_spelt(key, rng)] = held.pop(key)
    value = _put(value, tuple(above), held)
  elif way == "wrap":
    inner = _get(value, path)
    new = rng.choice(([inner], [inner] * 3, {"a": inner}, [[inner]], [inner, None]))
    value, done = _put(value, path, new), f"{at} wrapped"
  else:
    other = rng.choice(places)
    value, done = _put(value, path, _get(value, other)), f"{at} = {'.'.join(map(str, other))}"
  out = json.dumps(value, ensure_ascii=rng.random() < 0.7)
  return (
    out if raw is None else out.replace(json.dumps(_MARK), raw).replace(f'"{_MARK}"', raw)
  ), done


def mutate_lines(text: str, rng: random.Random) -> tuple[str, str]:
  """JSON lines with one of them changed, dropped, doubled or broken."""
  lines = text.splitlines()
  number = rng.randrange(len(lines))
  way = rng.choice(("json",) * 6 + ("twice", "blank", "joined", "half", "list", "none"))
  done = f"line {number + 1} {way}"
  if way == "json":
    lines[number], what = mutate_json(lines[number], rng)
    done = f"line {number + 1}: {what}"
  elif way == "twice":
    lines *= rng.choice((2, 200))
  elif way == "blank":
    lines.insert(number, rng.choice(("", " ", "\t", "\x0c", "\u2028", "\x00")))
  elif way == "joined":
    return "".join(lines), "lines joined"
  elif way == "half":
    lines[number] = lines[number][: rng.randrange(len(lines[number]))]
  elif way == "list":
    return "[" + ",\n".join(lines) + rng.choice(("]", "", ",]", "] x")), "a list of the lines"
  else:
    lines = []
  return rng.choice(("\n", "\n", "\r\n", "\r")).join(lines) + rng.choice(("\n", "")), done
