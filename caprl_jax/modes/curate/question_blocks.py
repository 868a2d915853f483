"""Lines of a model's reply -> blocks, one per question, and which line is what."""

import dataclasses
import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"
_BOLD = re.compile(  # not x**2
  r"(?<![0-9A-Za-z_)\]])\*\*(?=\S)(.+?)(?:(?<=[:：.)）?？])\*\*|\*\*(?![0-9A-Za-z_(]))"
)
_NOTHING = re.compile(r"[-–—_=*~\s]*|```\w*")  # blank lines, separators of any length, code fences
_BULLET = r"(?:[-*•+–]\s+)?"
# what ends a question's number: not 1.5, not 12:30
_END = r"(?:[.)](?!\d)|:(?!\d)|[：、．）]|\s[-–—]\s)"
_WORD = r"(?:question\b|q(?=[\s.#:\d])|问题|题目|第)"
_NUMBERED = re.compile(
  rf"(?:#+\s*{_WORD}?|{_BULLET}{_WORD})\s*[.#:]?\s*(\d{{1,3}})\s*题?\s*(?:{_END}\s*(.*)|$)",
  re.IGNORECASE,
)
_NAMED = re.compile(rf"(?:#+\s*)?{_BULLET}(?:question|q|问题|题目)\s*[:：]\s*(.*)", re.IGNORECASE)
_HEADING = re.compile(r"#+\s*(.*)")
_BARE = re.compile(rf"{_BULLET}[(（]?(\d{{1,3}}){_END}\s*(.*)")
_TITLE = re.compile(r"(?:question|问题)\s*\d*\s*(?:[:：]\s*|$)", re.IGNORECASE)
_OPTION = re.compile(
  rf"\s*(?:[-*•+–]\s*)?[(（]?(?:([{LETTERS}])([).:：、．）])|([a-j])([)）]))\s*(\S.*)"
)
_OPTIONS_TITLE = re.compile(r"(?:options|choices|选项)\s*[:：]?", re.IGNORECASE)
_ANSWER = re.compile(
  rf"{_BULLET}(?:(?:the\s+)?(?:(?:(?:correct|right|final)\s+)?(?:answer|ans)|(?:correct|right)\s+(?:option|choice))\b"
  rf"(?:(?:\s+is)?\s*[:：]\s*|\s+is\s+|\s+(?=[(（]?[{LETTERS}][)）.]?\s*$)|\s*$)"
  r"|(?:正确)?答案\s*(?:是|为)?\s*[:：]?)\s*(.*)",
  re.IGNORECASE,
)
_REMARK = re.compile(
  r"(?:explanation|reasoning|reason|rationale|note|解析|解释|理由)\s*[:：]", re.IGNORECASE
)


@dataclasses.dataclass
class Block:
  """A question as its lines say. `header`: "numbered", "named" (Question:), "heading" (#), "bare"
  (1.) or "" (none).
  """

  header: str
  number: int | None = None
  lines: list[str] = dataclasses.field(default_factory=list)
  stem: list[str] = dataclasses.field(default_factory=list)
  # letter, what closes it, text
  options: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
  answers: list[str] = dataclasses.field(default_factory=list)
  fault: str = ""


