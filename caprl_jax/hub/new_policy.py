"""An architecture and another model's tokenizer -> a captioner with random parameters."""

from collections.abc import Iterable
from typing import Any

import jax

from caprl_jax.config import schema as configuration
from caprl_jax.hub import hub_files
from caprl_jax.hub.load import Loaded, new_policy
from caprl_jax.hub.tokenizer import Tokenizer, compact_tokenizer, load_tokenizer

VISION_SPECIALS = (
  "<|vision_start|>",
  "<|vision_end|>",
  "<|vision_pad|>",
  "<|image_pad|>",
  "<|video_pad|>",
)


def policy_from_architecture(
  architecture: Any,
  preprocessor: Any | None,
  tokenizer: Tokenizer,
  *,
  seed: int,
  mesh: jax.sharding.Mesh,
) -> Loaded:
  """A new captioner of `architecture` (config.json) and `preprocessor` (preprocessor_config.json),
  whose sizes and ids are the tokenizer's. Raises ValueError as `PolicyConfig.from_hf`.
  """
  config = configuration.to_plain(architecture)
  config["text_config"]["vocab_size"] = tokenizer.vocab_size
  config["text_config"] |= {
    "bos_token_id": tokenizer.end_ids[-1],
    "eos_token_id": tokenizer.end_ids[0],
  }
  for name, token in (
    ("image_token_id", "<|image_pad|>"),
    ("video_token_id", "<|video_pad|>"),
    ("vision_start_token_id", "<|vision_start|>"),
    ("vision_end_token_id", "<|vision_end|>"),
  ):
    config[name] = tokenizer.id_of(token)
  return new_policy(
    config, configuration.to_plain(preprocessor or {}), tokenizer, jax.random.key(seed), mesh
  )


def shared_tokenizer(source: str, texts: Iterable[str] | None, instruction: str) -> Tokenizer:
  """The tokenizer of another model. With `texts`, a compact one: it keeps the tokens that these,
  the turn of `instruction` and images need. Raises ValueError for a model that is missing.
  """
  tokenizer = load_tokenizer(hub_files.resolve_model(source))
  if texts is None:
    return tokenizer
  turn = f"<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
  backend, _ = compact_tokenizer(tokenizer, sorted({turn, *texts}), list(VISION_SPECIALS))
  return Tokenizer(backend)
