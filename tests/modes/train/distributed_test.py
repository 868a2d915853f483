"""Two processes of two fake devices are one process of four: same metrics, same files, and Ctrl-C
stops them together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.paths import ROOT

from caprl_jax import sharding
from caprl_jax.data.batches import eval_batches, train_iterator
from caprl_jax.harness.checkpoints import CheckpointConfig, Checkpoints
from caprl_jax.harness.metrics import read_metrics
from caprl_jax.hub.load import load_policy

CONFIG = """
import json, ml_collections
def get_config():
  return ml_collections.ConfigDict(json.loads({text!r}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Tiny models and data, and a config file that main reads."""
  folder = tmp_path_factory.mktemp("tiny")
  config = tiny.write_all(folder)
  config.evaluate.group_images = 0  # one program less to compile
  config.mesh = dict(data=1, fsdp=2, tensor=2)  # parameters are split over the processes
  (folder / "config.py").write_text(CONFIG.format(text=config.to_json()))
  return folder


def start(folder, workdir, processes, devices, *flags, program=("-m", "caprl_jax.main")):
  """`main`, once a process, on loopback."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
    "XLA_FLAGS": os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}",
  }
  command = [
    sys.executable,
    *program,
    f"--config={folder / 'config.py'}",
    f"--workdir={workdir}",
    *flags,
  ]
  if processes > 1:
    with socket.socket() as probe:
      probe.bind(("localhost", 0))
      environment["JAX_COORDINATOR_ADDRESS"] = f"localhost:{probe.getsockname()[1]}"
    environment["JAX_NUM_PROCESSES"] = str(processes)
    command.append("--distributed")
  workdir.mkdir(exist_ok=True)
  started = []
  for number in range(processes):
    with open(workdir.with_name(f"{workdir.name}_stderr_{number}.txt"), "w") as file:
      started.append(
        subprocess.Popen(
          command,
          cwd=ROOT,
          env=environment | {"JAX_PROCESS_ID": str(number)},
          stdin=subprocess.DEVNULL,
          stdout=file,
          stderr=file,
        )
      )
  return started


def wait(started, workdir, code=0):
  try:
    codes = [process.wait(timeout=240) for process in started]
  finally:
    for process in started:
      process.kill()
  errors = [
    path.read_text()[-3000:] for path in sorted(workdir.parent.glob(f"{workdir.name}_stderr_*"))
  ]
  assert codes == [code] * len(started), "\n\n".join(errors)
  return errors


@pytest.fixture(scope="module")
def one(folder):
  """The workdir of one process with four devices."""
  wait(start(folder, folder / "one", 1, 4), folder / "one")
  return folder / "one"


@pytest.fixture(scope="module")
def two(folder):
  """The workdir of two processes with two devices each."""
  wait(start(folder, folder / "two", 2, 2), folder / "two")
  return folder / "two"


def files_of(workdir):
  found = {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()}
  return {name for name in found if not name.startswith("checkpoints/")}


def one_device():
  return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


def assert_close(a, b, name, rtol=1e-4):
  assert a.keys() == b.keys(), name
  for key in a:
    if not key.startswith("time/"):
      np.testing.assert_allclose(b[key], a[key], rtol=rtol, atol=1e-6, err_msg=f"{name}: {key}")


def test_metrics_and_figures_are_those_of_one_process(one, two):
  rows = [read_metrics(workdir / "metrics.jsonl") for workdir in (one, two)]
  assert [row["step"] for row in rows[1]] == [1, 2, 3, 4]
  for a, b in zip(*rows, strict=True):
    assert_close(a, b, f"step {a['step']}")
  a, b = (tiny.read_back(workdir / "summary.json") for workdir in (one, two))
  for stage in ("before", "after"):
    assert_close(a[stage], b[stage], stage)
  assert a["counts"] == b["counts"] and a["versions"] == b["versions"]
  assert (two / "log.txt").read_text().count("0 compilations after the first step") == 1


def test_the_captioner_is_that_of_one_process(one, two):
  a, b = (load_policy(str(workdir / "policy"), one_device()).params for workdir in (one, two))
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    # Adam moved them by up to 4e-3
    np.testing.assert_allclose(y, x, atol=2e-4, err_msg=jax.tree_util.keystr(path))


def test_one_process_writes(one, two):
  assert files_of(two) == files_of(one) | {"log.1.txt", "row_check.1.jsonl"}
  for name in ("before.json", "after.json", "step_000001.json", "step_000004.json"):
    a, b = (tiny.read_back(workdir / "samples" / name)["rows"] for workdir in (one, two))
    texts = [
      [(row["row"], row["questions"], [c["text"] for c in row["captions"]]) for row in rows]
      for rows in (a, b)
    ]
    assert texts[0] == texts[1], name
  errors = (two.parent / "two_stderr_1.txt").read_text()
  assert "CapRL" not in errors and "report:" not in errors


