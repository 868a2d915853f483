"""One size is doubled at a time, and what grows faster than its arithmetic is said."""

import argparse

import pytest

from benchmarks.parts import tiny_models
from benchmarks.rl import scaling


def base():
  args = argparse.Namespace(
    images=4, group=4, max_tokens=48, prompt=64, questions=4, image=112, vocabulary=99, layers=2
  )
  args.model, args.judge = (
    scaling.shrunk(config, args) for config in (tiny_models.CAPTIONER, tiny_models.JUDGE)
  )
  return args


def leaves(value, place=""):
  if isinstance(value, argparse.Namespace):
    value = vars(value)
  if not isinstance(value, dict):
    return {place: value}
  return {k: v for key, one in value.items() for k, v in leaves(one, f"{place}.{key}").items()}


@pytest.mark.parametrize("size", scaling.SIZES)
def test_one_size_is_doubled_in_both_models(size):
  one, other = leaves(base()), leaves(scaling.sizes_of(base(), size))
  changed = {key for key in one if one[key] != other[key]}
  assert all(other[key] == 2 * one[key] for key in changed)
  if size in scaling.STEP:
    assert changed == {f".{scaling.STEP[size]}"}
  else:
    assert {key.split(".")[1] for key in changed} == {"model", "judge"}
  if size == "layers":
    tower = "." + ".".join(("model", "vision_config", "depth"))
    assert changed >= {tower, ".judge.num_hidden_layers"} and len(changed) == 3


def test_a_size_that_is_none_is_refused():
  with pytest.raises(ValueError, match="'height' is none of rows, group, caption"):
    scaling.sizes_of(base(), "height")


def test_seconds_are_held_against_the_products():
  begin = dict(secs=2.0, needed=10.0, temporaries=100.0)
  for secs, over, said in ((3.0, 0.75, False), (5.0, 1.25, True)):
    found = dict(secs=secs, needed=20.0, temporaries=150.0)
    grown = scaling.growth(begin, found)
    assert grown == dict(secs=secs / 2, needed=2.0, temporaries=1.5, over=over)
    assert ("faster than its arithmetic" in scaling.line("rows", found, grown)) is said
