"""A mathematical answer, the gold -> 1 or 0, by the package math-verify where it is installed."""

import functools
import importlib.util
import re
import threading
from typing import Any

from caprl_jax.scoring.metrics import compared, exact
from caprl_jax.scoring.plain_text import without_markup
from caprl_jax.scoring.quantities import LONGEST


def maths(prediction: str | None, gold: str) -> tuple[float, str]:
  """1 if the prediction is mathematically the gold, else 0, and by which rule:

    math_verify  the package math-verify says so (or the two are the same text);
    exact        the gold is no mathematics (words, or nothing that math-verify can parse):
                 `exact`, or the same number;
    plain        math-verify is not installed: `exact`, or the same number, fractions and LaTeX
                 fractions included.

  math-verify reads words as products of letters, so that "lube" would be "blue": golds with words
  are left to `exact`. Raises ValueError in any but the main thread if math-verify is installed: it
  limits its time by a signal.
  """
  package = math_verify_package()
  if prediction is not None and len(prediction) > LONGEST:
    return 0.0, "exact" if package else "plain"  # no answer; a looping model's, which takes long
  if package is None:
    return (_exact_or_number(prediction, gold), "plain")
  parsed = None if _haswords_of(gold) else _parse(gold)
  if not parsed:
    return (_exact_or_number(prediction, gold), "exact")
  if prediction is None:
    return (0.0, "math_verify")
  same = re.sub(r"\s+", "", without_markup(prediction)) == re.sub(r"\s+", "", without_markup(gold))
  return (
    float(
      same
      or (not _haswords_of(prediction) and package.verify(parsed, _parse(prediction) or []))
      or (_haswords_of(prediction) and compared(prediction, gold, 0.0, lists=False) == 1)
    ),
    "math_verify",
  )


_FUNCTIONS = {
  "sin",
  "cos",
  "tan",
  "cot",
  "sec",
  "csc",
  "log",
  "exp",
  "sqrt",
  "arcsin",
  "arccos",
  "arctan",
}


def _haswords_of(text: str) -> bool:
  """Whether a text has words, of three letters or more, that are no LaTeX and no function."""
  words = re.findall(
    r"(?<![\\a-zA-Z])[^\W\d_]{3,}", re.sub(r"\\[a-zA-Z]+", " ", without_markup(text))
  )
  return any(word.casefold() not in _FUNCTIONS for word in words)


def _exact_or_number(prediction: str | None, gold: str) -> float:
  number = 0.0 if prediction is None else compared(prediction, gold, 0.0, lists=False)
  return max(exact(prediction, gold), number)


def has_math_verify() -> bool:
  """Whether the package math-verify is installed, without which there is no official score."""
  return importlib.util.find_spec("math_verify") is not None


def math_verify_package() -> Any:
  """The package math-verify, or None if it is not installed. Raises ValueError outside the main
  thread.
  """
  try:
    import math_verify
  except ImportError:
    return None
  if threading.current_thread() is not threading.main_thread():
    raise ValueError(
      "math-verify limits its time by a signal, which only the main thread may: score answers there"
    )
  return math_verify


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> list[Any]:
  """What math-verify parses a text as; [] if that is not mathematics."""
  text = text.strip()
  delimited = any(sign in text for sign in ("$", "\\(", "\\[", "\\boxed"))
  found = math_verify_package().parse(text if delimited else f"${text}$")
  return found if any(not isinstance(part, str) for part in found) else []