# A mode with the real loop, checkpoints and batches, and a model that compiles in a moment.
FAKE_MODE = """
import functools
import jax, jax.numpy as jnp, numpy as np
from caprl_jax import main, sharding
from caprl_jax.config import schema as configuration
from caprl_jax.harness.checkpoints import CheckpointConfig, Checkpoints
from caprl_jax.data.batches import train_iterator
from caprl_jax.harness.loop import run_loop
from caprl_jax.types import TrainState

def example(index, rng):
  return dict(row=np.int32(index), noise=rng.normal())

def run(config, workdir):
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4))
  split, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  places = TrainState(everywhere, split, everywhere, everywhere)
  @functools.partial(jax.jit, out_shardings=(places, everywhere, None), donate_argnums=0)
  def step(state, batch):
    params = state.params * 0.9 + batch["noise"] + batch["row"]
    metrics = {"loss": params.sum(), "first": params[0]}
    return state.replace(step=state.step + 1, params=params), metrics, None
  with jax.set_mesh(mesh):
    state = jax.jit(
      lambda: TrainState(jnp.int32(0), jnp.zeros(8), (), jax.random.key(0)), out_shardings=places
    )()
    checkpoints = Checkpoints(workdir, CheckpointConfig(100_000))
    iterator = train_iterator(example, 11, 8, 0, sharding.batch_share(mesh, 8))
    if checkpoints.latest_step():
      state, position = checkpoints.restore(state)
      iterator.set_state(position)
    run_loop(step, state, iterator, steps=config.train.steps, mesh=mesh, checkpoints=checkpoints,
             config={}, workdir=workdir, what="fake", reward_name="loss")
"""


def test_ctrl_c_in_one_process_stops_both_and_they_go_on(tmp_path, interruptible):
  """The state is split over both processes; what they end with is the run of one process that
  nothing stopped.
  """
  (tmp_path / "fake_mode.py").write_text(FAKE_MODE)
  (tmp_path / "config.py").write_text(
    CONFIG.format(text=json.dumps(dict(mode="fake", train=dict(steps=100_000))))
  )
  program = (
    "-c",
    "import sys; from caprl_jax import main; from caprl_jax.config import registry; "
    "registry.MODES['fake'] = registry.Mode('fake_mode', '', '', {}); "
    "sys.exit(main.main(sys.argv))",
  )
  begin = lambda name, processes, *flags: start(
    tmp_path, tmp_path / name, processes, 4 // processes, *flags, program=program
  )
  workdir = tmp_path / "stopped"
  started = begin("stopped", 2)
  deadline = time.time() + 100
  while not ((workdir / "metrics.jsonl").exists() and read_metrics(workdir / "metrics.jsonl")):
    assert time.time() < deadline and all(process.poll() is None for process in started)
    time.sleep(0.05)
  started[1].send_signal(signal.SIGINT)
  errors = wait(started, workdir, 130)
  assert all("run the same command to go on" in text for text in errors)
  first = read_metrics(workdir / "metrics.jsonl")
  steps = len(first)
  checkpoints = Checkpoints(workdir, CheckpointConfig())
  assert [row["step"] for row in first] == list(
    range(1, steps + 1)
  ) and checkpoints.latest_step() == steps
  checkpoints.close()
  wait(begin("stopped", 2, f"--config.train.steps={steps + 2}"), workdir)
  wait(begin("whole", 1, f"--config.train.steps={steps + 2}"), tmp_path / "whole")
  rows, whole = (read_metrics(folder / "metrics.jsonl") for folder in (workdir, tmp_path / "whole"))
  assert rows[:steps] == first and len(rows) == steps + 2
  for a, b in zip(whole, rows, strict=True):
    assert_close(a, b, f"step {a['step']}")


def light(index, rng):
  return dict(row=np.int32(index), noise=rng.integers(0, 1 << 30))


@pytest.mark.parametrize(
  "shares", [[range(0, 4), range(4, 8)], [range(0, 8, 2), range(1, 8, 2)], [range(8), range(8)]]
)
def test_batches_do_not_depend_on_the_number_of_processes(shares):
  """Each process's share is its part of the one batch; a state of one continues the others."""
  whole = train_iterator(light, 10, 8, 3)
  parts = [train_iterator(light, 10, 8, 3, share) for share in shares]
  state = whole.get_state()
  for number in range(4):
    batch = next(whole)
    if number == 2:
      for part in parts:
        part.set_state(state)
    for share, part in zip(shares, parts, strict=True):
      some = next(part)
      for name in batch:
        np.testing.assert_array_equal(some[name], batch[name][list(share)])
    state = whole.get_state()
  for share in shares:
    for (batch, real), (some, also) in zip(
      eval_batches(light, 13, 8, 3), eval_batches(light, 13, 8, 3, share), strict=True
    ):
      assert real == also and all(
        np.array_equal(some[name], batch[name][list(share)]) for name in batch
      )
