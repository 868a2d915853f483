"""What a model wrote -> the answer in it, or that there is none.

Two protocols, as in `answers.py`: "ours" reads as a careful reader would, "official" as the
released scorer of CapRL does, defects included.
"""

import ast
import json
import re
from typing import Any, Literal

from caprl_jax.scoring.labels import label_of
from caprl_jax.scoring.plain_text import normal_form
from caprl_jax.scoring.quantities import read_quantity
from caprl_jax.scoring.statements import (
  DENIES,
  IF,
  IS,
  NOUN,
  implied_letter,
  stated_letter,
)

Protocol = Literal["ours", "official"]

# Of a text that is tried as JSON, in characters.
_LONGEST_OBJECT = 20_000
_ANSWER_KEYS = ("answer", "finalanswer", "correctanswer", "choice", "option", "prediction", "答案")
_THOUGHTS = [
  (f"<{name}>", f"</{name}>")
  for name in ("think", "thinking", "thought", "reasoning", "seed:think")
] + [("◁think▷", "◁/think▷"), ("<|begin_of_thought|>", "<|end_of_thought|>")]
_ANSWER, _END_ANSWER = "<answer>", "</answer>"
_SAID = re.compile(
  rf"(?i:(?<![A-Za-z]){NOUN}(?:\s(?:to|for)\b[^.:\n]{{0,80}}?)?\**\"?\s?(?:{IS}|[：＝])"
  r"|(?:correct|right|best)\s(?:option|choice)\**\s?(?:is\b|[:：])"
  r"|^\W{0,6}(?:final\s)?answer\W{0,6}$)[:：]?[ \t]*\**[ \t]*(?:\n+[ \t]*)?",
  re.MULTILINE,
)
_REASON = re.compile(r"(?<=\S)[,;]?\s+(?:because|since)\s.*$", re.IGNORECASE)
# "The answer is clear" says no answer.
_NO_ANSWER = re.compile(
  r"(?:\w+ly\s)?(?:correct|clear|obvious|evident|wrong|incorrect|as follows|"
  r"given|based|found|in the|straightforward|simple|determined|supported|shown|provided|"
  r"consistent|therefore|not)\b",
  re.IGNORECASE,
)
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
  thought was cut off). Only the last `<answer>` is read, if it is not empty (its end tag may be
  missing, as when the end of the turn took its place); in a JSON object, the value of "answer".

  With options, the first of these that is there:
    1. the letter of the last clear statement (`statements.stated_letter`), a box among them;
    2. what the last `\\boxed{X}` holds;
    3. a letter that begins a line, or that the text implies (`statements.implied_letter`);
    4. the sentence after the last "answer is", "Answer:", "答案是" and the like, without a reason
       ("because …") and the full stop;
    5. the last line that holds letters or digits.
  Without, the last of 2 and 4, then 5. A phrase that is negated, conditional or says no answer
  ("The answer is clear") is passed over.
  """
  if protocol not in ("ours", "official"):
    raise ValueError(f"protocol = {protocol!r}; use 'ours' or 'official'")
  if options is not None and not 2 <= options <= 26:
    raise ValueError(
      f"options = {options}; a multiple-choice question has 2 to 26, an open one None"
    )
  if protocol == "official":
    return _official_answer(output)
  text = _behind_thought(output)
  if text is None:
    return None
  if _ANSWER in text:
    inner = text[text.rindex(_ANSWER) + len(_ANSWER) :].partition(_END_ANSWER)[0].strip()
    if inner:
      return _read(inner, options, whole=True)
  return _read(text, options, whole=False)


def _behind_thought(output: str) -> str | None:
  text = output
  for begin, end in _THOUGHTS:
    text = text[text.rfind(end) + len(end) :] if end in text else text
    if begin in text:
      return None
  return text


def _read(text: str, options: int | None, *, whole: bool) -> str | None:
  """The answer in a text without thoughts and tags; `whole`: that is all of it where nothing marks
  a part.
  """
  lines = [line.strip() for line in text.splitlines() if re.search(r"\w", normal_form(line))]
  if not lines:
    return text if whole else None
  value = _value_of_answer(text)
  if value is not None:
    return (value if options is None else _read(value, options, whole=True)) or value
  boxed, box_at = _last_boxed(text)
  letter = None
  if options is not None:
    letter = stated_letter(text, options)
    letter = label_of(boxed, options) if letter is None and boxed else letter
    if not letter and letter != "" and not boxed:
      letter = implied_letter(text, options)
  if letter:
    return letter
  said, said_at = _last_said(text)
  if options is None and said:
    said, said_at = _corrected(text, said_at) or (said, said_at)
  if boxed and not (said and said_at > box_at and options is None):
    return boxed
  if said or whole:
    return said or text.strip()
  if options is None and _is_explained(text, lines):
    return lines[0]
  # the last line of a list of the options is no answer
  listed = options and len(lines) > 1 and label_of(lines[-1], options)
  return None if listed else lines[-1]


def _is_explained(text: str, lines: list[str]) -> bool:
  """Whether a quantity stands alone in the first line, and below an empty one a text that gives no
  other at its end: "45", "The bar for 2014 reads 45." """
  first = read_quantity(lines[0])
  if first is None or len(lines) < 2 or not re.match(r"\s*\S.*\n\s*\n", text):
    return False
  if re.match(r"(?:explanation|reason(?:ing)?|because|note)\b", lines[-1], re.IGNORECASE):
    return True
  last = re.findall(r"(?:\b(?:is|are|was|were)|[:=])\s*([-\d$€£][^\s]*)", lines[-1])
  other = read_quantity(last[-1].rstrip(".,;")) if last else None
  return other is None or other == first


_CORRECTS = re.compile(
  r"\b(?:wait|actually|correction|sorry|no(?=\s?,)|i\smean)\b[\s,:;.…-]+"
  r"(?:(?:it|that|this|the\s\w+)(?:['’]s|\sis|\sshould\sbe)\s)?",
  re.IGNORECASE,
)


def _corrected(text: str, at: int) -> tuple[str, int] | None:
  """The last quantity behind a place that corrects what was said there, and where it stands."""
  for match in reversed([*_CORRECTS.finditer(text, at)]):
    line = text[match.end() :].partition("\n")[0]
    said = _first_sentence(line).strip().strip("*")
    if read_quantity(said) is not None:
      return said, match.end()
  return None


def _value_of_answer(text: str) -> str | None:
  """The value of "answer" or the like, where a text is a JSON object; None elsewhere."""
  text = re.sub(r"^\s*```\w*|```\s*$", "", text).strip()
  if not (text.startswith("{") and text.endswith("}")) or len(text) > _LONGEST_OBJECT:
    return None
  found: Any = None
  for read in (json.loads, ast.literal_eval):
    try:
      found = read(text)
      break
    except (ValueError, SyntaxError, RecursionError, MemoryError):
      continue  # not of this kind
  if not isinstance(found, dict):
    return None
  values = {re.sub(r"[\W_]", "", str(key)).casefold(): value for key, value in found.items()}
  value = next((values[key] for key in _ANSWER_KEYS if key in values), None)
  if isinstance(value, list) and len(value) == 1:
    value = value[0]
  return str(value) if isinstance(value, (str, int, float, list)) and value != "" else None


def _last_said(text: str) -> tuple[str | None, int]:
  """The sentence behind the last phrase that says an answer, and where it begins."""
  # Of a looping output, the end is enough.
  for match in reversed(list(_SAID.finditer(text))[-50:]):
    line = text[match.end() : match.end() + 5000].partition("\n")[0]
    before = re.split(r"[.!?;\n]", text[max(0, match.start() - 160) : match.start()])[-1]
    if not re.search(r"\w", line) or IF.search(before) or DENIES.search(before):
      continue
    found = _first_sentence(_REASON.sub("", line.strip())).strip().strip("*")
    if re.search(r"\w", found) and not _NO_ANSWER.match(found):
      return found, match.end()
  return None, -1


_REFUSAL = re.compile(
  r"\b(?:can(?:no|')t|can not|could not|couldn't|unable to|impossible to|"
  r"not possible to)\b[^.\n]{0,200}?"
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


def _last_boxed(text: str) -> tuple[str | None, int]:
  """What the last closed `\\boxed{…}` holds, and where it ends; None without one or if it is
  empty.
  """
  text = text.replace("<|begin_of_box|>", "\\boxed{").replace("<|end_of_box|>", "}")
  last = (-1, -1)
  opened: list[tuple[int, bool]] = []  # where the text in braces begins, and whether it is a box's
  for match in re.finditer(r"(\\f?boxed\s?)?\{|\}", text):
    if match.group() != "}":
      opened.append((match.end(), match.group(1) is not None))
    elif opened:
      begin, boxed = opened.pop()
      if boxed and not _negated(text, begin):
        last = max(last, (begin, match.start()))
  return (text[last[0] : last[1]].strip() or None if last[0] >= 0 else None), last[1]


def _negated(text: str, at: int) -> bool:
  """Whether the box that begins at a place is what an answer is not."""
  before = re.sub(r"[$*\\]*(?:\\f?boxed\s?)?\{?$", "", text[max(0, at - 160) : at])
  return bool(re.search(r"(?:\bnot|n['’]t|\bnever)\s*$", re.split(r"[.!?;\n]", before)[-1]))


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
