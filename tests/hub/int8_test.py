"""int8 weights and caches: what is rounded, what it changes; that a run says so and asks no other
judge."""

import dataclasses
import functools
import gc
import logging
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from caprl_jax import sharding
from caprl_jax.harness.gate import gate
from caprl_jax.harness.sections import PolicySection
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.setup import set_up
from caprl_jax.hub.load import load_judge, load_policy, rounded
from caprl_jax.inference import judge as host
from caprl_jax.inference.judge import HostJudge, JudgeSection, open_judge
from caprl_jax.models.attention import Prefix
from caprl_jax.models.decoder import Decoder, head_matrix
from caprl_jax.models.layers import Linear, to_int8
from caprl_jax.modes import export as export_mode
from caprl_jax.modes.plan import run as plan_mode
from caprl_jax.modes.train import run as train_mode


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


def test_a_rounded_captioner_is_its_dequantised_self(tmp_path):
  """The decoder's weights, rounded as they are read, and the cache; the tower stays."""
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  path = str(tiny.write_policy(tmp_path / "policy"))
  small, whole = (load_policy(path, mesh, int8=kind) for kind in ("both", "none"))
  text = small.params["language_model"]
  again = rounded(whole, "both")  # of a run's parameters, which are read otherwise
  jax.tree.map(np.testing.assert_array_equal, small.params, again.params)
  jax.tree.map(np.testing.assert_array_equal, small.params["visual"], whole.params["visual"])
  assert again.model.cfg == small.model.cfg and rounded(whole, "none") is whole
  for one in (small, again):  # evaluations move parameters to such places
    places = jax.tree.map(lambda x, place: place.shard_shape(x.shape), one.params, one.shardings)
    assert places == jax.tree.map(jnp.shape, one.params)
  assert up_kernel(text).dtype == jnp.int8

  @functools.partial(jax.jit, static_argnums=0)
  def run(cfg, params, tokens, start, prefixes=()):
    position, valid = start + jnp.arange(tokens.shape[1])[None], jnp.ones(tokens.shape, bool)
    return Decoder(cfg).apply(
      {"params": params}, tokens, position, valid, prefixes, method="extend"
    )

  cfg, exact = small.model.cfg.text, whole.model.cfg.text
  assert cfg.int8_cache and not exact.int8_cache
  tokens, wide = jnp.arange(12)[None], tiny.dequantised(text)
  hidden, prefix = run(cfg, text, tokens[:, :8], 0)
  want, floats = run(exact, wide, tokens[:, :8], 0)
  np.testing.assert_allclose(hidden, want, atol=1e-5)
  caches = ((prefix.key_YRSJh, floats.key_YRSJh), (prefix.value_YRSJh, floats.value_YRSJh))
  for cache, float_cache in caches:
    assert cache.values.dtype == jnp.int8
    error = np.abs(cache.values * cache.scale - float_cache)
    assert (error <= 0.51 * cache.scale + 1e-6).all()
  got, _ = run(cfg, text, tokens[:, 8:], 8, (prefix,))
  as_floats = [cache.values * cache.scale for cache, _ in caches]
  want, _ = run(exact, wide, tokens[:, 8:], 8, (Prefix(*as_floats, prefix.valid_RS),))
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.abs(got - run(exact, wide, tokens[:, 8:], 8, (floats,))[0]).max() > 1e-4


def test_only_captions_are_written_by_a_rounded_captioner(tmp_path):
  config = tiny.write_all(tmp_path)
  config.policy.int8 = "both"
  config.export = dict(output=str(tmp_path / "out"))
  for run in (train_mode.run, plan_mode.run, export_mode.run):
    with pytest.raises(ValueError, match="policy.int8 = 'both' is for captions .* set policy.int8"):
      run(config, tmp_path / "run")
  with pytest.raises(ValueError, match="int8 = 'weight' is none of none, weights, cache, both"):
    PolicySection("somewhere", int8="weight")
  section = PolicySection(config.policy.checkpoint)
  assert "int8" not in section.identity()  # what was kept before there was one stays valid
  assert dataclasses.replace(section, int8="cache").identity()["int8"] == "cache"


@pytest.fixture
def watched(monkeypatch):
  """Weak references to the kernels of every judge that is loaded, and (what for, the kernels' type)
  of everything a judge is asked."""
  kernels, asked = [], []

  def load(*args):
    judge = load_judge(*args)
    found = jax.tree_util.tree_leaves_with_path(judge.params)
    kernels.extend(weakref.ref(x) for path, x in found if path[-1].key == "kernel")
    return judge

  def choices(self, asks, what="judging"):
    asked.append((what, up_kernel(self.judge.params).dtype))
    return choose(self, asks, what)

  def priors(self, questions):
    asked.append(("priors", up_kernel(self.judge.params).dtype))
    return learn(self, questions)

  choose, learn = HostJudge.choices, HostJudge.priors
  monkeypatch.setattr(host, "load_judge", load)
  monkeypatch.setattr(HostJudge, "choices", choices)
  monkeypatch.setattr(HostJudge, "priors", priors)
  return kernels, asked


def up_kernel(params):
  return params["layers"]["mlp"]["up_proj"]["kernel"]


def test_everything_of_a_run_asks_the_rounded_judge_and_no_other_stays(tmp_path, caplog, watched):
  kernels, asked = watched
  config = tiny.write_all(tmp_path)
  config.judge.int8 = True
  template = "The image shows a {color} {shape}."
  config.question_filter = dict(
    informed=(template,), min_informed=-1.0, max_blind=1.1, mismatched=1
  )
  config.gate = dict(ideal=template, min_gap=-1.0)
  settings = read_settings(config)
  with caplog.at_level(logging.INFO, "caprl_jax"), jax.set_mesh(sharding.make_mesh(settings.mesh)):
    made = set_up(settings)
    gate(made)
  assert "% of 96 answers differ from float32's" in caplog.text
  assert 0 <= made.counts["int8_differs"] <= 1
  assert up_kernel(made.frozen.judge).dtype == jnp.int8
  assert asked[0] == ("judge", jnp.float32)  # what the rounded one is compared with
  assert {what for what, _ in asked[1:]} == {"int8 judge", "informed", "blind", "priors", "gate"}
  assert {dtype for _, dtype in asked[1:]} == {jnp.dtype(jnp.int8)}
  assert made.host_judge.judge is made.judge and made.judge.params is made.frozen.judge
  gc.collect()
  assert kernels and all(kernel() is None for kernel in kernels)


def test_a_section_says_which_judge_is_opened(tmp_path, watched):
  kernels, asked = watched
  section = JudgeSection(source=str(tiny.write_judge(tmp_path / "judge")), int8=True)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    judge = open_judge(section, kinds=[""], mesh=mesh, seed=0)
    assert up_kernel(section.load(mesh).params).dtype == jnp.int8
  assert up_kernel(judge.judge.params).dtype == jnp.int8
  assert judge.int8_differs is None and not asked  # nothing to compare
  gc.collect()
  assert kernels and all(kernel() is None for kernel in kernels)
