"""A written answer, the gold -> a score.

Two protocols. "ours" reads an answer as a careful reader would and applies each benchmark's own
metric (`METRICS`, `score`). "official" repeats what the released scorer of CapRL does
(Prism_Evaluation/Eval_CapRL.py of InternLM/CapRL, with VLMEvalKit's `process_line` of that time),
defects included, so that published numbers can be compared (`official.official_score`).
Scores lie in 0..1. No score is given to an answer of None: nothing could be read.
"""

import functools
import importlib.util
import re
import string
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from caprl_jax.scoring.extraction import LETTER, index_of, letter_of, without_markup

Metric = Literal["multiple_choice", "relaxed", "anls", "maths"]

# What `score` applies. "questions": plain rows of questions, as `readers.benchmarks.from_qa_rows`
# makes them.
METRICS: dict[str, Metric] = {
  "MMStar": "multiple_choice",
  "SEED": "multiple_choice",
  "MMMU": "multiple_choice",
  "MMMU-Pro": "multiple_choice",
  "questions": "multiple_choice",
  "ChartQA": "relaxed",
  "ChartQAPro": "relaxed",
  "CharXiv": "relaxed",
  "InfoVQA": "anls",
  "MathVerse": "maths",
  "MathVision": "maths",
  "WeMath": "maths",
  "VisuLogic": "maths",
}


class Score(NamedTuple):
  """`value` in 0..1, and the `rule` that gave it: a metric's name, or for mathematics one of
  `maths`'s rules.
  """

  value: float
  rule: str


def score(
  prediction: str | None, gold: str | Sequence[str], benchmark: str, options: Sequence[str] = ()
) -> Score:
  """Ours: an extracted answer by its benchmark's metric. Several golds: the best counts.

  Where a multiple-choice benchmark asks an open question (MMMU), the gold is no letter and `exact`
  applies; where a mathematical one asks for a letter, `multiple_choice` does. Where the gold is the
  text of one option, its letter is right too.

  Raises ValueError for a benchmark that is not in METRICS, for no gold, and as `multiple_choice`
  and `maths`.
  """
  if benchmark not in METRICS:
    raise ValueError(f"benchmark = {benchmark!r} has no metric; known: {', '.join(METRICS)}")
  golds = (gold,) if isinstance(gold, str) else tuple(gold)
  if not golds:
    raise ValueError(f"{benchmark}: no gold answer; give one or drop the row")
  metric = METRICS[benchmark]
  if metric == "anls":
    return Score(anls(prediction, golds), "anls")
  return max(
    (_score_one(prediction, one, metric, options) for one in golds), key=lambda found: found.value
  )


def _score_one(prediction: str | None, gold: str, metric: Metric, options: Sequence[str]) -> Score:
  found = _by_metric(prediction, gold, metric, options)
  option = None if LETTER.fullmatch(gold.strip()) else _option_of(gold, options)
  if found.value < 1 and option is not None:
    chosen = multiple_choice(prediction, string.ascii_uppercase[option], options)
    return Score(chosen, "multiple_choice") if chosen else found
  return found


def _option_of(text: str, options: Sequence[str]) -> int | None:
  """The option whose text it is; None for none, or for several."""
  for normal in (_plain_text, _normal):
    same = [i for i, option in enumerate(options) if normal(option) == normal(text)]
    if same:
      return same[0] if len(same) == 1 else None
  return None


def _by_metric(prediction: str | None, gold: str, metric: Metric, options: Sequence[str]) -> Score:
  if metric == "relaxed":
    return Score(relaxed_accuracy(prediction, gold), "relaxed")
  if LETTER.fullmatch(gold.strip()) and (not options or index_of(gold.strip()) < len(options)):
    return Score(multiple_choice(prediction, gold.strip(), options), "multiple_choice")
  if metric == "maths":
    return maths(prediction, gold)
  return Score(exact(prediction, gold), "exact")


# Metrics, ours.


