"""JSON rows of captions and conversations, in the layouts of LLaVA and OpenAI -> turns of user and
assistant.
"""

import dataclasses
import logging
import math
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from caprl_jax.data.json_rows import read_items
from caprl_jax.data.readers.image_spellings import find_image
from caprl_jax.data.rows import BadRow, ImageSource
from caprl_jax.json_files import cut, shown

log = logging.getLogger("caprl_jax.data")

Role = Literal["system", "user", "assistant"]
PLACE = "<image>"  # what LLaVA's data writes where the image goes
# what changes a row's meaning and is not read here
_UNREAD = ("video", "videos", "audio", "audios", "tools", "functions")
# where a part of a turn's content has its image: OpenAI's, transformers' and Anthropic's names
_PART_KEYS = ("image", "image_url", "path", "url", "base64", "data", "source")
_ROLES = {
  "human": "user",
  "user": "user",
  "gpt": "assistant",
  "assistant": "assistant",
  "system": "system",
}


@dataclasses.dataclass(frozen=True)
class Turn:
  """What one side says; the image stands before `text[image_at:]`, where this turn has it."""

  role: Role
  text: str
  image_at: int | None = None


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Turns with at most one image. `ended`: False for a last answer that was cut, after which no end
  is to be learnt.
  """

  image: ImageSource | None
  turns: tuple[Turn, ...]
  name: str
  ended: bool = True
  where: str = dataclasses.field(default="", compare=False)

  def __post_init__(self):
    """Raises ValueError, which names no row, for turns that are not user, assistant, user, ...
    after a system's.
    """
    roles = [turn.role for turn in self.turns]
    asked = roles[1:] if roles[:1] == ["system"] else roles
    if not asked or asked != ["user", "assistant"] * (len(asked) // 2):
      raise ValueError(
        f"its turns are of {cut(', '.join(roles)) or 'nobody'}; after an optional system turn they "
        "must be user and assistant in turn, the assistant last"
      )
    if any(turn.role == "assistant" and not turn.text.strip() for turn in self.turns):
      raise ValueError("an assistant's turn is empty")
    places = sum(turn.image_at is not None for turn in self.turns)
    if places != (self.image is not None) or any(
      turn.image_at is not None and turn.role != "user" for turn in self.turns
    ):
      raise ValueError(
        f"it has {int(self.image is not None)} image(s) and {places} place(s) for one in the "
        "user's turns"
      )


def scan_conversations(
  path: pathlib.Path, instruction: str, image_root: str | None = None
) -> Iterator[Conversation | BadRow]:
  """The captions and conversations of a file (`read_examples`), with a BadRow for each row that is
  neither.
  """
  failed, empty = 0, True
  for where, item in read_items(path):
    empty = False
    if isinstance(item, BadRow):
      yield item
    elif isinstance(item, dict) and _failed(item):
      failed += 1
    else:
      try:
        made = _parse(item, instruction, path.parent, image_root)
        yield dataclasses.replace(made, where=where)
      except ValueError as error:
        yield BadRow(where, f"{where}: {error}")
  if empty:
    raise ValueError(f"{path}: no rows; write one JSON object a line")
  if failed:
    log.warning("%s: left out %d rows that have an error in place of a caption", path, failed)


def _failed(item: dict) -> bool:
  """Whether a row of mode caption has an error and no caption."""
  return item.get("error") is not None and item.get("caption") is None


def _parse(
  item: Any, instruction: str, folder: pathlib.Path, image_root: str | None
) -> Conversation:
  if not isinstance(item, dict):
    raise ValueError(f"{shown(item)} is no JSON object")
  for key in _UNREAD:
    if item.get(key):
      raise ValueError(f"it has {key} = {shown(item[key])}, which are not supported; drop the row")
  images = _images(item)
  said = [key for key in ("caption", "conversations", "messages") if item.get(key) is not None]
  if len(said) != 1:
    has = f"it has {' and '.join(said)}" if said else f"it has the keys {shown(sorted(item))}"
    raise ValueError(f"{has}; one of caption, conversations and messages must be there")
  [key] = said
  if key == "caption":
    turns = [Turn("user", instruction, 0), Turn("assistant", _text(item["caption"], "caption"))]
  else:
    messages = _list(item[key], key)
    turns = [_turn(turn) for turn in messages]
    parts = _image_parts(messages)
    if images and parts and images != parts:
      raise ValueError(
        f"it names the image {shown(images[0])} and, in its turns, {shown(parts[0])}; keep one"
      )
    images = images or parts
  turns = _with_system(item.get("system"), turns)
  if len(images) > 1:
    raise ValueError(
      f"it has {len(images)} images; conversations with one image at most are supported"
    )
  # nowhere said: before the user's first words
  if images and all(turn.image_at is None for turn in turns):
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
    turns[first : first + 1] = [
      dataclasses.replace(turn, image_at=0) for turn in turns[first : first + 1]
    ]
  image, named = None, ""
  if images:
    roots = [pathlib.Path(image_root).expanduser()] if image_root else [folder, pathlib.Path()]
    remedy = "correct it or set image_root to the folder that the paths are relative to"
    found = find_image(images[0], roots, "", remedy)
    image, named = found.image, found.name
  name = next((item[key] for key in ("name", "id") if item.get(key) is not None), named)
  return Conversation(image, tuple(turns), str(name), item.get("finish") != "length")


def _images(item: dict) -> list:
  """The images that a row names beside its turns; null, "" and [] name none."""
  found = []
  for key in ("image", "images"):
    value = item.get(key)
    if isinstance(value, float) and math.isnan(value):
      value = None  # pandas' way to say nothing
    if isinstance(value, (bool, int, float)):
      raise ValueError(f"{key} {shown(value)} must be a path, images a list of them")
    values = value if isinstance(value, list) else [value]
    found.append([one for one in values if not _is_nothing(one)])
  if found[0] and found[1] and found[0] != found[1]:
    raise ValueError(f"image is {shown(found[0][0])}, and images {shown(found[1])}; keep one")
  return found[0] or found[1]


def _is_nothing(value: Any) -> bool:
  """null, "" and an object of such, {"bytes": null, "path": null}."""
  values = value.values() if isinstance(value, dict) else [value]
  return all(one is None or one == "" for one in values)


def _with_system(system: Any, turns: list[Turn]) -> list[Turn]:
  """The turns after the system's text that stands beside them in a row, if there is one."""
  if system is None or system == "":
    return turns
  if turns and turns[0].role == "system":
    raise ValueError("it has a key 'system' and a turn of the system; keep one of them")
  return [Turn("system", _text(system, "system")), *turns]


