"""int8 weights: what is rounded, how much it changes, and that a run says so."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
from helpers import tiny

from caprl_jax import sharding
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.setup import set_up
from caprl_jax.hub.int8 import to_int8
from caprl_jax.hub.load import load_judge
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.layers import Linear


def test_a_kernel_is_rounded_by_column():
  kernel = np.array([[1.27, -0.02], [0.5, 0.01]], np.float32)
  out = to_int8({"a": {"kernel": kernel, "bias": np.ones(2)}, "embedding": np.ones(3)})
  # 0.01 / (0.02 / 127) = 63.5, to even
  np.testing.assert_array_equal(out["a"]["kernel"], [[127, -127], [50, 64]])
  np.testing.assert_allclose(out["a"]["kernel_scale"], [0.01, 0.02 / 127], rtol=1e-6)
  assert out["a"]["kernel"].dtype == jnp.int8 and out["embedding"].sum() == 3
  x = jnp.array([[1.0, 2.0]])
  linear = Linear(2, ("embed", "mlp"), True, 0.02, jnp.float32)
  wide, small = (
    linear.apply({"params": {"kernel": kernel, "bias": jnp.ones(2)}}, x),
    linear.apply({"params": out["a"]}, x),
  )
  np.testing.assert_allclose(small, wide, atol=0.02)
  assert np.abs(small - wide).max() > 0


def test_zero_columns_stay_zero():
  out = to_int8({"kernel": np.zeros((2, 3), np.float32)})
  assert not out["kernel"].any() and np.isfinite(out["kernel_scale"]).all()


def test_logits_stay_near(tmp_path):
  judge = load_judge(
    str(tiny.write_judge(tmp_path / "judge")),
    sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]),
  )
  small = to_int8(judge.params)
  assert small["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.int8
  tokens = jnp.arange(12)[None] % judge.model.cfg.vocab_size

  def logits(params):
    run = lambda m, t: m(m.embed(t), jnp.arange(12)[None], jnp.ones(t.shape, bool))[0]
    return np.asarray(
      judge.model.apply({"params": params}, tokens, method=run)
      @ head_matrix(judge.model.cfg, params).T
    )

  want, got = logits(judge.params), logits(small)
  assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_a_run_says_how_often_its_answers_differ(tmp_path, caplog):
  config = tiny.write_all(tmp_path)
  config.judge.int8 = True
  settings = read_settings(config)
  with caplog.at_level(logging.INFO, "caprl_jax"), jax.set_mesh(sharding.make_mesh(settings.mesh)):
    made = set_up(settings)
  assert "% of 96 answers differ from float32's" in caplog.text
  assert 0 <= made.counts["int8_differs"] <= 1
  assert made.frozen.judge["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.int8
