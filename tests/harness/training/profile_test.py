"""Traced steps: which, and the table of their operations."""

import jax
import jax.numpy as jnp

from caprl_jax.harness.training.profile import Profile

STEP = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(x @ x) / 10, x))
X = jnp.ones((64, 64))


def test_the_steps_asked_for_are_traced(tmp_path):
  profile = Profile((2, 3), tmp_path)
  run = profile.of(STEP)
  table = tmp_path / "table.txt"
  for step in (1, 2, 3, 4):
    run(X)
    assert table.exists() == (step >= 3)
  first, *operations, last = table.read_text().splitlines()
  assert first.split() == ["ms", "a", "step", "share", "operation"] and operations
  shares = [float(line.split()[1].rstrip("%")) for line in operations]
  assert shares == sorted(shares, reverse=True) and 95 < sum(shares) < 101
  assert last.endswith("all operations") and float(last.split()[0]) > 0


def test_a_run_that_ends_before_keeps_what_there_is(tmp_path):
  profile = Profile((2, 9), tmp_path)
  run = profile.of(STEP)
  for _ in range(3):
    run(X)
  profile.close()
  assert "all operations" in (tmp_path / "table.txt").read_text()


def test_without_steps_nothing_is_wrapped(tmp_path):
  profile = Profile((), tmp_path)
  assert profile.of(STEP) is STEP
  profile.close()
  assert not list(tmp_path.iterdir())
