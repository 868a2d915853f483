"""Sizes of a step -> the arithmetic that it needs, by stage. Pure: numbers in, numbers out.

Needed is what the written captions call for: image and prompt once per image, the judge's prompt
once, every caption's own tokens once, and no padding. What a program executes on top of that is in
`executed`.

Letters as in `types.py`. FLOPs count a multiplication and an addition each.
"""

import dataclasses
import math

import numpy as np

from caprl_jax.models.decoder import DecoderConfig
from caprl_jax.models.quantized.codes import BLOCK


@dataclasses.dataclass(frozen=True)
class Tower:
  """A vision tower and one image.

  per_patch: weights that each patch passes through, over all layers.
  per_unit: weights that each merge unit passes through, on the way to the decoder.
  width: of queries, over all heads.
  pairs: patches that an image's patches see, together and over all layers.
  patches, units: slots of an image.
  """

  per_patch: int
  per_unit: int
  width: int
  pairs: int
  patches: int
  units: int

  def flops(self) -> float:
    """Of a forward pass over one image."""
    products = self.per_patch * self.patches + self.per_unit * self.units
    return 2.0 * products + 4.0 * self.width * self.pairs


@dataclasses.dataclass(frozen=True)
class Asked:
  """What the judge is shown about one caption.

  head: tokens of its prompt before the caption, run once for all.
  questions: presentations per caption, each run once.
  tokens: of each: question and listed options, or the question alone.
  branches: runs after each, one per option, where options are read word by word, and
    branch_tokens: of each.
  logits: tokens per presentation whose logits are made.
  answer_tokens: that the judge writes per presentation, at most.
  images: the prompt in front of captions holds an image: it runs once per image, by this tower.
  """

  head: int
  questions: int
  tokens: int
  branches: int = 0
  branch_tokens: int = 0
  logits: int = 1
  answer_tokens: int = 0
  blind: bool = False
  images: Tower | None = None


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step.

  prompt: P, image tokens included.
  length_BG: tokens of each caption, int.
  text, judge: the decoders.
  asked: None, as `judge`, where no judge is on the chips.
  learned: images that are learned from, of those that are captioned.
  trained: which of the captioner's weights have a gradient: tower and decoder.
  layer_item: bytes of a weight of the captioner's layers while captions are written.
  """

  tower: Tower
  text: DecoderConfig
  prompt: int
  length_BG: np.ndarray
  judge: DecoderConfig | None
  asked: Asked | None
  learned: int
  trained: tuple[bool, bool] = (True, True)
  layer_item: int = 2

  @property
  def images(self) -> int:
    return len(self.length_BG)

  @property
  def tokens(self) -> int:
    """That are written."""
    return int(self.length_BG.sum())


def decoder_flops(cfg: DecoderConfig, tokens: float, pairs: float) -> float:
  """Of a forward pass over so many tokens, which see `pairs` tokens in all; no unembedding."""
  return 2.0 * layer_weights(cfg) * tokens + 4.0 * cfg.num_layers * cfg.num_heads * (
    cfg.head_dim * pairs
  )


def layer_weights(cfg: DecoderConfig) -> int:
  """Weights of the matrices of all layers, adapters not counted."""
  heads, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
  return cfg.num_layers * cfg.hidden_size * (2 * heads + 2 * kv + 3 * cfg.intermediate_size)


def head_flops(cfg: DecoderConfig, tokens: float) -> float:
  """Of the logits of so many tokens."""
  return 2.0 * cfg.vocab_size * cfg.hidden_size * tokens


def draw_lengths(images: int, group: int, mean: float, limit: int) -> np.ndarray:
  """Captions' lengths as they are planned with, int [images, group]: log-normal with this mean
  before they are cut at the limit, their logarithms' deviation 0.6 and half of its square common to
  an image's captions."""
  rng, sigma = np.random.default_rng(0), 0.6
  noise = math.sqrt(0.5) * (rng.normal(size=(images, 1)) + rng.normal(size=(images, group)))
  drawn = np.exp(math.log(mean) - sigma**2 / 2 + sigma * noise)
  return np.clip(np.round(drawn), 1, limit).astype(int)


@dataclasses.dataclass(frozen=True)
class Forward:
  """FLOPs of the captioner's pass over a step, by part."""

  tower: float
  prompt: float
  captions: float
  head: float

  def total(self) -> float:
    return self.tower + self.prompt + self.captions + self.head


