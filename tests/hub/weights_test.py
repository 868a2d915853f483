"""Tensors <-> parameters that are larger than the tests' models have."""

import jax
import ml_dtypes
import numpy as np
import pytest

from caprl_jax.hub.weights import TRANSPOSED_ROWS, TensorsOfParams, params_from_tensors
from caprl_jax.models.family import Keys


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_large_kernels_are_read_and_written_transposed(stored):
  """More rows than are transposed at a time, in layers and alone, cast and back."""
  keys = Keys((("", ("model.",)),))
  rng = np.random.default_rng(0)
  rows = 2 * TRANSPOSED_ROWS + 7
  tensors = {
    name: rng.standard_normal((rows, 5)).astype(stored)
    for name in ("model.layers.0.weight", "model.layers.1.weight", "model.head.weight")
  }
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)
  wanted = {"layers": {"kernel": shape(2, 5, rows)}, "head": {"kernel": shape(5, rows)}}
  params = params_from_tensors(wanted, tensors, keys, "here")
  for i in (0, 1):
    want = tensors[f"model.layers.{i}.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(params["layers"]["kernel"][i], want)
  np.testing.assert_array_equal(params["head"]["kernel"], tensors["model.head.weight"].T)
  written = TensorsOfParams(params, keys, stored)
  assert written.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(written[name], tensor)
    assert written[name].flags.c_contiguous and written[name].dtype == stored
