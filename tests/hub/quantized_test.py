"""Rounded kernels read part by part, on any mesh; what is written is the checkpoint's, with the
adapters."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import tiny

from caprl_jax import sharding
from caprl_jax.harness.sections import PolicySection
from caprl_jax.hub.folders.quantized import RoundedLeaf
from caprl_jax.hub.load import init_policy, load_policy, save_policy
from caprl_jax.models.layers import LoraConfig
from caprl_jax.models.quantized import codes as quantized
from caprl_jax.models.trainable import is_lora, split_lora
from caprl_jax.modes.plan.abstract import policy_parameters


def flat(tree):
  return {".".join(p.key for p in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_part_is_that_of_the_whole(kind):
  """Also where parts end within a block: 240 inputs are four blocks of 60."""
  kernels = np.random.default_rng(0).normal(size=(2, 240, 10)).astype(np.float32)
  leaf = RoundedLeaf(lambda index: kernels[index], kernels.shape, kind, np.float32, "here")
  whole = [np.stack(x) for x in zip(*(quantized.quantize(k, kind, np.float32) for k in kernels))]
  rows = 240 if kind == "int8" else 120
  for start in range(0, rows, rows // 3):
    index = (slice(0, 2), slice(start, start + rows // 3), slice(5, 10))
    np.testing.assert_array_equal(leaf.code_part(index), whole[0][index])
  index = (slice(1, 2), *(() if kind == "int8" else (slice(1, 2),)), slice(0, 10))
  np.testing.assert_array_equal(leaf.scale_part(index), whole[1][index])


def test_the_host_holds_codes_and_one_kernel():
  """Of a stack that is read and rounded; in bfloat16 it has 4 MiB."""

  def read(index):
    return np.full((1, 256, 256), 0.5, jnp.bfloat16)

  shape = (32, 256, 256)
  leaf = RoundedLeaf(read, shape, "nf4", jnp.bfloat16, "here")
  tracemalloc.start()
  leaf.code_part((slice(None),) * 3)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  codes = 32 * 256 * 256 // 2
  assert codes < peak < 1.1 * codes + 14 * 256 * 256


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
  """A tiny captioner's folder, and it as it is loaded with each kind of base weights."""
  folder = tiny.write_policy(tmp_path_factory.mktemp("tiny") / "policy")

  def load(kind):
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    return load_policy(str(folder), mesh, lora=LoraConfig(2, 4.0, base_weights=kind))

  return folder, functools.cache(load)


def test_only_the_decoders_kernels_are_rounded(captioner):
  _, load = captioner
  whole, rounded = load(None), load("nf4")
  want, got = flat(whole.params), flat(rounded.params)
  assert jax.tree.structure(rounded.params) == jax.tree.structure(rounded.shardings)
  assert whole.stored is None and rounded.stored is not None
  kernels = [name for name in want if quantized.is_base_kernel(name)]
  assert len(kernels) == 7 and not any(name in got for name in kernels)
  for name in kernels:
    codes, scale = got[f"{name}_nf4"], got[f"{name}_scale"]
    assert codes.dtype == jnp.uint8 and scale.dtype == want[name].dtype
    wide = quantized.dequantize(codes, scale, "nf4", jnp.float32)
    worst = np.abs(wide - want[name]).max() / np.abs(want[name]).max()
    assert 0 < worst < 0.16  # half of the widest step
  for name in want.keys() - {*kernels}:
    np.testing.assert_array_equal(got[name], want[name])


def test_codes_and_scales_lie_as_their_kernels(captioner):
  """Widths of 32 and 48 over fsdp 2 x tensor 2: the scales of one block of 32 stay whole. What lies
  on several processes is compared in tests/modes/train/distributed_test.py."""
  _, load = captioner
  cfg = load(None).model.cfg
  mesh = sharding.abstract_mesh(sharding.MeshConfig(1, 2, 2), 4)
  boxed = sharding.abstract_params(lambda: init_policy(cfg)(jax.random.key(0)))
  for kind, up, scale, parts in (
    ("nf4", "kernel_nf4", (None, None, "tensor"), (2, 8, 24)),
    ("int8", "kernel", (None, "tensor"), (2, 16, 24)),
  ):
    section = PolicySection("", trainable="lora", lora=LoraConfig(2, 4.0, base_weights=kind))
    params, places = policy_parameters(section, boxed, mesh)
    made = params["language_model"]["layers"]["mlp"]["up_proj"]
    assert tuple(made[up].sharding.spec) == (None, "fsdp", "tensor")
    assert made[up].sharding.shard_shape(made[up].shape) == parts
    assert tuple(made["kernel_scale"].sharding.spec) == scale
    rounded = load(kind)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(rounded.params) == shapes(params)
    assert jax.tree.structure(rounded.shardings) == jax.tree.structure(places)


def test_what_is_written_is_merged_with_the_checkpoints_weights(captioner, tmp_path):
  folder, load = captioner
  draw = np.random.default_rng(0)
  loaded = {kind: load(kind) for kind in (None, "nf4")}
  noise = jax.tree.map(lambda x: draw.normal(size=x.shape), split_lora(loaded[None].params)[1])
  noise = flat(noise)
  for kind, one in loaded.items():
    params = jax.tree_util.tree_map_with_path(
      lambda path, x: (
        x + jnp.asarray(noise[name], x.dtype)
        if is_lora(name := ".".join(p.key for p in path))
        else x
      ),
      one.params,
    )
    save_policy(tmp_path / str(kind), one, params)
  want, got, base = (
    safetensors.numpy.load_file(place / "model.safetensors")
    for place in (tmp_path / "None", tmp_path / "nf4", folder)
  )
  assert want.keys() == got.keys()
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
  moved = {name for name in base if np.abs(got[name] - base[name]).max() > 0.1}
  assert len(moved) == 7 * 2  # seven maps in two layers
  configs = [(tmp_path / kind / "config.json").read_text() for kind in ("None", "nf4")]
  assert configs[0] == configs[1]
