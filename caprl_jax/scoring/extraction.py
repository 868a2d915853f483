"""What a model wrote -> the answer in it, or that there is none.

Two protocols, as in `answers.py`: "ours" reads as a careful reader would, "official" as the
released scorer of CapRL does, defects included.
"""

import re
import string
import unicodedata
from typing import Literal

Protocol = Literal["ours", "official"]

_THINK, _END_THINK, _ANSWER, _END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
LETTER = re.compile(r"[A-Z]")
_SAID = re.compile(
  r"(?i:\b(?:answer|(?:correct|right|best)\s+(?:option|choice))"
  r"\**\s*(?:(?:is|(?:w|sh)ould\s+be|must\s+be)\b|[:：])"
  r"|答案(?:是|为|[:：]))[:：]?[ \t]*\**[ \t]*(?:\n+[ \t]*)?"
)
# A letter with what may follow it in an answer: nothing, ")", ".", ":" or ",", a reason. Not "A red
# dog".
_LABEL = re.compile(
  r"[\s*_(\[\"'`$]*(?:option\s+|choice\s+)?[(\[*]*([A-Z])"
  r"(?:[*)\]\"'`$]*[\s.]*$|\*\*|\**[)\].:：](?!\d)|\**[,，、](?!\s*(?-i:[A-HJ-Z])\b)|\s+[-–—]\s"
  r"|\s+(?:because|since|as)\b)",
  re.IGNORECASE,
)
_REASON = re.compile(r"(?<=\S)[,;]?\s+(?:because|since)\s.*$", re.IGNORECASE)
# Words that a full stop shortens: as they are spelt ("12 ms." has none of "Ms."), and in any case
# before a number.
_ABBREVIATIONS = frozenset(
  "Capt Col Dr Gen Gov Lt Mr Mrs Ms Mt Prof Rep Rev Sen Sgt St Vs approx ca cf vs".split()
)
_BEFORE_NUMBERS = frozenset(
  "apr aug ch dec eq feb fig figs jan jul jun mar no nos nov oct p pp sec sep sept vol".split()
)


def extract_answer(output: str, options: int | None, protocol: Protocol) -> str | None:
  """The answer in a model's output, or None where there is none; it is scored as wrong.

  `options` is the number of options of a multiple-choice question, None for an open one.

  official: `</think>`, white space, `<answer>`, and in it `\\boxed{X}`; else None. As the released
  pattern has it, X reaches from the first `\\boxed{` to the last `}` before the last `</answer>`:
  nested braces are kept, and so is all that stands between two boxes.

  ours: what stands before the last `</think>` is dropped; None if a `<think>` is still open (the
  thought was cut off). Then the first of these that is there and not empty:
    1. the last `\\boxed{X}` in the last `<answer>`, braces balanced;
    2. the text of the last `<answer>` (its end tag may be missing, as when the end of the turn took
       its place);
    3. the last `\\boxed{X}` anywhere;
    4. the sentence after the last "answer is", "correct option is", "Answer:", "答案是" and the
       like, without a reason ("because …") and the full stop;
    5. multiple choice: a letter that is all the text, or begins its last line with ")", "." or ":"
       behind it, or so begins its first one where no other line begins with another option's;
    6. the last line that holds letters or digits.
  With options, a letter that begins any of these ("B) red", "(B).", "B, because …") stands for all
  of it.
  """
  if protocol not in ("ours", "official"):
    raise ValueError(f"protocol = {protocol!r}; use 'ours' or 'official'")
  if options is not None and not 2 <= options <= 26:
    raise ValueError(
      f"options = {options}; a multiple-choice question has 2 to 26, an open one None"
    )
  if protocol == "official":
    return _official_answer(output)
  text = output[output.rfind(_END_THINK) + len(_END_THINK) :] if _END_THINK in output else output
  if _THINK in text:
    return None
  found = None
  if _ANSWER in text:
    inner = text[text.rindex(_ANSWER) + len(_ANSWER) :].partition(_END_ANSWER)[0]
    found = _last_boxed(inner) or inner.strip()
  found = found or _last_boxed(text)
  if not found:
    said = [text[match.end() :].partition("\n")[0] for match in _SAID.finditer(text)]
    said = [line for line in said if re.search(r"\w", line)]
    found = _first_sentence(_REASON.sub("", said[-1].strip())).strip().strip("*") if said else None
  if found:
    return letter_of(found, options) or found
  lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
  if not lines:
    return None
  last, first = letter_of(lines[-1], options), letter_of(lines[0], options)
  # One that goes through the options begins a line with each.
  if not last and first and {letter_of(line, options) for line in lines} - {first, None}:
    first = None
  return last or first or lines[-1]