def multiple_choice(prediction: str | None, gold_letter: str, options: Sequence[str] = ()) -> float:
  """1 if the prediction is the gold's letter, or the text of exactly one option and that is the
  gold's; else 0.

  A letter counts alone ("B", "b", "(B)") or with a text behind it ("B) red"). Options may be
  unknown: then letters only. Raises ValueError for a gold that is no capital letter or no option's.
  """
  if not LETTER.fullmatch(gold_letter) or (options and index_of(gold_letter) >= len(options)):
    raise ValueError(
      f"gold {gold_letter!r} must be the letter of one of the {len(options) or 26} "
      f"options, A to {string.ascii_uppercase[(len(options) or 26) - 1]}"
    )
  if prediction is None:
    return 0.0
  count = len(options) or 26
  alone = re.fullmatch(r"[\s(\[*]*([A-Za-z])[\s)\].:*]*", without_markup(prediction))
  if alone:
    return float(alone.group(1).upper() == gold_letter)
  for normal in (_plain_text, _normal):  # to the second "A) blue" is "blue"
    same = [i for i, option in enumerate(options) if normal(option) == normal(prediction)]
    if same:
      return float(same == [index_of(gold_letter)])
    letter = letter_of(prediction, count)
    if letter:
      return float(letter == gold_letter)
  return 0.0


def relaxed_accuracy(prediction: str | None, gold: str, tolerance: float = 0.05) -> float:
  """1 for a number within `tolerance` of the gold, relative to the gold, bounds included; for
  texts, if they are equal.

  ChartQA's metric (Masry et al. 2022, section 5.1; after Methani et al. 2020). A gold of zero wants
  zero. Texts are compared without case, white space and a full stop at the end. Numbers:
    thousands separators, currency signs, LaTeX and Markdown around them do not matter, "2 million"
    is 2000000; a unit ("12 cm") does not matter if the other side has none, and must be the same if
    it has one; "50%" is 50; it is 0.5 too, but only if the other side has no sign and is written as
    a fraction of at most 1 ("0.5", "1/2"). Nothing else is forgiven a factor of 100.
  """
  if prediction is None:
    return 0.0
  found, wanted = _quantity(prediction), _quantity(gold)
  if found is None or wanted is None:
    return float(_plain_text(prediction) == _plain_text(gold))
  if found.unit and wanted.unit and found.unit != wanted.unit:
    return 0.0
  pairs = [(found.value, wanted.value)]
  if found.percent and not wanted.percent and wanted.is_fraction:
    pairs.append((found.value / 100, wanted.value))
  if wanted.percent and not found.percent and found.is_fraction:
    pairs.append((found.value, wanted.value / 100))
  # Fractions, not floats: 1.05 is within 5% of 1, and float arithmetic says it is not.
  relative = Fraction(str(tolerance))
  return float(any(abs(ours - golds) <= relative * abs(golds) for ours, golds in pairs))


def anls(prediction: str | None, golds: str | Sequence[str], threshold: float = 0.5) -> float:
  """The greatest normalised Levenshtein similarity to a gold, 0 below `threshold`.

  1 - distance / length of the longer text, without case and with single spaces (Biten et al. 2019,
  equation 1; at the threshold itself the paper gives 0, and the challenge's and the released code
  give the similarity, as here).
  """
  if prediction is None:
    return 0.0
  golds = (golds,) if isinstance(golds, str) else golds
  best = max(
    (_similarity(_spaced(prediction), _spaced(gold), threshold) for gold in golds), default=0.0
  )
  return best if best >= threshold else 0.0


def exact(prediction: str | None, gold: str) -> float:
  """1 if both are the same number, or the same text without case, articles, punctuation and white
  space; else 0.
  """
  return float(prediction is not None and _normal(prediction) == _normal(gold))


def maths(prediction: str | None, gold: str) -> Score:
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
  if package is None:
    return Score(_exact_or_number(prediction, gold), "plain")
  parsed = None if _has_words(gold) else _parse(gold)
  if not parsed:
    return Score(_exact_or_number(prediction, gold), "exact")
  if prediction is None:
    return Score(0.0, "math_verify")
  same = re.sub(r"\s+", "", without_markup(prediction)) == re.sub(r"\s+", "", without_markup(gold))
  return Score(
    float(
      same
      or (not _has_words(prediction) and package.verify(parsed, _parse(prediction) or []))
      or (_has_words(prediction) and relaxed_accuracy(prediction, gold, 0) == 1)
    ),
    "math_verify",
  )


