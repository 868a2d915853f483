"""Name of a checkpoint -> model, parameters, tokenizer; and a captioner back to a Hugging Face directory."""

from collections.abc import Callable
import dataclasses
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.models import files, weights
from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.policy import Policy, PolicyConfig
from caprl_jax.models.tokenizer import Tokenizer, check_tokenizer, id_table, load_tokenizer
from caprl_jax.types import Images, Params, Prompts, Vocabulary

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model with its parameters on the mesh. `config` and `preprocessor` are the checkpoint's JSON files."""
  model: Any
  params: Params
  tokenizer: Tokenizer
  config: dict
  preprocessor: dict
  shardings: Any


def init_policy(cfg: PolicyConfig) -> Callable[[jax.Array], Any]:
  """key -> flax variables of a captioner; the inputs that the tower and the decoder are traced with are one window."""
  S, E = cfg.vision.window_slots, cfg.vision.in_channels * cfg.vision.patch_size ** 2
  images = Images(jnp.zeros((1, S, E), jnp.uint8), jnp.zeros((1, S, 2), jnp.int32), jnp.ones((1, S), bool),
                  jnp.zeros((1, 1), jnp.int32))
  prompts = Prompts(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool), jnp.zeros((1, 3, 2), jnp.int32),
                    jnp.zeros(1, jnp.int32))
  return lambda key: Policy(cfg).init(key, images, prompts)


def init_decoder(cfg: DecoderConfig) -> Callable[[jax.Array], Any]:
  """key -> flax variables of a decoder."""
  def init(key):
    model = Decoder(cfg)
    tokens = jnp.zeros((1, 1), jnp.int32)
    run = lambda m, t: m(m.embed(t), t, jnp.ones(t.shape, bool))
    return model.init(key, tokens, method=run)
  return init


def _fill(init, table, tensors, source, mesh, dtype) -> tuple[Params, Any]:
  boxed = sharding.abstract_params(lambda: init(jax.random.key(0)))
  shardings = sharding.param_shardings(boxed, mesh)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nn.unbox(boxed))
  place = sharding.placer(shardings)
  return weights.params_from_tensors(abstract, tensors, table, source, place), shardings


def load_judge(source: str, mesh: jax.sharding.Mesh, dtype=jnp.float32) -> Loaded:
  """Loads a text-only language model from whatever `files.resolve_model` accepts. Raises ValueError for a
  checkpoint that is missing, damaged, of another family, or whose tokenizer has more ids than it has rows."""
  path = files.resolve_model(source)
  config, tensors = files.read_model(path)
  cfg = DecoderConfig.from_hf(config, dtype=dtype)
  tokenizer = load_tokenizer(path)
  check_tokenizer(tokenizer, cfg.vocab_size, source)
  params, shardings = _fill(init_decoder(cfg), weights.DECODER_KEYS, tensors, source, mesh, dtype)
  return Loaded(Decoder(cfg), params, tokenizer, config, {}, shardings)


def load_policy(source: str, mesh: jax.sharding.Mesh, dtype=jnp.float32, param_dtype=jnp.float32,
                remat: bool = False) -> Loaded:
  """Loads a Qwen2.5-VL captioner from a Hugging Face directory or hub name. Raises ValueError as `load_judge`."""
  path = files.resolve_model(source)
  config, tensors = files.read_directory(path)
  extra = path / "preprocessor_config.json"
  preprocessor = files.read_json(extra) if extra.exists() else {}
  cfg = PolicyConfig.from_hf(config, preprocessor, dtype=dtype, remat=remat)
  tokenizer = load_tokenizer(path)
  check_tokenizer(tokenizer, cfg.text.vocab_size, source)
  params, shardings = _fill(init_policy(cfg), weights.QWEN25_VL_KEYS, tensors, source, mesh, param_dtype)
  return Loaded(Policy(cfg), params, tokenizer, config, preprocessor, shardings)


def new_policy(config: dict, preprocessor: dict, tokenizer: Tokenizer, key: jax.Array,
               mesh: jax.sharding.Mesh) -> Loaded:
  """A captioner with random parameters from config.json and preprocessor_config.json contents."""
  cfg = PolicyConfig.from_hf(config, preprocessor)
  check_tokenizer(tokenizer, cfg.text.vocab_size, "the new policy")
  init = init_policy(cfg)
  shardings = sharding.param_shardings(sharding.abstract_params(lambda: init(key)), mesh)
  params = jax.jit(lambda k: nn.unbox(init(k)["params"]), out_shardings=shardings)(key)
  return Loaded(Policy(cfg), params, tokenizer, config, preprocessor, shardings)


def save_policy(path: str | pathlib.Path, loaded: Loaded, params: Params, dtype=None) -> None:
  """Writes a directory that transformers, vLLM and `load_policy` read. `dtype` casts the parameters."""
  host = jax.tree.map(lambda x: np.asarray(x).astype(dtype or x.dtype), params)
  name = np.dtype(dtype or jax.tree.leaves(params)[0].dtype).name
  config = {**loaded.config, "dtype": name}
  end = loaded.tokenizer.end_ids
  tokenizer_config = {
      "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>",
      "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False, "extra_special_tokens": {
          "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>",
          "vision_eos_token": "<|vision_end|>"}}
  files.write_directory(
      path, config, weights.tensors_from_params(host, weights.QWEN25_VL_KEYS),
      tokenizer_files={"tokenizer.json": loaded.tokenizer.to_json(),
                       "tokenizer_config.json": json.dumps(tokenizer_config, indent=2)},
      json_files={"preprocessor_config.json": loaded.preprocessor,
                  "generation_config.json": {"eos_token_id": list(end), "pad_token_id": end[-1], "do_sample": True,
                                             "temperature": 1.0}})


def relate_vocabularies(policy: Tokenizer, judge: Tokenizer, vocab_size: int) -> Vocabulary:
  """Which ids the policy may write, and what they are to the judge.

  Args:
    vocab_size: rows of the policy's embedding; rows beyond the tokenizer are never sampled.

  Raises:
    ValueError: a text token of the policy that the judge does not have, or no end token.
  """
  table = np.full(vocab_size, -1, np.int32)
  ids = id_table(policy, judge)
  table[:len(ids)] = ids
  if not policy.end_ids:
    raise ValueError("the policy's tokenizer has no end token (<|im_end|>, <|endoftext|> or eos_token_id)")
  allowed = table >= 0
  allowed[list(policy.end_ids)] = True
  return Vocabulary(jnp.asarray(allowed), jnp.asarray(table), tuple(policy.end_ids), policy.end_ids[-1])
