"""A dotted key of a config -> the annotation of its value, from the dataclasses that the registry
names; so that a key can be set which a config file leaves out."""

import dataclasses
import importlib
import logging
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from caprl_jax.config import registry


def resolve(path: str) -> type:
  """The dataclass at "module:Class" below `caprl_jax`. Imports its module."""
  module, _, name = path.partition(":")
  # absl writes while orbax is imported and, where the root logger has no handler, gives it one,
  # which would say all our lines again.
  quiet = logging.NullHandler()
  logging.root.addHandler(quiet)
  try:
    return getattr(importlib.import_module(f"caprl_jax.{module}"), name)
  finally:
    logging.root.removeHandler(quiet)


def section_types(name: str) -> tuple[type, ...]:
  """The dataclasses of a section's name: several where modes read it differently, none where no
  mode does."""
  paths = dict.fromkeys(m.sections[name] for m in registry.MODES.values() if name in m.sections)
  return tuple(map(resolve, paths))


def annotation_of(key: str) -> Any:
  """What the value at a dotted key is annotated as; None where no section has such a key."""
  name, *rest = key.split(".")
  roots = (registry.TOP_LEVEL[name][0],) if name in registry.TOP_LEVEL else section_types(name)
  found = (_find(root, rest) for root in roots)
  return next((annotation for annotation in found if annotation is not None), None)


def keys() -> list[str]:
  """All dotted keys, but for those below a name that the user gives, such as a stage's."""
  found = list(registry.TOP_LEVEL)
  for name in registry.section_names():
    for section in section_types(name):
      found += _keys(section, name)
  return list(dict.fromkeys(found))


def alternatives(annotation: Any) -> list[Any]:
  """What an annotation allows besides None."""
  union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
  members = typing.get_args(annotation) if union else (annotation,)
  return [member for member in members if member is not type(None)]


def _find(annotation: Any, path: list[str]) -> Any:
  if not path:
    return annotation
  for one in alternatives(annotation):
    if dataclasses.is_dataclass(one):
      inner = typing.get_type_hints(one).get(path[0]) if path[0] in _fields(one) else None
    else:
      inner = typing.get_args(one)[1] if typing.get_origin(one) in (dict, Mapping) else None
    if inner is not None and (found := _find(inner, path[1:])) is not None:
      return found
  return None


def _fields(cls: Any) -> list[str]:
  return [field.name for field in dataclasses.fields(cls) if field.init]


def _keys(annotation: Any, place: str) -> Iterator[str]:
  inner = [one for one in alternatives(annotation) if dataclasses.is_dataclass(one)]
  for one in inner:
    hints = typing.get_type_hints(one)
    for name in _fields(one):
      yield from _keys(hints[name], f"{place}.{name}")
  if not inner:
    yield place
