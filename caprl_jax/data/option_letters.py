"""The letters that options and answers are written with -> options without them, the right one's
index.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from caprl_jax.json_files import cut, shown

MAX_OPTIONS = len(string.ascii_uppercase)

_ONE = "([A-Za-zＡ-Ｚａ-ｚ])"
# "(A) red", "A) red", "A. red", "A: red", "A、red", "A.red", "- A) red", "Option A: red"; no "A.D."
_LABEL = re.compile(
  rf"\s*(?:[-*•]\s+)?(?:option\s+)?"
  rf"(?:[(\[（【]{_ONE}[)\]）】]|{_ONE}(?:[)）、．：]|[.:](?:(?=\s)|(?=[^\W_]{{2}}))))",
  re.IGNORECASE,
)
# A label only where all options have theirs in order: "A.5", "A.是", "A - red", "**A.** red".
_LOOSE = re.compile(
  rf"\s*(?:[-*+•·–—]\s+)?(?:(?:option|choice|answer|选项)\s*)?"
  rf"(?:([*_`]{{1,2}})[(\[]?{_ONE}\s?[)\].:]?\1[).:]?|<{_ONE}>"
  rf"|{_ONE}(?:\s?[)）、．：]|[.:]|\s?[-–—|]\s))",
  re.IGNORECASE,
)
_LETTER = re.compile(
  rf"\s*(?:(?:option|choice|answer|选项)\s*)?[(\[【<*_`]*{_ONE}[)\]】>*_`.:、。]*\s*", re.IGNORECASE
)
# Options that speak of what the question lists, "(a) and (b)": no letters of their own.
_REFERS = re.compile(r"(?:(?:and|or|&|,)\s+[(\[]?[A-Za-z][)\]]|only$)", re.IGNORECASE)
_NUMBER = re.compile(r"\s*(?:option\s+)?[(\[]?(\d{1,2})[)\].:、．]\s*\S", re.IGNORECASE)
_INITIALS = re.compile(r"\s*(?:[A-Z]\.\s*)+[A-Z][^\W\d_][\w'’-]*.*", re.DOTALL)
_NAME = re.compile(r"\s*(?:[A-Z][\w'’-]*\.?\s+)+[A-Z][\w'’-]*\.?\s*")


def folded(option: str) -> str:
  """What two options must differ in: the text without case and outer spaces."""
  return option.strip().casefold()


def labelled(option: str) -> tuple[str, str] | None:
  """The letter that an option is written with, a capital, and the text behind it: "b) red" -> B and
  red. None where there is no letter, or no text behind it.
  """
  match = _LABEL.match(option)
  text = option[match.end() :].strip() if match else ""
  if not match or not text:
    return None
  return unicodedata.normalize("NFKC", match.group(1) or match.group(2)).upper(), text


def without_letters(options: Sequence[str], where: str) -> tuple[str, ...]:
  """The options, without the letters A, B, C ... where all of them carry theirs, in this order.

  Raises ValueError, starting with `where`, as `check_letters` does of what is left.
  """
  texts = tuple(options)
  while (bare := _without_own(texts, labelled)) is not None:
    texts = bare
  if texts == tuple(options):
    texts = _without_own(texts, _loosely_labelled) or texts
  check_letters(texts, where)
  return texts


def options_in_order(options: Any) -> Any:
  """A list of options where they stand under their letters, {"A": "red", "B": "blue", "C": null};
  anything else as it is."""
  if not isinstance(options, dict):
    return options
  held = {key.strip().upper(): text for key, text in options.items() if text is not None}
  in_order = sorted(held) == list(string.ascii_uppercase[: len(held)])
  return [held[letter] for letter in sorted(held)] if held and in_order else options


def _without_own(
  options: Sequence[str], label: Callable[[str], tuple[str, str] | None]
) -> tuple[str, ...] | None:
  """The texts behind the letters A, B, C ... that `label` finds on all options, in this order; None
  where there are none, or where they are part of the texts: "(a) and (b)", "a.txt" and "b.txt"."""
  found = [part for part in map(label, options) if part]
  letters, texts = [part[0] for part in found], tuple(part[1] for part in found)
  if not letters or len(found) < len(options):
    return None
  if letters != list(string.ascii_uppercase[: len(letters)]):
    return None
  return None if _are_part(texts) else texts


def _are_part(texts: Sequence[str]) -> bool:
  """Whether letters are part of options, by the texts behind them."""
  alike = len(texts) > 1 and len({folded(text) for text in texts}) < len(texts)
  return alike or any(_REFERS.match(text) for text in texts)


def _loosely_labelled(option: str) -> tuple[str, str] | None:
  match = _LOOSE.match(option)
  text = option[match.end() :].strip() if match else ""
  if not match or not text or re.match(r"[A-Za-z]\b", text):  # "A.D."
    return None
  return unicodedata.normalize("NFKC", next(filter(None, match.groups()[1:]))).upper(), text


def check_letters(options: Sequence[str], where: str) -> None:
  """Raises ValueError, starting with `where`, for options that would be shown with two letters.

  That is: all carry the first letters of the alphabet, in any order; or all carry different letters
  that follow each other or are among the first, and are no initials; or some do, each that of its
  own place, as in ("red", "blue", "(C) green"). Taken for text: a letter at another place ("red",
  "A) blue"), for texts may begin so, names with initials ("A. Lincoln") among names, other letters
  ("E. coli", "S. aureus"), and letters that are part of the text ("(a) and (b)").
  """
  if _without_own(options, _loosely_labelled) is not None:
    raise ValueError(f"{where}: its options carry letters of their own; write them without")
  found = [labelled(option) for option in options]
  letters = [part[0] if part else "" for part in found]
  if not any(letters) or _are_part([part[1] for part in found if part]):
    return
  if all(letters):
    first = sorted(letters) == list(string.ascii_uppercase[: len(letters)])
    if first and "".join(letters) == string.ascii_uppercase[: len(letters)]:
      raise ValueError(f"{where}: its options carry letters of their own; write them without")
    if first or _may_be_labels(letters) and not are_names(options):
      raise ValueError(
        f"{where}: its options carry the letters {cut(', '.join(letters))}, which are not A, B, C "
        "... in order; write them without letters"
      )
    return
  own = [i for i, letter in enumerate(letters) if letter]
  if any(letters[i] != string.ascii_uppercase[i : i + 1] for i in own) or all(
    _INITIALS.fullmatch(option) if letter else _NAME.fullmatch(option)
    for option, letter in zip(options, letters)
  ):
    return
  raise ValueError(
    f"{where}: option {own[0]}, {shown(options[own[0]])}, carries a letter and others carry none; "
    "give letters to all of them or to none"
  )


def _may_be_labels(letters: Sequence[str]) -> bool:
  """Whether letters that are not A, B, C ... in order may have been: B, C; or A, B, D, F."""
  places = sorted(map(string.ascii_uppercase.index, letters))
  if len(set(places)) < len(places):
    return False
  in_a_row = places[-1] - places[0] == len(places) - 1
  return in_a_row or places[-1] <= len(places) + 1


def are_names(options: Sequence[str]) -> bool:
  """Whether all options begin with initials, "G. Washington", which are not A, B, C ... in some
  order.
  """
  letters = sorted(part[0] for part in map(labelled, options) if part)
  return letters != list(string.ascii_uppercase[: len(options)]) and all(
    map(_INITIALS.fullmatch, options)
  )


def gold_index(gold: Any, options: Sequence[str], where: str, letters: str = "") -> int:
  """The index of the option that `gold` says is right.

  Args:
    gold: an index from 0 (also 1.0, which pandas makes of 1); or a letter ("B", "b", "(B)", "B.",
      "option B"), a letter with the option's text ("B) red"), the text, or an index in digits. A
      small letter or digits that are an option's text are that option. A list of one such is read
      too.
    options: without letters.
    letters: of the options, in their order; "" for A, B, C ...

  Raises:
    ValueError, starting with `where`: no option fits, or several do, such as "A" for ("B", "A"). An
    index that is too large is returned as it is (`rows.check_question` refuses it).
  """
  if isinstance(gold, list) and len(gold) == 1:
    gold = gold[0]
  if isinstance(gold, float) and gold.is_integer():
    gold = int(gold)
  if isinstance(gold, bool) or not isinstance(gold, (int, str)):
    several = "; one option must be right" if isinstance(gold, list) else ""
    raise ValueError(
      f"{where}: gold is {shown(gold)}, but it must be an index, a letter or a text{several}"
    )
  if isinstance(gold, int):
    return gold
  numbers = [int(found.group(1)) for found in map(_NUMBER.match, options) if found]
  digits = gold.strip()
  numbered = len(numbers) == len(options) and numbers != [*range(len(numbers))]
  exact = any(option.strip() == digits for option in options)
  if numbered and digits.isdecimal() and int(digits[:9]) in numbers and not exact:
    raise ValueError(
      f"{where}: gold {shown(gold)} may be an index from 0 or a number that the options "
      f"{shown(list(options))} carry; write a letter, or options without numbers"
    )
  found = _fitting(gold, options, letters or string.ascii_uppercase[: len(options)])
  if len(found) != 1:
    fits = " and ".join(shown(options[i], 40) for i in sorted(found)) or "none"
    raise ValueError(
      f"{where}: gold {shown(gold)} fits {fits} of the options {shown(list(options))}; it must be "
      "the letter (A for the first) or the text of exactly one, or an index from 0"
    )
  return found.pop()


def _fitting(gold: str, options: Sequence[str], letters: str) -> set[int]:
  by_text = {i for i, option in enumerate(options) if folded(option) == folded(gold)}
  exactly = {i for i in by_text if options[i].strip() == gold.strip()}  # 5 mW is not 5 MW
  by_text = exactly or by_text
  plain = unicodedata.normalize("NFKC", gold).strip()
  if match := _LETTER.fullmatch(plain):
    place = letters.find(match.group(1).upper())
    if place < 0 or (by_text and plain == plain.lower()):
      return by_text
    return by_text | {place}
  if part := labelled(gold):
    place = letters.find(part[0])
    agrees = place >= 0 and folded(options[place]) == folded(part[1])
    return by_text | {place} if agrees else by_text
  digits = gold.strip()  # no "②", which NFKC makes a 2
  if not by_text and digits.isascii() and digits.isdigit() and int(digits[:9]) < len(options):
    return {int(digits[:9])}
  return by_text
