"""A caption as it was written -> the text that is kept: shortened, with text before and after; and
texts with {fields}, filled in.
"""

import dataclasses
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from caprl_jax.data.rows import CaptionRow
from caprl_jax.json_files import shown

OWN_FIELDS = ("name", "folder")  # of every image
_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_][\w.-]*)\}")

# What ends a sentence, with what may close behind it: in English where a space or the end follows,
# in Chinese and Japanese anywhere. A line that ends is an end, too.
_END = re.compile(
  r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s|$)"
  r"|[\u3002\uff01\uff1f\uff61]+[\u300d\u300f\u201d\u2019\uff09\u3011)\"']*"
  r"|(?<=\S)(?=[ \t]*\n)"
)
_ABBREVIATION = re.compile(
  r"(?:^|[\s(\"'\u201c])(?:[A-Za-z]|(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|approx|Fig|No|Vol|Inc|Ltd|Co|Jr|Sr"
  r"|e\.g|i\.e|cf|al|a\.m|p\.m|U\.S|U\.K))\.$",
  re.IGNORECASE,
)
# A word: a run of letters, or one sign of a script that is written without spaces.
_SCRIPTS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u0e00-\u0e7f"
_WORD = re.compile(
  rf"[{_SCRIPTS}]|(?:(?![{_SCRIPTS}])[^\s])*(?:(?![{_SCRIPTS}])\w)(?:(?![{_SCRIPTS}])\S)*"
)


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """What becomes of a caption's text.

  before, after: stand before and after every caption exactly as they are written here, spaces
    included. {name} is the image's file name without its suffix and {folder} the name of its
    folder; other fields are those of the image's row (a key of its JSON object, a column, in a tar
    file the members of the same name: {txt}, and the keys of its .json). {{ and }} are braces.
  max_words, max_characters: a longer caption is cut after its last whole sentence that fits, one
    without such after its last whole word; `before` and `after` do not count. In Chinese and
    Japanese every sign is a word.
  separator: between a caption that was there and the new one, with `caption.existing` = append or
    prepend.
  """

  before: str = ""
  after: str = ""
  max_words: int | None = None
  max_characters: int | None = None
  separator: str = " "

  def __post_init__(self):
    for key in ("max_words", "max_characters"):
      if (limit := getattr(self, key)) is not None and limit < 1:
        raise ValueError(f"{key} = {limit} must be at least 1, or None")


def fields_of(text: str) -> list[str]:
  """The names of the {fields} in a text, each once. Other braces are braces."""
  return list(dict.fromkeys(match[1] for match in _FIELD.finditer(text) if match[1]))


def fill(text: str, row: CaptionRow) -> str:
  """A text with its fields filled in. Raises ValueError where the row lacks one of them."""

  def value(match: re.Match) -> str:
    if match[1] is None:
      return match[0][0]
    found = values_of(row).get(match[1])
    if found is None:
      raise ValueError(
        f"row {shown(row.name)} has no {{{match[1]}}}, which {shown(text)} wants; it has "
        f"{', '.join(values_of(row))}"
      )
    return plain(found)

  return _FIELD.sub(value, text)


def values_of(row: CaptionRow) -> dict[str, Any]:
  """The fields of a row by name; {name} and {folder} are always the image's own."""
  path = pathlib.PurePath(row.image if isinstance(row.image, pathlib.Path) else row.name)
  own = {"name": path.stem, "folder": path.parent.name}
  return {**(row.fields or {}), **own}


def plain(value: Any) -> str:
  """A field's value as text: lists joined by commas, numbers as they are."""
  if isinstance(value, str):
    return value.strip()
  if isinstance(value, (list, tuple)):
    return ", ".join(map(plain, value))
  if isinstance(value, bytes):
    return value.decode("utf-8", "replace").strip()
  return str(value)


def check_fields(texts: Mapping[str, str], known: Collection[str]) -> None:
  """Raises ValueError for a field that no row has.

  Args:
    texts: by the key that each stands in.
    known: names of the fields that rows have.
  """
  there = [*OWN_FIELDS, *(name for name in known if name not in OWN_FIELDS)]
  for key, text in texts.items():
    for name in fields_of(text):
      if name not in there:
        raise ValueError(
          f"{key} = {shown(text)} has the field {{{name}}}, which no image has; the fields there "
          f"are: {', '.join(there)}. Write {{{{{name}}}}} for braces"
        )


def shorten(text: str, max_words: int | None, max_characters: int | None) -> str:
  """The text, or as many of its first sentences as the limits allow; where not one whole sentence
  fits, as many words, where not one does, as many characters.
  """
  text = text.strip()
  if _fits(text, max_words, max_characters):
    return text
  for ends in (_sentence_ends(text), [match.end() for match in _WORD.finditer(text)]):
    fitting = [end for end in ends if _fits(text[:end], max_words, max_characters)]
    if fitting:
      return text[: fitting[-1]].rstrip()
  return text[:max_characters].rstrip()


def _sentence_ends(text: str) -> list[int]:
  return [
    match.end()
    for match in _END.finditer(text)
    if not (match[0] == "." and _ABBREVIATION.search(text[: match.end()][-12:]))
  ]


def _fits(text: str, max_words: int | None, max_characters: int | None) -> bool:
  if max_characters is not None and len(text.rstrip()) > max_characters:
    return False
  return max_words is None or count_words(text) <= max_words


def count_words(text: str) -> int:
  """Words of a text; a sign of a script that is written without spaces is one."""
  return sum(1 for _ in _WORD.finditer(text))


def finished(text: str, row: CaptionRow, cfg: TextConfig) -> tuple[str, bool]:
  """A caption as it is kept, and whether it was shortened. Raises ValueError as `fill`."""
  short = text
  if cfg.max_words is not None or cfg.max_characters is not None:
    short = shorten(text, cfg.max_words, cfg.max_characters)
  return fill(cfg.before, row) + short + fill(cfg.after, row), len(short) < len(text.strip())


def joined(old: str, new: Sequence[str], how: str, separator: str) -> list[str]:
  """A caption that was there and new ones: one text where there is one new one, else one more.

  Args:
    how: "append" or "prepend" the new one.
  """
  if not old.strip():
    return list(new)
  if len(new) > 1:
    return [old, *new] if how == "append" else [*new, old]
  parts: Iterable[str] = (old, *new) if how == "append" else (*new, old)
  return [separator.join(parts)]
