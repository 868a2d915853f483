"""Whose matter an error is."""

import json

import jax.numpy as jnp
import pytest

from caprl_jax import errors, main
from caprl_jax.config import loading
from caprl_jax.harness.process.signals import Preempted


def raised(call):
  try:
    with main._whole_tracebacks():
      call()
  except BaseException as error:  # noqa: BLE001  whatever it is
    return error
  raise AssertionError("it raised nothing")


def test_a_value_that_only_jax_refuses_is_no_bad_input():
  error = raised(lambda: jnp.concatenate([]))
  assert isinstance(error, ValueError) and not errors.is_users(error)
  assert errors.code_of(error) == errors.FAILED


@pytest.mark.parametrize(
  "call",
  [
    lambda: json.loads("{"),
    lambda: loading.load_config("no/such/config.py"),
    lambda: open("/no/such/file"),
    lambda: int("x"),
  ],
)
def test_what_a_person_gave_is_bad_input(call):
  assert errors.code_of(raised(call)) == errors.BAD_INPUT


def test_a_user_s_error_is_one_wherever_it_is_raised():
  assert errors.code_of(errors.UserError("INTERNAL: not really")) == errors.BAD_INPUT


@pytest.mark.parametrize(
  "error, code",
  [
    (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), 1),
    (OSError("UNAVAILABLE: Socket closed"), 1),
    (ValueError("RESOURCE_EXHAUSTED: Out of memory"), 71),
    (KeyError("x"), 1),
    (FloatingPointError("nan"), 3),
    (KeyboardInterrupt(), 130),
    (Preempted("SIGTERM"), 75),
    (OSError(28, "No space left on device"), 74),
  ],
)
def test_exit_codes(error, code):
  assert errors.code_of(error) == code
