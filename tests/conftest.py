"""Settings that every test shares."""

import collections
import ctypes
import gc
import importlib.metadata
import logging
import os
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile many small programs and run each for a moment: compile fast rather than well. The
# last flag halves the time of a training step's compilation; XLA ends the process at flags that it
# does not know, so it is given only to releases that it was tried with.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  " --xla_cpu_parallel_codegen_split_count=1"
  + " --xla_cpu_use_fusion_emitters=false"
  * importlib.metadata.version("jaxlib").startswith("0.10."),
)
# PyTorch's threads wait for each other at full speed: with several workers on few cores most of an
# oracle's time went into that. Tiny models need no second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Many tests need the same program: the first to compile it leaves it to the others, to the other
# workers and to the processes that tests start. The folder goes when the tests end.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _programs = tempfile.TemporaryDirectory(prefix="caprl_jax_programs_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# So it is with the tiny checkpoints (tests/helpers/made_once.py).
if "CAPRL_JAX_TEST_CHECKPOINTS" not in os.environ:
  _checkpoints = tempfile.TemporaryDirectory(prefix="caprl_jax_checkpoints_")
  os.environ["CAPRL_JAX_TEST_CHECKPOINTS"] = _checkpoints.name

# Runs of tests ask no machine of Google's cloud, on which they may be, for its notices.
os.environ.setdefault("NO_GCE_CHECK", "true")

import jax  # pylint: disable=wrong-import-position
import pytest  # pylint: disable=wrong-import-position


def pytest_configure() -> None:
  """Does without the folder of programs where XLA does not take back what it wrote itself.

  On some CPUs jaxlib 0.10 refuses it, with a page of errors for each program
  (github.com/jax-ml/jax/issues/38445). Workers and other children inherit the decision.
  """
  if jax.config.jax_enable_compilation_cache and not _programs_come_back():
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    jax.config.update("jax_enable_compilation_cache", False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """Names of files that are no UTF-8 may be in a test's output; between processes that run tests
  side by side nothing else can be sent."""
  report = yield
  report.sections = [
    (title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections
  ]
  return report


def pytest_terminal_summary(terminalreporter) -> None:
  """Says what the tests' time depends on most."""
  kept = "kept" if jax.config.jax_enable_compilation_cache else "not kept (XLA refused its own)"
  terminalreporter.write_line(
    f"compiled programs were {kept} between tests; {os.cpu_count()} cores, load "
    f"{', '.join(f'{load:.1f}' for load in os.getloadavg())}"
  )


def pytest_collection_modifyitems(items) -> None:
  """Puts files with slow tests first, so that none is begun when the other worker has no more to
  do. Stops tests that compare with another transformers than they hold for."""
  slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
  items.sort(key=lambda item: -slow[item.path])
  # A third of the time is tracing, which makes millions of objects that stay: a collector that
  # went through them as often as Python's own settings say would take a fifth of it.
  gc.freeze()
  gc.set_threshold(100_000, 50, 100)
  if any(hasattr(getattr(item, "module", None), "transformers") for item in items):
    try:
      importlib.import_module("helpers.oracle")
    except RuntimeError as error:
      raise pytest.UsageError(str(error)) from error


def _programs_come_back() -> bool:
  hits = []

  def listen(event: str, **_) -> None:
    if event == "/jax/compilation_cache/cache_hits":
      hits.append(event)

  jax.monitoring.register_event_listener(listen)
  for _ in range(2):  # the second time from the folder
    jax.clear_caches()
    jax.jit(jax.numpy.cumsum)(jax.numpy.ones(3)).block_until_ready()
  jax.monitoring.unregister_event_listener(listen)
  return bool(hits)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
  """A file's programs go with it, and so does the memory that compiling them took: glibc would keep
  what is freed, half of a worker's gigabytes, for later."""
  yield
  jax.clear_caches()
  gc.collect()
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
  if trim:
    trim(0)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
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


@pytest.fixture(autouse=True)
def _level_of_the_log_is_left():
  """A test that leaves another level hides what others did not ask for, or shows it to them."""
  before = logging.root.level, logging.getLogger("caprl_jax").level
  yield
  assert (logging.root.level, logging.getLogger("caprl_jax").level) == before
