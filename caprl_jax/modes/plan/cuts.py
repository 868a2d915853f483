"""How a step is cut on a mesh: into which parts, pieces and blocks, and what of that runs. Pure."""

import dataclasses

import numpy as np

from caprl_jax.models.decoder import DecoderConfig
from caprl_jax.rl import judge as judging
from caprl_jax.rl import sampling
from caprl_jax.rl.rollout import MOST_PATCHES, block_slots


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis, all of them known (`sharding.mesh_sizes`)."""

  data: int
  fsdp: int
  tensor: int

  @property
  def parts(self) -> int:
    """Of a batch."""
    return self.data * self.fsdp

  @property
  def chips(self) -> int:
    return self.parts * self.tensor


@dataclasses.dataclass(frozen=True)
class Decoding:
  """Rounds of the decode loop on one device.

  rows, slots: of each part of the loop, the rows that run and the slots of their caches, as many
    times as `rounds` says; own: of a chunk, whose rows have a copy of their image's keys each.
  """

  rows: tuple[int, ...]
  slots: tuple[int, ...]
  rounds: tuple[int, ...]
  own: tuple[bool, ...]


def chunk_rows(share: int, chunks: int) -> int:
  """Rows that go on together once most captions of a device have ended, of `share`."""
  return max(-(-share // chunks), min(share, sampling.SMALLEST_CHUNK))


def decoding(length_BG: np.ndarray, limit: int, chunks: int) -> Decoding:
  """How the captions of one device are written: all rows on the trunk's caches, then those that are
  left in chunks.

  Args:
    length_BG: tokens of the captions of a device's images.
    limit: slots of the longest cache.
  """
  n = length_BG.ravel()
  trunk, stages = sampling.cache_stages(limit)
  leave = chunk_rows(n.size, chunks) if stages else 0
  ordered = np.sort(n)[::-1]
  end = min(trunk[-1], int(ordered[leave]) if leave < n.size else 0)
  found: list[tuple[int, int, int, bool]] = []

  def add(rows: int, stages: tuple[int, ...], begin: int, end: int, own: bool) -> None:
    for slots in stages:
      if begin < min(slots, end):
        found.append((rows, slots, min(slots, end) - begin, own))
        begin = min(slots, end)

  add(n.size, trunk, 0, end, False)
  if stages:
    left = n[n > end]
    for first in range(0, left.size, leave):
      add(leave, stages, end, int(left[first : first + leave].max()), True)
  rows, slots, rounds, own = zip(*found, strict=True) if found else ((), (), (), ())
  return Decoding(rows, slots, rounds, own)


def prefill_images(share: int, patches: int) -> int:
  """Images that a device encodes at once before captions are written, of `share`."""
  counts = (n for n in range(1, share + 1) if share % n == 0)
  return next((share // n for n in counts if share * patches <= n * MOST_PATCHES), 1)


@dataclasses.dataclass(frozen=True)
class Packed:
  """The update's rows of packed captions.

  images: of a piece on one device. slots: of a row. size: of a block.
  blocks: that a piece runs, the mean over pieces.
  """

  images: int
  slots: int
  size: int
  blocks: float

  @property
  def in_blocks(self) -> bool:
    return self.slots > self.size


def packed(
  length_BG: np.ndarray, limit: int, parts: int, pieces: int, cfg: DecoderConfig
) -> Packed:
  """Groups of like lengths share a piece, which runs as many blocks as its longest group needs on
  any device.

  Args:
    length_BG: of all images that are learned from.
    pieces: minibatches times microbatches.
  """
  B, G = length_BG.shape
  slots = max(G * (limit - 1), 1)
  images = max(B // parts // pieces, 1)
  size = block_slots(slots, images, cfg)
  whole = np.maximum(length_BG - 1, 0).sum(1)[: parts * images * pieces]
  totals = np.sort(whole.reshape(parts, -1), axis=1).reshape(parts, -1, images)
  blocks = np.ceil(totals.max(axis=(0, 2)) / size) if slots > size else np.ones(1)
  return Packed(images, slots, size, float(blocks.mean()))


@dataclasses.dataclass(frozen=True)
class Judged:
  """The judge's pieces: captions of each on one device, how many there are, and the slots that a
  piece runs of each caption, the mean over pieces."""

  rows: int
  pieces: int
  slots: float


def judged(length_BG: np.ndarray, limit: int, parts: int, microbatches: int, blind: bool) -> Judged:
  """Captions of like lengths share a piece, whatever their image, and each runs in blocks as far as
  its longest one goes."""
  n = length_BG.ravel()
  if blind:
    n = np.concatenate([n, np.zeros(len(length_BG), int)])
  share = max(n.size // parts, 1)
  if limit >= 2 * judging.SMALLEST_CAPTION:
    microbatches = max(microbatches, min(8 * microbatches, share // judging.SMALLEST_PIECE))
  rows = -(-share // min(microbatches, share))
  pieces = -(-share // rows)
  block = -(-limit // min(max(limit // judging.SMALLEST_CAPTION, 1), judging.MOST_BLOCKS))
  one = np.sort(n[:share])
  longest = [one[i : i + rows].max() for i in range(0, share, rows)]
  return Judged(rows, pieces, float(np.mean([-(-x // block) * block for x in longest])))
