"""A written answer to a multiple-choice question -> the letter that it states.

A text is read sentence by sentence. What states a letter is a phrase ("the answer is", "I choose",
"答案是") with a letter behind it, a letter with a verdict behind it ("B is correct"), or a box. A
sentence that is negated, conditional or a question states nothing; one that states two letters
states no answer. The last statement counts.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from caprl_jax.scoring.plain_text import normal_form

# Stand for the edges of a box.
_BOX, _END_BOX = "\ue000", "\ue001"
_OPENS = "\"'“”‘’«「『【《(\\[{<" + _BOX
_CLOSES = "\"'“”‘’»」』】》)\\]}>" + _END_BOX


class Statement(NamedTuple):
  """`letter` is "" where a sentence states several, or none that is an option's."""

  letter: str
  segment: int
  at: int  # in the segment


# Of a longer text, its beginning and its end are read: a model that loops says nothing in between.
_BEGINNING, _END_READ = 2000, 8000


def _bounded(text: str) -> str:
  if len(text) <= _BEGINNING + _END_READ:
    return text
  return text[:_BEGINNING] + "\n" + text[-_END_READ:]


def stated_letter(text: str, count: int) -> str | None:
  """The letter of the last clear statement; "" if that names several; None if nothing is stated.

  A statement that a later sentence takes back ("A is wrong after all") does not count.
  """
  clear, _, taken_back = _statements(_bounded(text), count)
  clear.sort(key=lambda one: (one.segment, one.at))
  while clear:
    last = clear.pop()
    if not any(
      one.letter == last.letter and (one.segment, one.at) > (last.segment, last.at)
      for one in taken_back
    ):
      return last.letter
  return None


def implied_letter(text: str, count: int) -> str | None:
  """The letter of a text that states none in words; None where it could be several, or none.

  In this order: the letter that begins a line ("B", "B) dog"); the one option of a list of them
  with a good word for it ("B) dog - yes") or without a bad one; the one that a text supposes or
  names at its end ("It could be B", "A dog, so (B)").
  """
  text = _bounded(text)
  letter = _by_lines(text, count)
  if letter:
    return letter
  _, weak, _ = _statements(text, count)
  letters = {one.letter for one in weak}
  return letters.pop() or None if len(letters) == 1 else None


def readable(text: str) -> str:
  """A text without the signs of Markdown, LaTeX and HTML; boxes' edges are private characters."""
  text = normal_form(text)
  text = re.sub(r"~~[^~\n]{1,200}~~", " ", text)
  for _ in range(2):  # one in the other
    text = re.sub(
      r"\\(?:text|math|bf|rm|mbox|operatorname)[a-z]{0,6}\s?\{([^{}]{0,200})\}", r"\1", text
    )
  text = re.sub(
    r"\\f?boxed\s?\{([^{}]{0,200})\}",
    lambda box: f" {_BOX}{' '.join(box[1].split())}{_END_BOX}",
    text,
  )
  text = text.replace("<|begin_of_box|>", _BOX).replace("<|end_of_box|>", _END_BOX)
  text = re.sub(r"</?[a-zA-Z]{1,10}\s?/?>", " ", text)
  text = re.sub(r"\\(?:[,;:! ()\[\]]|quad|qquad|left|right)(?![a-zA-Z])", " ", text)
  return re.sub(r"[*`$]|__", "", text)


