"""Images -> signatures -> near-duplicates, and images like those of a benchmark.

A signature has three parts, and two images are alike when all three are near:

  hash    64 bits, the package ImageHash's `phash` of the grey image: which of its coarsest
          frequencies are strong. It survives compression, scaling, small crops and changes of
          brightness, and is what is searched for.
  fine    256 bits, the same with more frequencies: pages of text and charts in one layout share
          the coarse ones.
  colors  mean colours of 4x4 fields, compared after the brighter image is dimmed to the other's
          brightness (by 30% at most): a red and a blue circle in one place have the same hashes.

Flat images, whose frequencies are noise, all have hash 0 and differ by colour and brightness alone.

Measured at the default limits. Found again, of 216 parts of 24 photographs and scans, of 200
easy-VQA images (64x64) and of 60 bar charts: JPEG at quality 60 1.00, 0.99, 1.00; half size 1.00,
1.00, 1.00; brightness 0.8 1.00, 0.99, 1.00; brightness 1.2, which clips white, 0.87, 0.99, 0.57; 2%
cut off every side 0.85, 0.82, 1.00, off two sides 0.91, 0.74, 1.00 (of pages of text a quarter).
Falsely alike: of 1000 easy-VQA images 8 would go, 7 of them for one with its colour, shape and
nearly its place; no part of a photograph for a part of another; of 150 random charts or pages in
one layout 0 bar charts, 1 line chart, 6 pages of text (94 at 6 of 64 bits without `fine`).
"""

import array
import dataclasses
import functools
import itertools
import re
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

Key = TypeVar("Key", bound=Hashable)

DEFAULT_BITS = 10  # of 64
DEFAULT_FINE_BITS = 48  # of 256
DEFAULT_COLOR = 20  # of 255

_FIELDS = 4
_LEAST_DIMMING = 0.7
_FLAT_RANGE = 8  # grey levels
# so many bands that 11 bits apart is 1 in some band; no more: buckets get large
_BAND_BITS = (11, 11, 11, 11, 10, 10)


@dataclasses.dataclass(frozen=True)
class Signature:
  """hash: 64 bits. fine: 256 bits. colors: mean red, green and blue, 0 to 255, of 4x4 fields, row
  by row.
  """

  hash: int
  fine: int
  colors: bytes


@dataclasses.dataclass(frozen=True)
class Limits:
  """How far apart alike images may be at most: bits of both hashes, and levels of any colour of any
  field.
  """

  bits: int = DEFAULT_BITS
  fine_bits: int = DEFAULT_FINE_BITS
  color: int = DEFAULT_COLOR


def perceptual_hash(image: Image.Image, side: int = 8) -> int:
  """The image's hash as an unsigned integer of side x side bits.

  0 for a flat image: fewer than 8 grey levels between the 32x32 fields of it.

  Raises:
    ValueError: the package ImageHash is not installed.
  """
  try:
    import imagehash
  except ImportError as error:
    raise ValueError(
      "near-duplicates are found with the package ImageHash, which cannot be "
      f"imported ({error}); run `pip install ImageHash`"
    ) from error
  gray = image.convert("RGB").convert("L")
  low, high = gray.resize((32, 32), Image.Resampling.BOX).getextrema()
  if high - low < _FLAT_RANGE:
    return 0
  return int.from_bytes(np.packbits(imagehash.phash(gray, side).hash).tobytes(), "big")


def signature_of(image: Image.Image) -> Signature:
  """Raises as `perceptual_hash`."""
  fields = image.convert("RGB").resize((_FIELDS, _FIELDS), Image.Resampling.BOX)
  return Signature(perceptual_hash(image), perceptual_hash(image, 16), np.asarray(fields).tobytes())


def to_json(signature: Signature) -> str:
  """A signature as text of 176 hexadecimal digits."""
  return f"{signature.hash:016x}{signature.fine:064x}{signature.colors.hex()}"


def from_json(text: str) -> Signature:
  """What `to_json` wrote. Raises ValueError for anything else."""
  if not isinstance(text, str) or not re.fullmatch(r"[0-9a-f]{176}", text):
    raise ValueError(f"{text!r} is no image signature; compute it anew")
  return Signature(int(text[:16], 16), int(text[16:80], 16), bytes.fromhex(text[80:]))


