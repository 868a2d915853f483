"""Needed arithmetic: by hand for the 3B models, and beside what a tiny program executes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.parts import tiny_models
from benchmarks.parts.executed import executed
from caprl_jax.hub.published_configs import CONFIGS
from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.policy import Policy, PolicyConfig
from caprl_jax.modes.plan import arithmetic, cuts
from caprl_jax.modes.plan.arithmetic import Asked, Step, Tower
from caprl_jax.modes.plan.shapes import tower_of
from caprl_jax.types import Images

QWEN = DecoderConfig.from_hf(CONFIGS["Qwen/Qwen2.5-3B-Instruct"])


def test_a_decoders_arithmetic_by_hand():
  # 36 layers: queries and output 2048x2048, keys and values 2048x256, three matrices 2048x11008
  weights = 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11008)
  assert arithmetic.layer_weights(QWEN) == weights == 2_774_532_096
  assert arithmetic.decoder_flops(QWEN, 10, 0) == 20 * weights
  # each query sees a key at 16 heads of 128, twice, in 36 layers
  assert arithmetic.decoder_flops(QWEN, 0, 1) == 36 * 2 * 2 * 16 * 128
  assert arithmetic.head_flops(QWEN, 3) == 6 * 151_936 * 2048
  assert arithmetic.slot_bytes(QWEN) == 36 * 2 * 2 * 128 * 2  # 36 KiB
  assert arithmetic.weight_bytes(QWEN) == 2 * (weights + 151_936 * 2048)


def a_step(**changes):
  tower = Tower(per_patch=10, per_unit=4, width=8, pairs=100, patches=16, units=4)
  asked = Asked(head=7, questions=3, tokens=5, logits=1, blind=True)
  given = dict(
    tower=tower,
    text=QWEN,
    prompt=20,
    length_BG=np.array([[3, 1], [2, 4]]),
    judge=QWEN,
    asked=asked,
    learned=2,
  )
  return Step(**{**given, **changes})


def test_a_steps_stages_by_hand():
  step = a_step()
  tower = 2 * (2 * (10 * 16 + 4 * 4) + 4 * 8 * 100)
  prompt = arithmetic.decoder_flops(QWEN, 40, 40 * 21 / 2)
  # 2, 0, 1 and 3 tokens run after 20 of the prompt
  captions = arithmetic.decoder_flops(QWEN, 6, 6 * 20 + 3 + 0 + 1 + 6)
  head = arithmetic.head_flops(QWEN, 6 + 2)
  once = tower + prompt + captions + head
  found = arithmetic.needed(step)
  assert found["rollout"] == pytest.approx(once, rel=1e-12)
  assert found["update"] == pytest.approx(3 * once, rel=1e-12)
  # adapters: no gradient of the weights, none of the tower
  found = arithmetic.needed(dataclasses.replace(step, trained=(False, False), learned=1))
  half = arithmetic.forward(dataclasses.replace(step, length_BG=step.length_BG[:1]))
  wanted = half.tower + 2 * (half.total() - half.tower)
  assert found["update"] == pytest.approx(wanted, rel=1e-12)

  n = np.array([3, 1, 2, 4, 0, 0])  # two empty captions
  pairs = 7 * 8 / 2 + (n * 7 + n * (n + 1) / 2 + 3 * (5 * (n + 7) + 15)).sum()
  asked = arithmetic.decoder_flops(QWEN, 7 + 10 + 6 * 15, pairs) + arithmetic.head_flops(QWEN, 18)
  assert found["judge"] == pytest.approx(asked, rel=1e-12)
  read = arithmetic.weight_bytes(QWEN) * 4 + arithmetic.slot_bytes(QWEN) * (20 * 7 + 3 + 0 + 1 + 6)
  assert arithmetic.decode_bytes(step) == read


def test_captions_are_drawn_with_the_mean_and_the_limit():
  drawn = arithmetic.draw_lengths(500, 8, 100.0, 4096)
  assert drawn.mean() == pytest.approx(100, rel=0.05) and drawn.min() >= 1
  assert arithmetic.draw_lengths(50, 8, 100.0, 64).max() == 64


def test_a_tower_and_a_decoder_execute_what_is_counted():
  """At uniform lengths; a program makes all of a triangle's square."""
  cfg = PolicyConfig.from_hf(tiny_models.CAPTIONER, dict(min_pixels=56**2, max_pixels=112**2))
  policy, E = Policy(cfg), 3 * cfg.vision.pixels.patch_size**2
  S, units = cfg.vision.pixels.shape(112, 112)
  images = Images(
    jnp.zeros((2, S, E), jnp.uint8),
    jnp.zeros((2, S, 2), jnp.int32),
    jnp.ones((2, S), bool),
    jnp.zeros((2, units), jnp.int32),
  )
  see = lambda images: policy.init_with_output(
    jax.random.key(0), images, method=lambda m, images: m.visual(images)
  )
  out, variables = see(images)
  run = lambda params, images: policy.apply(
    {"params": params}, images, method=lambda m, images: m.visual(images).main_BUD
  )
  boxed = variables["params"]
  params = jax.tree.map(lambda x: x.unbox(), boxed, is_leaf=lambda x: hasattr(x, "unbox"))
  tower = tower_of(cfg, boxed, (112, 112))
  assert (tower.patches, tower.units) == (S, units)
  assert executed(run, params, images)[0] == pytest.approx(2 * tower.flops(), rel=0.02)

  text = dataclasses.replace(DecoderConfig.from_hf(tiny_models.JUDGE), vocab_size=1000)
  decoder, N, L = Decoder(text), 2, 24
  tokens = jnp.ones((N, L), jnp.int32)
  place = jnp.broadcast_to(jnp.arange(L), (N, L))
  given = (tokens, place, tokens > 0)
  variables = jax.eval_shape(lambda: decoder.init(jax.random.key(0), *given, method="extend"))
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.value.shape), variables, is_leaf=lambda x: hasattr(x, "unbox")
  )
  run = lambda variables, *given: decoder.apply(variables, *given, method="extend")[0]
  counted = arithmetic.decoder_flops(text, N * L, N * L * L)
  assert executed(run, zeros, *given)[0] == pytest.approx(counted, rel=0.02)


def test_decoding_follows_the_captions():
  # limit 1024: a trunk up to 256 slots, then chunks
  lengths = np.array([[10] * 60 + [300] * 4])
  found = cuts.decoding(lengths, 1024, 8)
  assert (found.rows[0], found.slots[0], found.rounds[0]) == (64, 64, 10)
  assert found.own[-1] and found.rows[-1] == 8 and sum(found.rounds) == 300
  # where there is no trunk, all rows run to the end of the longest
  found = cuts.decoding(np.array([[3, 7]]), 16, 4)
  assert found == cuts.Decoding((2,), (16,), (7,), (False,))


def test_packed_groups_run_as_many_blocks_as_their_longest():
  lengths = np.full((8, 4), 65)
  lengths[0] = 257
  found = cuts.packed(lengths, 257, 2, 4, QWEN)
  assert (found.images, found.slots, found.size) == (1, 1024, 256)
  assert found.blocks == (1 + 1 + 1 + 4) / 4  # the long one with the other device's longest
  assert cuts.packed(lengths, 33, 2, 4, QWEN).in_blocks is False


def test_the_judges_pieces_run_as_far_as_their_longest():
  lengths = np.array([[10, 10, 10, 200]])
  found = cuts.judged(lengths, 256, parts=1, microbatches=2, blind=False)
  assert (found.rows, found.pieces) == (2, 2) and found.slots == (64 + 256) / 2
