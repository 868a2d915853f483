"""A config file, then --config.section.key=value arguments -> ConfigDict."""

import ast
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import typing
from collections.abc import Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from caprl_jax.config import keys, presets, registry, schema, shipped
from caprl_jax.json_files import cut, shown

# --config.section.key=value; --config.section.key and --noconfig.section.key are True and False.
OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<key>[^=]+)(=(?P<text>.*))?", re.DOTALL)


def load_config(path: str) -> ml_collections.ConfigDict:
  """The locked ConfigDict of a config file, or of one that comes with the package
  (`caprl_jax:NAME`). `FILE:ARGUMENT` calls `get_config(ARGUMENT)`."""
  file, *argument = path.split(":", 1)
  if file == shipped.PREFIX and argument:
    name, *argument = argument[0].split(":", 1)
    file = str(shipped.find(name))
  if not os.path.isfile(file):
    raise _no_such_file(file)
  loader = importlib.machinery.SourceFileLoader("caprl_jax_config", file)
  spec = importlib.util.spec_from_loader("caprl_jax_config", loader)
  assert spec is not None, file  # a loader is given
  module = importlib.util.module_from_spec(spec)
  try:
    loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise ValueError("it has no get_config()")
    config = module.get_config(*argument)
  except (Exception, SystemExit) as error:  # a config file is a program: it may raise anything
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    raise ValueError(f"config file {file}: {kind}{cut(error, 500)}") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(
      f"config file {file}: get_config() returned {type(config).__name__}; "
      "it must return an ml_collections.ConfigDict"
    )
  _check_tree(config, f"config file {file}", ())
  return config.lock()


def _no_such_file(file: str) -> ValueError:
  """What is said of a file that is not there: near ones in configs/, or the package's own."""
  here = sorted(str(path) for path in pathlib.Path("configs").glob("*.py"))
  hint = schema.did_you_mean(file, here)
  listed = f" (in configs/: {', '.join(here)})" if here else ""
  if not here:
    stem = pathlib.Path(file).stem
    name = stem if stem in shipped.names() else "NAME"
    listed = f"; --config={shipped.PREFIX}:{name} is one that comes with the package"
  return ValueError(f"config file {shown(file, 300)} does not exist in {os.getcwd()}{hint}{listed}")


def _check_tree(section: ml_collections.ConfigDict, place: str, above: tuple[int, ...]) -> None:
  """Raises ValueError, starting with `place`, for a key that is no text, a section that stands
  inside itself, and a value that is required and not set."""
  above = (*above, id(section))
  try:
    names = list(section.keys())
  except TypeError:  # they are sorted, which texts and others together cannot be
    names = [1]
  for key in names:
    if not isinstance(key, str):
      raise ValueError(f"{place}: a section has a key that is no text; write it in quotes")
    try:
      value: Any = section[key]
    except config_dict.RequiredValueError as error:
      raise ValueError(
        f"{place}: {cut(key)} is a required value that is not set; set it, or make it None where "
        "the command line is to set it"
      ) from error
    if id(value) in above:
      raise ValueError(f"{place}: the section {cut(key)} stands inside itself")
    if _is_section(value):
      _check_tree(value, place, above)


def apply_overrides(
  config: ml_collections.ConfigDict,
  overrides: Sequence[re.Match],
  file: str,
) -> None:
  """Applies matches of `OVERRIDE` in place, and expands the preset, which goes first: what it fills
  in can then be overridden like what the file says. One named here takes the place of the file's
  own preset or algorithm (`presets.rename`).

  The modules that declare the sections are imported, which takes a second, only where a key is not
  in the file.

  Raises:
    ValueError: a key that neither `file` nor a section has, a value of another type than there, no
      such preset.
  """
  named = [override for override in overrides if override["key"] == "preset"]
  own = config.get("preset")
  if named and "preset" not in config:
    with config.unlocked():
      config.preset = None
  for override in named:
    _override(config, override, file)
  if named:
    name = config.preset
    with config.unlocked():
      config.preset = own
    presets.rename(config, name)
  else:
    presets.expand(config)
  for override in overrides:
    if override not in named:
      _override(config, override, file)


