"""Letters as the names of options in a text, and the text as it is read for them."""

import re
from typing import NamedTuple

from caprl_jax.scoring.plain_text import normal_form

# Stand for the edges of a box.
BOX, END_BOX = "\ue000", "\ue001"
OPENS = "\"'“”‘’«「『【《(\\[{<" + BOX
CLOSES = "\"'“”‘’»」』】》)\\]}>" + END_BOX


# Of a longer text, its beginning and its end are read: a model that loops says nothing in between.
BEGINNING, END_READ = 2000, 8000


def bounded(text: str) -> str:
  """The beginning and the end of a text that is too long to be an answer; any other as it is."""
  if len(text) <= BEGINNING + END_READ:
    return text
  return text[:BEGINNING] + "\n" + text[-END_READ:]


def readable(text: str) -> str:
  """A text without the signs of Markdown, LaTeX and HTML; boxes' edges are private characters."""
  text = re.sub(r"<\|(?:im_end|endoftext|eot_id|end)\|>|</s>", " ", normal_form(text))
  text = re.sub(r"~~[^~\n]{1,200}~~", " ", text)
  text = re.sub(r"【\s?(答案|正确答案|参考答案)\s?】", r"\1:", text)
  for _ in range(2):  # one in the other
    text = re.sub(
      r"\\(?:text|math|bf|rm|mbox|operatorname)[a-z]{0,6}\s?\{([^{}]{0,200})\}", r"\1", text
    )
  text = re.sub(
    r"\\(?:f?boxed|fbox)\s?\{([^{}]{0,200})\}",
    lambda box: f" {BOX}{' '.join(box[1].split())}{END_BOX}",
    text,
  )
  text = text.replace("<|begin_of_box|>", BOX).replace("<|end_of_box|>", END_BOX)
  text = re.sub(r"</?[a-zA-Z][a-zA-Z_]{0,13}\s?/?>|\[/answer\]", " ", text, flags=re.IGNORECASE)
  text = re.sub(r"\[answer\]", " answer: ", text, flags=re.IGNORECASE)
  text = re.sub(r"\\(?:[,;:! ()\[\]]|quad|qquad|left|right)(?![a-zA-Z])", " ", text)
  return re.sub(r"[*`$]|__", "", text)


NAME = r"(?:options?|choices?|answers?|letter|选项|選項|选择|選択肢|opción|opção|opzione|lettre)"
MENTION = re.compile(
  rf"(?P<name>{NAME}\s?:?\s?)?(?P<open>[{OPENS}]{{0,4}})\s?(?P<letter>[A-Za-z])(?![A-Za-z0-9_])"
  rf"(?!['’][a-z])(?P<close>\s?[{CLOSES}]{{1,4}})?",
  re.IGNORECASE,
)
# What may follow a letter that is no word. Not a verb, of which it would be the subject.
FOLLOWS = re.compile(
  rf"\s?$|\s?[,;!?。、…{CLOSES}]|\s?[.:](?![A-Za-z]\b)(?!\d)|\s-|\s?[/&→]|,?\s(?:because|since|as|and|or|not|"
  r"but|if|rather|instead|over|which|where|with|in|on|for|based|due|given|here|too|the|this|that|est|"
  r"porque|weil|car|perché)\b|\s?(?![型级班组点座栋])[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]",
  re.IGNORECASE,
)
END = re.compile(rf"\s?$|\s?[.,;:!)。{CLOSES}](?:\s|$)")
_ORDINAL = re.compile(
  r"(?:the\s)?(first|second|third|fourth|fifth|last|1st|2nd|3rd|4th|5th)\s"
  r"(?:option|choice|one|answer)\b(?!\s(?:is|was)\s(?:not|wrong|incorrect))",
  re.IGNORECASE,
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth")


class Mention(NamedTuple):
  """A letter that names an option, up to `end` of its text."""

  letter: str
  end: int
  explicit: bool  # in brackets, or called an option


def mention_at(text: str, at: int, count: int, *, small: bool = False) -> Mention | None:
  """The option named at `at`; small letters alone only where `small`."""
  ordinal = _ORDINAL.match(text, at)
  if ordinal:
    word = ordinal[1].lower()
    index = int(word[0]) - 1 if word[0].isdigit() else count - 1
    index = _ORDINALS.index(word) if word in _ORDINALS else index
    return Mention(chr(65 + index), ordinal.end(), True) if index < count else None
  match = MENTION.match(text, at)
  if not match:
    return None
  letter, close = match["letter"], (match["close"] or "").strip()
  if ord(letter.upper()) - 65 >= count:
    return None
  wrapped = bool(match["open"] and close)
  explicit = wrapped or match["name"] is not None or close.startswith(")")
  follows = FOLLOWS.match(text, match.end())
  if letter.islower():
    ends = END.match(text, match.end())
    quoted = not match["open"].strip("\"'“”‘’")
    if not (wrapped and (small or not quoted) or small and ends):
      return None
    if match["name"] is not None and not wrapped and not ends:
      return None
  elif not explicit and not follows:
    return None
  elif match["name"] is not None and not wrapped and not follows and letter in "AI":
    return None  # "the answer a dog gives"
  return Mention(letter.upper(), match.end(), explicit)


# What joins two letters, and what makes the second one the subject of its own clause.
JOIN = re.compile(
  r"\s?(?:,\s?)?(?:(and/or|or|/|或者?|oder|ou)|and|&|plus|as well as|和|与|以及|及|、|,|und|et|y|e)"
  r"\s?(?:also\s|possibly\s|maybe\s|perhaps\s|even\s)?",
  re.IGNORECASE,
)
_SUBJECT = re.compile(
  r"\s(?:is|are|was|were|has|have|had|does|do|did|shows?|says?|would|could|can|may|might|seems?|looks?|"
  r"describes?|mentions?|refers?|matches|fits|cannot|can't|isn't|doesn't|contains?|states?)\b"
)


def joined(text: str, mention: Mention, count: int) -> bool:
  """Whether another letter is named together with it, as in "B or C"."""
  join = JOIN.match(text, mention.end)
  if not join:
    return False
  other = mention_at(text, join.end(), count)
  if other is None or other.letter == mention.letter:
    return False
  return join[1] is not None or not _SUBJECT.match(text, other.end)


# What is said against an option, behind its letter.
REJECTS = re.compile(
  r"\s?(?:\([^()]{0,60}\)\s?|[-:,]\s?\w{1,20}\s?)?,?\s?(?:option\s|choice\s)?(?:(?:is|are|was|were|seems|would\sbe|must\sbe|can\sbe|has\sbeen|"
  r"can)\s(?:also\s|thus\s|therefore\s|[a-z]+ly\s){0,3}(?:not\b(?!\sonly)|n't|wrong|incorrect|false|ruled|"
  r"eliminated|excluded|impossible|out\b|inaccurate|invalid|unlikely)|(?:isn|aren|wasn|can|doesn|won|couldn|wouldn)['’]t\b|"
  r"cannot\b|does\snot\b)|\s?[,-]?\s?(?:incorrect|wrong|no longer)\b|(?:选项|项)?(?:是)?(?:不|错)",
  re.IGNORECASE,
)
