"""What a family of vision-language models is to the rest of the package: one file, with one
`Family` in it.

A family's file holds its vision configuration (`VisionConfig` below says what it must offer), its
tower and its `FAMILY`; `families.py` lists them. CONTRIBUTING.md walks through adding one.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax

Array = jax.Array


@flax.struct.dataclass
class Features:
  """What a tower makes of a batch of images; padded units hold numbers that nobody reads."""

  main_BUD: Array  # takes the place of the image tokens' embeddings
  deep_XBUD: Array | None = None  # added to the output of the decoder's first X layers (DeepStack)


class Pixels(Protocol):
  """How pictures become patches: `image_processor.SmartResize` or `Tiles`."""

  patch_size: int

  def shape(self, height: int, width: int) -> tuple[int, int]: ...
  def patchify(self, image: Any) -> Any: ...


class VisionConfig(Protocol):
  """A tower's architecture, frozen and hashable."""

  pixels: Pixels
  in_channels: int
  slots_multiple: int  # an image's patch slots are a multiple of this

  def tower(self, name: str | None = None) -> nn.Module: ...  # Images -> Features


@dataclasses.dataclass(frozen=True)
class Keys:
  """What checkpoints call a model's parameters.

  A parameter's dotted path, after `renames`, is its checkpoint key: `kernel` is a transposed
  `weight`, `embedding` and `scale` are `weight`; what lives under one of `stacks` is stacked over
  the number that stands there.
  """

  # ours -> what writers have used; the first is what we write
  prefixes: tuple[tuple[str, tuple[str, ...]], ...]
  renames: tuple[tuple[str, str], ...] = ()  # regular expression on our path -> replacement
  stacks: tuple[str, ...] = ("layers", "blocks")
  # Tensors that a checkpoint may hold and no parameter needs: buffers that old writers saved.
  unused: str = r".*(rotary_emb|rotary_pos_emb)\.inv_freq|(.*\.)?position_ids"

  def candidates(self, path: str) -> tuple[list[str], bool]:
    """A parameter's checkpoint keys, `{}` standing for its number in a stack, and whether it is
    transposed there.
    """
    for pattern, replacement in self.renames:
      path = re.sub(pattern, replacement, path)
    head, _, leaf = path.rpartition(".")
    head, leaf = {
      "lm_head": (path, "weight"),
      "kernel": (head, "weight"),
      "embedding": (head, "weight"),
      "scale": (head, "weight"),
    }.get(leaf, (head, leaf))
    transposed = path.endswith(".kernel")
    key = f"{head}.{leaf}" if head else leaf
    for ours, theirs in self.prefixes:
      if key.startswith(ours):
        rest = re.sub(rf"(^|\.)({'|'.join(self.stacks)})\.", r"\1\2.{}.", key[len(ours) :], count=1)
        return [prefix + rest for prefix in theirs], transposed
    raise KeyError(path)


# Saved without its head, as `Qwen2Model`, a decoder has no prefix.
DECODER_KEYS = Keys((("lm_head.", ("lm_head.",)), ("", ("model.", ""))))


@dataclasses.dataclass(frozen=True)
class Family:
  """One family of captioners.

  vision: (config.json, preprocessor_config.json, overrides) -> VisionConfig.
  text: config.json -> the dict that `DecoderConfig.from_hf` reads.
  keys: of the whole model, whose parameters are `visual` and `language_model`.
  image_token: its key in config.json.
  marker: what the chat template writes for an image, and after_marker: after it.
  open, close: what the processor puts around its image tokens.
  projector: regular expression of the parameters between tower and decoder.
  adapt: (config, tensors) of another layout of the same models -> this one's.
  """

  model_type: str
  vision: Callable[..., VisionConfig]
  text: Callable[[dict], dict]
  keys: Keys
  projector: str
  image_token: str = "image_token_id"
  marker: str = "<|vision_start|><|image_pad|><|vision_end|>"
  after_marker: str = ""
  open: str = "<|vision_start|>"
  close: str = "<|vision_end|>"
  aliases: tuple[str, ...] = ()
  adapt: Callable[[dict, Mapping], tuple[dict, Mapping]] | None = None

  @property
  def decoder_keys(self) -> Keys:
    """Of the language model alone; the tower's tensors are left unread."""
    ours = "language_model."
    towers = [
      re.escape(name)
      for prefix, names in self.keys.prefixes
      if prefix.startswith("visual.")
      for name in names
    ]
    return dataclasses.replace(
      self.keys,
      prefixes=tuple(
        (prefix.removeprefix(ours), names)
        for prefix, names in self.keys.prefixes
        if prefix.startswith(ours)
      ),
      unused=rf"{self.keys.unused}|({'|'.join(towers)}).*",
    )
