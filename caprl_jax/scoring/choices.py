"""An answer to a multiple-choice question, the right letter -> 1 or 0."""

import re
import string
from collections.abc import Sequence

from caprl_jax.scoring.extraction import refuses
from caprl_jax.scoring.labels import label_of
from caprl_jax.scoring.metrics import NEGATES, normal_words, plain_words, words_of
from caprl_jax.scoring.plain_text import without_markup
from caprl_jax.scoring.statements import IF, implied_letter, stated_letter

LETTER = re.compile(r"[A-Z]")
_CHINESE = re.compile(r"[\u4e00-\u9fff]+")
_CHINESE_NOT = re.compile(r"(?:不|没有?|並?并?非|未)[^，。；]{0,4}$")
_NO_ANSWER = re.compile(
  r"(?:idea|answer|clue|info|information|data|way|one|option|mention|caption|image|evidence)\b"
)
_IS_NOT_THERE = re.compile(r"(?:is|are|was|were) (?:absent|missing|not|nowhere)\b")
_LONGEST = 4000  # of an answer that is read, in characters


def multiple_choice(prediction: str | None, gold_letter: str, options: Sequence[str] = ()) -> float:
  """1 if the prediction is the gold's letter, or the text of exactly one option and that is the
  gold's; else 0.

  A letter counts alone ("B", "b", "(B)"), with a text behind it ("B) red"), or as a sentence states
  it. In a sentence that states none, the only option whose words are in it counts ("The dog.").
  Options may be unknown: then letters only. Raises ValueError for a gold that is no capital letter
  or no option's.
  """
  if not LETTER.fullmatch(gold_letter) or (options and index_of(gold_letter) >= len(options)):
    raise ValueError(
      f"gold {gold_letter!r} must be the letter of one of the {len(options) or 26} "
      f"options, A to {string.ascii_uppercase[(len(options) or 26) - 1]}"
    )
  if prediction is None:
    return 0.0
  prediction = prediction if len(prediction) <= _LONGEST else prediction[-_LONGEST:]
  count = len(options) or 26
  alone = re.fullmatch(
    r"[\s(\[{*\"'`]*([A-Za-z])[\s)\]}.:*\"'`。]*", without_markup(prediction)[:100]
  )
  if alone:
    return float(alone.group(1).upper() == gold_letter)
  for normal in (plain_words, normal_words):  # to the second "A) blue" is "blue"
    equal = [i for i, option in enumerate(options) if normal(option) == normal(prediction)]
    if equal:
      return float(equal == [index_of(gold_letter)])
    letter = label_of(prediction, count)
    if letter:
      return float(letter == gold_letter)
  letter = stated_letter(prediction, count)
  if letter is None:
    letter = _labelled_option(prediction, options) or implied_letter(prediction, count)
  if letter is None:
    mentioned = _mentioned(prediction, options)
    return float(mentioned == index_of(gold_letter))
  return float(letter == gold_letter)


def chosen(prediction: str | None, options: Sequence[str]) -> int | None:
  """The option that a prediction chooses, as `multiple_choice` reads it; None for none."""
  letters = string.ascii_uppercase[: len(options)]
  found = (i for i, one in enumerate(letters) if multiple_choice(prediction, one, options))
  return next(found, None)


def _labelled_option(prediction: str, options: Sequence[str]) -> str | None:
  """The letter before its own option's text, or before a few words of no option ("B dog")."""
  match = re.fullmatch(r"[\s(\[*\"']*([A-Z])\s+(\S.*)", without_markup(prediction[:500]), re.DOTALL)
  if not match or index_of(match[1]) >= (len(options) or 26):
    return None
  rest = match[2]
  own = words_of(options[index_of(match[1])]) if options else ""
  same_text = options and words_of(rest).startswith(own)
  if match[1] in "AI":  # an article, a pronoun
    same_text = options and words_of(rest) == own
  few = match[1] not in "AI" and len(rest.split()) <= 5 and rest[0].islower()
  joined = re.match(
    r"(?:and|or|not|is|are|was|if|unless|would|could|might|may|can|than|in|of|on)\b", rest
  )
  return match[1] if same_text or (few and not joined and options) else None


def _mentioned(prediction: str, options: Sequence[str]) -> int | None:
  """The only option whose words are in a text and not denied; None for none, or several."""
  if IF.search(prediction):
    return None
  refused = refuses(prediction)
  text = words_of(prediction)
  spans: list[tuple[int, int, int]] = []
  for index, option in enumerate(options):
    words = words_of(option)
    chinese = _CHINESE.fullmatch(words.strip()) is not None  # which has no spaces between words
    words = words.strip() if chinese else words
    short_text = len(words.strip()) < 2 and not words.strip().isdigit() and not chinese
    if not re.search(r"\w", words) or short_text:
      continue
    if refused and not refuses(option):
      continue
    short = words.strip() in ("yes", "no", "true", "false")
    at = text.find(words)
    while at >= 0:
      behind = text[at + len(words) :]
      if short and (at > 0 or _NO_ANSWER.match(behind) and words.strip() == "no"):
        break
      before = text[max(0, at - 60) : at] if chinese else text[max(0, at - 60) : at + 1]
      denied = _CHINESE_NOT.search(before) if chinese else NEGATES.search(before)
      if not denied and not _IS_NOT_THERE.match(behind):
        spans.append((at, at + len(words), index))
      at = text.find(words, at + 1)
  kept = {
    index
    for begin, end, index in spans[:200]
    if not any(
      a <= begin and end <= b and (b - a) > (end - begin)
      for a, b, other in spans[:200]
      if other != index
    )
  }
  return kept.pop() if len(kept) == 1 else None


def index_of(letter: str) -> int:
  """A is 0."""
  return string.ascii_uppercase.index(letter)


def option_of(text: str, options: Sequence[str]) -> int | None:
  """The option whose text it is; None for none, or for several."""
  for normal in (plain_words, normal_words):
    same = [i for i, option in enumerate(options) if normal(option) == normal(text)]
    if same:
      return same[0] if len(same) == 1 else None
  return None