_REFUSAL = re.compile(
  r"\b(?:can(?:no|')t|can not|could not|couldn't|unable to|impossible to|not possible to)\b[^.\n]*"
  r"\b(?:answer|determin\w+|tell|say|know|infer\w*|identif\w+|find)\b"
  r"|(?:\bnot|n't)(?: \w+){0,2}"
  r" (?:mention\w*|specif\w+|provide\w*|state\w*|given|enough|sufficient)\b"
  r"|\b(?:insufficient|no|not enough) information\b|\bunanswerable\b"
  r"|\b(?:do not|don't) know\b|^(?:unknown|n/?a)\W*$",
  re.IGNORECASE,
)


def refuses(answer: str) -> bool:
  """Whether an answer that `extract_answer` found says that there is none, as in "The caption does
  not mention it".
  """
  return _REFUSAL.search(answer.replace("’", "'").strip()) is not None


def _official_answer(output: str) -> str | None:
  # The released pattern is </think>\s*<answer>.*?\\boxed{(.*)}.*?</answer>, greedy and over lines.
  # Backtracking, it is cubic in a text of many boxes, as looping models write; this finds the same
  # in one pass.
  start = re.search(r"</think>\s*<answer>", output)
  box = output.find("\\boxed{", start.end()) if start else -1
  end = output.rfind("}", 0, max(output.rfind(_END_ANSWER), 0))
  begin = box + len("\\boxed{")
  return output[begin:end] if box >= 0 and end >= begin else None


def _last_boxed(text: str) -> str | None:
  """What the last closed `\\boxed{…}` holds; None without one or if it is empty."""
  last = (-1, -1)
  opened: list[tuple[int, bool]] = []  # where the text in braces begins, and whether it is a box's
  for match in re.finditer(r"(\\boxed\s*)?\{|\}", text):
    if match.group() != "}":
      opened.append((match.end(), match.group(1) is not None))
    elif opened:
      begin, boxed = opened.pop()
      last = max(last, (begin, match.start())) if boxed else last
  return text[last[0] : last[1]].strip() or None if last[0] >= 0 else None


def _first_sentence(text: str) -> str:
  """A line up to the full stop that ends its first sentence, without it."""
  words = text.split()
  for number, (word, following) in enumerate(zip(words, words[1:]), 1):
    if word.endswith(".") and _ends_a_sentence(word[:-1].lstrip("([*\"'“‘"), following):
      return " ".join(words[:number])[:-1]
  return re.sub(r"(?<!\.[^\W\d])\.$", "", text)


def _ends_a_sentence(word: str, following: str) -> bool:
  """Whether the full stop between two words does; not in "Dr. No", "Fig. 3", "J. Smith", "U.S.
  dollars", "Inc. and".
  """
  initials = (len(word) == 1 and word.isupper()) or re.fullmatch(
    r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]", word
  )
  short = word.isalpha() and len(word) < 4 and following[0].islower()
  number = word.casefold() in _BEFORE_NUMBERS and following.lstrip("#(")[:1].isdigit()
  return not (
    not word or word.endswith(".") or initials or short or number or word in _ABBREVIATIONS
  )


def letter_of(text: str, options: int | None) -> str | None:
  """The option's letter that `text` begins with as an answer; a small letter only when alone. None
  without options.
  """
  if options is None:
    return None
  text = without_markup(text)
  match = _LABEL.match(text)
  if not match or index_of(match.group(1).upper()) >= options:
    return None
  alone = not re.search(r"\w", text[match.end(1) :])
  return match.group(1).upper() if match.group(1).isupper() or alone else None


def index_of(letter: str) -> int:
  return string.ascii_uppercase.index(letter)


_DASHES = str.maketrans("–—−⁄", "---/")


def without_markup(text: str) -> str:
  """A text without LaTeX's and Markdown's signs around it or its words; fractions and powers
  stay.
  """
  text = (
    unicodedata.normalize("NFKC", text.replace("²", "^2").replace("³", "^3"))
    .translate(_DASHES)
    .strip()
  )
  text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|textrm)\s*\{([^{}]*)\}", r"\1", text)
  text = re.sub(r"\\([%$#&_])", r"\1", text).replace("{,}", ",")
  text = re.sub(r"\\[,;!:]|\\(?:left|right)(?![a-zA-Z])", "", text)
  text = re.sub(r"\^\s*\{?\\circ\}?|\\degree", "°", text)
  for around in (r"\$\$?(.+?)\$\$?", r"\\\((.+)\\\)", r"\\\[(.+)\\\]", r"\*\*(.+)\*\*", r"`(.+)`"):
    match = re.fullmatch(around, text, re.DOTALL)
    text = match.group(1).strip() if match else text
  return text
