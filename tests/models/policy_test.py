"""The captioners against transformers' own classes with random weights: by module, and whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.oracle import SIZES, batch, pictures, relative_error

from caprl_jax.hub import weights
from caprl_jax.models.decoder import head_matrix
from caprl_jax.rl.rollout import RolloutConfig, sample_captions
from caprl_jax.rl.sampling import SamplingConfig
from caprl_jax.types import Batch, Vocabulary

HEADS = ("qwen2_5_vl-tied", "qwen3_vl-tied")  # all that differs from the cases without "-tied"


@pytest.fixture(scope="module", params=list(oracle.CASES))
def pair(request):
  return oracle.make_pair(request.param)


@pytest.fixture(scope="module", params=[case for case in oracle.CASES if case not in HEADS])
def body(request):
  """The pair of a case whose tower and decoder no other one has."""
  return oracle.make_pair(request.param)


def prefill(policy, params, images, prompts):
  """Logits, and the keys and values. As one program: op by op they would be a hundred."""

  @jax.jit
  def run(params, images, prompts):
    hidden, prefix = policy.apply({"params": params}, images, prompts, method="prefill")
    return hidden @ head_matrix(policy.cfg.text, params["language_model"]).T, prefix

  return run(params, images, prompts)


@functools.cache
def whole(pair):
  """Images and prompts of all sizes in one batch; their logits, keys and values."""
  images, prompts = batch(pair.cfg)
  logits, prefix = prefill(pair.ours, pair.params, images, prompts)
  return images, prompts, np.asarray(logits), prefix


def test_towers_match_for_several_sizes_in_one_padded_batch(body):
  images, _ = batch(body.cfg)
  tower = jax.jit(
    lambda params, x: body.ours.apply({"params": params}, x, method=lambda m, x: m.visual(x))
  )
  features = tower(body.params, images)
  for i, picture in enumerate(pictures()):
    want, deep = body.features(picture)
    units = np.asarray(images.unit_BI[i][: len(want)])
    assert relative_error(np.asarray(features.main_BUD[i])[units], want) < 1e-4, SIZES[i]
    assert len(deep) == (0 if features.deep_XBUD is None else len(features.deep_XBUD))
    for ours, theirs in zip(features.deep_XBUD if deep else [], deep, strict=True):
      assert relative_error(np.asarray(ours[i])[units], theirs) < 1e-4, SIZES[i]


def test_logits_match_for_several_images_and_prompt_lengths_in_one_batch(pair):
  _, prompts, logits, _ = whole(pair)
  for i, picture in enumerate(pictures()):
    valid = np.asarray(prompts.valid_BP[i])
    with torch.no_grad():
      want = pair.theirs(**pair.inputs(picture, prompts.tokens_BP[i][valid])).logits[0].numpy()
    assert relative_error(logits[i][valid], want) < 1e-4, SIZES[i]


def test_hidden_states_match_layer_by_layer(body):
  """Layer n's output is the model's own with the layers after n cut off, before the final norm."""
  _, prompts, _, prefix = whole(body)
  valid = np.asarray(prompts.valid_BP[1])
  states = {}
  hooks = [
    layer.register_forward_hook(
      lambda m, a, out, i=i: states.__setitem__(i, out if torch.is_tensor(out) else out[0])
    )
    for i, layer in enumerate(body.theirs.model.language_model.layers)
  ]
  with torch.no_grad():
    body.theirs(**body.inputs(pictures()[1], prompts.tokens_BP[1][valid]))
  for hook in hooks:
    hook.remove()
  # Our layers are scanned: the keys of layer n + 1 are a linear map of the normed output of layer
  # n.
  language = body.params["language_model"]["layers"]
  is_image = np.asarray(prompts.tokens_BP[1][valid]) == oracle.IMAGE
  deep = body.features(pictures()[1])[1]
  for i in range(body.cfg.text.num_layers - 1):
    x = states[i][0].numpy().copy()
    if i < len(deep):  # transformers adds DeepStack's features after the layer
      x[is_image] += deep[i]
    x = (
      x
      / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
      * np.asarray(language["input_layernorm"]["scale"][i + 1])
    )
    value = x @ np.asarray(language["self_attn"]["v_proj"]["kernel"][i + 1])
    if body.cfg.text.qkv_bias:
      value = value + np.asarray(language["self_attn"]["v_proj"]["bias"][i + 1])
    got = np.asarray(prefix.value_YRSJh[i + 1, 1][valid]).reshape(valid.sum(), -1)
    assert relative_error(got, value) < 1e-4, i


def test_positions_match(body):
  if body.cfg.text.mrope_sections is None:
    pytest.skip("one-dimensional positions, which the logits test holds")
  _, prompts = batch(body.cfg)
  grid = torch.cat([body.inputs(p, np.zeros(1))["image_grid_thw"] for p in pictures()])
  ids, valid = (torch.tensor(np.asarray(x)) for x in (prompts.tokens_BP, prompts.valid_BP))
  want, delta = body.theirs.model.get_rope_index(
    ids.long(), (ids == oracle.IMAGE).int() * valid, image_grid_thw=grid, attention_mask=valid.int()
  )
  got = np.asarray(prompts.position_B3P).transpose(1, 0, 2)
  np.testing.assert_array_equal(got * valid.numpy(), want.numpy() * valid.numpy())
  np.testing.assert_array_equal(
    np.asarray(prompts.next_position_B), (valid.sum(1) + delta[:, 0]).numpy()
  )


def test_gradients_match_for_every_parameter(pair):
  """Of the log-probability of each prompt's last token."""
  images, prompts = batch(pair.cfg)
  wanted = {}
  pair.theirs.zero_grad()
  for i, picture in enumerate(pictures()):
    valid = np.asarray(prompts.valid_BP[i])
    ids = prompts.tokens_BP[i][valid]
    logits = pair.theirs(**pair.inputs(picture, ids)).logits[0]
    (-torch.log_softmax(logits[-2].float(), -1)[int(ids[-1])]).backward()
  wanted = {k: v.grad.numpy() for k, v in pair.theirs.named_parameters() if v.grad is not None}
  pair.theirs.zero_grad()

  def loss(params):
    hidden, _ = pair.ours.apply({"params": params}, images, prompts, method="prefill")
    last = prompts.valid_BP.sum(1) - 1
    state = jnp.take_along_axis(hidden, (last - 1)[:, None, None], axis=1)[:, 0]
    logits = state @ head_matrix(pair.cfg.text, params["language_model"]).T
    target = jnp.take_along_axis(prompts.tokens_BP, last[:, None], axis=1)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), target, axis=1).sum()

  grads = jax.jit(jax.grad(loss))(pair.params)
  unused = {k for k in pair.theirs.state_dict() if "lm_head" in k and pair.cfg.text.tie_embeddings}
  shape = {
    k: np.zeros(v.shape, np.float32) for k, v in pair.theirs.state_dict().items() if k not in unused
  }
  theirs = weights.params_from_tensors(
    pair.params,
    {**shape, **{k: v for k, v in wanted.items() if k not in unused}},
    pair.cfg.family.keys,
    "gradients",
  )
  for (path, ours), want in zip(
    jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(theirs), strict=True
  ):
    name = jax.tree_util.keystr(path)
    largest = np.abs(want).max()
    if largest < 1e-5:  # a key's bias moves all scores alike
      assert np.abs(ours).max() < 1e-4, name
    else:
      assert relative_error(ours, np.asarray(want)) < 2e-3, name


