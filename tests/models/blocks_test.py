"""Rows run block by block: what one pass over the whole row makes, values and gradients, and no
more blocks than are needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from caprl_jax import sharding
from caprl_jax.hub.load import init_decoder
from caprl_jax.models import attention
from caprl_jax.models.blocks import Row, extend_in_blocks, running
from caprl_jax.models.decoder import Decoder, DecoderConfig

N, P, R = 2, 5, 23
REACH = 6  # segments have seven tokens
CONFIG = DecoderConfig.from_hf(
  dict(
    model_type="qwen2",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
  )
)
USED = 17  # slots that hold tokens in the longer of the rows


@pytest.fixture(scope="module")
def case():
  model, rng = Decoder(CONFIG), np.random.default_rng(0)
  params = sharding.nn.unbox(init_decoder(CONFIG)(jax.random.key(0))["params"])
  params = jax.tree.map(lambda x: 4 * x, params)
  valid = np.arange(R) < np.array([[USED], [9]])
  row = Row(
    jnp.asarray(rng.integers(0, 40, (N, R)), jnp.int32),
    jnp.asarray(P + np.arange(R)[None] % (REACH + 1) + np.zeros((N, 1)), jnp.int32),
    jnp.asarray(valid),
    jnp.asarray(np.arange(R)[None] // (REACH + 1) + np.zeros((N, 1)), jnp.int32),
  )
  prompt = jnp.asarray(rng.integers(0, 40, (N, P)), jnp.int32)
  return model, params, row, prompt


def hidden(case, size, params, ran=None):
  model, _, row, prompt = case
  given = {"params": params}
  ones = jnp.ones(prompt.shape, bool)
  position = jnp.broadcast_to(jnp.arange(P), prompt.shape)
  _, prefix = model.apply(given, prompt, position, ones, method="extend")

  run = running(model)

  def extend(*arguments):
    if ran is not None:
      jax.debug.callback(lambda: ran.append(1))
    return run(*arguments)

  out = extend_in_blocks(extend, params, row, (prefix,), REACH, size)
  return jnp.where(row.valid_NR[..., None], out, 0.0)


def value_and_gradients(case, size):
  def loss(params):
    out = hidden(case, size, params)
    return (out * jnp.arange(out.size).reshape(out.shape)).sum() / out.size, out

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(case[1])


@pytest.mark.parametrize("chunk", [512, 3])
@pytest.mark.parametrize("size", [4, 9])  # shorter than a segment, and longer
def test_blocks_make_what_one_pass_makes(case, size, chunk, monkeypatch):
  want = value_and_gradients(case, R)
  monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
  got = value_and_gradients(case, size)
  assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(want[1])) > 1e-3
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_allclose(b, a, rtol=2e-4, atol=2e-5 * float(jnp.abs(a).max()) + 1e-6)


@pytest.mark.parametrize("size", [4, 9])
def test_no_block_is_run_behind_the_last_token(case, size):
  ran = []
  jax.block_until_ready(jax.jit(lambda p: hidden(case, size, p, ran))(case[1]))
  jax.effects_barrier()
  assert len(ran) == -(-USED // size) < -(-R // size)


def carried(jaxpr):
  """Shapes of what the loops of a program carry from round to round."""
  shapes = set()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "while":
      shapes |= {x.aval.shape for x in eqn.outvars}
    for inner in core.jaxprs_in_params(eqn.params):
      shapes |= carried(inner)
  return shapes


def test_what_is_not_trained_has_no_sum_of_its_gradient(case):
  """A frozen embedding costs no array of its size in the backward pass; a trained one does."""
  params = case[1]

  def loss(trained):
    return hidden(case, 4, {**params, **trained}).sum()

  def loops(*names):
    trained = {name: params[name] for name in names}
    return carried(jax.make_jaxpr(jax.grad(loss))(trained).jaxpr)

  table = params["embed_tokens"]["embedding"].shape
  assert table in loops("norm", "embed_tokens") and table not in loops("norm")
  got = jax.grad(loss)({"norm": params["norm"]})["norm"]
  want = jax.grad(lambda p: hidden(case, R, p).sum())(params)["norm"]
  np.testing.assert_allclose(got["scale"], want["scale"], rtol=1e-4)
