"""A written number, date or time of day -> its value."""

import re
from fractions import Fraction
from typing import NamedTuple

from caprl_jax.scoring.plain_text import tidied

# Of a text that is a number, in characters: int() refuses more than 4300 digits, which a looping
# model writes.
LONGEST = 300


class Quantity(NamedTuple):
  """`value` times `scale` (10**6 of "2 million"), in `unit`; `percent` if a sign says so;
  `is_fraction` if it is written as one, and at most 1.
  """

  value: Fraction
  scale: int
  percent: bool
  is_fraction: bool
  unit: str


# 1,234.5 | 1 234,5 | 1'234 | 1.234.567 or 1.234,5 | 12,34,567 | 12,5 | 1234.5; a group of three
# behind a comma is thousands, one behind a single point is a fraction.
_DIGITS = (
  r"\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d{1,3}(?:[ ']\d{3})+(?:[.,]\d+)?(?!\d)|"
  r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?|\d+,\d{1,2}(?![\d,])|\d+(?:\.\d*)?|\.\d+"
)
_CURRENCY = r"(?:us|ca|au|nz|hk|c|a)?[$€£¥₹₩₽]|usd|eur|gbp|jpy|cny|rmb|chf|inr|rs\.?"
_WORD = r"[^\W\d_]+(?:\^[23])?"
_PERCENT = r"%|percent(?:age)?(?:\spoints?)?\b|per\scent\b|pct\b\.?"
_SCALES = {
  "hundred": 10**2,
  "thousand": 10**3,
  "million": 10**6,
  "billion": 10**9,
  "trillion": 10**12,
  "k": 10**3,
  "mn": 10**6,
  "mm": 10**6,
  "mio": 10**6,
  "m": 10**6,
  "bn": 10**9,
  "b": 10**9,
  "tn": 10**12,
  "t": 10**12,
  "lakh": 10**5,
  "crore": 10**7,
  "万": 10**4,
  "亿": 10**8,
}
# Letters are scales only directly behind the digits, or a currency before them: "5 m" is a length.
_NUMBER = re.compile(
  rf"(?P<sign>[-+]?)\s*(?P<currency>(?:{_CURRENCY})\s*)?(?P<minus>-?)\s*(?P<number>{_DIGITS})"
  r"(?:e(?P<exponent>[-+]?\d{1,3})|\s*(?:x|×|\*|\\times|\\cdot)\s*10\s*\^\s*\{?(?P<power>[-+]?\d{1,3})\}?)?"
  rf"(?:\s*/\s*(?P<under>{_DIGITS}))?(?:\s?(?P<percent>{_PERCENT}))?"
  r"(?:[ -]?(?P<scale>hundred|thousand|million|billion|trillion|lakh|crore|mio|"
  r"[万亿])s?(?![^\W\d_])|(?P<letter>k|mn|bn|tn|m|b|t)(?![^\W\d_]))?"
  rf"\s*(?P<unit>(?:{_CURRENCY})|°\s*[cf]?|(?:(?<=\s)|(?<=\d)(?=[^\W\d_]{{2}}))"
  rf"{_WORD}(?:[ /]{_WORD})?|"
  r"(?<=\d)[a-z](?![^\W_])|[年个人岁次件名位台家所])?\.?",
  re.IGNORECASE,
)
_HEDGE = re.compile(
  r"(?:(?:is|are|was|were|at|it|only|just|exactly|precisely|approximately|approx\.?|about|around|"
  r"roughly|nearly|almost|circa|ca\.|estimated|a\stotal\sof|total\sof|some|to\sbe|close\sto|"
  r"i(?:s|t['’]s)\sequal\sto|equal\sto)(?!\w)|[~≈=]|大约|大概|约)[\s,]*",
  re.IGNORECASE,
)
# A unit in another spelling.
_UNITS = {
  "km": "kilometer kilometre kms kilometers kilometres",
  "m": "meter metre meters metres",
  "cm": "centimeter centimetre centimeters centimetres cms",
  "mm": "millimeter millimetre millimeters millimetres",
  "kg": "kilogram kilograms kgs kilo kilos",
  "g": "gram grams gr",
  "mi": "mile miles",
  "ft": "foot feet",
  "in": "inch inches",
  "lb": "pound pounds lbs",
  "h": "hour hours hr hrs",
  "min": "minute minutes mins",
  "s": "second seconds sec secs",
  "year": "years yr yrs y",
  "day": "days d",
  "person": "persons people",
  "dollar": "dollars usd",
  "ton": "tons tonne tonnes",
  "l": "liter litre liters litres",
  "mg": "milligram milligrams",
  "°c": "c celsius degreescelsius degreecelsius",
  "°f": "f fahrenheit degreesfahrenheit degreefahrenheit",
  "°": "degree degrees deg",
}
_SAME_UNIT = {name: unit for unit, names in _UNITS.items() for name in names.split()}


