"""Name of a model -> what loading it takes: settings without gaps, tensors, and their names."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from caprl_jax.hub import hub_files, weights
from caprl_jax.hub.folders.numbers import check_numbers
from caprl_jax.hub.folders.pixels import complete_processor
from caprl_jax.hub.folders.settings import complete_text, complete_vision
from caprl_jax.hub.tokenizer import load_tokenizer
from caprl_jax.models.families import family_of, is_vision_language
from caprl_jax.models.family import DECODER_KEYS, Family, Keys

_IMAGE_TOKEN = "<IMG_CONTEXT>"  # of InternVL's own layout


@dataclasses.dataclass(frozen=True)
class Opened:
  """A checkpoint whose files were found and read, but for the weights.

  config: config.json as the family's `adapt` gives it, and true of the weights.
  text: the decoder's part of it.
  keys: of the whole model, or of the decoder alone.
  family: None of a text-only model.
  """

  path: pathlib.Path
  config: dict[str, Any]
  text: dict[str, Any]
  tensors: Mapping[str, Any]
  keys: Keys
  family: Family | None

  @property
  def captioner(self) -> Family:
    """The family of a captioner. Raises ValueError for a text-only model."""
    return self.family or family_of(self.config)

  def preprocessor(self) -> dict[str, Any]:
    """The image processor's settings. Raises ValueError as `complete_processor`."""
    return complete_processor(hub_files.read_preprocessor(self.path), self.config, self.path)


def open_captioner(source: str) -> Opened:
  """A captioner's files.

  Raises:
    ValueError: as `hub_files.resolve_model`, `hub_files.read_directory` and `settings`; or the
      model is of no family.
  """
  path = hub_files.resolve_model(source)
  config, tensors = hub_files.read_directory(path)
  config, tensors, family = _adapted(config, tensors, path)
  return _settled(path, config, tensors, family.keys, family)


def open_decoder(source: str) -> Opened:
  """A text-only model's files, or the decoder's of a captioner. Raises ValueError as
  `open_captioner`; a `.gguf` file will do.
  """
  path = hub_files.resolve_model(source)
  config, tensors = hub_files.read_model(path)
  if not is_vision_language(config):
    check_numbers(config, path)
    return _settled(path, config, tensors, DECODER_KEYS, None)
  config, tensors, family = _adapted(config, tensors, path)
  return _settled(path, config, tensors, family.decoder_keys, family)


def read_processor(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """config.json and the image processor's settings of a captioner, of which no weights are there.
  Raises ValueError as `open_captioner`.
  """
  path = hub_files.resolve_model(source)
  config, _, family = _adapted(hub_files.read_config(path), {}, path)
  config = complete_vision(_completed(config, family, path), path)
  return config, complete_processor(hub_files.read_preprocessor(path), config, path)


def _adapted(
  config: dict[str, Any], tensors: Mapping, path: pathlib.Path
) -> tuple[dict[str, Any], Mapping, Family]:
  try:
    family = family_of(config)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  check_numbers(config, path)
  if family.adapt is None:
    return config, tensors, family
  try:
    config, tensors = family.adapt(_with_image_token(config, path), tensors)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return config, tensors, family


def _with_image_token(config: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """A config of InternVL's own layout that says which token stands for the image, as its tokenizer
  does."""
  if config.get("model_type") != "internvl_chat" or config.get("img_context_token_id") is not None:
    return config
  token_id = load_tokenizer(path).backend.token_to_id(_IMAGE_TOKEN)
  if token_id is None:
    raise ValueError(
      f"the tokenizer has no {_IMAGE_TOKEN}, and config.json no img_context_token_id; copy the "
      "tokenizer's files from the checkpoint that this one was made from"
    )
  return config | {"img_context_token_id": token_id}


def _completed(config: dict[str, Any], family: Family | None, path: pathlib.Path) -> dict[str, Any]:
  """config.json with the decoder's settings in it that it leaves open."""
  if family is None:
    return complete_text(config, path)
  said = _text(config, family, path)
  new = {k: v for k, v in complete_text(said, path).items() if said.get(k) != v}
  if isinstance(config.get("text_config"), Mapping):
    return {**config, "text_config": {**config["text_config"], **new}} if new else config
  return {**config, **new}


def _text(config: dict[str, Any], family: Family, path: pathlib.Path) -> dict[str, Any]:
  try:
    return family.text(config)
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"{path}: config.json (model_type {family.model_type!r}) has no usable text_config; take the "
      "whole file of the checkpoint"
    ) from error


def _check_widths(config: dict[str, Any], family: Family | None, path: pathlib.Path) -> None:
  """Raises ValueError for a tower whose features do not fit the decoder."""
  if family is None or config["vision_config"].get("out_hidden_size") is None:
    return
  out, width = config["vision_config"]["out_hidden_size"], family.text(config).get("hidden_size")
  if out != width:
    raise ValueError(
      f"{path}: out_hidden_size = {out} in vision_config of config.json, but the decoder's "
      f"hidden_size is {width}; take the whole file of one checkpoint"
    )


def _settled(
  path: pathlib.Path,
  config: dict[str, Any],
  tensors: Mapping,
  keys: Keys,
  family: Family | None,
) -> Opened:
  config = _completed(config, family, path)
  config = complete_vision(config, path) if family else config
  inner = config.get("text_config")
  _check_widths(config, family, path)
  hint = bool(isinstance(inner, Mapping) and inner.get("tie_word_embeddings"))
  text = family.text(config) if family else config
  says = bool(text.get("tie_word_embeddings"))
  tied, tensors = weights.settle_tie(says, hint, tensors, keys, str(path))
  if tied != says:
    config = {**config, "tie_word_embeddings": tied}
    if isinstance(inner, Mapping):
      config["text_config"] = {**inner, "tie_word_embeddings": tied}
    text = {**text, "tie_word_embeddings": tied}
  return Opened(path, config, text, tensors, keys, family)
