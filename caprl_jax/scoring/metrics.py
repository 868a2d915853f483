"""An answer, the gold -> 0..1 by a benchmark's published metric.

Letters are in `choices.py`, mathematics in `mathematics.py`.
"""

import ast
import re
from collections.abc import Sequence
from fractions import Fraction

from caprl_jax.scoring.plain_text import spaced, tidied, without_markup
from caprl_jax.scoring.quantities import LONGEST, Quantity, read_moment, read_quantity


def relaxed_accuracy(prediction: str | None, gold: str, tolerance: float = 0.05) -> float:
  """1 for a number within `tolerance` of the gold, relative to the gold, bounds included; for
  texts, if they are equal.

  ChartQA's metric (Masry et al. 2022, section 5.1; after Methani et al. 2020); years are numbers to
  it. A gold of zero wants zero. Texts are compared without case, white space and a full stop at the
  end; dates and times of day as such; lists ("red and blue", "[red, blue]") in any order. Numbers:
    as `quantities.read_quantity` has them; "2 million" is 2000000, and 2 where the other side has
    no such word (an axis may count in millions); a unit ("12 cm") does not matter if the other side
    has none, and must be the same if it has one; "50%" is 50; it is 0.5 too, but only if the other
    side has no sign and is written as a fraction of at most 1 ("0.5", "1/2"). Nothing else is
    forgiven a factor of 100.
  """
  if prediction is None:
    return 0.0
  return compared(prediction, gold, tolerance)


def same(prediction: str | None, gold: str) -> float:
  """1 for the very number, however it is written, or the same text; lists in any order; else 0.

  CharXiv's rule (Wang et al. 2024, the grader's instructions): numbers are equal in value, terms
  are the same, the order of several does not matter. Its grader is a language model, which also
  takes words of the same meaning.
  """
  if prediction is None:
    return 0.0
  return max(compared(prediction, gold, 0.0), exact(prediction, gold))


def compared(prediction: str, gold: str, tolerance: float, *, lists: bool = True) -> float:
  """`relaxed_accuracy`; `lists`: in any order."""
  if _close_set(prediction) == _close_set(gold):
    return 1.0
  moments = read_moment(prediction), read_moment(gold)
  if all(moments):
    return float(moments[0] == moments[1])
  found, wanted = read_quantity(prediction), read_quantity(gold)
  if found is not None and wanted is not None:
    return float(_close(found, wanted, tolerance))
  if lists:
    golds = _items(gold)
    ours = _items(prediction, tight=gold.strip().startswith("["))
    if len(ours) == len(golds) >= 2:
      return float(_same_items(ours, golds, tolerance))
  return float(plain_words(prediction) == plain_words(gold))


def _close_set(text: str) -> str:
  """Without case and markup, and without spaces around a ratio's or a fraction's sign."""
  return re.sub(r"\s?([:/])\s?", r"\1", spaced(tidied(text)))


def _close(found: Quantity, wanted: Quantity, tolerance: float) -> bool:
  if found.unit and wanted.unit and found.unit != wanted.unit:
    return False
  ours, golds = found.value * found.scale, wanted.value * wanted.scale
  pairs = [(ours, golds)]
  if (found.scale == 1) != (wanted.scale == 1):
    pairs.append((found.value, wanted.value))
  if found.percent and not wanted.percent and wanted.is_fraction:
    pairs.append((ours / 100, golds))
  if wanted.percent and not found.percent and found.is_fraction:
    pairs.append((ours, golds / 100))
  # Fractions, not floats: 1.05 is within 5% of 1, and float arithmetic says it is not.
  relative = Fraction(str(tolerance))
  return any(abs(one - other) <= relative * abs(other) for one, other in pairs)


def _items(text: str, *, tight: bool = False) -> list[str]:
  """The items of a text that is a list of them, else the text alone; `tight`: commas without a
  space part them too, as they do in brackets.
  """
  text = tidied(text[:2000])
  try:
    held = ast.literal_eval(text) if text.startswith("[") else None
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    held = None
  if isinstance(held, list) and all(isinstance(one, str) for one in held):
    return [tidied(one) for one in held]
  bracketed = re.fullmatch(r"[\[({](.*)[\])}]", text, re.DOTALL)
  inner = bracketed[1] if bracketed else text
  parts = re.split(
    r",\s+and\s|[,;]\s|\s(?:and|&)\s|[、;\n]" + (r"|,(?!\d{3}\b)" if bracketed or tight else ""),
    inner,
  )
  return [tidied(part) for part in parts if part.strip()]


def _same_items(ours: list[str], golds: list[str], tolerance: float) -> bool:
  """Whether each of ours is one of the golds, and each gold one of ours."""
  left = list(golds)
  for one in ours if len(ours) <= 50 else ():
    match = next(
      (i for i, gold in enumerate(left) if compared(one, gold, tolerance, lists=False)), None
    )
    if match is None:
      return False
    del left[match]
  return not left


