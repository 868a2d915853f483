"""Name of a checkpoint -> model, parameters, tokenizer; and a captioner back to a Hugging Face
directory.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.hub import hub_files, weights
from caprl_jax.hub.chat_template import (
  default_template,
  find_template,
  prompt_pieces,
  prompt_texts,
  text_prompt,
)
from caprl_jax.hub.folders.pixels import PREPROCESSOR, PROCESSOR, processor_of
from caprl_jax.hub.folders.quantized import MergedTensors, Stored
from caprl_jax.hub.folders.text_files import json_of
from caprl_jax.hub.int8 import Int8, named, rounded_places, while_read, with_int8_cache
from caprl_jax.hub.lora import merge_lora, new_lora
from caprl_jax.hub.opened import open_captioner, open_decoder, read_processor
from caprl_jax.hub.tokenizer import Tokenizer, check_tokenizer, id_table, load_tokenizer
from caprl_jax.json_files import cut, shown
from caprl_jax.models.attention_choice import AttentionChoice, choose_attention
from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.family import Keys
from caprl_jax.models.layers import LoraConfig, to_int8
from caprl_jax.models.policy import NO_REMAT, Policy, PolicyConfig, Remat, limit_pixels
from caprl_jax.models.quantized.codes import BaseWeights, quantized_places
from caprl_jax.models.trainable import merge_trees, split_lora
from caprl_jax.progress import going_on
from caprl_jax.types import Images, Params, Prompts, Vocabulary

log = logging.getLogger("caprl_jax.hub")


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model with its parameters on the mesh. `config` and `preprocessor` are the checkpoint's JSON
  files, `files` its other small ones (tokenizer, chat template, ...) as they stand. `bare`: it is
  asked in ChatML with the turns that are given and no other, whatever its template would add.
  `stored`: where kernels are rounded, the checkpoint's own weights, which `save_policy` writes."""

  model: Any
  params: Params
  tokenizer: Tokenizer
  config: dict
  preprocessor: dict
  shardings: Any
  files: dict[str, bytes] = dataclasses.field(default_factory=dict, repr=False)
  bare: bool = False
  stored: Stored | None = dataclasses.field(default=None, repr=False)

  def prompt_pieces(
    self, instruction: str, system: str | None = None
  ) -> tuple[list[int], list[int]]:
    """Token ids before and after the image's, for a captioner asked `instruction`, by its own chat
    template.
    """
    template, special = self.chat_template()
    return prompt_pieces(
      template, self.model.cfg.family, self.tokenizer, instruction, special, system
    )

  def prompt_texts(self, instruction: str) -> tuple[str, str]:
    """What `prompt_pieces` are the token ids of."""
    template, special = self.chat_template()
    return prompt_texts(template, self.model.cfg.family, instruction, special)

  def text_prompt(self, instruction: str, system: str | None = None) -> list[int]:
    """Token ids of `instruction` without an image, by the checkpoint's own chat template."""
    template, special = self.chat_template()
    return text_prompt(template, self.tokenizer, instruction, special, system)

  def chat_template(self) -> tuple[str, dict[str, str]]:
    """The checkpoint's own template (a new model's is its family's), and the special tokens by the
    names that templates use (`bos_token`, ...).

    Raises:
      ValueError: a checkpoint without one, which transformers refuses too.
    """
    settings = json_of(self.files, "tokenizer_config.json")
    text = lambda token: token.get("content") if isinstance(token, dict) else token
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    said = {k: text(settings.get(k)) for k in names}
    special = {k: token for k, token in said.items() if token and isinstance(token, str)}
    template = None if self.bare else find_template(self.files)
    if template is None and not self.bare and self.files:
      raise ValueError(
        "the checkpoint has no chat template (chat_template.jinja, chat_template.json, or "
        "chat_template in tokenizer_config.json): how to ask it is not known, and transformers "
        "refuses it too. Copy the file from the checkpoint that this one was made from"
      )
    return template or default_template(self.model.cfg.family), special


def init_policy(cfg: PolicyConfig) -> Callable[[jax.Array], Any]:
  """key -> flax variables of a captioner; the inputs that the tower and the decoder are traced with
  are minimal.
  """
  S, E = cfg.vision.slots_multiple, cfg.vision.in_channels * cfg.vision.pixels.patch_size**2
  images = Images(
    jnp.zeros((1, S, E), jnp.uint8),
    jnp.zeros((1, S, 2), jnp.int32),
    jnp.ones((1, S), bool),
    jnp.zeros((1, 1), jnp.int32),
  )
  prompts = Prompts(
    jnp.zeros((1, 2), jnp.int32),
    jnp.ones((1, 2), bool),
    jnp.zeros((1, 3, 2), jnp.int32),
    jnp.zeros(1, jnp.int32),
  )
  return lambda key: Policy(cfg).init(key, images, prompts)


