"""A checkpoint's chat template, an instruction -> token ids before and after the image."""

import os
from collections.abc import Mapping
from typing import Any

from caprl_jax.hub.folders.notices import warn_once
from caprl_jax.hub.folders.text_files import json_of
from caprl_jax.hub.template_limits import check_limits
from caprl_jax.hub.tokenizer import Tokenizer
from caprl_jax.json_files import cut, decode, shown
from caprl_jax.models.family import Family

# ChatML with one image, as Qwen's and InternVL's templates write it when no system message is
# given.
DEFAULT_TEMPLATE = (
  "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is "
  "string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if "
  "part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
  "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def default_template(family: Family) -> str:
  """What a new model of the family is given."""
  return DEFAULT_TEMPLATE.replace("IMAGE", family.marker + family.after_marker)


def _is_default(template: str) -> bool:
  """Whether it is ours, of any family: `default_template` differs between them in IMAGE only."""
  before, _, after = DEFAULT_TEMPLATE.partition("IMAGE")
  image = template.removeprefix(before).removesuffix(after)
  return template == before + image + after and "{" not in image


def find_template(files: Mapping[str, bytes]) -> str | None:
  """The chat template among a checkpoint's small files; None if absent.

  Where there are several, the one that transformers' processors take, and a warning names the
  others; a tokenizer's own only where there is no other.

  Raises:
    ValueError: a file that may hold one is damaged, or it is no text.
  """
  found: dict[str, str] = {}
  for name in (
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer_config.json",
  ):
    if name not in files:
      continue
    if name.endswith(".jinja"):
      template = _text_of(files[name], name)
    else:
      template = _default_of(json_of(files, name).get("chat_template"), name)
    if template:
      found[name] = template
  taken = next(iter(found), None)
  if taken is None:
    return None
  # Jinja drops one line break at a template's end.
  others = [n for n in found if found[n].removesuffix("\n") != found[taken].removesuffix("\n")]
  if others:
    warn_once(
      f"the checkpoint has more than one chat template: that of {taken} is taken, as transformers' "
      f"processors do, and that of {' and '.join(others)} differs from it; remove what is old"
    )
  return found[taken]


def _text_of(data: bytes, name: str) -> str:
  try:
    return decode(data)
  except UnicodeError as error:
    raise ValueError(f"{name}: no text ({error}); take the model's own file") from error


def _default_of(said: Any, name: str) -> str | None:
  """The template of a JSON file's `chat_template`: a text, or one of several by name."""
  if isinstance(said, list):
    said = {t.get("name"): t.get("template") for t in said if isinstance(t, dict)}
  if isinstance(said, dict):
    said = said.get("default")
  if said is not None and not isinstance(said, str):
    raise ValueError(f"{name}: chat_template = {shown(said)} is no text; take the model's own file")
  return said


def prompt_pieces(
  template: str,
  family: Family,
  tokenizer: Tokenizer,
  instruction: str,
  special: Mapping[str, str] | None = None,
  system: str | None = None,
) -> tuple[list[int], list[int]]:
  """Token ids of a user's turn with one image and an instruction, cut where the image's tokens go.

  Arguments and errors as of `prompt_texts`.
  """
  before, after = prompt_texts(template, family, instruction, special, system)
  return tokenizer.encode(before), tokenizer.encode(after)


def prompt_texts(
  template: str,
  family: Family,
  instruction: str,
  special: Mapping[str, str] | None = None,
  system: str | None = None,
) -> tuple[str, str]:
  """A user's turn with one image and an instruction as text, cut where the image's tokens go.

  system: a turn before it; None leaves it to the template, of which some write their own.

  Raises ValueError for an instruction that spells the family's image token, and for a template that
  does not write the family's image marker once.
  """
  image = family.marker.removeprefix(family.open).removesuffix(family.close)
  if image in instruction:  # it would be one more image token than there are image features
    raise ValueError(
      f"the instruction {shown(instruction)} holds {image!r}, which stands for an image; "
      "the chat template writes it where it belongs: take it out of the instruction"
    )
  content = [{"type": "image"}, {"type": "text", "text": instruction}]
  text = _render(template, content, special, system)
  before, found, after = text.partition(family.marker)
  if not found or text.count(image) != 1:
    raise ValueError(
      f"the checkpoint's chat template writes {shown(text, 300)} for an image and an "
      f"instruction; it must hold {family.marker!r} once. Is it of the text-only "
      "model?"
    )
  return before + family.open, family.close + after


def text_prompt(
  template: str,
  tokenizer: Tokenizer,
  instruction: str,
  special: Mapping[str, str] | None = None,
  system: str | None = None,
) -> list[int]:
  """Token ids of a user's turn without an image."""
  return tokenizer.encode(
    _render(template, [{"type": "text", "text": instruction}], special, system)
  )


def _render(
  template: str, content: list[dict], special: Mapping[str, str] | None, system: str | None
) -> str:
  turns = [{"role": "user", "content": content}]
  if system is not None:
    turns.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
  return render(template, turns, special, add_generation_prompt=True)


def render(
  template: str,
  turns: list[dict],
  special: Mapping[str, str] | None = None,
  *,
  add_generation_prompt: bool = False,
) -> str:
  """What a chat template makes of turns of `role` and `content`, by transformers' own renderer.

  Raises:
    ValueError: it fails on them, does not end, or writes what is no text.
  """
  # Late: it takes a second. It would tell the user that PyTorch is missing, which is not needed.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "true")
  from transformers.utils.chat_template_utils import render_jinja_template

  if not _is_default(template):
    check_limits(template)
  try:
    (text,), _ = render_jinja_template(
      [turns],
      chat_template=template,
      add_generation_prompt=add_generation_prompt,
      **(special or {}),
    )
    text.encode("utf-8")
  except Exception as error:  # a template is a program: it may raise anything
    roles = [turn["role"] for turn in turns]
    raise ValueError(
      f"the checkpoint's chat template failed on turns of {roles}: {type(error).__name__}: "
      f"{cut(error, 300)}; mend chat_template.jinja"
    ) from error
  return text