def chartqapro(prediction: str | None, gold: str, years: Sequence[bool] | None = None) -> float:
  """ChartQAPro's metric (Masry et al. 2025, section 5; evaluate_predictions.py of the release):
  lists by element, in order, where one too many or too few scores 0; years exactly; other numbers
  within 5%, relative to the gold; texts by their ANLS. The mean over elements.

  years: whether each element is a year, as the dataset's column "Year" has it; the last flag stands
  for further ones. None: four digits from 1800 to 2100 are one. Numbers are read as by
  `relaxed_accuracy`, and a list where the gold is one also without brackets.
  """
  if prediction is None:
    return 0.0
  bracketed = re.fullmatch(r"\s*\[.*\][\s.]*", gold, re.DOTALL)
  golds = _items(gold) if bracketed else [gold]
  if not bracketed and re.fullmatch(r"\s*\[.*\]\s*", prediction, re.DOTALL):
    prediction = ", ".join(_items(prediction))  # as the benchmark does, which reads lists of both
  ours = _items(prediction, tight=True) if bracketed else [prediction]
  if bracketed and len(golds) == 1 and not re.match(r"\s*\[", prediction):
    ours = [prediction]
  found = 0.0
  for number, (one, wanted) in enumerate(zip(ours, golds)):
    year = years[min(number, len(years) - 1)] if years else _is_year(wanted)
    if year:
      found += float(spaced(tidied(one)) == spaced(tidied(wanted)))
    else:
      close = compared(one, wanted, 0.05, lists=False)
      numbers = read_quantity(one) is not None and read_quantity(wanted) is not None
      found += close if close or numbers else anls(tidied(one), tidied(wanted))
  return found / max(len(ours), len(golds), 1)


def _is_year(text: str) -> bool:
  match = re.fullmatch(r"\d{4}", tidied(text))
  return match is not None and 1800 <= int(match[0]) <= 2100


def open_answer(prediction: str | None, gold: str) -> float:
  """MMMU's rule for open questions (its eval_utils.py): numbers that are equal when rounded to two
  decimals; a text that holds the gold's; else `exact`.
  """
  if prediction is None:
    return 0.0
  found, wanted = read_quantity(prediction), read_quantity(gold)
  if found is not None and wanted is not None and not (found.percent or wanted.percent):
    return float(_close(_rounded(found), _rounded(wanted), 0.0))
  words = words_of(gold)
  held = len(words.strip()) > 1 and wanted is None and words in words_of(prediction[:5000])
  if held and not NEGATES.search(words_of(prediction[:5000]).partition(words)[0] + " "):
    return 1.0
  return exact(prediction, gold)


def _rounded(number: Quantity) -> Quantity:
  return number._replace(value=Fraction(round(number.value, 2)))


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
    (_similarity(spaced(prediction), spaced(gold), threshold) for gold in golds), default=0.0
  )
  return best if best >= threshold else 0.0


def exact(prediction: str | None, gold: str) -> float:
  """1 if both are the same number, or the same text without case, articles, punctuation and white
  space; else 0.
  """
  return float(prediction is not None and normal_words(prediction) == normal_words(gold))


def plain_words(text: str) -> str:
  """A text without markup, case and a full stop at its end."""
  return spaced(without_markup(text)).rstrip(".").rstrip()


_TOKEN = re.compile(
  r"(?:(?<![\w)\]])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
  r"|[^\W\d_]+(?:['’][^\W\d_]+)*|\\[a-z]+|[%°/+=<>^*√()\[\]{}-]"
)


def normal_words(text: str) -> tuple[str | Fraction, ...]:
  """A text's words, numbers and signs. Signs that punctuate words are left out, those of
  mathematics are not.
  """
  text = without_markup(text).casefold()
  whole = read_quantity(text)
  if whole and not whole.unit:
    value = whole.value * whole.scale
    return ("%", value) if whole.percent else (value,)
  # brackets and hyphens punctuate words and make intervals and differences
  wordy = re.search(r"[^\W\d_]{2,}", text)
  tokens: list[str | Fraction] = []
  for token in _TOKEN.findall(text):
    if wordy and token in "()[]{}-*":
      continue
    number = re.fullmatch(r"[-+]?[\d,.]+", token) and len(token) <= LONGEST
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


def words_of(text: str) -> str:
  """Words with a space around each."""
  found = re.findall(r"[^\W_]+(?:[.,:/'’-][^\W_]+)*|[^\w\s]", spaced(tidied(text)))
  return f" {' '.join(word for word in found if re.search(r'[^_]', word))} "


NEGATES = re.compile(
  r" (?:not|no|[a-z]*n['’]t|never|without|neither|nor|cannot|than|instead of|unlike|except|"
  r"lack|lacks|lacking)(?: [^ .;]+){0,3} $"
)
