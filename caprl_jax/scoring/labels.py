"""Lines that begin with an option's letter -> the letter that they answer with."""

import re

from caprl_jax.scoring.option_names import (
  CLOSES,
  JOIN,
  NAME,
  OPENS,
  REJECTS,
  bounded,
  mention_at,
  readable,
)

_LABEL = re.compile(
  rf"[\s>#•·–→\u2600-\u27bf\U0001f300-\U0001faff-]{{0,8}}(?:{NAME}\s?:?\s?)?(?P<open>[{OPENS}]{{0,3}})\s?"
  rf"(?P<letter>[A-Za-z])(?![A-Za-z0-9_])(?!['’][a-z])(?P<close>\s?[{CLOSES}]{{0,3}})(?P<rest>.*)",
  re.IGNORECASE | re.DOTALL,
)
_AFTER_LABEL = re.compile(
  r"[.:)。、](?![A-Za-z]\b)(?!\d)(?![A-Za-z]\.)|[,](?!\s?[A-HJ-Z]\b)|\s-+\s|\s(?:because|since|as)\b|\s?->|\sI\s(?:guess|think|believe|suppose|would|am)\b|\s(?:and\s)?not\b|\s?(?:选项|選項|项|です|吧|对)"
)


def label_of(line: str, count: int) -> str | None:
  """The letter that a line begins with as an answer does: alone, in brackets or with ")", ".", ":",
  a comma, a dash or a reason behind it; not "A red dog". A small letter with ")", "." or ":".
  """
  line = " ".join(readable(bounded(line)).split())
  match = _LABEL.fullmatch(line)
  if not match or ord(match["letter"].upper()) - 65 >= count:
    return None
  letter, close, rest = match["letter"].upper(), match["close"].strip(), match["rest"]
  end = match.start("close") + len(match["close"].rstrip())
  if not re.search(r"\w", rest):
    return letter
  if REJECTS.match(line, end):
    return None
  wrapped = bool(match["open"] and close) or close.startswith(")")
  behind = wrapped or _AFTER_LABEL.match(line, end)
  if match["letter"].isupper():
    second = JOIN.match(line, end)
    other = second and mention_at(line, second.end(), count)
    return letter if behind and not other else None
  spaced = wrapped or re.compile(r"[.:]\s").match(line, end)
  return letter if spaced and not rest.startswith("(") else None


_BAD = re.compile(
  r"[-:(,=]\s?(?:this\sis\s|it\sis\s|it's\s)?(?:also\s)?(?:no\b|not\b|wrong|incorrect|false|inaccurate|unlikely|implausible|"
  r"irrelevant)|^[.):]\s?(?:wrong|incorrect)\b|\b(?:is|are|was|does|do|did|has|have|can)(?:\snot\b|n['’]t)|cannot|"
  r"\b(?:is|are)\s(?:\w+\s)?(?:wrong|incorrect|false|ruled|eliminated)|[✗✘❌×]|错|不(?:对|正确|符合|是)",
  re.IGNORECASE,
)
_GOOD = re.compile(
  r"[-:(,=]\s?(?:this\sis\s|it\sis\s)?(?:the\s)?(?:yes|correct|right|true|matches|supported|plausible|answer)\b|"
  r"^[.):]\s?correct\b|\b(?:is|are)\s(?:the\s)?(?:\w+ly\s)?(?:correct|right|true|supported|mentioned|answer)|"
  r"\b(?:matches|fits)\b|[✓✔✅]|(?<!不)(?:正确|对的|符合)",
  re.IGNORECASE,
)


def by_lines(text: str, count: int) -> str | None:
  """The one letter that lines begin with; of several, the one with a good word for it or without a
  bad one, or the one that the last line says again. None for none.
  """
  lines = [line for line in text.splitlines() if re.search(r"\w", line)]
  labels = [(label_of(line[:2000], count), line[:2000]) for line in lines]
  named = [(letter, line) for letter, line in labels if letter]
  letters = list(dict.fromkeys(letter for letter, _ in named))
  if len(letters) < 2:
    return letters[0] if letters else None
  rests = [(letter, _LABEL.fullmatch(" ".join(readable(line).split()))) for letter, line in named]
  judged = [(letter, (match["close"] + match["rest"]).strip()) for letter, match in rests if match]
  bad = {letter for letter, rest in judged if _BAD.search(rest)}
  good = {letter for letter, rest in judged if _GOOD.search(rest) and not _BAD.search(rest)}
  for chosen in (good, set(letters) - bad if bad else set()):
    if len(chosen) == 1:
      return chosen.pop()
  # one said again behind the list
  last = labels[-1][0]
  return last if last and sum(letter == last for letter, _ in named) > 1 else None
