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
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

Protocol = Literal["ours", "official"]
Metric = Literal["multiple_choice", "relaxed", "anls", "maths"]

# What `score` applies. "questions": plain rows of questions, as `data.benchmarks.from_qa_rows`
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
  option = None if _LETTER.fullmatch(gold.strip()) else _option_of(gold, options)
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
  if _LETTER.fullmatch(gold.strip()) and (not options or _index(gold.strip()) < len(options)):
    return Score(multiple_choice(prediction, gold.strip(), options), "multiple_choice")
  if metric == "maths":
    return maths(prediction, gold)
  return Score(exact(prediction, gold), "exact")


# Reading an answer out of what the model wrote.

_THINK, _END_THINK, _ANSWER, _END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
_LETTER = re.compile(r"[A-Z]")
_SAID = re.compile(
  r"(?i:\b(?:answer|(?:correct|right|best)\s+(?:option|choice))"
  r"\**\s*(?:(?:is|(?:w|sh)ould\s+be|must\s+be)\b|[:：])"
  r"|答案(?:是|为|[:：]))[:：]?[ \t]*\**[ \t]*(?:\n+[ \t]*)?"
)
# A letter with what may follow it in an answer: nothing, ")", ".", ":" or ",", a reason. Not "A red
# dog".
_LABEL = re.compile(
  r"[\s*_(\[\"'`$]*(?:option\s+|choice\s+)?[(\[*]*([A-Z])"
  r"(?:[*)\]\"'`$]*[\s.]*$|\*\*|\**[)\].:：](?!\d)|\**[,，、](?!\s*(?-i:[A-HJ-Z])\b)|\s+[-–—]\s"
  r"|\s+(?:because|since|as)\b)",
  re.IGNORECASE,
)
_REASON = re.compile(r"(?<=\S)[,;]?\s+(?:because|since)\s.*$", re.IGNORECASE)
# Words that a full stop shortens: as they are spelt ("12 ms." has none of "Ms."), and in any case
# before a number.
_ABBREVIATIONS = frozenset(
  "Capt Col Dr Gen Gov Lt Mr Mrs Ms Mt Prof Rep Rev Sen Sgt St Vs approx ca cf vs".split()
)
_BEFORE_NUMBERS = frozenset(
  "apr aug ch dec eq feb fig figs jan jul jun mar no nos nov oct p pp sec sep sept vol".split()
)


def extract_answer(output: str, options: int | None, protocol: Protocol) -> str | None:
  """The answer in a model's output, or None where there is none; it is scored as wrong.

  `options` is the number of options of a multiple-choice question, None for an open one.

  official: `</think>`, white space, `<answer>`, and in it `\\boxed{X}`; else None. As the released
  pattern has it, X reaches from the first `\\boxed{` to the last `}` before the last `</answer>`:
  nested braces are kept, and so is all that stands between two boxes.

  ours: what stands before the last `</think>` is dropped; None if a `<think>` is still open (the
  thought was cut off). Then the first of these that is there and not empty:
    1. the last `\\boxed{X}` in the last `<answer>`, braces balanced;
    2. the text of the last `<answer>` (its end tag may be missing, as when the end of the turn took
       its place);
    3. the last `\\boxed{X}` anywhere;
    4. the sentence after the last "answer is", "correct option is", "Answer:", "答案是" and the
       like, without a reason ("because …") and the full stop;
    5. multiple choice: a letter that is all the text, or begins its last line with ")", "." or ":"
       behind it, or so begins its first one where no other line begins with another option's;
    6. the last line that holds letters or digits.
  With options, a letter that begins any of these ("B) red", "(B).", "B, because …") stands for all
  of it.
  """
  if protocol not in ("ours", "official"):
    raise ValueError(f"protocol = {protocol!r}; use 'ours' or 'official'")
  if options is not None and not 2 <= options <= 26:
    raise ValueError(
      f"options = {options}; a multiple-choice question has 2 to 26, an open one None"
    )
  if protocol == "official":
    return _official_answer(output)
  text = output[output.rfind(_END_THINK) + len(_END_THINK) :] if _END_THINK in output else output
  if _THINK in text:
    return None
  found = None
  if _ANSWER in text:
    inner = text[text.rindex(_ANSWER) + len(_ANSWER) :].partition(_END_ANSWER)[0]
    found = _last_boxed(inner) or inner.strip()
  found = found or _last_boxed(text)
  if not found:
    said = [text[match.end() :].partition("\n")[0] for match in _SAID.finditer(text)]
    said = [line for line in said if re.search(r"\w", line)]
    found = _first_sentence(_REASON.sub("", said[-1].strip())).strip().strip("*") if said else None
  if found:
    return _letter_of(found, options) or found
  lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
  if not lines:
    return None
  last, first = _letter_of(lines[-1], options), _letter_of(lines[0], options)
  # One that goes through the options begins a line with each.
  if not last and first and {_letter_of(line, options) for line in lines} - {first, None}:
    first = None
  return last or first or lines[-1]


