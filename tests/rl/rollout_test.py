"""Captions of a random captioner against the loss and unshared forward passes; keys and ends."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from caprl_jax.data.image_prompts import build_prompt, stack_prompts
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.image_processor import pad_image
from caprl_jax.models.policy import Policy, PolicyConfig, Remat, merge_image_features
from caprl_jax.models.trainable import split_params, trainable_filter
from caprl_jax.rl import rollout as rollout_module
from caprl_jax.rl import sampling
from caprl_jax.rl.rollout import (
  RolloutConfig,
  block_slots,
  caption_logprobs,
  group_slots,
  pack_groups,
  sample_captions,
)
from caprl_jax.rl.sampling import SamplingConfig
from caprl_jax.types import Batch, Images, SeenImages, Vocabulary

V, IMAGE, PAD, ENDS = 60, 55, 50, (51, 52)
G, T = 4, 9
TEXT_CONFIG = dict(
  model_type="qwen2_5_vl_text",
  vocab_size=V,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  rms_norm_eps=1e-6,
  initializer_range=0.3,
  rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
)
CONFIG = dict(
  model_type="qwen2_5_vl",
  tie_word_embeddings=True,
  text_config=TEXT_CONFIG,
  image_token_id=IMAGE,
  vision_config=dict(
    depth=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    out_hidden_size=32,
    patch_size=8,
    window_size=32,
    fullatt_block_indexes=[1],
    initializer_range=0.3,
  ),
)


@pytest.fixture(scope="module")
def model():
  """A random captioner, three images of different sizes with prompts of different lengths, and the
  vocabulary.
  """
  policy = Policy(PolicyConfig.from_hf(CONFIG, dict(min_pixels=256, max_pixels=64 * 64)))
  rng = np.random.default_rng(0)
  pictures = [
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for height, width in ((32, 32), (48, 16), (64, 48))
  ]
  patches = [policy.cfg.vision.pixels.patchify(picture) for picture in pictures]
  padded = [pad_image(p, 80, 14) for p in patches]
  images = Images(**{k: np.stack([p[k] for p in padded]) for k in padded[0]})
  prompts = stack_prompts(
    [
      build_prompt([1, 2], p.grid_units, [3, *range(4, 5 + i)], IMAGE)
      for i, p in enumerate(patches)
    ],
    22,
  )
  batch = jax.tree.map(jnp.asarray, Batch(images, prompts, None, np.arange(3)))
  params = nn.unbox(jax.jit(policy.init)(jax.random.key(0), batch.images, batch.prompts)["params"])
  allowed = (jnp.arange(V) < 40) | jnp.isin(jnp.arange(V), jnp.array(ENDS))
  vocabulary = Vocabulary(allowed_V=allowed, judge_id_V=jnp.arange(V), end_ids=ENDS, pad_id=PAD)
  return policy, params, batch, vocabulary


def sample(model, seed=0, vocabulary=None, group=G, end_cut=False, **sampling):
  policy, params, batch, default = model
  drawn = SamplingConfig(**{"max_tokens": T, "temperature": 0.9, **sampling})
  cfg = RolloutConfig(group, drawn, end_cut=end_cut)
  return jax.device_get(
    sampler(policy, cfg)(params, batch, jax.random.key(seed), vocabulary or default)
  )


def test_activations_that_are_made_again_change_no_gradient(model):
  """Of tower and decoder; and of one alone they are that part's."""
  policy, params, batch, _ = model

  def slopes(remat):
    vision, text = policy.cfg.vision, policy.cfg.text
    cfg = dataclasses.replace(
      policy.cfg,
      vision=dataclasses.replace(vision, remat=remat.tower),
      text=dataclasses.replace(text, remat=remat.decoder),
    )

    def total(params, batch):
      return jnp.square(Policy(cfg).apply({"params": params}, batch.images, batch.prompts)).mean()

    return jax.grad(total)

  for remat, parts in ((Remat(), 0), (Remat(tower=True), 1), (Remat(decoder=True), 1)):
    again = str(jax.make_jaxpr(slopes(remat))(params, batch))
    assert again.count("prevent_cse=False") == parts, remat
  whole, found = (jax.jit(slopes(Remat(on, on)))(params, batch) for on in (False, True))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max() + 1e-6))


def test_the_parts_of_a_captioner_follow_the_key_of_both():
  assert Remat.of(True) == Remat(True, True) and Remat.of(False) == Remat()
  assert Remat.of(True, tower=False) == Remat(False, True)
  assert Remat.of(False, None, True) == Remat(False, True)
  cfg = PolicyConfig.from_hf(CONFIG, dict(min_pixels=256, max_pixels=4096), remat=Remat(True))
  assert cfg.vision.remat and not cfg.text.remat


