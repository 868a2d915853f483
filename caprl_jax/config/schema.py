"""ConfigDict sections -> frozen dataclasses, with errors that name the nearest key."""

import dataclasses
import difflib
import pathlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections
import numpy as np
from ml_collections import config_dict

from caprl_jax.json_files import cut, shown

T = TypeVar("T")

# What a section may be: a config file builds ConfigDicts, tests also write plain dicts.
MAPPINGS = (Mapping, ml_collections.ConfigDict)


def load_section(config: Any, name: str, cls: type[T]) -> T:
  """Builds the dataclass `cls` from `config[name]`.

  Fields that are dataclasses are built from the sub-sections of their name, lists become tuples
  where the annotation is a tuple, and an integer is accepted for a float. An absent key takes
  the dataclass's default; an absent section takes all of them.

  Args:
    config: the whole configuration, a ConfigDict or a dict.
    name: the section's key in it.
    cls: a dataclass. Its annotations may use bool, int, float, str, None, Any, Literal, unions,
      tuple, dict and other dataclasses.

  Raises:
    ValueError: an unknown key, a missing key without a default, a value of the wrong type or
      outside a Literal's alternatives, or a value that the dataclass itself refuses.
    TypeError: `cls` has an annotation that this function does not know (a mistake in `cls`).
  """
  section = config.get(name, {})
  return _build(section, cls, f"config.{name}")


def check_top_level(config: Any, known: Iterable[str]) -> None:
  """Raises ValueError where `config` has a top-level key that is not in `known`."""
  _check_keys(config, known, "config")


_DEEPEST = 64  # of lists and sections in a config


def to_plain(config: Any, place: str = "config") -> Any:
  """The configuration as dicts, lists, strings, numbers and None: what `json.dumps` takes.

  Raises:
    ValueError: a value that JSON has no form for, with its key; or one that stands inside itself.
  """
  if place.count(".") + place.count("[") > _DEEPEST:
    raise ValueError(
      f"{cut(place)} is nested more than {_DEEPEST} deep; does a list stand inside itself?"
    )
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    config = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  if isinstance(config, MAPPINGS):
    plain = {}
    for key in config.keys():
      if not isinstance(key, str):
        raise ValueError(f"{place} has the key {shown(key)}; keys must be strings")
      plain[key] = to_plain(_value(config, key, None), f"{place}.{key}")
    return plain
  if isinstance(config, (list, tuple)):
    return [to_plain(item, f"{place}[{i}]") for i, item in enumerate(config)]
  if isinstance(config, np.generic):
    return config.item()
  if isinstance(config, pathlib.PurePath):
    return str(config)
  if config is None or isinstance(config, (bool, int, float, str)):
    return config
  raise ValueError(
    f"{place} is {_describe(config)}, which cannot be saved with the run; "
    "use numbers, strings, tuples and dicts in a config"
  )


def nearest(key: str, known: Iterable[str], count: int = 3) -> list[str]:
  """The keys of `known` that `key` may have been meant to be, best first, at most `count`.

  A dotted key is compared as a whole and by its last part: `lr` and `optimizer.lr` both find
  `update.optimizer.lr`.
  """
  known = list(known) if len(key) <= 200 else []  # no key is so long, and likeness takes its time
  last = key.rpartition(".")[2]

  def likeness(candidate: str) -> float:
    whole = difflib.SequenceMatcher(None, key, candidate).ratio()
    part = difflib.SequenceMatcher(None, last, candidate.rpartition(".")[2]).ratio()
    return max(whole, part) + 0.1 * min(whole, part)  # the lesser one settles ties

  scores = {candidate: likeness(candidate) for candidate in known}
  # A shared section makes its keys look alike a little: only what comes near the best counts.
  floor = max(0.6, max(scores.values(), default=0.0) - 0.2)
  ranked = sorted(scores, key=lambda candidate: scores[candidate], reverse=True)
  return [candidate for candidate in ranked if scores[candidate] >= floor][:count]


def did_you_mean(key: str, known: Iterable[str]) -> str:
  """`; did you mean 'a' or 'b'?`, or nothing when no known key is near."""
  found = nearest(key, known)
  return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def _check_keys(section: Any, known: Iterable[str], place: str) -> None:
  known = sorted(known)
  for key in section.keys():
    if key not in known:
      hint = did_you_mean(str(key), known)
      listed = ", ".join(known) if known else "none"
      raise ValueError(
        f"{place}.{cut(key)} is not a known key{hint} (known keys of {place}: {listed})"
      )


_MISSING = object()


def _value(section: Any, key: str, default: Any) -> Any:
  """`section[key]`, or `default` where it is absent or a placeholder that nobody filled."""
  if key not in section:
    return default
  try:
    return section[key]
  except config_dict.RequiredValueError:
    return default