def test_greedy_captions_are_transformers_own(pair):
  """64 tokens for images and prompts of several sizes in one batch, ids equal one by one."""
  images, prompts = batch(pair.cfg)
  B = len(SIZES)
  allowed = jnp.ones(oracle.VOCAB, bool)
  vocabulary = Vocabulary(allowed, jnp.arange(oracle.VOCAB), (oracle.VOCAB - 1,), 0)
  cfg = RolloutConfig(1, SamplingConfig(64, temperature=0.0))
  sample = jax.jit(
    lambda params, batch: sample_captions(
      pair.ours, params, batch, jax.random.key(0), vocabulary, cfg
    )
  )
  captions = sample(pair.params, Batch(images, prompts, None, jnp.arange(B)))
  for i, picture in enumerate(pictures()):
    ids = prompts.tokens_BP[i][np.asarray(prompts.valid_BP[i])]
    with torch.no_grad():
      want = pair.theirs.generate(
        **pair.inputs(picture, ids),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=oracle.VOCAB - 1,
        pad_token_id=0,
      )[0, len(ids) :].numpy()
    got = np.asarray(captions.tokens_BGT[i, 0])[np.asarray(captions.valid_BGT[i, 0])]
    np.testing.assert_array_equal(got, want, err_msg=str(SIZES[i]))


def test_checkpoint_keys_round_trip_and_are_complete(pair):
  keys = pair.cfg.family.keys
  tensors = dict(weights.TensorsOfParams(pair.params, keys))
  again = weights.params_from_tensors(pair.params, tensors, keys, "ours")
  for a, b in zip(jax.tree.leaves(pair.params), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
  name = next(
    k
    for k in tensors
    if k.endswith("norm.weight") and "language_model" in k or k == "model.norm.weight"
  )
  broken = {k: v for k, v in tensors.items() if k != name}
  with pytest.raises(ValueError, match=f"1 tensors are missing.*{name}"):
    weights.params_from_tensors(pair.params, broken, keys, "ours")
  with pytest.raises(ValueError, match="fit no parameter.*surprise"):
    weights.params_from_tensors(pair.params, {**tensors, "surprise": np.zeros(1)}, keys, "ours")
  with pytest.raises(ValueError, match=rf"{name} has shape \(7,\)"):
    weights.params_from_tensors(
      pair.params, {**tensors, name: np.zeros(7, np.float32)}, keys, "ours"
    )


def test_the_rest_of_the_batch_and_its_padding_do_not_matter(body):
  _, prompts, logits, _ = whole(body)
  i = 3  # the narrowest
  alone, _ = prefill(body.ours, body.params, *batch(body.cfg, slice(i, i + 1), extra=0))
  alone, valid = np.asarray(alone), np.asarray(prompts.valid_BP[i])
  np.testing.assert_allclose(
    logits[i][valid], alone[0][: valid.sum()], rtol=1e-4, atol=1e-4 * np.abs(alone).max()
  )


def test_bfloat16_is_near(body):
  """What bfloat16 costs: logits of random weights within 6% of the largest, on the argmax of most
  positions.
  """
  half = lambda cfg: dataclasses.replace(cfg, dtype=jnp.bfloat16)
  ours = type(body.ours)(
    dataclasses.replace(body.cfg, vision=half(body.cfg.vision), text=half(body.cfg.text))
  )
  images, prompts, want, _ = whole(body)
  hidden, _ = jax.jit(
    lambda params: ours.apply({"params": params}, images, prompts, method="prefill")
  )(body.params)
  assert hidden.dtype == jnp.bfloat16
  head = head_matrix(body.cfg.text, body.params["language_model"])
  got = np.asarray(hidden.astype(jnp.float32) @ head.T)
  valid = np.asarray(prompts.valid_BP)
  assert relative_error(got[valid], want[valid]) < 0.06