def forward(step: Step) -> Forward:
  """The captioner's pass: each image and prompt once, each caption's tokens once after them."""
  B, P = step.images, step.prompt
  n = step.length_BG.astype(float)
  run = np.maximum(n - 1, 0)  # a caption's last token never runs
  pairs = (run * P + run * (run + 1) / 2).sum()
  return Forward(
    B * step.tower.flops(),
    decoder_flops(step.text, B * P, B * P * (P + 1) / 2),
    decoder_flops(step.text, run.sum(), pairs),
    # The first token's logits are the prompt's own, once for a group.
    head_flops(step.text, n.sum() - n.size + B),
  )


def learned(step: Step) -> Step:
  """The part of a step that is learned from."""
  return dataclasses.replace(step, length_BG=step.length_BG[: step.learned])


def judge_flops(step: Step) -> float:
  """The judge's prompt once (or once per image), each caption once after it, each presentation once
  after its caption, with the tokens that the judge writes. 0 without a judge."""
  a, cfg = step.asked, step.judge
  if a is None or cfg is None:
    return 0.0
  n = step.length_BG.astype(float).ravel()
  if a.blind:
    n = np.concatenate([n, np.zeros(step.images)])
  heads = step.images if a.images else 1
  seen = n + a.head
  asked = a.tokens * seen + a.tokens * (a.tokens + 1) / 2
  asked += a.branches * a.branch_tokens * (seen + a.tokens + (a.branch_tokens + 1) / 2)
  asked += a.answer_tokens * (seen + a.tokens + (a.answer_tokens + 1) / 2)
  each = a.tokens + a.branches * a.branch_tokens + a.answer_tokens
  pairs = (n * a.head + n * (n + 1) / 2 + a.questions * asked).sum()
  total = decoder_flops(
    cfg,
    heads * a.head + n.sum() + n.size * a.questions * each,
    heads * a.head * (a.head + 1) / 2 + pairs,
  )
  total += head_flops(cfg, n.size * a.questions * (a.logits + a.answer_tokens))
  return total + (heads * a.images.flops() if a.images else 0.0)


def needed(step: Step) -> dict[str, float]:
  """FLOPs that the captions call for, by stage."""
  once, (tower, decoder) = forward(learned(step)), step.trained
  # Backward: the activations' gradients cost one pass, the weights' another; a tower that is not
  # trained has neither.
  update = once.tower * (3 if tower else 1)
  update += (once.prompt + once.captions + once.head) * (3 if decoder else 2)
  return {"rollout": forward(step).total(), "judge": judge_flops(step), "update": update}


def slot_bytes(cfg: DecoderConfig) -> int:
  """Of a token's keys and values, over all layers, in two bytes a number."""
  return 2 * 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim


def weight_bytes(cfg: DecoderConfig, layer_item: int = 2) -> float:
  """Of what each decoded token multiplies with: the layers' matrices, in so many bytes a number
  where they are not rounded under adapters, and the unembedding, in two."""
  return matrix_bytes(cfg, layer_item) + 2 * cfg.vocab_size * cfg.hidden_size


def matrix_bytes(cfg: DecoderConfig, layer_item: int = 2) -> float:
  """Of the layers' matrices as they are stored: rounded under adapters, or in so many bytes a
  number."""
  kind = cfg.lora.base_weights if cfg.lora else None
  each = layer_item if kind is None else 1 if kind == "int8" else 0.5 + 2 / BLOCK
  return each * layer_weights(cfg)


def widened_bytes(cfg: DecoderConfig) -> int:
  """Of a rounded layer's matrices, in bfloat16 while it runs; 0 where none is rounded."""
  rounded = cfg.lora is not None and cfg.lora.base_weights is not None
  return 2 * layer_weights(cfg) // cfg.num_layers if rounded else 0


def decode_bytes(step: Step, parts: int = 1) -> float:
  """Bytes that decoding must read where the batch is split into parts: each reads the weights once
  a token of its longest caption, an image's keys once a token of its group's longest, a caption's
  own as long as it is written."""
  if parts > 1:
    share = step.length_BG[: max(step.images // parts, 1)]
    return parts * decode_bytes(dataclasses.replace(step, length_BG=share))
  n, slot = step.length_BG.astype(float), slot_bytes(step.text)
  own = slot * (n * (n - 1) / 2).sum()
  weights = weight_bytes(step.text, step.layer_item)
  return float(weights * n.max() + slot * step.prompt * n.max(1).sum() + own)
