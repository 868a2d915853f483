"""The step on four fake devices is the step on one: data, fsdp, tensor parallel; bad meshes."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.paths import ROOT

from caprl_jax import sharding

MESHES = {
  "one": None,
  "data4": dict(data=4),
  "fsdp2_tensor2": dict(data=1, fsdp=2, tensor=2),
  "data2_fsdp2": dict(data=2, fsdp=2),
}

HOST_MOMENTS = "data2_fsdp2"

# In a process of its own, since the number of CPU devices is set before jax starts. Everything
# sharded is jitted and every step waited for: XLA's in-process collectives hang otherwise.
PROGRAM = """
import dataclasses, gc, json, pathlib, sys
import jax
gc.disable()  # tracing makes many objects, and they stay
jax.config.update("jax_num_cpu_devices", 4)
import ml_collections
import numpy as np
from helpers.programs import hlo
from caprl_jax import sharding
from caprl_jax.data.batches import train_iterator
from caprl_jax.rl.optimizer import build_optimizer
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.setup import set_up
from caprl_jax.harness.training.state import make_state
from caprl_jax.harness.training.programs import build_step

config = ml_collections.ConfigDict(json.loads(pathlib.Path(sys.argv[1]).read_text()))
HOST = sys.argv[4]  # the mesh whose moments lie in the host's memory
results = {}
real, programs = jax.jit, []


def jit(function, **kwargs):
  # The step is compiled by hand, so that its text can be read.
  jitted, compiled = real(function, **kwargs), []
  if getattr(getattr(function, "func", None), "__name__", "") != "train_step":
    return jitted
  def call(*args):
    if not compiled:
      compiled.append(jitted.lower(*args).compile())
      programs.append(compiled[0].as_text())
    return compiled[0](*args)
  return call


jax.jit = jit
for name, sizes in json.loads(sys.argv[2]).items():
  devices = jax.devices()[:1] if sizes is None else jax.devices()
  assert len(jax.devices()) == 4
  mesh = sharding.make_mesh(sharding.MeshConfig(**(sizes or {})), devices)
  with jax.set_mesh(mesh):
    config.optimizer.moment_memory = "host" if name == HOST else "device"
    made = set_up(read_settings(config))
    tx, _ = build_optimizer(made.settings.optimizer, 2)
    memory = made.settings.optimizer.moment_memory
    state = make_state(made.policy.params, tx, made.policy.shardings, 0, mesh, memory)
    iterator = train_iterator(made.train.example, len(made.train_rows), 8, 0)
    step = build_step(made, tx)
    steps = []
    for _ in range(2):
      state, metrics, samples = step(state, sharding.put_batch(next(iterator), mesh))
      jax.block_until_ready((state, metrics, samples))
      steps.append({k: float(v) for k, v in jax.device_get(metrics).items()})
    # The share of all parameters, and of Adam's moments, that lies on the first device.
    def share(tree):
      leaves = [x for x in jax.tree.leaves(tree) if x.ndim]
      local = sum(x.addressable_shards[0].data.size for x in leaves)
      return local / sum(x.size for x in leaves)
    specs = sorted({a for x in jax.tree.leaves(state.params) for a in x.sharding.spec if a})
    kept = all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(made.policy.shardings), strict=True))
    results[name] = dict(steps=steps, share=share(state.params), moments=share(state.opt_state),
                         judge=share(made.frozen.judge), axes=specs, kept=kept,
                         moments_in=sorted({x.sharding.memory_kind for x in jax.tree.leaves(
                             state.opt_state) if x.ndim}),
                         flops=hlo.dot_flops(programs[-1]), programs=len(programs),
                         tokens=np.asarray(jax.device_get(samples.captions.tokens_BGT)).tolist())
pathlib.Path(sys.argv[3]).write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def config(folder):
  return tiny.write_all(folder)


