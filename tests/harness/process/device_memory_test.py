"""What is said where devices are full: what lies there, by kind, and what takes less."""

import jax
import jax.numpy as jnp
import pytest
from helpers.paths import ROOT

from caprl_jax.harness.process import device_memory
from caprl_jax.harness.process.device_memory import (
  KNOBS,
  hold,
  hold_bytes,
  hold_planned,
  what_is_full,
)


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
  monkeypatch.setattr(device_memory, "_held", {})


def test_kinds_come_with_their_size_on_a_device_the_largest_first():
  hold("judge", [jnp.zeros((1 << 20,), jnp.bfloat16)])
  hold("captioner", jax.tree.leaves({"a": jnp.zeros((1 << 20, 3)), "key": jax.random.key(0)}))
  hold_planned({"moments": 6 << 30}, devices=2)
  hold_bytes("reference", 0)
  said = what_is_full(RuntimeError("RESOURCE_EXHAUSTED: of 9 bytes\nBuffers: 1, 2"))
  assert "does not suffice (RESOURCE_EXHAUSTED: of 9 bytes)." in said and "Buffers" not in said
  assert "lie: moments 3.00 GiB, captioner 0.01 GiB, judge 0.00 GiB; what" in said
  hold("captioner", [])  # in place of what was noted
  assert "captioner" not in what_is_full(RuntimeError("x")).partition("What takes less")[0]


def test_without_anything_there_are_the_knobs():
  said = what_is_full(RuntimeError("RESOURCE_EXHAUSTED"))
  assert "On each device" not in said
  documented = (ROOT / "docs" / "configuration.md").read_text()
  for key, effect in KNOBS:
    assert f"  {key}: {effect}" in said
    assert all(f"`{one.partition('=')[0]}`" in documented for one in key.split(", ")), key