def _build(section: Any, cls: type, place: str) -> Any:
  if isinstance(section, cls):
    return section
  if not isinstance(section, MAPPINGS):
    raise ValueError(
      f"{place} is {_describe(section)}, but it must be a section with the keys "
      f"{', '.join(f.name for f in dataclasses.fields(cls))}"
    )
  fields = [f for f in dataclasses.fields(cls) if f.init]
  _check_keys(section, [f.name for f in fields], place)
  annotations = typing.get_type_hints(cls)
  values = {}
  for field in fields:
    value = _value(section, field.name, _MISSING)
    if value is not _MISSING:
      values[field.name] = convert(value, annotations[field.name], f"{place}.{field.name}")
    elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      raise ValueError(
        f"{place}.{field.name} is missing and has no default; set it in the config file or with "
        f"--{place}.{field.name}=VALUE (it must be {expected(annotations[field.name])})"
      )
  try:
    return cls(**values)
  except ValueError as error:  # the dataclass knows its rule, but not where it stands
    raise ValueError(f"in {place}: {cut(error, 1000)}") from error


def convert(value: Any, annotation: Any, place: str) -> Any:
  """`value` as `annotation` wants it. Raises ValueError, which names `place`, for another one."""
  wrong = ValueError(f"{place} is {_describe(value)}, but it must be {expected(annotation)}")
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation is Any:
    return value
  if dataclasses.is_dataclass(annotation):
    return _build(value, typing.cast(type, annotation), place)
  if annotation in (None, type(None)):
    if value is not None:
      raise wrong
    return None
  if origin in (typing.Union, types.UnionType):
    return _convert_union(value, arguments, wrong, place)
  if origin is typing.Literal:
    # By type as well as by value: True == 1, but it is not the alternative 1.
    if not any(type(value) is type(a) and value == a for a in arguments):
      names = [a for a in arguments if isinstance(a, str)]
      hint = did_you_mean(value, names) if isinstance(value, str) else ""
      raise ValueError(f"{wrong}{hint}")
    return value
  if annotation is tuple or origin is tuple:
    return _convert_tuple(value, arguments, wrong, place)
  if annotation is dict or origin in (dict, Mapping):
    if not isinstance(value, MAPPINGS):
      raise wrong
    _, item = arguments or (str, Any)
    return {key: convert(value[key], item, f"{place}.{key}") for key in value.keys()}
  if annotation is float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise wrong
    return float(value)
  if annotation is int:
    if isinstance(value, bool) or not isinstance(value, int):
      raise wrong
    return value
  if annotation in (bool, str):
    if not isinstance(value, annotation):
      raise wrong
    return value
  raise TypeError(f"{place} is annotated {annotation!r}, which load_section does not know")


def _convert_union(value: Any, alternatives: Sequence[Any], wrong: ValueError, place: str) -> Any:
  if value is None:
    if type(None) not in alternatives:
      raise wrong
    return None
  alternatives = [a for a in alternatives if a is not type(None)]
  if len(alternatives) == 1:  # `X | None`: X's own complaint is the clearest
    return convert(value, alternatives[0], place)
  # `int | float` must leave 1 an int, so an alternative of the value's own type goes first.
  for alternative in sorted(alternatives, key=lambda a: a is not type(value)):
    try:
      return convert(value, alternative, place)
    except ValueError:
      continue  # another alternative may take it; if none does, `wrong` names them all
  raise wrong


def _convert_tuple(value: Any, items: Sequence[Any], wrong: ValueError, place: str) -> tuple:
  if not isinstance(value, (list, tuple)):
    raise wrong
  if not items:
    return tuple(value)
  if len(items) == 2 and items[1] is Ellipsis:
    items = [items[0]] * len(value)
  if len(items) != len(value):
    raise wrong
  return tuple(convert(v, item, f"{place}[{i}]") for i, (v, item) in enumerate(zip(value, items)))


def _describe(value: Any) -> str:
  if value is None or isinstance(value, bool):
    return str(value)
  if isinstance(value, ml_collections.ConfigDict):
    return "a section"
  return f"{shown(value)} ({type(value).__name__})"


_NAMES = {
  bool: "True or False",
  int: "an integer",
  float: "a number",
  str: "a string",
  Any: "anything",
  type(None): "None",
  None: "None",
  tuple: "a tuple",
  dict: "a dict",
}


def expected(annotation: Any) -> str:
  """An annotation in words."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    return " or ".join(map(expected, arguments))
  if origin is typing.Literal:
    return "one of " + ", ".join(map(repr, arguments))
  if origin is tuple:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
      return f"a tuple, each item {expected(arguments[0])}"
    return f"a tuple of {len(arguments)}: ({', '.join(map(expected, arguments))})"
  if origin in (dict, Mapping):
    return f"a dict, each value {expected(arguments[1])}"
  if dataclasses.is_dataclass(annotation):
    return "a section"
  return _NAMES.get(annotation, repr(annotation))
