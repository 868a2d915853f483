"""A vision tower of one checkpoint, the language model of another, a new projector between them ->
a captioner.

How captions are compared as pretraining data (CapRL, arXiv 2509.22647, section on pretraining):
Qwen2.5-VL's tower before Qwen2.5, for example.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from caprl_jax import sharding
from caprl_jax.hub import hub_files, weights
from caprl_jax.hub.chat_template import default_template, find_template
from caprl_jax.hub.folders.text_files import json_of
from caprl_jax.hub.load import Loaded, init_policy, new_policy_files
from caprl_jax.hub.opened import open_captioner, open_decoder
from caprl_jax.hub.tokenizer import CHAT_SPECIALS, Tokenizer, check_tokenizer, load_tokenizer
from caprl_jax.models.decoder import DecoderConfig
from caprl_jax.models.family import Family
from caprl_jax.models.policy import NO_REMAT, Policy, PolicyConfig, Remat
from caprl_jax.models.trainable import merge_trees, split_params, trainable_filter
from caprl_jax.types import Params

# The decoder of a family, and the text-only models that it is, but for positions in images. A Llama
# is a Qwen2 whose queries, keys and values have biases of zero.
_TEXT_MODELS = {
  "qwen2_5_vl_text": ("qwen2_5_vl_text", "qwen2", "llama"),
  "qwen3_vl_text": ("qwen3_vl_text", "qwen3"),
}
_TEXT_KEYS = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "head_dim",
  "hidden_act",
  "max_position_embeddings",
  "initializer_range",
  "rms_norm_eps",
  "attention_bias",
  "attention_dropout",
  "use_cache",
  "bos_token_id",
  "eos_token_id",
  "pad_token_id",
  "tie_word_embeddings",
)
# What a captioner's config.json says beside its decoder.
_OUTER_KEYS = (
  "architectures",
  "model_type",
  "vision_config",
  "downsample_ratio",
  "image_seq_length",
  "projector_hidden_act",
  "vision_feature_layer",
  "vision_feature_select_strategy",
  "tiles",
)
_PIXEL_FILES = (
  "preprocessor_config.json",
  "processor_config.json",
  "video_preprocessor_config.json",
)


def compose_policy(
  vision: str,
  language: str,
  key: jax.Array,
  mesh: jax.sharding.Mesh,
  dtype=jnp.float32,
  param_dtype=jnp.float32,
  remat: Remat = NO_REMAT,
) -> Loaded:
  """Loads the tower of `vision`, a captioner, and the language model of `language`; `key` draws the
  projector between them, as torch draws new layers.

  Args:
    language: as `load.load_judge` takes it, of the kind that the captioner's family has for its
      decoder.

  Raises:
    ValueError: as `load.load_policy`; a language model that does not fit the family; or one whose
      vocabulary lacks the tokens that stand for images, and whose embedding has no room for them.
  """
  seeing, speaking = open_captioner(vision), open_decoder(language)
  config, tensors, family = seeing.config, seeing.tensors, seeing.captioner
  path, preprocessor = seeing.path, seeing.preprocessor()
  small = hub_files.read_small_files(path)
  text, text_tensors, text_keys = speaking.text, speaking.tensors, speaking.keys
  tokenizer, small = _vocabulary(
    load_tokenizer(path),
    small,
    load_tokenizer(speaking.path),
    rows=text["vocab_size"],
    config=config,
    family=family,
    language=language,
  )
  config = _config(config, family, text, load_tokenizer(path), tokenizer, language)
  cfg = PolicyConfig.from_hf(config, preprocessor, dtype=dtype, remat=remat)
  check_tokenizer(tokenizer, cfg.text.vocab_size, language)
  if cfg.text.qkv_bias and text["model_type"] == "llama":
    text_tensors = _ZeroBiases(text_tensors, cfg.text)

  init = init_policy(cfg)
  boxed = sharding.abstract_params(lambda: init(key))
  shardings = sharding.param_shardings(boxed, mesh)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, param_dtype), nn.unbox(boxed))
  is_projector = trainable_filter("projector", family)
  params = _tower_params(abstract, shardings, tensors, family, vision)
  decoder = weights.params_from_tensors(
    abstract["language_model"], text_tensors, text_keys, language, shardings["language_model"]
  )

  def draw(key: jax.Array) -> Params:
    made = split_params(nn.unbox(init(key)["params"]), is_projector)[0]
    return jax.tree.map(lambda x: x.astype(param_dtype), _as_torch_begins(made, key))

  new = jax.jit(draw, out_shardings=split_params(shardings, is_projector)[0])(key)
  params = merge_trees(merge_trees(params, new), {"language_model": decoder})
  return Loaded(Policy(cfg), params, tokenizer, config, preprocessor, shardings, small)


def _as_torch_begins(projector: Params, key: jax.Array) -> Params:
  """Linear layers as torch.nn.Linear draws them, uniform within 1/sqrt(inputs), biases too: the
  ScaleCap notebooks, by which CapRL pretrains, make a new `Qwen2_5_VLPatchMerger` and leave it so.
  Norms stay ones and zeros."""

  def redraw(tree: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    if "kernel" in tree:  # [inputs, outputs]
      bound = tree["kernel"].shape[-2] ** -0.5
      return {
        name: jax.random.uniform(jax.random.fold_in(key, i), x.shape, x.dtype, -bound, bound)
        for i, (name, x) in enumerate(sorted(tree.items()))
      }
    return {
      name: redraw(value, jax.random.fold_in(key, i)) if isinstance(value, dict) else value
      for i, (name, value) in enumerate(sorted(tree.items()))
    }

  return redraw(projector, key)


def with_tower(policy: Loaded, vision: str) -> Loaded:
  """The same model with the tower of the captioner `vision` in place of its own; its projector
  stays. Raises ValueError as `load.load_policy`, and for a tower of another family, architecture or
  way of reading pixels."""
  found, family = open_captioner(vision), policy.model.cfg.family
  if found.captioner is not family:
    raise ValueError(
      f"{vision} is a {found.captioner.model_type}, whose tower a {family.model_type} cannot have"
    )
  tensors = found.tensors
  theirs = _tower_fields(family.vision(found.config, found.preprocessor()))
  own = _tower_fields(policy.model.cfg.vision)
  differing = [
    f"{name} ({theirs[name]} there, {own[name]} here)" for name in own if theirs[name] != own[name]
  ]
  if differing:
    raise ValueError(
      f"{vision}: its tower differs from the new model's in {', '.join(differing)}; "
      "give architecture.vision_config and preprocessor the values that it was "
      "trained with"
    )
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), policy.params)
  tower = _tower_params(abstract, policy.shardings, tensors, family, vision)
  others = split_params(
    policy.params,
    lambda path: path.startswith("visual.") and not trainable_filter("projector", family)(path),
  )[1]
  return dataclasses.replace(policy, params=merge_trees(others, tower))


def _tower_fields(cfg: Any) -> dict[str, Any]:
  """All that a tower's parameters depend on: not the projector, not how it begins or is computed,
  not image sizes.
  """
  passed = {
    "pixels",
    "out_hidden_size",
    "projector_activation",
    "init_std",
    "layer_scale",
    "dtype",
    "remat",
    "min_pixels",
    "max_pixels",
    "min_tiles",
    "max_tiles",
  }
  return {
    f.name: getattr(part, f.name)
    for part in (cfg, cfg.pixels)
    for f in dataclasses.fields(part)
    if f.name not in passed
  }


def _tower_params(
  abstract: Params, shardings: Any, tensors: Mapping, family: Family, source: str
) -> Params:
  """The tower without the projector, from a captioner's tensors."""
  tower = lambda tree: split_params(
    {"visual": tree["visual"]}, trainable_filter("projector", family)
  )[1]
  return weights.params_from_tensors(
    tower(abstract),
    tensors,
    dataclasses.replace(family.keys, unused=".*"),
    source,
    tower(shardings),
  )