def read_blocks(lines: Sequence[str]) -> list[Block]:
  """Groups lines by question. `loose` is the last paragraph that belongs to none: the stem of one
  without a header.
  """
  blocks: list[Block] = []
  block: Block | None = None
  loose: list[str] = []
  # a blank line stands before this one; the last line was an answer's title alone
  gap = awaiting = False
  indent = 0  # of the last option
  for raw in lines:
    line = unbold(raw)
    if _NOTHING.fullmatch(line):
      gap = True
      continue
    started = _start(line, block)
    line = line.lstrip("#").strip()
    answer = _ANSWER.fullmatch(line)
    # an option may be **kwargs
    option = _OPTION.fullmatch(_BOLD.sub(r"\1", raw).strip()) or _OPTION.fullmatch(line)
    if started:
      block, rest = started
      blocks.append(block)
      block.lines.append(raw)
      block.stem += [rest] if rest else []
      loose, gap, awaiting = [], False, False
      continue
    if awaiting:
      block.answers.append(line)
      awaiting = False
    elif answer:
      if block is None:
        block = Block("", lines=list(loose))
        blocks.append(block)
      awaiting = not answer.group(1)
      block.answers += [] if awaiting else [unbold(answer.group(1))]
      loose = []
    elif option and _is_option(option, block):
      letter = _letter(option)
      if block is None or block.answers or (block.options and loose and letter == "A"):
        block = Block("", lines=list(loose), stem=[unbold(other) for other in loose])
        blocks.append(block)
      elif block.options and loose:
        block.fault = f"there is text between its options: {loose[0].strip()!r}"
      block.options.append((letter, option.group(2) or option.group(4), option.group(5).strip()))
      loose, indent = [], len(raw) - len(raw.lstrip())
    elif block is not None and not block.options and not block.answers:
      if not _OPTIONS_TITLE.fullmatch(line):
        block.stem.append(line if block.stem else _untitled(line))
    elif (
      block is not None and not block.answers and not gap and not loose and not _REMARK.match(line)
    ):
      letter, close, begun = block.options[-1]
      block.options[-1] = letter, close, f"{begun} {line}"
      if len(raw) - len(raw.lstrip()) <= indent:
        block.fault = f"there is text between its options or before its answer: {line!r}"
    else:
      loose = [raw] if gap else [*loose, raw]
      gap = False
      continue
    block.lines.append(raw)
    gap = False
  return blocks


def _start(line: str, block: Block | None) -> tuple[Block, str] | None:
  """A new block and the rest of its first line, where `line` is a question's header."""
  in_stem = block is not None and not block.options and not block.answers
  rest = lambda found: _untitled(unbold(found or ""))
  if found := _NUMBERED.fullmatch(line):
    return Block("numbered", int(found.group(1))), rest(found.group(2))
  if found := _NAMED.fullmatch(line):  # below "### Question 1" it only titles the stem
    return (
      None
      if in_stem and block.header in ("numbered", "bare")
      else (Block("named"), rest(found.group(1)))
    )
  if found := _HEADING.fullmatch(line):
    title = rest(found.group(1))
    part = _OPTIONS_TITLE.fullmatch(title) or _ANSWER.fullmatch(title) or _OPTION.fullmatch(title)
    return None if part or (in_stem and not block.stem) else (Block("heading"), title)
  if found := _BARE.fullmatch(line):
    number = int(found.group(1))
    # Inside a stem it may number what the stem lists, unless it goes on counting after a header of
    # its own kind.
    goes_on = in_stem and block.header == "bare" and number == block.number + 1
    if not in_stem or block.header == "heading" or goes_on:
      fault = "the question before it has no options: they cannot be told apart" if goes_on else ""
      return Block("bare", number, fault=fault), rest(found.group(2))
  return None


def _is_option(option: re.Match[str], block: Block | None) -> bool:
  """Options begin with A: before it, "I. ..." or "B. ..." is text."""
  if _letter(option) == "A":
    return True
  return block is not None and bool(block.options) and not block.answers


def _letter(option: re.Match[str]) -> str:
  return (option.group(1) or option.group(3)).upper()


def is_question_like(block: Block, numbered: bool) -> bool:
  if block.options or block.answers:
    return True
  if block.header == "heading":  # "## Questions"
    return any(line.endswith(("?", "？")) for line in block.stem)
  # an enumeration among questions that have better headers
  return not (block.header == "bare" and numbered)


def unbold(line: str) -> str:
  """Without Markdown's bold, also where only its beginning or end is on this line; 2**3 stays."""
  line = _BOLD.sub(r"\1", line.strip())
  return line.removeprefix("**").removesuffix("**").strip()


def _untitled(line: str) -> str:
  """Without the title "Question:" that some models put before the question, or in its place."""
  found = _TITLE.match(line)
  return unbold(line[found.end() :]) if found else line
