"""A written answer to a multiple-choice question -> the letter that it states.

A text is read sentence by sentence. What states a letter is a phrase ("the answer is", "I choose",
"答案是") with a letter behind it, a letter with a verdict behind it ("B is correct"), or a box. A
sentence that is negated, conditional or a question states nothing; one that states two letters
states no answer. The last statement counts.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from caprl_jax.scoring.labels import by_lines
from caprl_jax.scoring.option_names import (
  BOX,
  CLOSES,
  END_READ,
  NAME,
  OPENS,
  REJECTS,
  Mention,
  bounded,
  joined,
  mention_at,
  readable,
)


class Statement(NamedTuple):
  """`letter` is "" where a sentence states several, or none that is an option's."""

  letter: str
  segment: int
  at: int  # in the segment


def stated_letter(text: str, count: int) -> str | None:
  """The letter of the last clear statement; "" if that names several; None if nothing is stated.

  A statement that a later sentence takes back ("A is wrong after all") does not count.
  """
  clear, _, taken_back = _statements(bounded(text), count)
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
  text = bounded(text)
  letter = by_lines(text, count)
  if letter:
    return letter
  _, weak, _ = _statements(text, count)
  letters = {one.letter for one in weak}
  return letters.pop() or None if len(letters) == 1 else None