@functools.cache
def sampler(policy, cfg):
  return jax.jit(functools.partial(sample_captions, policy, cfg=cfg))


@pytest.fixture(scope="module")
def captions(model):
  return sample(model)


@functools.partial(jax.jit, static_argnums=0)
def forward(policy, params, images, tokens, position):
  """Hidden states of one sequence, image and all, through the language model in one piece: no
  prefix.
  """

  def run(m):
    x = m.language_model.embed(tokens)
    x = merge_image_features(x, m.visual(images).main_BUD, images.unit_BI, tokens == IMAGE)
    return m.language_model(x, position, jnp.ones(tokens.shape, bool))[0]

  return (
    policy.apply({"params": params}, method=run)[0]
    @ head_matrix(policy.cfg.text, params["language_model"]).T
  )


def unshared(model, captions, temperature):
  """Log-probabilities of every caption on its own, [image + prompt + caption]. Causal: what pads it
  is not seen.
  """
  policy, params, batch, vocabulary = model
  out = np.zeros(captions.tokens_BGT.shape, np.float32)
  for b, g in np.ndindex(out.shape[:2]):
    caption = captions.tokens_BGT[b, g][captions.valid_BGT[b, g]]
    prompt = np.asarray(batch.prompts.tokens_BP[b])[np.asarray(batch.prompts.valid_BP[b])]
    after = int(batch.prompts.next_position_B[b]) + np.arange(len(caption))
    position = np.concatenate(
      [
        np.asarray(batch.prompts.position_B3P[b])[:, : len(prompt)],
        np.broadcast_to(after, (3, len(caption))),
      ],
      axis=1,
    )
    tokens = np.concatenate([prompt, caption])
    pad = 22 + T - len(tokens)
    logits = (
      forward(
        policy,
        params,
        jax.tree.map(lambda x: x[b : b + 1], batch.images),
        np.pad(tokens, (0, pad))[None],
        np.pad(position, ((0, 0), (0, pad)))[None],
      )
      / temperature
    )
    logp = np.asarray(jax.nn.log_softmax(jnp.where(vocabulary.allowed_V, logits, -jnp.inf)))
    out[b, g, : len(caption)] = np.take_along_axis(
      logp[len(prompt) - 1 :][: len(caption)], caption[:, None], 1
    )[:, 0]
  return out


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def teacher(policy, params, batch, captions, vocabulary, temperature, chunk_tokens=1024):
  return caption_logprobs(
    policy,
    params,
    batch,
    captions,
    vocabulary=vocabulary,
    temperature=temperature,
    chunk_tokens=chunk_tokens,
    entropy="figure",
  )


def test_sampled_equals_teacher_forced_equals_unshared(model, captions):
  policy, params, batch, vocabulary = model
  logp, entropy = teacher(policy, params, batch, captions, vocabulary=vocabulary, temperature=0.9)
  valid = captions.valid_BGT
  lengths = valid.sum(-1)
  # the case is worth something
  assert len(np.unique(lengths)) > 1 and captions.ended_BG.any(), lengths
  np.testing.assert_allclose(captions.logp_BGT[valid], np.asarray(logp)[valid], atol=1e-4)
  np.testing.assert_allclose(captions.logp_BGT, unshared(model, captions, 0.9), atol=1e-4)
  np.testing.assert_array_equal(captions.logp_BGT[~valid], 0)
  assert np.isfinite(logp).all() and np.isfinite(entropy).all()
  assert (np.asarray(entropy)[valid] > 0).all()


def test_teacher_forcing_of_one_token_and_in_chunks(model):
  policy, params, batch, vocabulary = model
  one = sample(model, max_tokens=1)
  assert one.tokens_BGT.shape == (3, G, 1)
  logp, _ = teacher(policy, params, batch, one, vocabulary, 0.9, 5)
  np.testing.assert_allclose(one.logp_BGT, logp, atol=1e-4)


def test_stages_and_chunks_change_nothing(model, monkeypatch):
  """Caches of 3, 6 and 12 slots for all rows, then of 24 and 48 for one or two rows at a time."""
  plain = sample(model, group=8, max_tokens=48)
  monkeypatch.setattr(sampling, "SMALLEST_CACHE", 3)
  monkeypatch.setattr(sampling, "SMALLEST_CHUNK", 1)
  assert sampling.cache_stages(48) == ((3, 6, 12), (12, 24, 48))
  staged = sample(model, group=8, max_tokens=48, chunks=12)
  lengths = plain.valid_BGT.sum(-1)
  assert (lengths > 12).sum() > 4 and (lengths < 12).any() and (~plain.ended_BG).any(), lengths
  np.testing.assert_array_equal(plain.tokens_BGT, staged.tokens_BGT)
  np.testing.assert_allclose(plain.logp_BGT, staged.logp_BGT, atol=1e-5)
  np.testing.assert_array_equal(plain.valid_BGT, staged.valid_BGT)
  np.testing.assert_array_equal(plain.ended_BG, staged.ended_BG)