# Sentences end at these; not at the stops of "i.e." and the like, which are taken out before.
_SHORTENED = re.compile(r"\b(i\.e|e\.g|vs|etc|approx|Fig)\.(?=[\s,(])", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s|(?<=。)|\n")


def _segments(text: str) -> list[str]:
  text = _SHORTENED.sub(lambda match: match[1].replace(".", ""), readable(text))
  # a character may be eighteen in the compatibility form
  parts = (" ".join(part.split()) for part in _SENTENCE_END.split(text[-2 * _END_READ :]))
  return [part for part in parts if part]


# A letter as the name of an option.

_NAME = r"(?:options?|choices?|answers?|letter|选项|選項|选择|選択肢|opción|opção|opzione|lettre)"
_MENTION = re.compile(
  rf"(?P<name>{_NAME}\s?:?\s?)?(?P<open>[{_OPENS}]{{0,4}})\s?(?P<letter>[A-Za-z])(?![A-Za-z0-9_])"
  rf"(?!['’][a-z])(?P<close>\s?[{_CLOSES}]{{1,4}})?",
  re.IGNORECASE,
)
# What may follow a letter that is no word. Not a verb, of which it would be the subject.
_FOLLOWS = re.compile(
  rf"\s?$|\s?[,;!?。、…{_CLOSES}]|\s?[.:](?![A-Za-z]\b)(?!\d)|\s-|\s?[/&→]|,?\s(?:because|since|as|and|or|not|"
  r"but|rather|instead|over|which|where|with|in|on|for|based|due|given|here|too|the|this|that|est|"
  r"porque|weil|car|perché)\b|\s?(?![型级班组点座栋])[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]",
  re.IGNORECASE,
)
_END = re.compile(rf"\s?$|\s?[.,;:!)。{_CLOSES}](?:\s|$)")
_ORDINAL = re.compile(
  r"(?:the\s)?(first|second|third|fourth|fifth|last|1st|2nd|3rd|4th|5th)\s"
  r"(?:option|choice|one|answer)\b(?!\s(?:is|was)\s(?:not|wrong|incorrect))",
  re.IGNORECASE,
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth")


class _Mention(NamedTuple):
  letter: str
  end: int
  explicit: bool  # in brackets, or called an option


def _mention_at(text: str, at: int, count: int, *, small: bool = False) -> _Mention | None:
  """The option named at `at`; small letters alone only where `small`."""
  ordinal = _ORDINAL.match(text, at)
  if ordinal:
    word = ordinal[1].lower()
    index = int(word[0]) - 1 if word[0].isdigit() else count - 1
    index = _ORDINALS.index(word) if word in _ORDINALS else index
    return _Mention(chr(65 + index), ordinal.end(), True) if index < count else None
  match = _MENTION.match(text, at)
  if not match:
    return None
  letter, close = match["letter"], (match["close"] or "").strip()
  if ord(letter.upper()) - 65 >= count:
    return None
  wrapped = bool(match["open"] and close)
  explicit = wrapped or match["name"] is not None or close.startswith(")")
  follows = _FOLLOWS.match(text, match.end())
  if letter.islower():
    ends = _END.match(text, match.end())
    quoted = not match["open"].strip("\"'“”‘’")
    if not (wrapped and (small or not quoted) or small and ends):
      return None
    if match["name"] is not None and not wrapped and not ends:
      return None
  elif not explicit and not follows:
    return None
  elif match["name"] is not None and not wrapped and not follows and letter in "AI":
    return None  # "the answer a dog gives"
  return _Mention(letter.upper(), match.end(), explicit)


# What joins two letters, and what makes the second one the subject of its own clause.
_JOIN = re.compile(
  r"\s?(?:,\s?)?(?:(and/or|or|/|或者?|oder|ou)|and|&|plus|as well as|和|与|以及|及|、|,|und|et|y|e)"
  r"\s?(?:also\s|possibly\s|maybe\s|perhaps\s|even\s)?",
  re.IGNORECASE,
)
_SUBJECT = re.compile(
  r"\s(?:is|are|was|were|has|have|had|does|do|did|shows?|says?|would|could|can|may|might|seems?|looks?|"
  r"describes?|mentions?|refers?|matches|fits|cannot|can't|isn't|doesn't|contains?|states?)\b"
)


def _joined(text: str, mention: _Mention, count: int) -> bool:
  """Whether another letter is named together with it, as in "B or C"."""
  join = _JOIN.match(text, mention.end)
  if not join:
    return False
  other = _mention_at(text, join.end(), count)
  if other is None or other.letter == mention.letter:
    return False
  return join[1] is not None or not _SUBJECT.match(text, other.end)


# Phrases that a letter follows.

NOUN = (
  r"(?:answers?|option|choice|selection|pick|response|solution|conclusion|guess|letter|decision|"
  r"prediction|label|réponse|respuesta|resposta|risposta|antwort|lösung|ответ|đáp án|opción|opção|"
  r"答案|正解|答え|回答|解答|正确选项|正确的选项|选项|答|정답은|정답|답)"
)
IS = (
  r"(?:(?:is|was|are|be|(?:would|should|must|will|has\sto|have\sto|ought\sto|seems\sto|appears\sto|"
  r"can\sonly)(?:\s[a-z]+ly)?\sbe|seems|est|es|ist|lautet|é|è|là|sera|sería)(?![A-Za-z'’])|"
  r"[:=→⇒]|-+>?|=>|应该?[是为选]|[是为為选選は])"
)
_MAY_BE = r"(?:(?:could|might|may|can|possibly|perhaps|maybe)(?:\s(?:well|[a-z]+ly))?\sbe)"
_GAP = (
  r"(?:\s(?:to|for|of|here|among|in|from|based|that|which|on|with|i|we|would|according|choice|option|"
  r"letter|number|correct[ae]?|exacte|richtige|corretta|à|a|zur|auf)\b[^.:;,]{0,80}?|,\s[^.:;,]{1,60},)?"
)
# Only phrases that end in one of these are followed by any letter; the others need it at once.
_STATES = re.compile(
  rf"(?<![A-Za-z]){NOUN}{_GAP}[\"'”’)]{{0,2}}\s?(?:(?P<may>{_MAY_BE})|{IS})|(?P<box>{_BOX})",
  re.IGNORECASE,
)
# "Answer B", at the beginning of a sentence
_ANSWER = re.compile(
  r"^(?:(?:so|the|my|final|correct|right|best)\s){0,3}(?:answer|réponse|respuesta|antwort)(?=\s\S)|"
  r"(?:答案|정답|正解)(?=\s?[(A-Z])",
  re.IGNORECASE,
)
_LEADS = re.compile(
  r"(?<![A-Za-z])(?:choose|chose|choosing|picked|pick|picking|selected|select|selecting|"
  r"(?:go|going|went)\swith|opt(?:ed|ing)?\sfor|settle\son|vote\sfor|"
  r"(?:i|we)(?:'d|'ll|\swould|\swill)?\s(?:say|answer|guess)|answer\swith|answering|conclude|"
  r"leaves(?:\sus\swith)?|leaving(?:\sus\swith)?|points?\sto|pointing\sto|"
  r"correspond(?:s|ing)?\s(?:to|with)|matches|matching|supports|supporting|suggests|indicates|"
  r"consistent\swith|align(?:s|ed)?\swith|lean(?:ing)?\stowards?|"
  r"(?:it|this|that)(?:['’]s|\sis|\swas|\s(?:must|should|would|will|has\sto)(?:\s[a-z]+ly)?\sbe)|"
  r"which\sis|so|thus|therefore|hence|consequently|accordingly|definitely|clearly|finally|"
  r"in\sconclusion|ultimately|overall|probably|presumably|likely|(?:no|wait|sorry|hmm|actually|correction|i\smean|rather|nein|non)\s?"
  r"(?:[,:.…-]|\.\.\.)+|elijo|escojo|elegir|je\schoisis|c['’]est|ich\swähle|wähle)"
  r"(?![A-Za-z'’])|"
  r"->|=>|→|⇒|(?:选择?(?![项項])|選擇?(?![項択])|选项[是为]|应该?是|应当是|就是|是|为|因此|所以|故|即|選択)",
  re.IGNORECASE,
)
_MAYBE = re.compile(
  rf"(?<![A-Za-z])(?:(?:it|this|that|they)\s{_MAY_BE}|maybe|perhaps|possibly)(?![A-Za-z])",
  re.IGNORECASE,
)
_FILLER = re.compile(
  r"[\s:,=>\"'“”「«(\[-]|(?:the|that|it|is|are|be|to|most|more|very|likely|probably|indeed|also|"
  r"just|still|then|thus|therefore|hence|simply|clearly|definitely|certainly|surely|actually|surely|"
  r"obviously|option|choice|answer|letter|number|case|correct|right|best|final|one|only|either|both|as|follows|"
  r"la|le|el|die|der|das|los|a|es|lautet|item|选项|選項|选择|应该|应|就|只能|我|会|是|为|选|opción|opção|"
  r"option|lettre|buchstabe)(?![A-Za-z'’])",
  re.IGNORECASE,
)
_NOT = re.compile(
  r"(?:not|never|neither|nor|n't|no\slonger|anything\sbut|unlikely|nicht|pas|no)(?![A-Za-z])|不[是选]?|非",
  re.IGNORECASE,
)
_INSTEAD = re.compile(
  r"[^A-Z]{0,20}?(?:\bbut\b|\binstead\b|\brather\b|\bsondern\b|\bmais\b|\bsino\b|而是|[,;]\s?(?:it\sis|it's|是))",
  re.IGNORECASE,
)


def _named_behind(text: str, at: int, count: int, *, small: bool) -> tuple[_Mention, int] | None:
  """The letter behind a phrase, and where it stands; a negated one is skipped for "but B"."""
  for _ in range(16):
    mention = _mention_at(text, at, count, small=small)
    if mention:
      return mention, at
    negation = _NOT.match(text, at)
    if negation:
      instead = _INSTEAD.match(text, negation.end())
      skipped = instead or re.compile(r".{0,60}?(?:\bbut\b|而是|\bsondern\b)").match(text, at)
      if not skipped:
        return None
      at = skipped.end()
      continue
    filler = _FILLER.match(text, at)
    if not filler:
      return None
    at = filler.end()
  return None


# What takes the statement out of a sentence.

_BREAK = re.compile(
  r"\b(?:so|thus|therefore|hence|but|however|then)\b|->|因此|所以|故|但", re.IGNORECASE
)
IF = re.compile(
  r"(?<!even )\b(?:if|unless|otherwise|suppose|supposing|assuming|whether|imagine|sofern|wenn)\b"
  r"(?!\s(?:we|you|one|i|i'm)\b(?!\s(?:were|assume|choose|chose|pick|had)))|^(?:were|had)\b|如果|假如|假设|若",
  re.IGNORECASE,
)
_IF_BEHIND = re.compile(
  r"\W{0,3}(?:only\s)?(?:if|unless|provided|assuming)\b(?!\s(?:i|i'm|we|you|one)\b)", re.IGNORECASE
)
DENIES = re.compile(
  r"(?:\b(?:not|never|hardly|cannot)|n't)\s(?:\w+\s){0,3}?(?:think|believe|say|mean|imply|suggest|choose|"
  r"true|case|sure|certain|conclude|support\w*|match\w*|correct|likely|possible|know|agree)\b[^,;:]*$|"
  r"\b(?:nothing|none|nobody|neither|doubt|unlikely|wrong|incorrect|mistake\w*|false|impossible)\b[^,;:]*$|"
  r"(?:\b(?:not|never|cannot|nor|nothing)|n't|\bno)\s(?:\w+ly\s|be\s|to\s)?$|[不别非没](?:应该?|能|会|可以|该)?$|排除$",
  re.IGNORECASE,
)
_TENTATIVE = re.compile(
  r"\b(?:at\sfirst|initially|originally|thought|tempt\w*|assumed|first\sguess|one\s(?:could|might|may)|"
  r"(?:some|many|people|you|one|others|they)\s(?:might|may|would|could)|might\s(?:think|say|guess|choose|seem)|"
  r"to\s(?:check|see|test|verify))\b[^;]*$",
  re.IGNORECASE,
)
_REJECTS = re.compile(
  r"\s?(?:\([^()]{0,60}\)\s?|[-:,]\s?\w{1,20}\s?)?,?\s?(?:option\s|choice\s)?(?:(?:is|are|was|were|seems|would\sbe|must\sbe|can\sbe|has\sbeen|"
  r"can)\s(?:also\s|thus\s|therefore\s|[a-z]+ly\s){0,3}(?:not\b(?!\sonly)|n't|wrong|incorrect|false|ruled|"
  r"eliminated|excluded|impossible|out\b|inaccurate|invalid|unlikely)|(?:isn|aren|wasn|can|doesn|won|couldn|wouldn)['’]t\b|"
  r"cannot\b|does\snot\b)|\s?[,-]?\s?(?:incorrect|wrong|no longer)\b|(?:选项|项)?(?:是)?(?:不|错)",
  re.IGNORECASE,
)


def _force(text: str, start: int) -> str:
  """How a phrase at `start` of its sentence is meant: "clear", "weak", or "" for not at all."""
  before = text[max(0, start - 160) : start]
  breaks = list(_BREAK.finditer(before))
  behind_break = before[breaks[-1].end() :] if breaks else before
  if IF.search(behind_break):
    return ""
  if DENIES.search(re.split(r"[,;:]", behind_break)[-1]):
    return ""
  return "weak" if _TENTATIVE.search(behind_break) else "clear"


_RIGHT = re.compile(
  r"(?P<gap>\s?(?:,?\s?(?:\([^()]{0,60}\)|[^.;?!]{1,60}?),?))?\s(?:(?:is|are|was|seems(?:\sto\sbe)?|"
  r"appears(?:\sto\sbe)?|looks|remains|'s|(?:must|would|should|has\sto|will|can\sonly)\s(?:\w+ly\s)?be)\s"
  r"(?:(?!unlikely|hardly|partially|partly|scarcely|barely|incorrectly)(?:[a-z]+ly|the|most|more|also|indeed|thus|therefore|best|"
  r"one|a|better|closest|my|our|all)\s){0,5}(?:correct|right|best|true|accurate|answer|appropriate|"
  r"suitable|valid|supported|consistent|closest|likely|better|choice|option|fit|match|plausible|"
  r"reasonable|it)(?:\s(?:final\s|correct\s)?(?:answer|option|choice|one|selection|fit|match|description|statement))?"
  r"(?=\s?(?:$|[.,;:!)]|because|since|as\b|based|given|here|for\b|according|in\sthis|with\b|by\b|"
  r"among|of\b|from\b|to\b))|(?:best|most\sclosely|most\saccurately|correctly|accurately)\s[a-z]+s\b|"
  r"(?:fits|matches|describes)\s(?:best|the\s|perfectly|exactly|this|it\b|what)|wins\b|it\sis(?=\s?(?:$|[.,!])))",
  re.IGNORECASE,
)
_RIGHT_CJK = re.compile(
  r"\s?(?:选项|項|项)?\s?(?:是|为|才是|最|が|は)?\s?(?:正确|正確|对的|正解|正しい|答案|答え|最?符合|最?合适|恰当|です$|입니다)"
)
_ANY_MENTION = re.compile(
  rf"(?<![A-Za-z0-9\\'’])(?:{_NAME}\s?)?[{_OPENS}]{{0,3}}[A-Z](?![A-Za-z0-9])"
)
_JOINED_BEFORE = re.compile(
  rf"(?<![A-Za-z0-9])([A-Z])[{_CLOSES}]?,?\s?(and|or|&|/|,|和|与|或)\s?(?:option\s|choice\s)?$"
)


def _statements(text: str, count: int) -> tuple[list[Statement], list[Statement], list[Statement]]:
  """(clear, weak, taken back), each in no order."""
  segments = _segments(text)
  found: dict[str, list[Statement]] = {"clear": [], "weak": [], "taken": []}
  for number, segment in enumerate(segments):
    following = segments[number + 1] if number + 1 < len(segments) else ""
    for force, letter, at in (
      *_behind_phrases(segment, following, count),
      *_with_verdicts(segment, count),
      *_named(segment, count),
    ):
      if segment.endswith("?") and force != "taken":
        force = "weak" if force == "clear" else ""
      if force:
        found[force].append(Statement(letter, number, at))
  return found["clear"], found["weak"], found["taken"]


_Found = tuple[str, str, int]  # force, letter, place in the sentence


def _behind_phrases(segment: str, following: str, count: int) -> Iterator[_Found]:
  """The letters behind "the answer is", "I choose" and the like."""
  for pattern in (_STATES, _ANSWER, _LEADS, _MAYBE):
    for phrase in pattern.finditer(segment):
      begin = phrase.end() if _BREAK.match(phrase[0]) else phrase.start()
      force = _force(segment, begin)
      if pattern is _MAYBE or phrase.groupdict().get("may"):
        force = force and "weak"
      text, at = segment, phrase.end()
      if at >= len(segment) - 1 and pattern is _STATES:  # "Answer:" and the letter in the next line
        text, at = following, 0
      named = _named_behind(text, at, count, small=pattern in (_STATES, _ANSWER))
      if named and force:
        mention, place = named
        if not (_REJECTS.match(text, mention.end) or _IF_BEHIND.match(text, mention.end)):
          several = _joined(text, mention, count)
          yield force, "" if several else mention.letter, place if text is segment else at


def _with_verdicts(segment: str, count: int) -> Iterator[_Found]:
  """The letters before "is correct" and "is wrong"."""
  for found in _ANY_MENTION.finditer(segment):
    letter, at = found[0][-1], found.start()
    if ord(letter) - 65 >= count:
      continue
    close = re.compile(rf"[{_CLOSES}.:]{{0,3}}").match(segment, found.end())
    end = close.end() if close else found.end()
    if _REJECTS.match(segment, end):
      yield "taken", letter, at
      continue
    explicit = len(found[0]) > 1 or segment[found.end() : end].startswith((")", "]", ".", ":"))
    right = _RIGHT.match(segment, end)
    if right and (not explicit and right["gap"] or _ANY_MENTION.search(right["gap"] or "")):
      right = None
    if right or _RIGHT_CJK.match(segment, end):
      joined = _JOINED_BEFORE.search(segment[max(0, at - 12) : at])
      several = (
        joined and joined[1] != letter and (joined[2] != "," or " are " in segment[end:][:6])
      )
      yield _force(segment, at), "" if several else letter, at


def _named(segment: str, count: int) -> Iterator[_Found]:
  """Weakly: the letter that is all of a sentence, stands in brackets, or at the end."""
  alone = _mention_at(segment, 0, count)
  if alone and not re.search(r"\w", segment[alone.end :]):
    yield "weak", alone.letter, 0
  for found in re.finditer(r"[(\[\"“「【]\s?[A-Z](?![A-Za-z0-9])", segment):
    mention = _mention_at(segment, found.start(), count)
    if not mention or not mention.explicit:
      continue
    if not any(pattern.match(segment, mention.end) for pattern in (_REJECTS, _IF_BEHIND)):
      letter = "" if _joined(segment, mention, count) else mention.letter
      yield _force(segment, found.start()) and "weak", letter, found.start()
  tail = re.search(r"[,:;-]\s(?:option\s)?[(\[\"]?([A-Z])[)\]\"]?[.!。]?$", segment)
  if tail and ord(tail[1]) - 65 < count:
    listed = re.search(rf"(?<![A-Za-z])[A-Z][{_CLOSES}]?$", segment[: tail.start()])
    yield _force(segment, tail.start()) and "weak", "" if listed else tail[1], tail.start()


# Lines that begin with a letter.

_LABEL = re.compile(
  rf"[\s>#•·–→\u2600-\u27bf\U0001f300-\U0001faff-]{{0,8}}(?:{_NAME}\s?:?\s?)?(?P<open>[{_OPENS}]{{0,3}})\s?"
  rf"(?P<letter>[A-Za-z])(?![A-Za-z0-9_])(?!['’][a-z])(?P<close>\s?[{_CLOSES}]{{0,3}})(?P<rest>.*)",
  re.IGNORECASE | re.DOTALL,
)
_AFTER_LABEL = re.compile(
  r"[.:)。、](?![A-Za-z]\b)(?!\d)(?![A-Za-z]\.)|[,](?!\s?[A-HJ-Z]\b)|\s-+\s|\s(?:because|since|as)\b|\s?->|\sI\s(?:guess|think|believe|suppose|would|am)\b|\s?(?:选项|選項|项|です)"
)


def label_of(line: str, count: int) -> str | None:
  """The letter that a line begins with as an answer does: alone, in brackets or with ")", ".", ":",
  a comma, a dash or a reason behind it; not "A red dog". A small letter with ")", "." or ":".
  """
  line = " ".join(readable(_bounded(line)).split())
  match = _LABEL.fullmatch(line)
  if not match or ord(match["letter"].upper()) - 65 >= count:
    return None
  letter, close, rest = match["letter"].upper(), match["close"].strip(), match["rest"]
  end = match.start("close") + len(match["close"].rstrip())
  if not re.search(r"\w", rest):
    return letter
  if _REJECTS.match(line, end):
    return None
  wrapped = bool(match["open"] and close) or close.startswith(")")
  behind = wrapped or _AFTER_LABEL.match(line, end)
  if match["letter"].isupper():
    second = _JOIN.match(line, end)
    other = second and _mention_at(line, second.end(), count)
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


def _by_lines(text: str, count: int) -> str | None:
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