def _token_keys(config: dict, tokenizer: Tokenizer) -> dict[str, str]:
  """The tokens for images that config.json names by id: key -> token."""
  text = ("bos_token_id", "eos_token_id", "pad_token_id")
  named = {
    k: tokenizer.backend.id_to_token(v)
    for k, v in config.items()
    if k.endswith("_token_id") and k not in text and isinstance(v, int)
  }
  return {k: token for k, token in named.items() if token is not None}


def _vocabulary(
  theirs: Tokenizer,
  small: dict[str, bytes],
  ours: Tokenizer,
  rows: int,
  config: dict,
  family: Family,
  language: str,
) -> tuple[Tokenizer, dict[str, bytes]]:
  """The tokenizer of the composed model and its small files. `theirs` is the captioner's, `ours`
  the language model's."""
  vocab = theirs.backend.get_vocab()
  if (
    all(vocab.get(token) == i for token, i in ours.backend.get_vocab().items())
    and theirs.vocab_size <= rows
  ):
    return theirs, small  # Qwen2.5-VL's is Qwen2.5's; Qwen2's with more tokens
  image = family.marker.removeprefix(family.open).removesuffix(family.close)
  needed = list(
    dict.fromkeys(
      [*_token_keys(config, theirs).values(), family.open, image, family.close, *CHAT_SPECIALS]
    )
  )
  missing = [token for token in needed if ours.backend.token_to_id(token) is None]
  room = rows - ours.vocab_size
  if len(missing) > room:
    raise ValueError(
      f"{language}: its vocabulary lacks {missing}, and its embedding of {rows} rows has room "
      f"for {room} tokens more. Use a language model of the tower's own family (Qwen2.5 with "
      "Qwen2.5-VL, Qwen3 with Qwen3-VL), or one whose embedding is padded"
    )
  backend = tokenizers.Tokenizer.from_str(ours.to_json())
  backend.add_special_tokens(
    [tokenizers.AddedToken(token, special=True, normalized=False) for token in missing]
  )
  tokenizer = Tokenizer(backend, (backend.token_to_id("<|im_end|>"),))
  made = new_policy_files(tokenizer, family)
  settings = json.loads(made["tokenizer_config.json"])
  settings["chat_template"] = find_template(small) or default_template(family)
  extra = json_of(small, "tokenizer_config.json").get("extra_special_tokens")
  settings |= {"extra_special_tokens": extra} if isinstance(extra, dict) else {}
  made["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
  return tokenizer, {**{k: v for k, v in small.items() if k in _PIXEL_FILES}, **made}


def _config(
  config: dict, family: Family, text: dict, theirs: Tokenizer, tokenizer: Tokenizer, language: str
) -> dict:
  """config.json of the composed model."""
  kind, own = text["model_type"], family.text(config)
  as_said = DecoderConfig.from_hf(text)
  new = {k: text[k] for k in _TEXT_KEYS if k in text}
  new["tie_word_embeddings"] = as_said.tie_embeddings
  if own["model_type"] in _TEXT_MODELS:
    fitting = _TEXT_MODELS[own["model_type"]]
    if kind not in fitting or as_said.o_bias or as_said.rope_scaling:
      raise ValueError(
        f"{language}: model_type {kind!r} cannot be the decoder of {family.model_type}, which "
        f"takes {fitting[1:]} without biases of their own or scaled positions"
      )
    sections, half = DecoderConfig.from_hf(own).mrope_sections, as_said.head_dim // 2
    # the same shares, as near as it goes
    across = [section * half // sum(sections) for section in sections[1:]]
    rope = {
      "rope_type": "default",
      "rope_theta": as_said.rope_theta,
      "mrope_section": [half - sum(across), *across],
    }
    if as_said.head_dim * as_said.num_heads != as_said.hidden_size and not as_said.qk_norm:
      raise ValueError(
        f"{language}: {as_said.num_heads} heads of {as_said.head_dim} are not its width "
        f"{as_said.hidden_size}, as {family.model_type} asks"
      )
    interleaved = {"mrope_interleaved": True} if own["model_type"] == "qwen3_vl_text" else {}
    new |= {"model_type": own["model_type"], "rope_parameters": {**rope, **interleaved}}
    new.pop("attention_bias", None)
  else:
    new = {
      k: v for k, v in text.items() if k not in ("architectures", "torch_dtype", "dtype")
    } | new
  outer = {k: config[k] for k in _OUTER_KEYS if k in config}
  outer |= {k: tokenizer.id_of(token) for k, token in _token_keys(config, theirs).items()}
  if "out_hidden_size" in outer["vision_config"]:
    outer["vision_config"] = {**outer["vision_config"], "out_hidden_size": as_said.hidden_size}
  return {**outer, "text_config": new, "tie_word_embeddings": as_said.tie_embeddings}


class _ZeroBiases(Mapping):
  """A Llama's tensors, with biases of zero where Qwen2 has some."""

  def __init__(self, tensors: Mapping, cfg: DecoderConfig):
    self.tensors = tensors
    width = {
      "q": cfg.num_heads * cfg.head_dim,
      "k": cfg.num_kv_heads * cfg.head_dim,
      "v": cfg.num_kv_heads * cfg.head_dim,
    }
    self.zeros = {
      f"model.layers.{i}.self_attn.{name}_proj.bias": size
      for i in range(cfg.num_layers)
      for name, size in width.items()
    }

  def __getitem__(self, name: str) -> np.ndarray:
    return np.zeros(self.zeros[name], np.float32) if name in self.zeros else self.tensors[name]

  def shape_of(self, name: str) -> tuple[int, ...]:
    """A tensor's shape; nothing is read where the file tells."""
    if name in self.zeros:
      return (self.zeros[name],)
    of = getattr(self.tensors, "shape_of", None)
    return tuple(of(name)) if of else np.shape(self.tensors[name])

  def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor."""
    read = None if name in self.zeros else getattr(self.tensors, "read_part", None)
    return read(name, index) if read else np.asarray(self[name])[index]

  def __iter__(self) -> Iterator[str]:
    yield from self.tensors
    yield from self.zeros

  def __len__(self) -> int:
    return len(self.tensors) + len(self.zeros)