@pytest.mark.parametrize("slots", [None, "just enough"])
def test_packed_rows_hold_each_caption_once(captions, slots):
  needed = group_slots(captions)
  R = G * (T - 1) if slots is None else int(needed.max())
  packed = pack_groups(captions, R)
  np.testing.assert_array_equal(packed.valid_BR.sum(1), needed)
  for b, g in np.ndindex(captions.tokens_BGT.shape[:2]):
    own = np.flatnonzero(np.asarray(packed.valid_BR[b] & (packed.caption_BR[b] == g)))
    length = int(captions.valid_BGT[b, g].sum())
    assert len(own) == length - 1
    np.testing.assert_array_equal(packed.tokens_BR[b, own], captions.tokens_BGT[b, g, : length - 1])
    np.testing.assert_array_equal(packed.step_BR[b, own], np.arange(length - 1))
    np.testing.assert_array_equal(packed.target_BR[b, own], g * T + 1 + np.arange(length - 1))
    np.testing.assert_array_equal(packed.slot_BGT[b, g, 1:length], own)


def test_captions_end_at_the_first_end_token_and_are_padded_after(model):
  captions = sample(model, group=16)
  for tokens, valid, ended in zip(
    captions.tokens_BGT.reshape(-1, T),
    captions.valid_BGT.reshape(-1, T),
    captions.ended_BG.reshape(-1),
  ):
    ends = np.flatnonzero(np.isin(tokens, ENDS))
    length = ends[0] + 1 if len(ends) else T
    np.testing.assert_array_equal(valid, np.arange(T) < length)
    assert (tokens[length:] == PAD).all()
    assert ended == bool(len(ends))
  assert captions.ended_BG.any() and not captions.ended_BG.all()


def test_a_cut_caption_may_get_an_end_token(model):
  plain, ended = (sample(model, group=16, end_cut=end_cut) for end_cut in (False, True))
  cut_BG = ~plain.ended_BG
  assert cut_BG.any() and (ended.tokens_BGT[cut_BG][:, -1] == ENDS[0]).all()
  np.testing.assert_array_equal(ended.ended_BG, plain.ended_BG)  # it counts as cut all the same
  same = np.array(plain.tokens_BGT)
  same[cut_BG, -1] = ENDS[0]
  np.testing.assert_array_equal(ended.tokens_BGT, same)


def test_forbidden_ids_are_never_sampled(model):
  captions = sample(model, group=64, temperature=5.0)
  seen = np.unique(captions.tokens_BGT[captions.valid_BGT])
  allowed = np.asarray(model[3].allowed_V)
  assert allowed[seen].all() and len(seen) > 0.9 * allowed.sum()


def test_same_key_same_captions_and_captions_of_a_group_differ(model, captions):
  again, other = sample(model), sample(model, seed=1)
  jax.tree.map(np.testing.assert_array_equal, captions, again)
  assert (captions.tokens_BGT != other.tokens_BGT).any()
  assert all(len(np.unique(group, axis=0)) > 1 for group in captions.tokens_BGT)


def test_greedy_takes_the_likeliest_whatever_the_key(model):
  policy, params, batch, vocabulary = model
  greedy = sample(model, temperature=0.0)
  jax.tree.map(np.testing.assert_array_equal, greedy, sample(model, seed=5, temperature=0.0))
  assert (greedy.tokens_BGT == greedy.tokens_BGT[:, :1]).all()
  # Recorded at temperature 1, so that training on it has log-probabilities.
  np.testing.assert_allclose(greedy.logp_BGT, unshared(model, greedy, 1.0), atol=1e-4)
  # No allowed token would have been likelier, at any place.
  allowed = np.flatnonzero(vocabulary.allowed_V)
  for t in range(T):
    valid = greedy.valid_BGT[:, 0, t]
    # Captions of a group branch off at place t, one for each allowed token.
    spread = lambda x: np.repeat(x[:, :1], len(allowed), axis=1)
    tokens = spread(greedy.tokens_BGT)
    tokens[:, :, t] = allowed
    logp, _ = teacher(
      policy,
      params,
      batch,
      greedy.replace(tokens_BGT=tokens, valid_BGT=spread(greedy.valid_BGT)),
      vocabulary,
      0.0,
    )
    assert (np.asarray(logp)[:, :, t] <= greedy.logp_BGT[:, :1, t] + 1e-4)[valid].all()


