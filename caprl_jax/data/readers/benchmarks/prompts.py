"""A benchmark's prompt, a caption -> the answering model's prompt; the question and its options."""

import re
import string

from caprl_jax.data.readers.benchmarks.row import CAPTIONQA, BenchmarkRow
from caprl_jax.json_files import shown

PLACEHOLDERS = ("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
# Stage 2's sentence in the placeholder's place, to the byte: nothing between it and the question's
# text.
BEFORE_CAPTION = "Here is a detailed caption of an image: "
AFTER_CAPTION = ". Please answer the question based on the caption."
_USER_TURN = re.compile(r"<\|im_start\|>user\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_TURN = r"((?:(?!<\|im_).)*)<\|im_end\|>\s*"
_CHAT = re.compile(
  rf"\s*(?:<\|im_start\|>system\n{_TURN})?<\|im_start\|>user\n{_TURN}(?:<\|im_start\|>assistant\s*)?",
  re.DOTALL,
)
_OPTION_LINE = re.compile(r"\s*(?:[-*]\s*)?(?:\(([A-Z])\)|([A-Z])[).:])\s*(\S.*?)\s*$")
_OPTIONS_TITLE = re.compile(r"(?:^|\n)\s*(?:options|choices)\s*[:：]?\s*\Z", re.IGNORECASE)
_INLINE = re.compile(r"(?:options|choices)\s*[:：]\s*(.+)", re.IGNORECASE)
_INLINE_LABEL = re.compile(r"(?:^|[\s,;])\(?([A-Z])[).:]\s*")


def split_at_placeholder(prompt: str, where: str) -> tuple[str, str]:
  """What stands before and after the one image placeholder. Raises ValueError, from `where` on, for
  none or more.
  """
  count = sum(prompt.count(placeholder) for placeholder in PLACEHOLDERS)
  if count != 1:
    raise ValueError(
      f"{where}: the prompt has {count} image placeholders "
      f"({' or '.join(PLACEHOLDERS)}), but one caption; drop the row"
    )
  before, _, after = prompt.partition(next(one for one in PLACEHOLDERS if one in prompt))
  return before, after


def split_prompt(row: BenchmarkRow) -> tuple[str, str]:
  """Stage 2's prompt before and after the caption.

  Who tokenises the parts apart, with special tokens in these and without in the caption, lets no
  caption that spells `<|im_end|>` steer the answering model."""
  before, after = split_at_placeholder(row.prompt, f"row {shown(row.name)}")
  if row.benchmark == CAPTIONQA:  # whose prompt says by itself what stands there
    return before, after
  return before + BEFORE_CAPTION, AFTER_CAPTION + after


def stage2_prompt(row: BenchmarkRow, caption: str) -> str:
  """The answering model's prompt as the release makes it. The caption goes in as it is, chat tokens
  included.

  The release replaces only a `<|vision_start|>…` placeholder that begins the user's turn; for
  others it would show no caption at all, and this does."""
  before, after = split_prompt(row)
  return before + caption + after


def chat_turns(row: BenchmarkRow, before: str, caption: str, after: str) -> tuple[str, str]:
  """A prompt of the release, cut at its caption -> its system turn, "" for none, and the user's:
  for a server, which writes the chat around them.

  Raises ValueError for a prompt of more turns, or whose answer is begun.
  """
  if "<|im_" not in before + after:
    return "", before + caption + after
  match = _CHAT.fullmatch(f"{before}\0{after}")
  if match is None:
    raise ValueError(
      f"row {shown(row.name)}: its prompt is not one user's turn, with at most a system turn "
      "before it, so a judge behind an endpoint cannot be asked it; set judge.source and "
      "judge.endpoint = None, or drop the row"
    )
  system, user = (turn.replace("\0", caption) for turn in match.groups(default=""))
  return system, user


def user_text(row: BenchmarkRow) -> str:
  """The benchmark's own question: the user's turn that holds the placeholder, without it and
  without chat tokens.
  """
  split_at_placeholder(row.prompt, f"row {shown(row.name)}")
  if row.benchmark == CAPTIONQA:
    return split_prompt(row)[1].strip()
  turns = [
    turn for turn in _USER_TURN.findall(row.prompt) if any(one in turn for one in PLACEHOLDERS)
  ] or [row.prompt]
  before, after = split_at_placeholder(turns[0], f"row {shown(row.name)}")
  return (before + after).strip()


def parse_options(text: str) -> tuple[str, ...]:
  """The texts of the last lettered options in a question, from A on without a gap; () for fewer
  than two.

  They stand a line each ("A) red", "(A) red", "A. red", "A: red", "- A. red"), or in one line
  behind "Options:" or "Choices:" ("Options: A: red, B: blue")."""
  return split_options(text)[1]


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
  """A question -> its text without its options and their title, and the options, as `parse_options`
  has them.
  """
  lines = text.splitlines()
  best: list[str] = []
  run: list[str] = []
  end = 0
  for number, match in enumerate(map(_OPTION_LINE.match, lines), 1):
    letter = (match.group(1) or match.group(2)) if match else None
    if letter == "A":
      run = [match.group(3)]
    elif letter and run and letter == chr(ord("A") + len(run)):
      run.append(match.group(3))
    else:
      run = []
    if len(run) >= 2:
      best, end = list(run), number
  if best:
    before = _OPTIONS_TITLE.sub("", "\n".join(lines[: end - len(best)]))
    return "\n".join([before, *lines[end:]]).strip(), tuple(best)
  for inline in reversed(list(_INLINE.finditer(text))):
    found = _inline_options(inline.group(1))
    if len(found) >= 2:
      return (text[: inline.start()].rstrip() + text[inline.end() :]).strip(), found
  return text, ()


def _inline_options(text: str) -> tuple[str, ...]:
  starts: list[re.Match[str]] = []
  for match in _INLINE_LABEL.finditer(text):
    # another letter is part of an option's text
    if match.group(1) == string.ascii_uppercase[len(starts) % 26]:
      starts.append(match)
  ends = [match.start() for match in starts[1:]] + [len(text)]
  found = tuple(
    text[match.end() : end].strip().rstrip(",;").strip() for match, end in zip(starts, ends)
  )
  return found if all(found) else ()
