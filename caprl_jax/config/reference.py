"""The sections' dataclasses -> the table of all keys in docs/configuration.md.

  python -m caprl_jax.config.reference docs/configuration.md

writes the table anew between the page's two markers. A key's meaning is its entry in the docstring
of its dataclass: a line "name: meaning", not indented, and the indented lines that follow it; or
else the comment behind the field.
"""

import dataclasses
import inspect
import pathlib
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from caprl_jax.config import keys, registry, schema

BEGIN = "<!-- keys: written by python -m caprl_jax.config.reference docs/configuration.md -->"
END = "<!-- end of keys -->"

# What holds inner sections, by what `_inner_sections` says of their place.
KINDS = {"": "a section", ".NAME": "sections by name", "[i]": "a tuple of sections"}


def meanings(cls: type) -> dict[str, str]:
  """What a dataclass and its bases say of each of its fields, on one line each; a field of which
  nothing is said is left out."""
  found: dict[str, str] = {}
  for base in reversed(cls.__mro__):
    if dataclasses.is_dataclass(base):
      names = [field.name for field in dataclasses.fields(base)]
      found |= _comments(base, names) | _entries(inspect.cleandoc(base.__doc__ or ""), names)
  return found


def purpose(cls: type) -> str:
  """A dataclass's docstring without the entries of its fields, on one line."""
  names = [field.name for field in dataclasses.fields(cls)]
  kept, entry = [], False
  for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
    entry = bool(_names_of(line, names)) or (entry and line.startswith(" "))
    if not entry:
      kept.append(line)
  return " ".join(" ".join(kept).split())


def _names_of(line: str, names: Sequence[str]) -> list[str]:
  """The fields that a docstring's line is the entry of."""
  match = re.match(r"(\w+(?:, \w+)*): ", line)
  found = match[1].split(", ") if match else []
  return found if set(found) <= set(names) else []


def _entries(text: str, names: Sequence[str]) -> dict[str, str]:
  found: dict[str, str] = {}
  current: list[str] = []
  for line in text.splitlines():
    if named := _names_of(line, names):
      current = named
      line = line.partition(": ")[2]
    elif not line.startswith(" "):
      current = []
    for name in current:
      found[name] = f"{found.get(name, '')} {line.strip()}".strip()
  return found


def _comments(cls: type, names: Sequence[str]) -> dict[str, str]:
  found = {}
  for name in names:
    if match := re.search(rf"^  {name}: [^#\n]*  # (.+)$", inspect.getsource(cls), re.MULTILINE):
      found[name] = match[1]
  return found


def _cell(text: str) -> str:
  return text.replace("|", "\\|")


def _default(field: dataclasses.Field, instance: Any) -> Any:
  """A field's default, or what the default of the section around it has; MISSING for neither."""
  if instance is not None:
    return getattr(instance, field.name)
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default


def _rows(cls: Any, place: str, instance: Any = None) -> Iterator[str]:
  """One line of the table for each key of a dataclass; those of inner sections follow theirs, but
  for an inner section that has its own place in the table.

  Args:
    instance: what the keys' defaults are taken from, where the section is another one's default.
  """
  hints, said = typing.get_type_hints(cls), meanings(cls)
  for field in dataclasses.fields(cls):
    if not field.init:
      continue
    key, hint, default = f"{place}.{field.name}", hints[field.name], _default(field, instance)
    inner = _inner_sections(hint)
    what = KINDS[inner[0][0]] if inner else schema.expected(hint)
    shown = "required" if default is dataclasses.MISSING else "" if inner else f"`{default!r}`"
    yield f"| `{key}` | {_cell(what)} | {_cell(shown)} | {_cell(said.get(field.name, ''))} |"
    for step, one in inner:
      if not _has_a_place(one):
        known = dataclasses.is_dataclass(default) and not isinstance(default, type)
        yield from _rows(one, f"{key}{step}", default if known else None)


def _has_a_place(cls: type) -> bool:
  """Whether a dataclass is what a section of a config is read as."""
  return any(cls in keys.section_types(name) for name in registry.section_names())


def _inner_sections(annotation: Any) -> list[tuple[str, Any]]:
  """The dataclasses inside an annotation, each with what its keys' place ends in: "" for a section,
  ".NAME" for sections that a user names, "[i]" for a list of them."""
  found = []
  for one in keys.alternatives(annotation):
    if dataclasses.is_dataclass(one):
      found.append(("", one))
    else:
      step = ".NAME" if typing.get_origin(one) is dict else "[i]"
      found += [(step, a) for a in typing.get_args(one) if dataclasses.is_dataclass(a)]
  return found


def table() -> str:
  """The page's part between its markers, in Markdown."""
  head = ["| key | value | default | meaning |", "|---|---|---|---|"]
  lines = ["### Keys of no section", "", *head]
  for name, (annotation, meaning) in registry.TOP_LEVEL.items():
    lines.append(f"| `{name}` | {schema.expected(annotation)} | | {meaning} |")
  for name in registry.section_names():
    lines += ["", f"### `{name}`", ""]
    for cls in keys.section_types(name):
      modes = [
        mode
        for mode, about in registry.MODES.items()
        if name in about.sections and keys.resolve(about.sections[name]) is cls
      ]
      listed = ", ".join(f"`{mode}`" for mode in modes)
      about = purpose(cls)
      lines += [f"Read by {listed}.{' ' + about if about else ''}", "", *head]
      lines += [*_rows(cls, name), ""]
    lines.pop()
  return "\n".join(lines)


def update(text: str) -> str:
  """A page with the table of today between its markers. Raises ValueError where it has none."""
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not (begin and end):
    raise ValueError(f"the page has no lines {BEGIN!r} and {END!r}")
  return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
  page = pathlib.Path(sys.argv[1])
  page.write_text(update(page.read_text(encoding="utf-8")), encoding="utf-8")
