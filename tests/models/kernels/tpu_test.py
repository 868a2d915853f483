"""Kernels on a mesh: compiled for four chips of a TPU where libtpu is, and interpreted on eight CPU
devices beside XLA's attention on one."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from helpers.paths import ROOT

LIBTPU = os.environ.get("CAPRL_JAX_LIBTPU", "")  # launch/test.sh puts it where jax does not see it
HAS_LIBTPU = (
  pathlib.Path(LIBTPU, "libtpu").is_dir() if LIBTPU else bool(importlib.util.find_spec("libtpu"))
)

# In a process of its own, since the number of CPU devices is set before jax starts, and since the
# others must not see libtpu.
PROGRAM = """
import json, pathlib, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
import numpy as np
from caprl_jax import sharding
from caprl_jax.models.attention import OwnTokens, attend
from caprl_jax.modes.plan.compiling import topology_devices

found, ROWS = {}, sharding.P(("data", "fsdp"))

def gradients(kind):
  def run(q, k, v, prefix_k, prefix_v, valid, own_valid, segment):
    out = attend(q, (k, v), OwnTokens(own_valid, segment), ((prefix_k, prefix_v, valid),), kind)
    return (jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out).sum(), out
  return jax.jit(jax.grad(run, argnums=range(5), has_aux=True))

def placed(mesh, x):
  whole = len(x) % sharding.batch_parts(mesh)
  return jax.sharding.NamedSharding(mesh, sharding.P() if whole else ROWS)

def arrays(make, N, R, L, S, H, J, h):
  return (make(N, L, H, h), make(N, L, J, h), make(N, L, J, h), make(R, S, J, h), make(R, S, J, h))

# one row of a prefix for all devices, and one key head for two of them
rng, (N, R, L, S) = np.random.default_rng(0), (8, 1, 130, 140)
numbers = arrays(lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32), N, R, L, S, 4, 1, 8)
masks = rng.random((R, S)) < 0.7, rng.random((N, L)) < 0.7, np.sort(rng.integers(0, 3, (N, L)))
one = gradients("xla")(*numbers, *masks)
mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
with jax.set_mesh(mesh):
  here = [jax.device_put(x, placed(mesh, x)) for x in (*numbers, *masks)]
  got = jax.block_until_ready(gradients("interpreted")(*here))
pairs = zip(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(jax.device_get(one)))
found["apart"] = max(float(np.abs(a - b).max()) for a, b in pairs)

if sys.argv[2] == "True":
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2), topology_devices("v5e:2x2"))
  struct = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype, sharding=placed(mesh, np.empty(s[:1])))
  N, R, L, S = 4, 1, 1024, 640
  half = arrays(lambda *s: struct(jnp.bfloat16, *s), N, R, L, S, 4, 2, 128)
  masks = struct(bool, R, S), struct(bool, N, L), struct(jnp.int32, N, L)
  with jax.set_mesh(mesh):
    compiled = gradients("tpu").lower(*half, *masks).compile()
  try:
    found["tpu"] = compiled.as_text()
  except jax.errors.JaxRuntimeError:  # libtpu may be newer than jaxlib
    found["tpu"] = None
pathlib.Path(sys.argv[1]).write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  path = tmp_path_factory.mktemp("kernels") / "found.json"
  places = [str(ROOT), *([LIBTPU] if LIBTPU else [])]
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, str(path), str(HAS_LIBTPU)],
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(places)},
    capture_output=True,
    text=True,
    timeout=420,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(path.read_text())


def test_each_device_of_a_mesh_has_its_own_rows_and_heads(found):
  """Rows of a prefix and key heads that devices share are summed over them."""
  assert found["apart"] < 2e-5


@pytest.mark.skipif(not HAS_LIBTPU, reason="pip install libtpu")
def test_for_a_tpu_no_array_has_queries_and_keys(found):
  """Per device 2 rows, and 2 heads on one key head: attention to the prefix and to the row itself,
  each with its gradients of queries, and of keys and values."""
  if found["tpu"] is None:
    pytest.skip("it compiles, but jaxlib cannot read the program of this libtpu")
  assert found["tpu"].count('custom_call_target="tpu_custom_call"') == 6
  # queries, and keys as they are or in whole blocks, in either order
  queries, keys = "1024", "(?:1024|768|640)"
  scores = re.compile(rf"\[[\d,]*{queries},(?:2,)?{keys}\]|\[[\d,]*{keys},(?:2,)?{queries}\]")
  assert scores.search("f32[2,1,1024,2,768]{4,3,2,1,0}")
  assert not scores.search(found["tpu"])
