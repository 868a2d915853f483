"""Which attention a model takes, and what is said where it cannot be the one that was asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.hub.published_configs import CONFIGS
from caprl_jax.models import attention_choice
from caprl_jax.models.attention_choice import CLOSE, Heads, choose_attention, difference, heads_of
from caprl_jax.models.decoder import DecoderConfig
from caprl_jax.models.families import is_vision_language
from caprl_jax.models.image_processor import SmartResize
from caprl_jax.models.policy import PolicyConfig
from caprl_jax.models.qwen25_vl import Qwen25VisionConfig, VisionAttention

NAME = "some/model"


def config(name="Qwen/Qwen2.5-VL-3B-Instruct", **changes):
  found = CONFIGS[name]
  if is_vision_language(found):
    return PolicyConfig.from_hf(found)
  return dataclasses.replace(DecoderConfig.from_hf(found), **changes)


@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_take_the_published_models(name):
  assert [heads.problem for heads in heads_of(config(name))] in ([""], ["", ""])


def test_each_platform_has_its_kernels():
  for platform, kind in (("tpu", "tpu"), ("gpu", "gpu"), ("cpu", "interpreted")):
    cfg, notice = choose_attention(config(), "kernel", platform, NAME)
    assert cfg.vision.attention == cfg.text.attention == kind
    assert ("very slow" in notice) == (platform == "cpu")
  with pytest.raises(ValueError, match="some/model: attention = 'kernel': .*METAL; use 'xla'"):
    choose_attention(config(), "kernel", "METAL", NAME)
  for platform in ("cpu", "METAL"):
    assert choose_attention(config(), "auto", platform, NAME)[0].text.attention == "xla"


@pytest.mark.parametrize(
  "changes, said",
  [(dict(head_dim=100), "must be a multiple of 8"), (dict(num_kv_heads=1, num_heads=32), "wide")],
)
def test_heads_that_do_not_fit_are_an_error_or_xla(changes, said):
  cfg = config("Qwen/Qwen2.5-3B-Instruct", **changes)
  with pytest.raises(ValueError, match=f"the decoder has .*{said}"):
    choose_attention(cfg, "kernel", "tpu", NAME)
  cfg, notice = choose_attention(cfg, "auto", "tpu", NAME)
  assert cfg.attention == "xla" and said in notice


def test_auto_tries_the_kernels_on_the_chip(monkeypatch):
  def fails(heads, kind):
    raise RuntimeError("Mosaic failed")

  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  for found, kind, said in (
    (lambda heads, kind: CLOSE / 2, "tpu", "kernels"),
    (lambda heads, kind: float("nan"), "xla", "nan away from XLA on this chip"),
    (fails, "xla", "RuntimeError: Mosaic failed"),
  ):
    monkeypatch.setattr(attention_choice, "difference", found)
    cfg, notice = choose_attention(config(), "auto", "tpu", NAME)
    assert cfg.text.attention == cfg.vision.attention == kind and said in notice


def test_the_check_passes_and_finds_a_fault(monkeypatch):
  """Interpreted. A kernel that scaled scores by another width would be far off."""
  heads = Heads("decoder", 2, 1, 8)
  good = attention_choice._tried(heads, "xla")
  assert difference(heads, "interpreted") < CLOSE
  monkeypatch.setattr(
    attention_choice, "_tried", lambda _, kind: good if kind == "xla" else [1.1 * x for x in good]
  )
  assert difference(heads, "tpu") > 2 * CLOSE


@pytest.mark.parametrize("whole", [True, False])
def test_a_window_of_the_tower_is_a_segment_to_the_kernels(whole):
  pixels = SmartResize(14, 2, 784, 78400, window_units=4)
  cfg = Qwen25VisionConfig(pixels, 1, 16, 16, 2, 16, 2, ())
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 128, 16)), jnp.float32)
  angle = jnp.asarray(rng.normal(size=(2, 128, 8)), jnp.float32)
  given = (x, jnp.cos(angle), jnp.sin(angle), jnp.asarray(rng.random((2, 128)) < 0.8), whole)
  params = VisionAttention(cfg).init(jax.random.key(0), *given)

  def run(kind):
    attention = VisionAttention(dataclasses.replace(cfg, attention=kind))
    return jax.jit(lambda params: attention.apply(params, *given))(params)

  np.testing.assert_allclose(run("interpreted"), run("xla"), atol=1e-5)
