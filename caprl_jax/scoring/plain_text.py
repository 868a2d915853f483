"""A written text -> the same without the signs that only set it: Markdown's, LaTeX's, quotes."""

import re
import unicodedata

# Dashes, minus signs and the fraction's slash; letters in black squares (emoji) are letters.
_SIGNS = str.maketrans("‐‑‒–—―−⁄", "-------/") | {0x1F170 + i: chr(65 + i) for i in range(26)}
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufe0e\ufe0f\ufeff]")
# "2½" is two and a half, and to NFKC "21/2"
_HALVES = re.compile("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])")
_SET_AS_TEXT = re.compile(
  r"\\(?:text(?:bf|it|rm|sf|tt|up)?|math(?:rm|bf|sf|tt|it)|mbox|operatorname)\s?\{([^{}]*)\}"
)
_AROUND = [
  re.compile(pattern, re.DOTALL)
  for pattern in (
    r"\$\$?([^$]+)\$\$?",
    r"\\\((.+)\\\)",
    r"\\\[(.+)\\\]",
    r"\*\*(.+)\*\*",
    r"__(.+)__",
    r"\*([^*]+)\*",
    r"`+([^`]+)`+",
  )
]


def normal_form(text: str) -> str:
  """A text in Unicode's compatibility form (full-width letters are letters), with one kind of
  dash.

  Superscript 2 and 3 stay powers ("^2"), and "2½" becomes "2 1/2".
  """
  text = _INVISIBLE.sub("", text.replace("²", "^2").replace("³", "^3"))
  return unicodedata.normalize("NFKC", _HALVES.sub(" ", text)).translate(_SIGNS)


def without_markup(text: str) -> str:
  """A text without LaTeX's and Markdown's signs around it or its words; fractions and powers
  stay.
  """
  text = normal_form(text).strip()
  text = _SET_AS_TEXT.sub(r"\1", _SET_AS_TEXT.sub(r"\1", text))
  text = re.sub(r"\\([%$#&_])", r"\1", text).replace("{,}", ",")
  text = re.sub(r"\\[,;!:]|\\(?:left|right)(?![a-zA-Z])", "", text)
  text = re.sub(r"\^\s?\{?\\circ\}?|\\degree", "°", text)
  for around in _AROUND:
    match = around.fullmatch(text)
    text = match.group(1).strip() if match else text
  return text


def spaced(text: str) -> str:
  """Without case, and with single spaces."""
  return " ".join(text.casefold().split())


_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "「": "」", "『": "』"}


def tidied(text: str) -> str:
  """`without_markup`, and without quotation marks around the text or a full stop at its end."""
  text = without_markup(text)
  for _ in range(4):
    before = text
    text = re.sub(r"(?<!\.[^\W\d])[.。]$", "", text.strip())
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1] and text[-1] not in text[1:-1]:
      text = text[1:-1]
    text = without_markup(text) if text != before else text
    if text == before:
      break
  return text
