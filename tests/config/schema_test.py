"""Sections to dataclasses: what is accepted, what is refused, and what the refusal says."""

import dataclasses
import json
import pathlib
import re
from typing import Any, Literal

import ml_collections
import numpy as np
import pytest
from ml_collections import config_dict

from caprl_jax.config import schema as configuration


@dataclasses.dataclass(frozen=True)
class Clip:
  low: float = 0.2
  high: float = 0.28


@dataclasses.dataclass(frozen=True)
class Update:
  learning_rate: float
  microbatches: int = 1
  kind: Literal["grpo", "rloo"] = "grpo"
  level: Literal[1, 2] = 1
  donate: bool = True
  reference: str | None = None
  buckets: tuple[int, ...] = (8,)
  size: tuple[int, float] = (1, 2.0)
  limit: int | float = 0
  weights: dict[str, float] = dataclasses.field(default_factory=dict)
  clip: Clip = Clip()
  extra: Any = None

  def __post_init__(self):
    if self.microbatches < 1:
      raise ValueError(f"microbatches is {self.microbatches}; it must be at least 1")


def load(**section):
  config = ml_collections.ConfigDict({"update": {"learning_rate": 1e-4} | section})
  return configuration.load_section(config, "update", Update)


def test_defaults_fill_what_is_absent():
  assert load() == Update(learning_rate=1e-4)


def test_nested_sections_lists_and_integers_for_floats():
  got = load(learning_rate=1, buckets=[4, 8], size=[3, 4], clip={"high": 1}, weights={"a": 2})
  assert got == Update(
    learning_rate=1.0, buckets=(4, 8), size=(3, 4.0), clip=Clip(high=1.0), weights={"a": 2.0}
  )
  assert type(got.learning_rate) is float and type(got.clip.high) is float
  assert type(got.size[1]) is float and type(got.buckets) is tuple and type(got.weights) is dict


def test_a_union_keeps_the_value_s_own_type():
  assert type(load(limit=1).limit) is int
  assert type(load(limit=1.5).limit) is float


def test_plain_dicts_and_absent_sections():
  assert configuration.load_section({"clip": {"low": 0.1}}, "clip", Clip) == Clip(low=0.1)
  assert configuration.load_section({}, "clip", Clip) == Clip()
  with pytest.raises(ValueError, match=r"config\.update\.learning_rate is missing .* a number"):
    configuration.load_section({}, "update", Update)


def test_placeholders():
  section = ml_collections.ConfigDict({"learning_rate": 1.0})
  section.reference = config_dict.placeholder(str)
  section.microbatches = config_dict.required_placeholder(int)
  got = configuration.load_section({"update": section}, "update", Update)
  assert got == Update(learning_rate=1.0)
  required = ml_collections.ConfigDict({"learning_rate": config_dict.required_placeholder(float)})
  with pytest.raises(ValueError, match="learning_rate is missing"):
    configuration.load_section({"update": required}, "update", Update)