def init_decoder(cfg: DecoderConfig) -> Callable[[jax.Array], Any]:
  """key -> flax variables of a decoder."""

  def init(key):
    model = Decoder(cfg)
    tokens = jnp.zeros((1, 1), jnp.int32)
    run = lambda m, t: m(m.embed(t), t, jnp.ones(t.shape, bool))
    return model.init(key, tokens, method=run)

  return init


def _fill(
  init,
  keys: Keys,
  tensors,
  source,
  mesh,
  dtype,
  int8: bool = False,
  base_weights: BaseWeights | None = None,
) -> tuple[Params, Any]:
  try:
    boxed = sharding.abstract_params(lambda: init(jax.random.key(0)))
  # Sizes that contradict each other show as whatever the layers stumble over.
  except (ArithmeticError, AssertionError, IndexError, TypeError, ValueError) as error:
    raise ValueError(
      f"{source}: the sizes in config.json contradict each other "
      f"({type(error).__name__}: {cut(error, 200)}); take the file of the checkpoint that this one "
      "was made from"
    ) from error
  shardings = sharding.param_shardings(boxed, mesh)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nn.unbox(boxed))
  base, adapters = split_lora(abstract)
  base_shardings, adapter_shardings = split_lora(shardings)
  with going_on(f"loading {cut(source, 100)}"):
    each = while_read if int8 else None
    params = weights.params_from_tensors(
      base, tensors, keys, source, base_shardings, each, base_weights
    )
  if int8:
    params, shardings = named(params), rounded_places(shardings)
  params = merge_trees(params, new_lora(adapters, adapter_shardings))
  if base_weights:
    shardings = quantized_places(abstract, shardings, base_weights)
  return params, shardings


def load_judge(source: str, mesh: jax.sharding.Mesh, dtype=jnp.float32) -> Loaded:
  """Loads a text-only language model, or the decoder of a vision-language one, from whatever
  `hub_files.resolve_model` accepts. Raises ValueError for a checkpoint that is missing, damaged, of
  another family, or whose tokenizer has more ids than it has rows."""
  found = open_decoder(source)
  cfg = decoder_config(found.text, source, dtype=dtype)
  tokenizer = load_tokenizer(found.path)
  check_tokenizer(tokenizer, cfg.vocab_size, source)
  params, shardings = _fill(init_decoder(cfg), found.keys, found.tensors, source, mesh, dtype)
  return Loaded(Decoder(cfg), params, tokenizer, found.text, {}, shardings)


def decoder_config(text: dict, source: str, **overrides: Any) -> DecoderConfig:
  """Reads a decoder's settings. Raises ValueError where they lack one or are of an unknown
  kind."""
  try:
    return DecoderConfig.from_hf(text, **overrides)
  except KeyError as error:
    raise ValueError(
      f"{source}: config.json (model_type {text.get('model_type')!r}) lacks the key {error}; take "
      "the whole file of the checkpoint"
    ) from error
  except (ArithmeticError, TypeError, ValueError) as error:
    raise ValueError(f"{source}: config.json: {cut(error, 300)}") from error


def load_policy(
  source: str,
  mesh: jax.sharding.Mesh,
  dtype=jnp.float32,
  param_dtype=jnp.float32,
  remat: Remat = NO_REMAT,
  lora: LoraConfig | None = None,
  min_pixels: int | None = None,
  max_pixels: int | None = None,
  int8: Int8 = "none",
) -> Loaded:
  """Loads a captioner of any family from a Hugging Face directory or hub name. Raises ValueError as
  `load_judge`. `lora.base_weights`: its decoder's kernels are rounded to that as they are read.

  `int8`: what is rounded, for captions alone: the decoder's weights, its cache, or both.
  `min_pixels` and `max_pixels` take the place of the preprocessor's, and are written with the
  captioner: what sees smaller images while it is trained and asked is given them afterwards, too.
  """
  found = open_captioner(source)
  preprocessor = found.preprocessor()
  try:
    cfg = PolicyConfig.from_hf(found.config, preprocessor, dtype=dtype, remat=remat, lora=lora)
  except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
    raise ValueError(
      f"{source}: config.json or preprocessor_config.json: {cut(error, 300)}; take the files of "
      "the checkpoint that this one was made from"
    ) from error
  tokenizer = load_tokenizer(found.path)
  check_tokenizer(tokenizer, cfg.text.vocab_size, source)
  small = hub_files.read_small_files(found.path)
  empty = Loaded(Policy(cfg), {}, tokenizer, found.config, preprocessor, {}, small)
  empty = with_pixel_limits(empty, min_pixels, max_pixels)
  base_weights = lora.base_weights if lora else None
  params, shardings = _fill(
    init_policy(empty.model.cfg),
    found.keys,
    found.tensors,
    source,
    mesh,
    param_dtype,
    int8 in ("weights", "both"),
    base_weights,
  )
  model = with_int8_cache(empty.model) if int8 in ("cache", "both") else empty.model
  stored = Stored(found.tensors, found.keys, jnp.dtype(param_dtype)) if base_weights else None
  return dataclasses.replace(empty, model=model, params=params, shardings=shardings, stored=stored)