def test_an_image_does_not_see_the_others(model, captions):
  policy, params, batch, vocabulary = model
  one = jax.tree.map(lambda x: x[1:2], (batch, captions))
  logp, _ = teacher(policy, params, *one, vocabulary, 0.9)
  valid = one[1].valid_BGT
  np.testing.assert_allclose(np.asarray(logp)[valid], one[1].logp_BGT[valid], atol=1e-4)


def test_gradient_reaches_both_towers(model, captions):
  policy, params, batch, vocabulary = model

  def f(params):
    logp, _ = caption_logprobs(
      policy, params, batch, captions, vocabulary=vocabulary, temperature=0.9
    )
    return jnp.sum(jnp.where(captions.valid_BGT, logp, 0.0))

  grad = jax.jit(jax.grad(f))(params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))
  norm = lambda tree: sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(tree))
  assert norm(grad["visual"]) > 0 and norm(grad["language_model"]) > 0


def test_only_the_end_allowed_gives_captions_of_one_token(model):
  only = model[3].replace(allowed_V=jnp.arange(V) == ENDS[0])
  captions = sample(model, vocabulary=only)
  np.testing.assert_array_equal(
    captions.tokens_BGT, np.broadcast_to(np.where(np.arange(T) == 0, ENDS[0], PAD), (3, G, T))
  )
  np.testing.assert_array_equal(captions.valid_BGT.sum(-1), 1)
  np.testing.assert_allclose(captions.logp_BGT, 0, atol=1e-6)
  assert captions.ended_BG.all()


def test_an_empty_group_is_refused():
  with pytest.raises(ValueError, match="group_size = 0"):
    RolloutConfig(0, SamplingConfig(4))


def test_images_encoded_in_pieces_give_the_same_prefix(model, monkeypatch):
  policy, params, batch, _ = model
  prefill = lambda: jax.jit(
    lambda params, batch: rollout_module.prefill_in_pieces(policy, params, batch)
  )(params, batch)
  whole = prefill()
  monkeypatch.setattr(rollout_module, "MOST_PATCHES", batch.images.patches_BSE.shape[1])
  assert "scan" in str(
    jax.make_jaxpr(lambda p: rollout_module.prefill_in_pieces(policy, p, batch))(params)
  )
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(prefill()), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


def test_a_tower_that_is_not_trained_sees_each_image_once(model, captions, monkeypatch):
  policy, params, batch, vocabulary = model
  base, trained = {"visual": params["visual"]}, {"language_model": params["language_model"]}
  seen = rollout_module.see_once(policy, trained, base, batch)
  assert isinstance(seen.images, SeenImages)
  monkeypatch.setattr(rollout_module, "MOST_PATCHES", 80)  # one image at a time
  in_pieces = rollout_module.see_once(policy, trained, base, batch)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), in_pieces, seen)

  def logp(params, batch):
    return caption_logprobs(policy, params, batch, captions, vocabulary=vocabulary, temperature=1.0)

  # Nothing reads the tower's parameters any more.
  got, want = logp(trained, seen), logp(params, batch)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_a_tower_of_which_something_is_trained_is_asked_each_time(model):
  policy, params, batch, _ = model
  projector, rest = split_params(params, trainable_filter("projector", policy.cfg.family))
  for trained, base in ((params, None), (projector, rest)):
    assert rollout_module.see_once(policy, trained, base, batch) is batch


@pytest.mark.parametrize(
  "slots, rows, width, size",
  [
    (60, 8, 2048, 60),  # short rows are one block
    (504, 8, 2048, 168),
    (2040, 8, 2048, 136),
    (2040, 1, 2048, 292),  # 7 blocks of at least 256 tokens
    (8184, 8, 2048, 264),  # 31 blocks, of more than 2,048 tokens each
    (8184, 1, 2048, 512),  # 16 blocks
    (8184, 1, 256, 264),  # of 256 tokens each, since the matrices are small
    (8184, 2, 256, 130),
    (32_760, 1, 2048, 2048),
    (32_760, 4, 2048, 520),
  ],
)
def test_blocks_are_small_where_there_are_many_rows_or_small_matrices(slots, rows, width, size):
  cfg = types.SimpleNamespace(hidden_size=width, intermediate_size=4 * width)
  assert block_slots(slots, rows, cfg) == size
