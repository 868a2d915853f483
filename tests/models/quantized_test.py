"""Kernels as codes: nf4 beside what bitsandbytes publishes, products and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.models.layers import Linear, LoraConfig, to_int8
from caprl_jax.models.quantized import codes as quantized

# bitsandbytes, dQuantizeNF4 (csrc/kernels.cu): a code is the number of these that are smaller.
PIVOTS = np.array(
  [
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
  ],
  np.float32,
)


def kernel(inputs=192, outputs=5, seed=0):
  return np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32)


def test_nf4_is_what_bitsandbytes_has():
  levels = np.array(quantized.NF4, np.float32)
  np.testing.assert_allclose((levels[1:] + levels[:-1]) / 2, PIVOTS, rtol=0, atol=6e-8)
  weights = kernel()
  weights[64:128, 1] = 0  # a block of zeros
  codes, scale = quantized.quantize(weights, "nf4", np.float32)
  assert codes.dtype == np.uint8 and codes.shape == (96, 5) and scale.shape == (3, 5)
  # bitsandbytes: the largest weight of 64 in a row; torch's rows are our columns
  blocks = weights.T.reshape(5, 3, 64)
  largest = np.abs(blocks).max(-1)
  np.testing.assert_array_equal(scale, largest.T)
  code = np.searchsorted(PIVOTS, blocks / np.where(largest == 0, 1, largest)[..., None])
  want = (levels[code] * largest[..., None]).reshape(5, 192).T
  got = quantized.dequantize(codes, scale, "nf4", jnp.float32)
  np.testing.assert_array_equal(got, want)
  assert not np.asarray(got)[64:128, 1].any()


def test_int4_and_int8_by_hand():
  weights = np.array([[7.0, 0.0], [-7.0, 2.0], [0.4, -0.6], [2.6, 0.9]], np.float32)
  codes, scale = quantized.quantize(weights, "int4", np.float32)
  np.testing.assert_allclose(scale, [[1, 2 / 7]], rtol=1e-6)
  # 0.4 -> 0, 2.6 -> 3; 2.0 is 7 steps of 2/7, -0.6 -> -2.1 -> -2, 0.9 -> 3.15 -> 3
  want = np.array([[7, 0], [-7, 7], [0, -2], [3, 3]])
  np.testing.assert_array_equal(codes & 15, want[:2] + 8)
  np.testing.assert_array_equal(codes >> 4, want[2:] + 8)
  got = quantized.dequantize(codes, scale, "int4", jnp.float32)
  np.testing.assert_allclose(got, want * scale, rtol=1e-6)
  codes, scale = quantized.quantize(weights, "int8", np.float32)
  assert codes.dtype == np.int8 and scale.shape == (2,)
  np.testing.assert_array_equal(codes[:, 0], [127, -127, 7, 47])
  other = to_int8({"kernel": weights})
  np.testing.assert_array_equal(codes, other["kernel"])
  np.testing.assert_allclose(scale, other["kernel_scale"], rtol=1e-6)


@pytest.mark.parametrize("kind, error", [("nf4", 0.10), ("int4", 0.12), ("int8", 0.01)])
def test_rounding_is_as_fine_as_its_bits(kind, error):
  """The root mean square error of normal weights, in their deviations; large kernels are rounded
  piece by piece."""
  weights = kernel(1152, 300)
  codes, scale = quantized.quantize(weights, kind, np.float32)
  got = quantized.dequantize(codes, scale, kind, jnp.float32)
  assert error / 2 < np.sqrt(np.square(got - weights).mean()) < error
  first = quantized.quantize(weights[:64, :7], kind, np.float32)
  if kind != "int8":
    np.testing.assert_array_equal(first[0], codes[:32, :7])
  # float32 scales of bfloat16 weights are bfloat16 already, where the largest weight is the scale
  small = weights.astype(jnp.bfloat16)
  if kind == "nf4":
    wide, narrow = (quantized.quantize(small, kind, dtype) for dtype in (np.float32, jnp.bfloat16))
    np.testing.assert_array_equal(wide[0], narrow[0])
    np.testing.assert_array_equal(wide[1], narrow[1].astype(np.float32))


@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
def test_a_linear_map_is_its_dequantised_kernels(kind):
  """Values and gradients; what is kept for the backward pass is no kernel."""
  linear = Linear(
    6, ("embed", "mlp"), False, 0.02, jnp.float32, LoraConfig(2, 4.0, ("up",)), name="up"
  )
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(3, 128)), jnp.float32)
  adapters = {"lora_a": rng.normal(size=(128, 2)) / 9, "lora_b": rng.normal(size=(2, 6))}
  adapters = {name: jnp.asarray(value, jnp.float32) for name, value in adapters.items()}
  names = ["kernel_scale", "kernel" if kind == "int8" else f"kernel_{kind}"]
  codes, scale = quantized.quantize(kernel(128, 6), kind, np.float32)
  rounded = dict(zip(names, (jnp.asarray(scale), jnp.asarray(codes))))
  wide = {"kernel": quantized.dequantize(codes, scale, kind, jnp.float32)}

  def loss(adapters, x, base):
    return (linear.apply({"params": {**adapters, **base}}, x) ** 2).sum()

  got, want = (
    jax.value_and_grad(loss, argnums=(0, 1))(adapters, x, base) for base in (rounded, wide)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, want)
  _, pull = jax.vjp(lambda a, x: loss(a, x, rounded), adapters, x)
  kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == (128, 6)]
  assert all(leaf.dtype == jnp.int8 for leaf in kept)


def test_casting_leaves_codes_and_scales():
  codes, scale = quantized.quantize(kernel(), "nf4", np.float32)
  params = {
    "kernel_nf4": jnp.asarray(codes),
    "kernel_scale": jnp.asarray(scale),
    "bias": jnp.ones(5),
  }
  out = quantized.cast(params, jnp.bfloat16)
  assert out["bias"].dtype == jnp.bfloat16
  assert (out["kernel_nf4"].dtype, out["kernel_scale"].dtype) == (jnp.uint8, jnp.float32)
  assert quantized.parameter_count(params) == 192 * 5 + 5


def test_what_cannot_be_rounded_is_refused():
  assert [quantized.block_size(n) for n in (2048, 48, 96, 74)] == [64, 48, 48, 2]
  with pytest.raises(ValueError, match="33 inputs, an odd number"):
    quantized.block_size(33)
  weights = kernel()
  weights[3, 2] = np.nan
  with pytest.raises(ValueError, match="not finite"):
    quantized.quantize(weights, "nf4", np.float32)
