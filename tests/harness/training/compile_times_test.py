"""What a log says of a function whose first call compiles."""

import logging
import re

import jax
import jax.numpy as jnp
import pytest

from caprl_jax import progress
from caprl_jax.harness.training import compile_times


@pytest.fixture(autouse=True)
def said(caplog):
  caplog.set_level(logging.INFO, "caprl_jax")


def test_the_first_call_says_how_long_compiling_took(caplog, monkeypatch):
  monkeypatch.setattr(compile_times, "LEAST_SECS", 0.0)
  program = jax.jit(lambda x: jnp.sin(x) * 7 - 3)
  call = compile_times.timed_first(program, "CapRL: compiling the step")
  call(jnp.ones(13))
  [line] = caplog.messages
  assert re.fullmatch(r"CapRL: compiling the step took \d+ s; \d+ programs?.*, \d+ s in XLA", line)
  call(jnp.ones(13))
  call(jnp.ones(14))  # compiled anew, and not the first
  assert len(caplog.messages) == 1


def test_a_short_first_call_is_not_worth_a_line(caplog):
  assert compile_times.timed_first(lambda x: x + 1, "compiling")(1) == 2
  assert caplog.messages == []


def test_programs_from_the_cache_are_told_apart(caplog, monkeypatch):
  monkeypatch.setattr(compile_times, "LEAST_SECS", 0.0)
  with compile_times.CompileTimes() as times:
    jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 2.0)
  jax.monitoring.record_event("/jax/compilation_cache/cache_hits")  # after it
  assert (times.programs, times.cached, times.secs) == (1, 1, 2.0)

  def compiled(_):
    for _ in range(2):
      jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 50.0)
    jax.monitoring.record_event("/jax/compilation_cache/cache_hits")

  compile_times.timed_first(compiled, "compiling")(None)
  spent = progress.duration(100)
  assert caplog.messages == [
    f"compiling took 0 s; 2 programs, 1 of them from the cache, {spent} in XLA"
  ]