class HashIndex(Generic[Key]):
  """64-bit hashes, found again within a Hamming distance, exactly.

  Hashes are kept by each of their six bands of 10 or 11 bits: of two hashes at most d bits apart at
  least one band is at most d / 6 bits apart, so the few values of a band that near are looked up
  and what lies there is compared. Up to 11 bits that takes less than a millisecond among a million
  random hashes; beyond, and among few, all are compared.
  """

  def __init__(self):
    self._keys: list[Key] = []
    self._hashes = array.array("Q")
    # A bucket: the hashes with one value of a band, and their numbers.
    self._bands: list[dict[int, tuple[array.array[int], array.array[int]]]] = [
      {} for _ in _BAND_BITS
    ]

  def __len__(self) -> int:
    return len(self._keys)

  def add(self, value: int, key: Key) -> None:
    """Adds a hash under `key`; both may come more than once."""
    for band, part in zip(self._bands, _parts(value)):
      hashes, numbers = band.get(part) or band.setdefault(
        part, (array.array("Q"), array.array("Q"))
      )
      hashes.append(value)
      numbers.append(len(self))
    self._hashes.append(value)
    self._keys.append(key)

  def find(self, value: int, max_distance: int) -> Key | None:
    """The key first added of a hash at most `max_distance` bits from `value`."""
    found = self._near(value, max_distance)
    return self._keys[found[0]] if len(found) else None

  def find_all(self, value: int, max_distance: int) -> list[Key]:
    """The keys of all hashes at most `max_distance` bits from `value`, as they were added."""
    return [self._keys[i] for i in self._near(value, max_distance)]

  def _near(self, value: int, max_distance: int) -> np.ndarray:
    """Numbers, ascending."""
    if max_distance < 0:
      raise ValueError(f"max_distance {max_distance}: a number of bits, at least 0")
    radius = max_distance // len(_BAND_BITS)
    if radius > 1 or len(self) < 1000:  # to look at all of them is quicker
      return np.flatnonzero(_close(self._hashes, value, max_distance))
    found = [np.zeros(0, np.uint64)]
    for band, part, bits in zip(self._bands, _parts(value), _BAND_BITS):
      near = [bucket for mask in _masks(radius, bits) if (bucket := band.get(part ^ mask))]
      if near:
        # Joined as bytes: an array that numpy looks into could not grow as long as it does.
        hashes, numbers = (b"".join(arrays) for arrays in zip(*near))
        found.append(np.frombuffer(numbers, np.uint64)[_close(hashes, value, max_distance)])
    return np.unique(np.concatenate(found))


def _close(hashes: array.array | bytes, value: int, max_distance: int) -> np.ndarray:
  if not hashes:
    return np.zeros(0, bool)
  return np.bitwise_count(np.frombuffer(hashes, np.uint64) ^ np.uint64(value)) <= max_distance


def alike(a: Signature, b: Signature, limits: Limits = Limits()) -> bool:
  """Whether two images are near-duplicates."""
  return (
    (a.hash ^ b.hash).bit_count() <= limits.bits
    and (a.fine ^ b.fine).bit_count() <= limits.fine_bits
    and _color_distance(a, b) <= limits.color
  )


def near_duplicates(
  signatures: Sequence[Signature], max_distance: int = DEFAULT_BITS, *, limits: Limits | None = None
) -> list[tuple[int, int]]:
  """Pairs (i, first): image i is to go because it is `alike` image `first`, which stands before it
  and stays.

  `first` is the earliest of those that stay. An image that goes makes no other go: of a chain in
  which only neighbours are alike every other one stays. `max_distance` is short for
  Limits(max_distance).
  """
  limits = limits or Limits(max_distance)
  index, pairs = HashIndex[int](), []
  for i, signature in enumerate(signatures):
    first = _first_alike(signature, index, signatures, limits)
    if first is None:
      index.add(signature.hash, i)
    else:
      pairs.append((i, first))
  return pairs


def like_benchmark(
  signatures: Sequence[Signature],
  benchmark: Sequence[Signature],
  max_distance: int = DEFAULT_BITS,
  *,
  limits: Limits | None = None,
) -> list[tuple[int, int]]:
  """Pairs (i, which): image i is `alike` image `which` of the benchmark, the first such."""
  limits = limits or Limits(max_distance)
  index = HashIndex[int]()
  for which, signature in enumerate(benchmark):
    index.add(signature.hash, which)
  found = (
    (i, _first_alike(signature, index, benchmark, limits)) for i, signature in enumerate(signatures)
  )
  return [(i, which) for i, which in found if which is not None]


def _first_alike(
  signature: Signature, index: HashIndex[int], signatures: Sequence[Signature], limits: Limits
) -> int | None:
  near = index.find_all(signature.hash, limits.bits)
  return next((i for i in near if alike(signatures[i], signature, limits)), None)


def _color_distance(a: Signature, b: Signature) -> float:
  """The greatest difference of a colour; between flat images, where brightness is all there is,
  without dimming.
  """
  x, y = (np.frombuffer(colors, np.uint8).astype(np.float64) for colors in (a.colors, b.colors))
  if a.hash or b.hash:
    dark = min(x.mean(), y.mean())
    x, y = (side * max(dark / max(side.mean(), 1), _LEAST_DIMMING) for side in (x, y))
  return float(np.abs(x - y).max())


def _parts(value: int) -> list[int]:
  parts = []
  for bits in _BAND_BITS:
    parts.append(value & (1 << bits) - 1)
    value >>= bits
  return parts


@functools.cache
def _masks(radius: int, bits: int) -> list[int]:
  """All numbers of so many bits with at most `radius` of them set."""
  return [
    sum(1 << bit for bit in chosen)
    for count in range(radius + 1)
    for chosen in itertools.combinations(range(bits), count)
  ]