_REFUSAL = re.compile(
  r"\b(?:can(?:no|')t|can not|could not|couldn't|unable to|impossible to|not possible to)\b[^.\n]*"
  r"\b(?:answer|determin\w+|tell|say|know|infer\w*|identif\w+|find)\b"
  r"|(?:\bnot|n't)(?: \w+){0,2}"
  r" (?:mention\w*|specif\w+|provide\w*|state\w*|given|enough|sufficient)\b"
  r"|\b(?:insufficient|no|not enough) information\b|\bunanswerable\b"
  r"|\b(?:do not|don't) know\b|^(?:unknown|n/?a)\W*$",
  re.IGNORECASE,
)


def refuses(answer: str) -> bool:
  """Whether an answer that `extract_answer` found says that there is none, as in "The caption does
  not mention it".
  """
  return _REFUSAL.search(answer.replace("’", "'").strip()) is not None


def _official_answer(output: str) -> str | None:
  # The released pattern is </think>\s*<answer>.*?\\boxed{(.*)}.*?</answer>, greedy and over lines.
  # Backtracking, it is cubic in a text of many boxes, as looping models write; this finds the same
  # in one pass.
  start = re.search(r"</think>\s*<answer>", output)
  box = output.find("\\boxed{", start.end()) if start else -1
  end = output.rfind("}", 0, max(output.rfind(_END_ANSWER), 0))
  begin = box + len("\\boxed{")
  return output[begin:end] if box >= 0 and end >= begin else None


def _last_boxed(text: str) -> str | None:
  """What the last closed `\\boxed{…}` holds; None without one or if it is empty."""
  last = (-1, -1)
  opened: list[tuple[int, bool]] = []  # where the text in braces begins, and whether it is a box's
  for match in re.finditer(r"(\\boxed\s*)?\{|\}", text):
    if match.group() != "}":
      opened.append((match.end(), match.group(1) is not None))
    elif opened:
      begin, boxed = opened.pop()
      last = max(last, (begin, match.start())) if boxed else last
  return text[last[0] : last[1]].strip() or None if last[0] >= 0 else None


def _first_sentence(text: str) -> str:
  """A line up to the full stop that ends its first sentence, without it."""
  words = text.split()
  for number, (word, following) in enumerate(zip(words, words[1:]), 1):
    if word.endswith(".") and _ends_a_sentence(word[:-1].lstrip("([*\"'“‘"), following):
      return " ".join(words[:number])[:-1]
  return re.sub(r"(?<!\.[^\W\d])\.$", "", text)


def _ends_a_sentence(word: str, following: str) -> bool:
  """Whether the full stop between two words does; not in "Dr. No", "Fig. 3", "J. Smith", "U.S.
  dollars", "Inc. and".
  """
  initials = (len(word) == 1 and word.isupper()) or re.fullmatch(
    r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]", word
  )
  short = word.isalpha() and len(word) < 4 and following[0].islower()
  number = word.casefold() in _BEFORE_NUMBERS and following.lstrip("#(")[:1].isdigit()
  return not (
    not word or word.endswith(".") or initials or short or number or word in _ABBREVIATIONS
  )


