"""Packed rows against each example alone: logits and gradients of all families."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from caprl_jax.data.images import pad_image
from caprl_jax.data.prompts import build_prompt
from caprl_jax.models.decoder import head_matrix
from caprl_jax.types import Images, Prompts

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl-qwen2-tied")
ROWS = ((0, None, 2), (None,))  # pictures of `oracle.pictures()`, None for text alone


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
  return oracle.make_pair(request.param)


def examples(cfg):
  """(patches or None, prompt) of each example, row by row."""
  mrope = cfg.text.mrope_sections is not None
  rng = np.random.default_rng(0)

  def one(picture):
    words = rng.integers(5, 100, rng.integers(5, 9)).tolist()
    if picture is None:
      return None, build_prompt(words, (0, 0), [], cfg.image_token, False)
    patches = cfg.vision.pixels.patchify(oracle.pictures()[picture])
    return patches, build_prompt(words[:3], patches.grid_units, words[3:], cfg.image_token, mrope)
  return [[one(picture) for picture in row] for row in ROWS]


def packed(cfg, rows, images=3, extra=4):
  """Arrays of rows packed by hand; one padded image a row, in another place in each, and padded tokens."""
  slots = max(len(p.valid_S) for row in rows for p, _ in row if p)
  units = slots // cfg.vision.pixels.merge_size ** 2
  length = max(sum(len(p.tokens) for _, p in row) for row in rows) + extra
  empty = pad_image(next(p for p, _ in rows[0] if p), slots, 200)
  empty = {k: np.zeros_like(v) for k, v in empty.items()}
  fields, made = [], []
  for row in rows:
    tokens, position = np.zeros(length, np.int32), np.zeros((3, length), np.int32)
    segment, at, shown, unit = np.zeros(length, np.int32), 0, [], []
    for number, (patches, prompt) in enumerate(row, 1):
      span = slice(at, at + len(prompt.tokens))
      tokens[span], position[:, span], segment[span] = prompt.tokens, prompt.position, number
      at = span.stop
      if patches:
        unit.append(patches.unit_I + len(shown) * units)
        shown.append(pad_image(patches, slots, 200))
    unit = np.concatenate([*unit, np.zeros(0, np.int32)])
    fields += shown + [empty] * (images - len(shown))
    made.append((tokens, segment > 0, position, segment, np.pad(unit, (0, length - len(unit)))))
  tokens, valid, position, segment, unit = map(np.stack, zip(*made))
  stacked = {k: np.stack([f[k] for f in fields]) for k in fields[0]}
  return (Images(**{**stacked, "unit_BI": unit}), Prompts(tokens, valid, position, np.zeros(len(rows), np.int32)), segment)


def logits(pair, hidden, params=None):
  return hidden @ head_matrix(pair.cfg.text, (params or pair.params)["language_model"]).T


def alone(pair, params, patches, prompt):
  """Logits [L, V] of one example by itself, through `prefill`."""
  prompts = Prompts(prompt.tokens[None], np.ones((1, len(prompt.tokens)), bool), prompt.position[None], np.zeros(1, np.int32))
  apply = jax.jit(pair.ours.apply, static_argnames="method")
  variables = {"params": params}
  if patches is None:
    hidden = apply(variables, prompts.tokens_BP, prompts.position_B3P[:, 0], prompts.valid_BP, (), method="extend")[0]
  else:
    images = Images(**{k: v[None] for k, v in pad_image(patches, len(patches.valid_S), patches.num_tokens).items()})
    hidden = apply(variables, images, prompts, method="prefill")[0]
  return logits(pair, hidden[0], params)


def test_packed_logits_are_each_example_s_own(pair):
  rows = examples(pair.cfg)
  images, prompts, segment = packed(pair.cfg, rows)
  got = logits(pair, jax.jit(pair.ours.apply, static_argnames="method")(
      {"params": pair.params}, images, prompts, segment, method="packed"))
  for b, row in enumerate(rows):
    for number, (patches, prompt) in enumerate(row, 1):
      want = alone(pair, pair.params, patches, prompt)
      assert oracle.relative_error(got[b][segment[b] == number], want) < 1e-5, (b, number)


def test_packed_gradients_are_the_sum_of_the_examples_own(pair):
  rows = examples(pair.cfg)
  images, prompts, segment = packed(pair.cfg, rows)
  loss = lambda logits, tokens: -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]

  @jax.jit
  @jax.grad
  def together(params):
    out = logits(pair, pair.ours.apply({"params": params}, images, prompts, segment, method="packed"), params)
    own = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)
    return jnp.sum(jnp.where(own, jax.vmap(loss)(out[:, :-1], prompts.tokens_BP[:, 1:]), 0))

  @jax.jit
  @jax.grad
  def apart(params):
    return sum(loss(alone(pair, params, patches, prompt)[:-1], prompt.tokens[1:]).sum() for row in rows for patches, prompt in row)

  got, want = together(pair.params), apart(pair.params)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    if np.abs(b).max() < 1e-4:  # a key's bias moves all scores alike
      assert np.abs(a).max() < 1e-3, jax.tree_util.keystr(path)
    else:
      assert oracle.relative_error(a, np.asarray(b)) < 2e-4, jax.tree_util.keystr(path)


def test_text_alone_needs_no_tower(pair):
  tokens = np.arange(10).reshape(2, 5)
  prompts = Prompts(tokens, np.ones_like(tokens, bool), np.broadcast_to(np.arange(5), (2, 3, 5)), np.zeros(2, np.int32))
  got = pair.ours.apply({"params": pair.params}, None, prompts, np.ones_like(tokens), method="packed")
  want = pair.ours.apply({"params": pair.params}, tokens, np.broadcast_to(np.arange(5), (2, 5)), prompts.valid_BP, (), method="extend")[0]
  np.testing.assert_array_equal(got, want)