class _Quantity(NamedTuple):
  value: Fraction
  percent: bool
  is_fraction: bool  # written as one, and at most 1
  unit: str


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_CURRENCY = r"(?:us|ca|au)?[$€£¥₹]|usd|eur|gbp"
_WORD = r"[^\W\d_]+(?:\^[23])?"
_NUMBER = re.compile(
  rf"(?P<sign>[-+]?)\s*(?:(?:{_CURRENCY})\s*)?(?P<minus>-?)(?P<number>{_DIGITS})(?:e(?P<exponent>[-+]?\d{{1,3}}))?"
  rf"(?:\s*/\s*(?P<under>{_DIGITS}))?(?:\s*(?P<percent>%|percent\b))?"
  r"(?:\s+(?P<scale>thousand|million|billion|trillion)\b)?"
  rf"\s*(?P<unit>(?:{_CURRENCY})|°\s*[cf]?|(?<=\s){_WORD}(?:[ /]{_WORD})?)?\.?",
  re.IGNORECASE,
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# characters: int() refuses more than 4300 digits, which a looping model writes
_LONGEST_NUMBER = 300


def _quantity(text: str) -> _Quantity | None:
  """The number that a text is, with its unit; None for any other text."""
  text = without_markup(text)
  # Not behind a number: 2\frac{1}{2} is 5/2.
  text = re.sub(
    r"(?<!\d)(?<!\d )\\[dt]?frac\s*(?:\{([^{}]+)\}\s*\{([^{}]+)\}|(\d)(\d))",
    lambda match: f"{match[1] or match[3]}/{match[2] or match[4]}",
    text,
  )
  match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
  if not match:
    return None
  value = Fraction(match["number"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
  if match["under"]:
    under = Fraction(match["under"].replace(",", ""))
    if not under:
      return None
    value /= under
  value *= _SCALES.get((match["scale"] or "").lower(), 1)
  if "-" in (match["sign"], match["minus"]):
    value = -value
  written = "." in match["number"] or match["under"] is not None
  unit = re.sub(rf"\s+|(?:{_CURRENCY})$", "", (match["unit"] or "").casefold())
  unit = unit.removesuffix("s") if len(unit) > 3 else unit
  return _Quantity(value, match["percent"] is not None, written and abs(value) <= 1, unit)


def _spaced(text: str) -> str:
  return " ".join(text.casefold().split())


def _plain_text(text: str) -> str:
  return _spaced(without_markup(text)).rstrip(".").rstrip()


_TOKEN = re.compile(
  r"(?:(?<![\w)\]])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
  r"|[^\W\d_]+(?:['’][^\W\d_]+)*|\\[a-z]+|[%°/+=<>^*√()\[\]{}-]"
)


def _normal(text: str) -> tuple[str | Fraction, ...]:
  """A text's words, numbers and signs. Signs that punctuate words are left out, those of
  mathematics are not.
  """
  text = without_markup(text).casefold()
  whole = _quantity(text)
  if whole and not whole.unit:
    return ("%", whole.value) if whole.percent else (whole.value,)
  # brackets and hyphens punctuate words and make intervals and differences
  wordy = re.search(r"[^\W\d_]{2,}", text)
  tokens: list[str | Fraction] = []
  for token in _TOKEN.findall(text):
    if wordy and token in "()[]{}-*":
      continue
    number = re.fullmatch(r"[-+]?[\d,.]+", token) and len(token) <= _LONGEST_NUMBER
    tokens.append(Fraction(token.replace(",", "")) if number else token)
  return (
    tuple(token for token in tokens if token not in ("a", "an", "the"))
    or tuple(tokens)
    or tuple(text.split())
  )


def _similarity(a: str, b: str, threshold: float) -> float:
  """1 - Levenshtein distance / longer length; 0 where the lengths alone keep it below the
  threshold.
  """
  longer = max(len(a), len(b))
  if not longer:
    return 1.0
  if min(len(a), len(b)) / longer < threshold:
    return 0.0
  return 1 - edit_distance(a, b) / longer


def edit_distance(a: str, b: str) -> int:
  """Levenshtein's distance, by Wagner and Fischer's table, a row at a time."""
  row = list(range(len(b) + 1))
  for i, left in enumerate(a, 1):
    diagonal, row[0] = row[0], i
    for j, right in enumerate(b, 1):
      diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
  return row[-1]


# Mathematics.

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


def _has_words(text: str) -> bool:
  """Whether a text has words, of three letters or more, that are no LaTeX and no function."""
  words = re.findall(
    r"(?<![\\a-zA-Z])[^\W\d_]{3,}", re.sub(r"\\[a-zA-Z]+", " ", without_markup(text))
  )
  return any(word.casefold() not in _FUNCTIONS for word in words)


def _exact_or_number(prediction: str | None, gold: str) -> float:
  return max(exact(prediction, gold), relaxed_accuracy(prediction, gold, 0))


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
