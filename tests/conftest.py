"""Settings that every test shares."""

import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile many small programs and run each for a moment: compile fast rather than well.
os.environ.setdefault(
  "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax  # pylint: disable=wrong-import-position
import pytest  # pylint: disable=wrong-import-position


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """`harness.setup.Run` of the tiny models, under a mesh of one device."""
  from helpers import tiny  # it needs torch, which not every test does

  from caprl_jax import sharding
  from caprl_jax.harness.settings import read_settings
  from caprl_jax.harness.setup import set_up

  config = tiny.write_all(tmp_path_factory.mktemp("tiny"))
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])):
    yield set_up(read_settings(config))


@pytest.fixture
def interruptible():
  """Ctrl-C has Python's own handling, in this process and in those that the test starts.

  Whoever starts the tests in the background may ignore SIGINT (`nohup`, a CI runner's shell), and
  every process inherits that.
  """
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)