def _override(config: ml_collections.ConfigDict, override: re.Match, file: str) -> None:
  """Sets one value of the config, by the type it has there or, where it is not there, that its
  section gives it.

  Not by ml_collections.config_flags: it looks a key up as an attribute first, so that in a
  section whose keys a user names (`pretrain.stages`) a key such as `update` would find ConfigDict's
  method, and it cannot set a value that is a list, or None in the file.
  """
  key = override["key"]
  *sections, leaf = key.split(".")
  holder: Any = config
  for section in sections:
    holder = holder[section] if _is_section(holder) and section in holder else None
  if not isinstance(holder, ml_collections.ConfigDict) or leaf not in holder:
    if (annotation := keys.annotation_of(key)) is None:
      raise _unknown_key(key, config, file)
    _add(config, override, annotation)
    return
  kind = holder.get_type(leaf)
  if issubclass(kind, ml_collections.ConfigDict):
    inner = ", ".join(f"--config.{key}.{k}" for k in leaves(holder[leaf]))
    raise ValueError(f"--config.{key} is a section; set its keys one by one ({cut(inner, 500)})")
  text = _text_of(override, kind, f"{kind.__name__} in {file}")
  try:
    holder[leaf] = _parse_value(text, kind)
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"--config.{key}={cut(text)}: not a value of type {kind.__name__}, which {file} gives it"
    ) from error


def _unknown_key(key: str, config: ml_collections.ConfigDict, file: str) -> ValueError:
  """What is said of a key that neither the file nor a section has: its new name, or near ones."""
  if (new := registry.new_name(key)) is not None:
    return ValueError(f"--config.{key} is called --config.{new} now")
  own = leaves(config)
  every = list(dict.fromkeys([*own, *keys.keys()]))
  near = schema.nearest(key, every)
  if near and near[0] in own:  # the file's own are likelier to be meant
    near = schema.nearest(key, own)
  hint = f"; did you mean {' or '.join(f'--config.{k}' for k in near)}?" if near else ""
  place = key.rpartition(".")[0]
  while place and not any(k.startswith(f"{place}.") for k in every):
    place = place.rpartition(".")[0]
  if place:
    listed = f"keys of {place}: {', '.join(k for k in every if k.startswith(f'{place}.'))}"
  else:
    listed = f"sections: {', '.join(sorted({k.partition('.')[0] for k in own}))}"
  return ValueError(f"--config.{cut(key)} is not a key of {file}{hint} ({cut(listed, 900)})")


def _text_of(override: re.Match, kind: Any, expected: str) -> str:
  """The value as written; --config.key and --noconfig.key are True and False where the key is a
  bool.
  """
  text = override["text"]
  if text is not None and not override["no"]:
    return text
  if kind is not bool or text is not None:
    raise ValueError(f"{cut(override[0])}: write --config.{override['key']}=VALUE ({expected})")
  return "False" if override["no"] else "True"


def _add(config: ml_collections.ConfigDict, override: re.Match, annotation: Any) -> None:
  """Sets a key that the config does not have."""
  key = override["key"]
  expected = schema.expected(annotation)
  if expected == "a section":
    raise ValueError(f"--config.{key} is a section; set its keys one by one")
  text = _text_of(override, annotation, expected)
  try:
    value = schema.convert(_parse_annotated(text, annotation), annotation, key)
  except (ValueError, TypeError) as error:
    raise ValueError(f"--config.{key}={cut(text)}: it must be {expected}") from error
  *sections, leaf = key.split(".")
  holder: Any = config
  with config.unlocked():
    for section in sections:
      if not _is_section(holder.get(section)):
        holder[section] = ml_collections.ConfigDict()
      holder = holder[section]
    holder[leaf] = value


def _parse_annotated(text: str, annotation: Any) -> Any:
  """A value from text as an annotation has it, of which None may be a part."""
  kinds = keys.alternatives(annotation)
  if text != "None" and len(kinds) == 1:
    origin = typing.get_origin(kinds[0]) or kinds[0]
    return _parse_value(text, origin if isinstance(origin, type) else type(None))
  value = _parse_value(text, type(None))
  return text if str in kinds and type(value) not in (type(None), *kinds) else value


def _parse_value(text: str, kind: type) -> Any:
  if text == "None":
    return None  # whether the section allows it is for `schema.load_section` to say
  if kind is str:
    return text
  if kind is bool:
    if text.lower() not in ("true", "1", "false", "0"):
      raise ValueError(text)
    return text.lower() in ("true", "1")
  if kind in (int, float):
    return kind(text)
  try:
    value = ast.literal_eval(text)
  # TypeError: a key of a dict that can be none; the last two: brackets without an end
  except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
    value = text
  if kind is type(None):
    return value
  if kind in (tuple, list):
    return kind(value) if isinstance(value, (tuple, list)) else kind([value])
  if not isinstance(value, kind):
    raise ValueError(text)
  return value


def _is_section(value: Any) -> bool:
  return isinstance(value, ml_collections.ConfigDict)


def leaves(config: Any, prefix: str = "") -> list[str]:
  """The dotted keys of all values."""
  found = []
  for key in config.keys():
    nested = issubclass(config.get_type(key), ml_collections.ConfigDict)
    found += leaves(config[key], f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
  return found