def rounded(loaded: Loaded, int8: Int8) -> Loaded:
  """The captioner with that of it rounded: as `load_policy` with `int8`, of one that is whole."""
  if int8 in ("weights", "both"):
    decoder = to_int8(loaded.params["language_model"])
    loaded = dataclasses.replace(
      loaded,
      params={**loaded.params, "language_model": decoder},
      shardings=rounded_places(loaded.shardings),
    )
  if int8 in ("cache", "both"):
    loaded = dataclasses.replace(loaded, model=with_int8_cache(loaded.model))
  return loaded


def load_pixels(source: str, min_pixels: int | None = None, max_pixels: int | None = None):
  """How a captioner cuts images into patches, `PolicyConfig.vision.pixels`, without its weights.
  Raises ValueError as `load_policy`."""
  return load_policy_config(source, min_pixels, max_pixels).vision.pixels


def load_policy_config(
  source: str, min_pixels: int | None = None, max_pixels: int | None = None
) -> PolicyConfig:
  """A captioner's sizes, without its weights. Raises ValueError as `load_policy`."""
  return limit_pixels(PolicyConfig.from_hf(*read_processor(source)), min_pixels, max_pixels)[0]


def with_pixel_limits(loaded: Loaded, min_pixels: int | None, max_pixels: int | None) -> Loaded:
  """The same captioner with other limits on image size (None: its own), which `save_policy` writes
  with it. One of a family that cuts images into tiles has no such limits and stays as it is."""
  cfg, notice = limit_pixels(loaded.model.cfg, min_pixels, max_pixels)
  if notice:
    log.warning("%s", notice)
  if cfg is loaded.model.cfg:
    return loaded
  pixels = cfg.vision.pixels
  # Both spellings: transformers reads either, and its older versions one of them.
  said = {
    "min_pixels": pixels.min_pixels,
    "max_pixels": pixels.max_pixels,
    "size": {"shortest_edge": pixels.min_pixels, "longest_edge": pixels.max_pixels},
  }
  return dataclasses.replace(
    loaded,
    model=Policy(cfg),
    preprocessor={**loaded.preprocessor, **said},
    files=hub_files.change_preprocessor(loaded.files, said),
  )


def without_adapters(loaded: Loaded) -> Loaded:
  """The same captioner with its adapters merged into the matrices that they adapt."""
  cfg = loaded.model.cfg
  if cfg.text.lora is None:
    return loaded
  return dataclasses.replace(
    loaded,
    model=Policy(dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, lora=None))),
    params=merge_lora(loaded.params, cfg.text.lora),
    shardings=split_lora(loaded.shardings)[0],
  )


def with_new_adapters(loaded: Loaded, lora: LoraConfig, mesh: jax.sharding.Mesh) -> Loaded:
  """The same captioner, which has none, with adapters as they begin."""
  cfg = loaded.model.cfg
  cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, lora=lora))
  init = init_policy(cfg)
  boxed = sharding.abstract_params(lambda: init(jax.random.key(0)))
  shardings = sharding.param_shardings(boxed, mesh)
  adapters = new_lora(split_lora(nn.unbox(boxed))[1], split_lora(shardings)[1])
  params = merge_trees(loaded.params, adapters)
  return dataclasses.replace(loaded, model=Policy(cfg), params=params, shardings=shardings)


def with_attention(
  loaded: Loaded, wanted: AttentionChoice, mesh: jax.sharding.Mesh, name: str
) -> Loaded:
  """The same model with the attention that is asked for; logs what must be said. `name`: of the
  model, for messages. Raises ValueError as `choose_attention`."""
  if wanted == "xla":  # as it was loaded
    return loaded
  platform = mesh.devices.flat[0].platform
  cfg, notice = choose_attention(loaded.model.cfg, wanted, platform, name)
  if notice:
    log.info("%s", notice)
  return dataclasses.replace(loaded, model=type(loaded.model)(cfg))