@pytest.mark.parametrize(
  "section, message",
  [
    (
      {"microbatchs": 2},
      r"config\.update\.microbatchs is not a known key; did you mean 'microbatches'\? "
      r"\(known keys of config\.update: buckets, clip, donate, ",
    ),
    (
      {"clip": {"hihg": 1.0}},
      r"config\.update\.clip\.hihg is not a known key; did you mean 'high'\? "
      r"\(known keys of config\.update\.clip: high, low\)",
    ),
    ({"zzz": 1}, r"config\.update\.zzz is not a known key \(known keys"),
    ({"learning_rate": "fast"}, r"learning_rate is 'fast' \(str\), but it must be a number"),
    ({"learning_rate": None}, "learning_rate is None, but it must be a number"),
    ({"learning_rate": True}, "learning_rate is True, but it must be a number"),
    ({"microbatches": True}, "microbatches is True, but it must be an integer"),
    ({"microbatches": 2.0}, r"microbatches is 2.0 \(float\), but it must be an integer"),
    ({"microbatches": 0}, r"in config\.update: microbatches is 0; it must be at least 1"),
    ({"donate": 1}, r"donate is 1 \(int\), but it must be True or False"),
    ({"reference": 3}, r"reference is 3 \(int\), but it must be a string"),
    (
      {"kind": "grop"},
      r"kind is 'grop' \(str\), but it must be one of 'grpo', 'rloo'; did you mean 'grpo'\?",
    ),
    ({"level": True}, "level is True, but it must be one of 1, 2"),
    ({"buckets": 8}, r"buckets is 8 \(int\), but it must be a tuple, each item an integer"),
    ({"buckets": [8, "x"]}, r"config\.update\.buckets\[1\] is 'x'"),
    ({"size": [1]}, r"must be a tuple of 2: \(an integer, a number\)"),
    ({"limit": "x"}, "limit is 'x' .* must be an integer or a number"),
    ({"weights": {"a": "x"}}, r"config\.update\.weights\.a is 'x'"),
    ({"clip": 0.2}, r"clip is 0.2 \(float\), but it must be a section with the keys low, high"),
    ({"donate": {}}, "donate is a section, but it must be True or False"),
  ],
)
def test_refusals_name_the_key_the_value_and_the_remedy(section, message):
  with pytest.raises(ValueError, match=message):
    load(**section)


def test_an_annotation_it_does_not_know_is_the_programmer_s_mistake():
  @dataclasses.dataclass
  class Odd:
    when: complex = 0j

  with pytest.raises(TypeError, match=r"config\.odd\.when is annotated .*complex"):
    configuration.load_section({"odd": {"when": 1j}}, "odd", Odd)


def test_top_level():
  config = ml_collections.ConfigDict({"mode": "train", "polcy": {}})
  configuration.check_top_level(config, {"mode", "polcy"})
  message = "config.polcy is not a known key; did you mean 'policy'? (known keys of config: mode, "
  with pytest.raises(ValueError, match=re.escape(message)):
    configuration.check_top_level(config, {"mode", "policy"})


def test_nearest_compares_the_whole_and_the_last_part():
  known = ["update.optimizer.learning_rate", "update.clip.high", "mode"]
  assert configuration.nearest("learning_rate", known)[0] == "update.optimizer.learning_rate"
  assert configuration.nearest("optimizer.learning_rat", known)[0] == known[0]
  known += ["update.clip.low"]  # in the same section, but nothing like it
  assert configuration.nearest("update.clip.hihg", known) == ["update.clip.high"]
  assert configuration.nearest("qqqqq", known) == []


def test_plain_form_is_json():
  config = ml_collections.ConfigDict(
    {"a": {"b": (1, 2.5), "c": None, "d": np.float32(0.5)}, "path": pathlib.PurePosixPath("x/y")}
  )
  config.twice = config.get_ref("a")
  config.hole = config_dict.required_placeholder(int)
  config.clip = Clip()
  a = {"b": [1, 2.5], "c": None, "d": 0.5}
  expected = {
    "a": a,
    "path": "x/y",
    "twice": a,
    "hole": None,
    "clip": {"low": 0.2, "high": 0.28},
  }
  assert json.loads(json.dumps(configuration.to_plain(config))) == expected


def test_plain_form_refuses_what_json_cannot_hold():
  with pytest.raises(ValueError, match=r"config\.a\[1\] is .*set.* cannot be saved"):
    configuration.to_plain({"a": [1, {2}]})
  with pytest.raises(ValueError, match="config has the key 3; keys must be strings"):
    configuration.to_plain({3: 1})


def test_what_stands_inside_itself_is_refused():
  circle = []
  circle.append(circle)
  with pytest.raises(ValueError, match="config.a.* is nested more than 64 deep; does a list"):
    configuration.to_plain({"a": circle})
