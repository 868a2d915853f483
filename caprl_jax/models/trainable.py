"""Which parameters are trained: trees split by the dotted paths of their leaves, and merged again.

Parameter trees are nested dicts; a part of one has the same nesting with leaves left out.
"""

import re
from collections.abc import Callable
from typing import Literal

from caprl_jax.models.family import Family
from caprl_jax.types import Params

Trainable = Literal["full", "decoder", "projector", "lora"]


def split_params(params: Params, chosen: Callable[[str], bool]) -> tuple[Params, Params]:
  """A tree's leaves whose dotted path is chosen, and the others, each as a tree."""

  def part(tree: dict, prefix: str, want: bool) -> dict:
    out = {}
    for key, value in tree.items():
      if isinstance(value, dict):
        inner = part(value, f"{prefix}{key}.", want)
        if inner:
          out[key] = inner
      elif chosen(prefix + key) == want:
        out[key] = value
    return out

  return part(params, "", True), part(params, "", False)


def merge_trees(a: Params, b: Params) -> Params:
  """The inverse of `split_params`."""
  out = dict(a)
  for key, value in b.items():
    if isinstance(value, dict):
      out[key] = merge_trees(a.get(key, {}), value)
    else:
      assert key not in a, key
      out[key] = value
  return out


def merge_params(trained: Params, base: Params | None) -> Params:
  """All parameters, from those that are trained and the others."""
  return trained if base is None else merge_trees(trained, base)


def is_lora(path: str) -> bool:
  return path.rpartition(".")[2] in ("lora_a", "lora_b")


def split_lora(params: Params) -> tuple[Params, Params]:
  """The model's own parameters, and its adapters'."""
  adapters, base = split_params(params, is_lora)
  return base, adapters


def trainable_filter(kind: Trainable, family: Family) -> Callable[[str], bool]:
  """Which parameters (by dotted path) `policy.trainable` = kind trains."""
  return {
    "full": lambda _: True,
    "decoder": lambda path: path.startswith("language_model."),
    "projector": lambda path: re.match(family.projector, path) is not None,
    "lora": is_lora,
  }[kind]