def new_policy(
  config: dict, preprocessor: dict, tokenizer: Tokenizer, key: jax.Array, mesh: jax.sharding.Mesh
) -> Loaded:
  """A captioner with random parameters from config.json and preprocessor_config.json contents."""
  cfg = PolicyConfig.from_hf(config, preprocessor)
  check_tokenizer(tokenizer, cfg.text.vocab_size, "the new policy")
  init = init_policy(cfg)
  shardings = sharding.param_shardings(sharding.abstract_params(lambda: init(key)), mesh)
  params = jax.jit(lambda k: nn.unbox(init(k)["params"]), out_shardings=shardings)(key)
  return Loaded(Policy(cfg), params, tokenizer, config, preprocessor, shardings)


def new_policy_files(tokenizer: Tokenizer, family) -> dict[str, bytes]:
  """Tokenizer and generation files for a captioner that came from no checkpoint."""
  end = tokenizer.end_ids
  tokenizer_config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": default_template(family),
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "extra_special_tokens": {
      "image_token": "<|image_pad|>",
      "video_token": "<|video_pad|>",
      "vision_bos_token": "<|vision_start|>",
      "vision_eos_token": "<|vision_end|>",
    },
  }
  generation = {
    "eos_token_id": list(end),
    "pad_token_id": end[-1],
    "do_sample": True,
    "temperature": 1.0,
  }
  return {
    "tokenizer.json": tokenizer.to_json().encode(),
    "tokenizer_config.json": json.dumps(tokenizer_config, indent=2).encode(),
    "generation_config.json": json.dumps(generation, indent=2).encode(),
  }


def save_policy(
  path: str | pathlib.Path,
  loaded: Loaded,
  params: Params,
  dtype=None,
  max_shard_bytes: int = 5_000_000_000,
  card: str | None = None,
) -> None:
  """Writes a directory that transformers, vLLM and `load_policy` read. `dtype` casts the
  parameters; adapters are merged into the matrices that they adapt, where these are rounded into
  the checkpoint's own; `card` becomes README.md. All processes call it, the first one writes."""
  family, lora = loaded.model.cfg.family, loaded.model.cfg.text.lora
  if loaded.stored is not None:
    tensors = MergedTensors(loaded.stored, params, lora, dtype)
    stored_dtype = loaded.stored.dtype
  else:
    params = merge_lora(params, lora)
    tensors = weights.TensorsOfParams(params, family.keys, dtype)
    stored_dtype = jax.tree.leaves(params)[0].dtype
  if jax.process_index() > 0:
    if loaded.stored is None:
      for name in tensors:
        tensors[name]  # its part in gathering them  # pylint: disable=pointless-statement
    return
  config = {**loaded.config, "dtype": np.dtype(dtype or stored_dtype).name}
  config.pop("torch_dtype", None)  # the same under its old name
  small = loaded.files or new_policy_files(loaded.tokenizer, family)
  small = {**small, **({"README.md": card.encode()} if card else {})}
  if not json_of(small, PREPROCESSOR) and not json_of(small, PROCESSOR).get("image_processor"):
    said = {**processor_of(loaded.model.cfg.vision), **loaded.preprocessor}
    small[PREPROCESSOR] = json.dumps(said, indent=2).encode()
  with going_on(f"writing {path}"):
    hub_files.write_directory(
      path, config, tensors, tokenizer_files=small, max_shard_bytes=max_shard_bytes
    )


def relate_vocabularies(
  policy: Tokenizer, judge: Tokenizer, vocab_size: int
) -> tuple[Vocabulary, int]:
  """Which ids the policy may write and what they are to the judge, and how many of its text tokens
  the judge lacks.

  Where it lacks any, the table is of no use: captions have to be translated (`retokenise.py`).

  Args:
    vocab_size: rows of the policy's embedding; rows beyond the tokenizer are never sampled.

  Raises:
    ValueError: the policy has no end token.
  """
  table = np.full(vocab_size, -1, np.int32)
  ids = id_table(policy, judge, require_all=False)
  table[: len(ids)] = ids
  if not policy.end_ids:
    raise ValueError(
      "the policy's tokenizer has no end token (<|im_end|>, <|endoftext|> or eos_token_id)"
    )
  text = np.zeros(vocab_size, bool)
  text[[i for i in policy.backend.get_vocab().values() if i not in policy.special_ids]] = True
  absent = int((text & (table < 0)).sum())
  allowed = text.copy()
  ends = tuple(end for end in policy.end_ids if end < vocab_size)
  if not ends:
    raise ValueError(
      f"the policy's end tokens {shown(policy.end_ids)} are beyond its {vocab_size} tokens; take "
      "config.json, generation_config.json and the tokenizer of one model"
    )
  allowed[list(ends)] = True
  return Vocabulary(jnp.asarray(allowed), jnp.asarray(table), ends, ends[-1]), absent