def _turn(turn: Any) -> Turn:
  """One turn of either layout; an image that it holds is placed, and its sign taken out of the
  text.
  """
  held = turn if isinstance(turn, dict) else {}
  role_key = "role" if held.get("role") is not None else "from"
  own, other = ("content", "value") if role_key == "role" else ("value", "content")
  text_key = own if held.get(own) is not None or held.get(other) is None else other
  for key in ("tool_calls", "function_call"):
    if held.get(key):
      raise ValueError(f"a turn has {key} = {shown(held[key])}, which are not supported")
  if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str):
    raise ValueError(f"{shown(turn)} is no turn of 'from' and 'value', or 'role' and 'content'")
  if turn[role_key] not in _ROLES:
    raise ValueError(f"{role_key} {shown(turn[role_key])} is not one of {', '.join(_ROLES)}")
  role, content = _ROLES[turn[role_key]], turn.get(text_key)
  if isinstance(content, list):  # there, `<image>` is text
    texts, at = [], None
    for part in content:
      if _is_image(part):
        if at is not None:
          raise ValueError(
            "a turn has two images; conversations with one image at most are supported"
          )
        at = sum(map(len, texts))
      else:
        texts.append(_part_text(part))
    return Turn(role, "".join(texts), at)
  text = _text(content, text_key)
  if role != "user" or PLACE not in text:
    return Turn(role, text)
  before, _, after = text.partition(PLACE)
  if PLACE in after:
    raise ValueError(
      f"a turn has {PLACE} {text.count(PLACE)} times; conversations with one image at most are "
      "supported"
    )
  # the template puts its own around the image
  before, after = before.removesuffix("\n"), after.removeprefix("\n")
  return Turn(role, before + after, len(before))


def _part_text(part: Any) -> str:
  """The text of a part of a turn's content."""
  if isinstance(part, str):
    return part
  if not isinstance(part, dict) or not isinstance(part.get("text"), str):
    kind = part.get("type") if isinstance(part, dict) else part
    raise ValueError(f"a part of the content is {shown(kind)}; text and one image are supported")
  return part["text"]


def _is_image(part: Any) -> bool:
  return isinstance(part, dict) and part.get("type") in ("image", "image_url", "input_image")


def _image_parts(messages: list) -> list:
  """What the content's own parts say of their images."""
  found = []
  for part in (
    p for m in messages if isinstance(m.get("content"), list) for p in m["content"] if _is_image(p)
  ):
    value = next((part[key] for key in _PART_KEYS if part.get(key)), None)
    value = value.get("url") if isinstance(value, dict) and "url" in value else value
    if not value or (isinstance(value, str) and value.lower().startswith(("http:", "https:"))):
      raise ValueError(f"image {shown(value or part)} is no path of a file; save it as one")
    found.append(value)
  return found


def _list(value: Any, key: str) -> list:
  if not isinstance(value, list) or not value:
    raise ValueError(f"{key} is {shown(value)}, but it must be a list of turns")
  return value


def _text(value: Any, key: str) -> str:
  if not isinstance(value, str):
    raise ValueError(f"{key} is {shown(value)}, but it must be a text")
  return value
