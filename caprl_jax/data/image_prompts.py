"""Prompt token ids and an image's grid -> padded prompt with M-RoPE positions. Host code, numpy
only.
"""

import dataclasses

import numpy as np

from caprl_jax.types import Prompts


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One unpadded prompt: `tokens` int32 [P], `position` int32 [3, P], and where the caption goes
  on.
  """

  tokens: np.ndarray
  position: np.ndarray
  next_position: int


def build_prompt(
  before: list[int],
  grid_units: tuple[int, int],
  after: list[int],
  image_token: int,
  mrope: bool = True,
) -> Prompt:
  """Text, one image of rows x columns tokens, text; without `mrope`, every token is one further
  than the last.

  Text advances all three positions together; image tokens keep the time of their first and count
  rows and columns; text after the image goes on from the largest position used (Qwen2-VL, arXiv
  2409.12191).
  """
  rows, columns = grid_units
  start = len(before)
  tokens = np.concatenate([before, np.full(rows * columns, image_token), after]).astype(np.int32)
  if not mrope:
    return Prompt(
      tokens, np.broadcast_to(np.arange(len(tokens), dtype=np.int32), (3, len(tokens))), len(tokens)
    )
  row, column = np.divmod(np.arange(rows * columns), columns)
  image = np.stack([np.zeros_like(row), row, column]) + start
  resume = start + max(rows, columns)
  text = lambda count, first: np.broadcast_to(np.arange(count) + first, (3, count))
  position = np.concatenate([text(start, 0), image, text(len(after), resume)], axis=1).astype(
    np.int32
  )
  return Prompt(tokens, position, resume + len(after))


def stack_prompts(prompts: list[Prompt], length: int) -> Prompts:
  """Pads prompts on the right to `length` tokens. Raises ValueError when one is longer."""
  longest = max(len(p.tokens) for p in prompts)
  if longest > length:
    raise ValueError(
      f"a prompt has {longest} tokens (image included), more than the {length} that its batch has "
      "room for, and cutting it would cut its image; if the image's file has changed since the "
      "sizes were read, begin again"
    )
  pad = lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])
  return Prompts(
    tokens_BP=np.stack([pad(p.tokens) for p in prompts]),
    valid_BP=np.stack([np.arange(length) < len(p.tokens) for p in prompts]),
    position_B3P=np.stack([pad(p.position) for p in prompts]),
    next_position_B=np.array([p.next_position for p in prompts], np.int32),
  )