def read_quantity(text: str) -> Quantity | None:
  """The number that a text is, with its unit; None for any other text.

  Read too: numbers in words, mixed fractions, powers of ten, separators of thousands of any kind,
  decimal commas where they are nothing else ("1.200,5", "3,25"), and "about" before a number. A
  scale of one letter ("1.5k", "$3.5B") is one only directly behind digits.
  """
  text = tidied(text) if len(text) <= 2 * LONGEST else text
  if len(text) > LONGEST:
    return None
  for _ in range(3):
    hedge = _HEDGE.match(text)
    text = text[hedge.end() :] if hedge else text
  text = re.sub(r"^(?:minus|negative)\s(?=\d)", "-", text, flags=re.IGNORECASE)
  if text.startswith("(") and text.endswith(")") and not set("(),") & set(text[1:-1]):
    text = text[1:-1].strip()
  text = re.sub(
    r"\\[dt]?frac\s*(?:\{([^{}]+)\}\s*\{([^{}]+)\}|(\d)(\d))",
    lambda match: f" {match[1] or match[3]}/{match[2] or match[4]}",
    text,
  ).strip()
  text = re.sub(r"^10\s?\^\s?\{?(-?\d{1,2})\}?$", r"1e\1", text)
  mixed = re.fullmatch(r"(-?)(\d{1,9})\s(\d{1,9})\s?/\s?(\d{1,9})(?=\D|$)(.*)", text)
  whole = Fraction(0)
  if mixed and int(mixed[4]):
    whole = Fraction(int(mixed[2]))
    text = f"{mixed[1]}{mixed[3]}/{mixed[4]}{mixed[5]}"
  match = _NUMBER.fullmatch(text)
  if not match:
    return _in_words(text)
  value = _value(match["number"])
  value *= Fraction(10) ** int(match["exponent"] or match["power"] or 0)
  if match["under"]:
    under = _value(match["under"])
    if not under:
      return None
    value /= under
  value += whole
  if "-" in (match["sign"], match["minus"]):
    value = -value
  written = "." in match["number"] or match["under"] is not None
  scale = (match["scale"] or match["letter"] or "").casefold()
  return Quantity(
    value,
    _SCALES.get(scale, 1),
    match["percent"] is not None,
    written and abs(value) <= 1,
    _unit(match["unit"] or ""),
  )


def _value(digits: str) -> Fraction:
  digits = digits.replace(" ", "").replace("'", "")
  if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}|\d+,\d{1,2}", digits):
    return Fraction(digits.replace(".", "").replace(",", "."))
  return Fraction(digits.replace(",", ""))


def _unit(written: str) -> str:
  unit = re.sub(r"\s+", "", written.casefold())
  if re.fullmatch(_CURRENCY, unit):
    return ""
  return _SAME_UNIT.get(unit, unit.removesuffix("s") if len(unit) > 3 else unit)


# Numbers in words.