@pytest.fixture(scope="module")
def results(folder, config):
  (folder / "config.json").write_text(config.to_json())
  done = subprocess.run(
    [
      sys.executable,
      "-c",
      PROGRAM,
      str(folder / "config.json"),
      json.dumps(MESHES),
      str(folder / "results.json"),
      HOST_MOMENTS,
    ],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    capture_output=True,
    text=True,
    timeout=420,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_the_sharded_step_is_the_step_on_one_device(results, name):
  one, sharded = results["one"], results[name]
  assert sharded["tokens"] == one["tokens"]
  for number, (a, b) in enumerate(zip(one["steps"], sharded["steps"], strict=True), 1):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_allclose(
        b[key], a[key], rtol=2e-3, atol=2e-5, err_msg=f"step {number}: {key}"
      )


@pytest.mark.parametrize(
  "name, at_most", [("data4", 1.03), ("data2_fsdp2", 1.03), ("fsdp2_tensor2", 1.2)]
)
def test_each_device_computes_its_part(results, name, at_most):
  """FLOPs of matrix products in one device's program, against those of a device alone."""
  assert [found["programs"] for found in results.values()] == list(range(1, len(MESHES) + 1))
  assert results[name]["flops"] <= at_most * results["one"]["flops"] / 4


@pytest.mark.parametrize(
  "name, axes, at_most",
  [
    ("one", [], 1.0),
    ("data4", [], 1.0),
    ("data2_fsdp2", ["fsdp"], 0.6),
    ("fsdp2_tensor2", ["fsdp", "tensor"], 0.4),
  ],
)
def test_parameters_lie_where_the_mesh_says(results, name, axes, at_most):
  found = results[name]
  assert found["axes"] == axes and found["kept"]
  for tree in ("share", "moments", "judge"):
    assert found[tree] <= at_most, tree
    if at_most == 1.0:
      assert found[tree] == 1.0, tree


def test_moments_lie_in_the_memory_that_was_asked_for(results):
  """And stay there: two steps were made, by one program (above)."""
  for name, found in results.items():
    assert found["moments_in"] == ["pinned_host" if name == HOST_MOMENTS else "device"], name


@pytest.mark.parametrize(
  "sizes, message",
  [
    (dict(data=3), r"'data': 3.*does not multiply to the 4 devices"),
    (dict(data=-1, fsdp=3), r"'fsdp': 3.*does not multiply to the 4 devices"),
    (dict(data=8), "does not multiply to the 4 devices"),
    (dict(data=-1, fsdp=-1), "at most one is -1"),
    (dict(data=0), "sizes are positive"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(sharding.MeshConfig(**sizes), [jax.devices()[0]] * 4)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What is read of a chip of a v5e slice of 2x2."""

  slice_index: int
  id: int
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"
  core_on_chip: int = 0

  @property
  def coords(self) -> tuple[int, int, int]:
    return (self.id % 2, self.id // 2, 0)

  @property
  def process_index(self) -> int:
    return self.slice_index


@pytest.mark.parametrize("sizes", [(2, 4, 1), (4, 2, 1), (2, 2, 2)])
def test_only_data_crosses_slices(sizes):
  chips = [Chip(i % 2, i // 2) for i in range(8)]  # in no helpful order
  mesh = sharding.make_mesh(sharding.MeshConfig(*sizes), chips)
  assert mesh.devices.shape == sizes and set(mesh.devices.flat) == set(chips)
  for copy in mesh.devices:  # one place of `data`: its parameters lie in one slice
    assert len({chip.slice_index for chip in copy.flat}) == 1
  with pytest.raises(ValueError, match=r"mesh.data = 1, and the devices are 2 slices.*multiple of"):
    sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=8), chips)


@pytest.mark.parametrize("name", ["data.batch_size", "evaluate.batch_size"])
def test_a_batch_that_does_not_divide_is_refused(name):
  mesh = jax.sharding.AbstractMesh((2, 2, 1), sharding.MESH_AXES)
  sharding.check_batch_size(8, mesh, name)
  message = rf"{name} = 6 images cannot be split over data x fsdp = 4 devices; use a multiple of 4"
  with pytest.raises(ValueError, match=message):
    sharding.check_batch_size(6, mesh, name)