# Sentences end at these; not at the stops of "i.e." and the like, which are taken out before.
_SHORTENED = re.compile(r"\b(i\.e|e\.g|vs|etc|approx|Fig)\.(?=[\s,(])", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s|(?<=。)|\n")


def _segments(text: str) -> list[str]:
  text = _SHORTENED.sub(lambda match: match[1].replace(".", ""), readable(text))
  # a character may be eighteen in the compatibility form
  parts = (" ".join(part.split()) for part in _SENTENCE_END.split(text[-2 * END_READ :]))
  return [part for part in parts if part]


# Phrases that a letter follows.

NOUN = (
  r"(?:answers?|ans|option|choice|selection|statement|description|match|fit|candidate|interpretation|"
  r"pick|response|solution|conclusion|guess|letter|decision|"
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
  rf"(?<![A-Za-z]){NOUN}{_GAP}[\"'”’)]{{0,2}}\s?(?:(?P<may>{_MAY_BE})|{IS})|(?P<box>{BOX})",
  re.IGNORECASE,
)
# "Answer B", at the beginning of a sentence
_ANSWER = re.compile(
  r"^(?:(?:so|the|my|final|correct|right|best)\s){0,3}(?:answer|réponse|respuesta|antwort)(?=\s\S)|"
  r"【?(?:答案|정답|正解)】?(?=\s?[(A-Z])",
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
  r"in\sconclusion|or\srather|i\smeant?|make\sthat|(?:chang(?:e|ed|ing)|revis(?:e|ed|ing)|"
  r"switch(?:ed|ing)?|updat(?:e|ed|ing)|correct(?:ed|ing)?)(?:\s(?:my|the|this))?(?:\sanswer)?"
  r"(?:\sfrom\s(?:option\s)?\(?[A-Z]\)?)?\sto|ultimately|overall|probably|presumably|likely|"
  r"(?:no|wait|sorry|oops|hmm|actually|correction|edit|yes|(?:my\s)?mistake|apologies|i\smean|rather|"
  r"nein|non|scratch\sthat|strike\sthat|on\s(?:second\sthought|reflection))\s?"
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


def _named_behind(text: str, at: int, count: int, *, small: bool) -> tuple[Mention, int] | None:
  """The letter behind a phrase, and where it stands; a negated one is skipped for "but B"."""
  for _ in range(16):
    mention = mention_at(text, at, count, small=small)
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
  r"(?!\s(?:we|you|one|i|i'm)\b(?!\s(?:were(?!\sto\s(?:guess|choose|pick))|assume|choose|chose|pick|"
  r"had(?!\sto\b))))|^(?:were|had)\b(?!\si\sto\b)|如果|假如|假设|若",
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
  r"\b(?:(?:even\s)?though|although|while|whereas|runner-up|second[-\s]best)\b[^,;]*$|"
  r"\b(?:at\sfirst|initially|originally|thought|tempt\w*|assumed|first\sguess|one\s(?:could|might|may)|"
  r"(?:some|many|people|you|one|others|they)\s(?:might|may|would|could)|might\s(?:think|say|guess|choose|seem)|"
  r"to\s(?:check|see|test|verify))\b[^;]*$",
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
  r"one|a|better|closest|my|our|all|final|only)\s){0,5}(?:correct|right|best|true|accurate|answer|appropriate|"
  r"suitable|valid|complete|specific|fitting|precise|supported|pick|guess|consistent|closest|likely|"
  r"better|choice|option|fit|match|plausible|reasonable|it)(?:\s(?:final\s|correct\s)?(?:answer|option|choice|one|selection|fit|match|description|statement))?"
  r"(?=\s?(?:$|[.,;:!)]|because|since|as\b|based|given|here|for\b|according|in\sthis|with\b|by\b|"
  r"among|of\b|from\b|to\b))|(?:best|most\sclosely|most\saccurately|correctly|accurately)\s[a-z]+s\b|"
  r"(?:fits|matches|describes)\s(?:best|the\s|perfectly|exactly|this|it\b|what)|wins\b|it\sis(?=\s?(?:$|[.,!])))",
  re.IGNORECASE,
)
_RIGHT_CJK = re.compile(
  r"\s?(?:选项|項|项)?\s?(?:是|为|才是|最|が|は)?\s?(?:正确|正確|对的|正解|正しい|答案|答え|最?符合|最?合适|恰当|です$|입니다)"
)
_ANY_MENTION = re.compile(
  rf"(?<![A-Za-z0-9\\'’])(?:{NAME}\s?)?[{OPENS}]{{0,3}}[A-Z](?![A-Za-z0-9])"
)
_JOINED_BEFORE = re.compile(
  rf"(?<![A-Za-z0-9])([A-Z])[{CLOSES}]?,?\s?(and|or|&|/|,|和|与|或)\s?(?:option\s|choice\s)?$"
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
      if at >= len(segment) and pattern is _STATES:  # "Answer:" and the letter in the next line
        text, at = following, 0
      named = _named_behind(text, at, count, small=pattern in (_STATES, _ANSWER))
      if named and force:
        mention, place = named
        if not (REJECTS.match(text, mention.end) or _IF_BEHIND.match(text, mention.end)):
          several = joined(text, mention, count)
          yield force, "" if several else mention.letter, place if text is segment else at


def _with_verdicts(segment: str, count: int) -> Iterator[_Found]:
  """The letters before "is correct" and "is wrong"."""
  for found in _ANY_MENTION.finditer(segment):
    letter, at = found[0][-1], found.start()
    if ord(letter) - 65 >= count:
      continue
    close = re.compile(rf"[{CLOSES}.:]{{0,3}}").match(segment, found.end())
    end = close.end() if close else found.end()
    if REJECTS.match(segment, end):
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
  alone = mention_at(segment, 0, count)
  if alone and not re.search(r"\w", segment[alone.end :]):
    yield "weak", alone.letter, 0
  for found in re.finditer(r"[(\[\"“「【]\s?[A-Z](?![A-Za-z0-9])", segment):
    mention = mention_at(segment, found.start(), count)
    if not mention or not mention.explicit:
      continue
    if not any(pattern.match(segment, mention.end) for pattern in (REJECTS, _IF_BEHIND)):
      letter = "" if joined(segment, mention, count) else mention.letter
      yield _force(segment, found.start()) and "weak", letter, found.start()
  tail = re.search(r"[,:;-]\s(?:option\s)?[(\[\"]?([A-Z])[)\]\"]?[.!。]?$", segment)
  if tail and ord(tail[1]) - 65 < count:
    listed = re.search(rf"(?<![A-Za-z])[A-Z][{CLOSES}]?$", segment[: tail.start()])
    yield _force(segment, tail.start()) and "weak", "" if listed else tail[1], tail.start()