def _letter_of(text: str, options: int | None) -> str | None:
  """The option's letter that `text` begins with as an answer; a small letter only when alone. None
  without options.
  """
  if options is None:
    return None
  text = _without_markup(text)
  match = _LABEL.match(text)
  if not match or _index(match.group(1).upper()) >= options:
    return None
  alone = not re.search(r"\w", text[match.end(1) :])
  return match.group(1).upper() if match.group(1).isupper() or alone else None


def _index(letter: str) -> int:
  return string.ascii_uppercase.index(letter)


# Metrics, ours.


def multiple_choice(prediction: str | None, gold_letter: str, options: Sequence[str] = ()) -> float:
  """1 if the prediction is the gold's letter, or the text of exactly one option and that is the
  gold's; else 0.

  A letter counts alone ("B", "b", "(B)") or with a text behind it ("B) red"). Options may be
  unknown: then letters only. Raises ValueError for a gold that is no capital letter or no option's.
  """
  if not _LETTER.fullmatch(gold_letter) or (options and _index(gold_letter) >= len(options)):
    raise ValueError(
      f"gold {gold_letter!r} must be the letter of one of the {len(options) or 26} "
      f"options, A to {string.ascii_uppercase[(len(options) or 26) - 1]}"
    )
  if prediction is None:
    return 0.0
  count = len(options) or 26
  alone = re.fullmatch(r"[\s(\[*]*([A-Za-z])[\s)\].:*]*", _without_markup(prediction))
  if alone:
    return float(alone.group(1).upper() == gold_letter)
  for normal in (_plain_text, _normal):  # to the second "A) blue" is "blue"
    same = [i for i, option in enumerate(options) if normal(option) == normal(prediction)]
    if same:
      return float(same == [_index(gold_letter)])
    letter = _letter_of(prediction, count)
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
  same = re.sub(r"\s+", "", _without_markup(prediction)) == re.sub(
    r"\s+", "", _without_markup(gold)
  )
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
  text = _without_markup(text)
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


_DASHES = str.maketrans("–—−⁄", "---/")


def _without_markup(text: str) -> str:
  """A text without LaTeX's and Markdown's signs around it or its words; fractions and powers
  stay.
  """
  text = (
    unicodedata.normalize("NFKC", text.replace("²", "^2").replace("³", "^3"))
    .translate(_DASHES)
    .strip()
  )
  text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|textrm)\s*\{([^{}]*)\}", r"\1", text)
  text = re.sub(r"\\([%$#&_])", r"\1", text).replace("{,}", ",")
  text = re.sub(r"\\[,;!:]|\\(?:left|right)(?![a-zA-Z])", "", text)
  text = re.sub(r"\^\s*\{?\\circ\}?|\\degree", "°", text)
  for around in (r"\$\$?(.+?)\$\$?", r"\\\((.+)\\\)", r"\\\[(.+)\\\]", r"\*\*(.+)\*\*", r"`(.+)`"):
    match = re.fullmatch(around, text, re.DOTALL)
    text = match.group(1).strip() if match else text
  return text


def _spaced(text: str) -> str:
  return " ".join(text.casefold().split())


def _plain_text(text: str) -> str:
  return _spaced(_without_markup(text)).rstrip(".").rstrip()


_TOKEN = re.compile(
  r"(?:(?<![\w)\]])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
  r"|[^\W\d_]+(?:['’][^\W\d_]+)*|\\[a-z]+|[%°/+=<>^*√()\[\]{}-]"
)


def _normal(text: str) -> tuple[str | Fraction, ...]:
  """A text's words, numbers and signs. Signs that punctuate words are left out, those of
  mathematics are not.
  """
  text = _without_markup(text).casefold()
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
    r"(?<![\\a-zA-Z])[^\W\d_]{3,}", re.sub(r"\\[a-zA-Z]+", " ", _without_markup(text))
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
