"""Whose matter an error is."""

import io
import json

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from PIL import Image

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


@pytest.mark.parametrize(
  "call",
  [
    lambda: jnp.concatenate([]),
    lambda: jax.jit(lambda x: x.at[0].set(1, mode="?"))(jnp.ones(2)),
    lambda: jax.lax.scan(lambda state, x: (state, x), 0, (jnp.ones(2), jnp.ones(3))),
    lambda: jax.tree.map(lambda x, y: x, {"a": 1}, {"b": 1}),
    lambda: ocp.CheckpointManagerOptions(best_mode="?"),
    lambda: optax.cosine_decay_schedule(1.0, 0),
    lambda: np.stack([]),
    lambda: np.pad(np.ones(3), (1, 2, 3)),
  ],
)
def test_a_value_that_our_code_gives_a_library_is_no_bad_input(call):
  """Raised through our own frames, as in a step, and told from those that read users' files."""
  error = raised(call)
  assert isinstance(error, ValueError) and not errors.is_users(error)
  assert errors.code_of(error) == errors.FAILED


@pytest.mark.parametrize(
  "call",
  [
    lambda: json.loads("{"),
    lambda: loading.load_config("no/such/config.py"),
    lambda: open("/no/such/file"),
    lambda: int("x"),
    lambda: b"\xff".decode(),
    lambda: Image.open(io.BytesIO(b"no image")),
    lambda: Image.new("RGB", (-1, 1)),
    lambda: huggingface_hub.hf_hub_download("a name that is none", "config.json"),
    lambda: safetensors.numpy.load_file("/no/such/file"),
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