_ONES = {
  word: number
  for number, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen".split()
  )
}
_TENS = {
  word: 10 * number
  for number, word in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2
  )
}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "tenth": 10}


def _in_words(text: str) -> Quantity | None:
  words = re.findall(r"[a-z]+|%", text.casefold().replace("per cent", "percent"))
  if not words or len(words) > 20 or re.search(r"[^\w\s%,.-]|\d", text):
    return None
  percent = words[-1] in ("percent", "%", "pct")
  words = [word for word in words[: len(words) - percent] if word != "and"]
  part = words[-1].removesuffix("s") if words else ""
  if part in _PARTS and len(words) <= 2:
    above = {"a": 1, "one": 1}.get(words[0], _ONES.get(words[0], 0)) if len(words) == 2 else 1
    fraction = Fraction(above, _PARTS[part])
    return Quantity(fraction, 1, False, abs(fraction) <= 1, "") if above else None
  total = group = 0
  for position, word in enumerate(words):
    if word in _ONES:
      group += _ONES[word]
    elif word in _TENS:
      group += _TENS[word]
    elif word == "hundred" and group:
      group *= 100
    elif word in _SCALES and len(word) > 3 and (group or (position and total)):
      total, group = total + group * _SCALES[word], 0
    elif position and position >= len(words) - 2 and word not in ("or", "of", "to", "a", "the"):
      # "two dogs"
      return Quantity(Fraction(total + group), 1, percent, False, _unit("".join(words[position:])))
    else:
      return None
  return Quantity(Fraction(total + group), 1, percent, False, "")


# Dates and times.

_MONTHS = {
  name: number
  for number, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), start=1)
}
_MONTH = (
  r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
  r"sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DATES = [
  re.compile(pattern, re.IGNORECASE)
  for pattern in (
    rf"(?:\w+day,?\s)?{_MONTH}(?:\s(?P<day>\d{{1,2}})(?:st|nd|rd|th)?)?(?:,?\s(?:of\s)?(?P<year>\d{{4}}))?",
    rf"(?:\w+day,?\s)?(?:the\s)?(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:\sof)?[\s-]{_MONTH}(?:[,\s-]+(?P<year>\d{{4}}))?",
    r"(?P<year>\d{4})[-/.](?P<number>\d{1,2})[-/.](?P<day>\d{1,2})",
    r"(?P<year>\d{4})年(?P<number>\d{1,2})月(?:(?P<day>\d{1,2})日)?",
    rf"(?P<year>\d{{4}})\s{_MONTH}(?:\s(?P<day>\d{{1,2}}))?",
  )
]
_TIME = re.compile(
  r"(?:at\s)?(?P<hour>\d{1,2})(?::(?P<minute>\d{2})(?::(?P<second>\d{2}))?)?\s?"
  r"(?:(?P<half>[ap])\.?\s?m\.?|o'?clock|(?:uhr|hrs|h))?",
  re.IGNORECASE,
)


def read_moment(text: str) -> tuple[int | None, ...] | None:
  """A date as (year, month, day) or a time of day as (hour, minute, second, 0); None for others.

  Dates need a month's name, or the year first: "01/05/2015" could be two.
  """
  text = " ".join(tidied(text).split()) if len(text) <= LONGEST else ""
  for pattern in _DATES:
    match = pattern.fullmatch(text)
    if match:
      found = match.groupdict()
      month = found.get("month")
      number = _MONTHS[month[:3].lower()] if month else int(found["number"])
      year, day = found.get("year"), found.get("day")
      return (int(year) if year else None, number, int(day) if day else None)
  match = _TIME.fullmatch(text)
  if match and (match["half"] or match["minute"]):
    hour = int(match["hour"])
    if match["half"] and 1 <= hour <= 12:
      hour = hour % 12 + (12 if match["half"].lower() == "p" else 0)
    return (hour, int(match["minute"] or 0), int(match["second"] or 0), 0)
  return None
