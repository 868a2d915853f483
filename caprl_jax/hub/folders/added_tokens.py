"""Files beside a vocabulary -> the tokens that it has besides."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from caprl_jax.hub.folders.text_files import read_bytes, read_json
from caprl_jax.json_files import shown

_ADDED = dict(content=str, special=bool, normalized=bool)
_ADDED |= dict(single_word=bool, lstrip=bool, rstrip=bool)
_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_SPECIALS += ("mask_token", "additional_special_tokens", "extra_special_tokens")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def listed_tokens(
  places: Mapping[str, pathlib.Path],
) -> list[tuple[int | None, dict[str, Any]]]:
  """The tokens that stand beside a vocabulary, with their ids where these are said: those of
  tokenizer_config.json, those of the older added_tokens.json, and those that it calls special."""
  settings, found = {}, []
  if "tokenizer_config.json" in places:
    settings = read_json(places["tokenizer_config.json"])
    found += _added_tokens(places["tokenizer_config.json"])
  special = [name for key in _SPECIALS for name in _names(settings.get(key))]
  plain = dict(lstrip=False, rstrip=False, normalized=False)
  if "added_tokens.json" in places:
    held = read_json(places["added_tokens.json"])
    if not isinstance(held, dict) or not all(isinstance(i, int) for i in held.values()):
      raise ValueError(
        f"{places['added_tokens.json']}: must give tokens their ids. Download it again."
      )
    known = {token["content"] for _, token in found}
    for name, token_id in sorted(held.items(), key=lambda item: item[1]):
      if name not in known:
        found.append((token_id, dict(content=name, special=name in special, **plain)))
  known = {token["content"] for _, token in found}
  new = [name for name in dict.fromkeys(special) if name not in known]
  # Up to the last that a template writes: for the others the embedding need not have a row.
  template = "".join(
    read_bytes(places[name]).decode("utf-8", "replace") for name in _TEMPLATES if name in places
  ) + json.dumps(settings.get("chat_template"), ensure_ascii=False)
  said = {key for key in _SPECIALS if re.search(rf"\b{key}\b", template)}
  said_names = [name for key in said for name in _names(settings.get(key))]
  used = [i for i, name in enumerate(new, 1) if name in template or name in said_names]
  new = new[: max(used, default=0)]
  return found + [(None, dict(content=name, special=True, **plain)) for name in new]


def _names(value: Any) -> list[str]:
  """The texts of special tokens: one, a list or an object of them, each a text or an object."""
  if isinstance(value, dict) and "content" not in value:
    value = [*value.values()]
  values = value if isinstance(value, list) else [value]
  texts = [held.get("content") if isinstance(held, dict) else held for held in values]
  return [text for text in texts if isinstance(text, str) and text]


def _added_tokens(file: pathlib.Path) -> list[tuple[int, dict[str, Any]]]:
  """The ids and settings in a tokenizer_config.json's `added_tokens_decoder`, in order."""
  added = read_json(file).get("added_tokens_decoder", {})
  good = isinstance(added, dict) and all(
    token_id.isdecimal()
    and isinstance(token, dict)
    and "content" in token
    and all(isinstance(value, _ADDED.get(key, ())) for key, value in token.items())
    for token_id, token in added.items()
  )
  if not good:
    raise ValueError(
      f"{file}: added_tokens_decoder = {shown(added)} must give ids, each with the content of a "
      "token and whether it is special, normalized and so on. Download it again."
    )
  return sorted((int(token_id), token) for token_id, token in added.items())
