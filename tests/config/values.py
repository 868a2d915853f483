"""A config's values by dotted key, its preset's and all defaults among them."""

import functools

from helpers.paths import ROOT

from caprl_jax.config import keys, loading, presets, registry, schema


@functools.cache
def sections_of(name, preset=None):
  """The sections of configs/`name`.py, under another preset if one is given, and its top."""
  config = loading.load_config(str(ROOT / "configs" / f"{name}.py")).unlock()
  presets.rename(config, preset or config.get("preset"))
  (mode,) = registry.modes_of(config).values()
  sections = {
    section: schema.load_section(config, section, keys.resolve(where))
    for section, where in mode.sections.items()
  }
  return sections | {"seed": config.get("seed", 0), "preset": config.get("preset")}


def value_of(name, key, preset=None):
  """The value of a dotted key."""
  return functools.reduce(
    lambda holder, part: holder[part] if isinstance(holder, dict) else getattr(holder, part),
    key.split("."),
    sections_of(name, preset),
  )
