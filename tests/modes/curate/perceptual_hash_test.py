"""Near-duplicates: the search against brute force, hashes on real images and changed copies."""

import dataclasses
import io
import pathlib
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from caprl_jax.data.readers.easy_vqa import read_easy_vqa
from caprl_jax.modes.curate import perceptual_hash
from caprl_jax.modes.curate.perceptual_hash import (
  HashIndex,
  Limits,
  Signature,
  alike,
  like_benchmark,
  near_duplicates,
  signature_of,
)

pytest.importorskip("imagehash")


def recompressed(image: Image.Image) -> Image.Image:
  out = io.BytesIO()
  image.save(out, "JPEG", quality=60)
  return Image.open(out)


def cropped(image: Image.Image) -> Image.Image:
  x, y = round(image.width * 0.02), round(image.height * 0.02)
  return image.crop((x, y, image.width - x, image.height - y))


CHANGES = {
  "same": lambda image: image,
  "jpeg": recompressed,
  "crop": cropped,
  "half": lambda image: image.resize((image.width // 2, image.height // 2)),
  "dark": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
  "bright": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
}


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
  """A photograph that comes with matplotlib, and parts of it that do not overlap much."""
  whole = Image.open(
    pathlib.Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
  ).convert("RGB")
  width, height = whole.size
  boxes = [
    (0, 0, width, height),
    (0, 0, width // 2, height // 2),
    (width // 2, 0, width, height // 2),
    (0, height // 2, width // 2, height),
    (width // 4, height // 4, 3 * width // 4, 3 * height // 4),
  ]
  return [whole.crop(box) for box in boxes]


@pytest.fixture(scope="module")
def toys():
  """(facts, image, signature) of 1000 images of easy-VQA."""
  rows = read_easy_vqa("train", 0)[:1000]
  images = [Image.open(row.image).convert("RGB") for row in rows]
  return [(row.facts, image, signature_of(image)) for row, image in zip(rows, images)]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_photographs_are_found(photographs, change):
  signatures = [signature_of(image) for image in photographs]
  changed = [signature_of(CHANGES[change](image)) for image in photographs]
  count = len(photographs)
  assert near_duplicates(signatures + changed) == [(count + i, i) for i in range(count)]
  assert like_benchmark(changed, signatures) == [(i, i) for i in range(count)]


@pytest.mark.parametrize(
  "change, least", [("jpeg", 0.98), ("half", 0.99), ("dark", 0.99), ("bright", 0.98), ("crop", 0.8)]
)
def test_how_many_changed_toys_are_found(toys, change, least):
  found = [
    alike(signature, signature_of(CHANGES[change](image))) for _, image, signature in toys[:200]
  ]
  assert np.mean(found) >= least


def test_different_toys_stay(toys):
  pairs = near_duplicates([signature for _, _, signature in toys])
  assert len(pairs) <= 8  # of 1000; golden: as the module says, measure anew when a limit changes
  differ = [
    (i, j)
    for i, j in pairs
    if any(toys[i][0].get(k) != toys[j][0].get(k) for k in ("color", "shape"))
  ]
  assert len(differ) <= 1


def draw(color, shape="ellipse", place=(20, 20)) -> Image.Image:
  image = Image.new("RGB", (64, 64), (240, 240, 230))
  getattr(ImageDraw.Draw(image), shape)((*place, place[0] + 22, place[1] + 22), fill=color)
  return image


def test_colour_shape_and_place_tell_images_apart():
  images = [
    draw("red"),
    draw("blue"),
    draw("teal"),
    draw("gray"),
    draw("black"),
    draw("red", place=(5, 38)),
    draw("red", place=(34, 20)),
  ]
  assert near_duplicates([signature_of(image) for image in images]) == []
  # It is the colours that do it:
  assert (
    near_duplicates([signature_of(image) for image in images[:3]], limits=Limits(64, 256, 20)) == []
  )
  assert near_duplicates(
    [signature_of(image) for image in images[:3]], limits=Limits(64, 256, 255)
  ) == [(1, 0), (2, 0)]


def test_pages_in_one_layout_are_told_apart_by_fine_hashes():
  pages, words = [], "the of and a to in is was he for it with as his on be at by this had".split()
  random = np.random.default_rng(0)
  for _ in range(40):
    page = Image.new("RGB", (400, 520), "white")
    for y in range(20, 500, 14):
      ImageDraw.Draw(page).text((20, y), " ".join(random.choice(words, 14)), fill="black")
    pages.append(signature_of(page))
  coarse = near_duplicates(pages, limits=Limits(fine_bits=256))
  assert len(coarse) > 20 and len(near_duplicates(pages)) <= 4


def test_flat_images_differ_by_their_colour_alone():
  flat = [
    Image.new("RGB", (50, 40), color)
    for color in ("white", "black", "red", (128, 128, 128), (90, 90, 90))
  ]
  noisy = Image.fromarray(
    np.random.default_rng(0).integers(252, 256, (200, 300, 3)).astype(np.uint8)
  )
  signatures = [signature_of(image) for image in [*flat, noisy]]
  assert {signature.hash for signature in signatures} == {0}
  assert near_duplicates(signatures) == [(5, 0)]  # noise on white is white
  assert perceptual_hash.perceptual_hash(draw("black")) != 0


def test_modes_and_determinism(photographs):
  image = photographs[0]
  first = signature_of(image)
  assert signature_of(image.copy()) == first and 0 < first.hash < 2**64 and 0 < first.fine < 2**256
  assert len(first.colors) == 48
  for mode in ("RGBA", "P", "L", "1"):
    signature_of(image.convert(mode))
  assert alike(signature_of(image.convert("RGBA")), first)
  assert not alike(signature_of(image.convert("L")), first)  # without colour it is another picture
  assert perceptual_hash.from_json(perceptual_hash.to_json(first)) == first
  small = Signature(0, 1, bytes(48))
  assert perceptual_hash.from_json(perceptual_hash.to_json(small)) == small
  for text in (
    "",
    perceptual_hash.to_json(first)[1:],
    perceptual_hash.to_json(first)[:-1] + "x",
    None,
  ):
    with pytest.raises(ValueError, match="no image signature"):
      perceptual_hash.from_json(text)


def test_the_hash_is_that_of_imagehash(photographs):
  import imagehash

  for image in photographs:
    assert f"{perceptual_hash.perceptual_hash(image):016x}" == str(imagehash.phash(image))


def make_hashes(count: int, seed: int) -> list[int]:
  """Random hashes, most of them a few bits from an earlier one."""
  random = np.random.default_rng(seed)
  hashes: list[int] = []
  for _ in range(count):
    value = int(random.integers(2**64, dtype=np.uint64))
    if hashes and random.random() < 0.7:
      value = hashes[random.integers(len(hashes))]
      for bit in random.integers(64, size=random.integers(16)):
        value ^= 1 << int(bit)
    hashes.append(value)
  return hashes


@pytest.mark.parametrize("count", [0, 50, 3000])
def test_the_search_is_exact(count):
  hashes = make_hashes(count, count)
  index = HashIndex()
  for i, value in enumerate(hashes):
    index.add(value, str(i))
  assert len(index) == count
  known = np.array(hashes, np.uint64)
  found = 0
  for query in make_hashes(40, 1) + hashes[:60]:
    query ^= 1 << 63 | 1
    apart = np.bitwise_count(known ^ np.uint64(query))
    for distance in (0, 1, 3, 4, 7, 8, 10, 11, 12, 20, 64):
      want = [str(i) for i in np.flatnonzero(apart <= distance)]
      assert index.find_all(query, distance) == want
      assert index.find(query, distance) == (want[0] if want else None)
      found += len(want)
  assert found or not count
  with pytest.raises(ValueError, match="at least 0"):
    index.find(0, -1)


def test_hashes_at_exactly_the_distance_in_the_worst_bands():
  index = HashIndex()
  for i in range(2000):  # far away from 0
    index.add(2**64 - 1 - i, "far")
  index.add(0, "near")
  starts = (0, 11, 22, 33, 44, 54)
  for distance in (1, 3, 5, 6, 7, 10, 11):
    bits = [start + more for more in (0, 7) for start in starts]  # spread evenly over the bands
    value = sum(1 << bit for bit in bits[:distance])
    assert index.find(value, distance) == "near" and index.find(value, distance - 1) is None


def test_near_duplicates_against_brute_force():
  random = np.random.default_rng(3)
  hashes = make_hashes(1800, 4)
  signatures = [
    Signature(
      value, int(random.integers(4)) << 40, bytes([int(random.integers(3)) * 15 + 100] * 48)
    )
    for value in hashes
  ]
  for limits in (Limits(), Limits(3, 0, 10), Limits(11, 1, 30), Limits(12, 256, 255)):
    kept, want = [], []
    for i, signature in enumerate(signatures):
      first = next((j for j in kept if alike(signatures[j], signature, limits)), None)
      want += [] if first is None else [(i, first)]
      kept += [i] if first is None else []
    assert near_duplicates(signatures, limits=limits) == want and want
  assert near_duplicates(signatures, 5) == near_duplicates(signatures, limits=Limits(5))
  assert near_duplicates([], 5) == []
  bench = signatures[:700]
  want = [
    (i, next(j for j, other in enumerate(bench) if alike(other, s)))
    for i, s in enumerate(signatures)
    if any(alike(other, s) for other in bench)
  ]
  assert like_benchmark(signatures, bench) == want and like_benchmark(signatures, []) == []


def test_each_part_of_a_signature_counts():
  base = Signature(0b1111, 2**60 - 1, bytes([100, 120, 140] * 16))
  change = lambda **parts: dataclasses.replace(base, **parts)
  limits = Limits(2, 3, 10)
  near = [
    base,
    change(hash=0b1100),
    change(fine=2**57 - 1),
    change(colors=bytes([105, 120, 140] * 16)),
    change(colors=bytes([80, 96, 112] * 16)),
  ]  # 0.8 of its brightness
  far = [
    change(hash=0b1000),
    change(fine=2**56 - 1),
    change(colors=bytes([100, 120, 140] * 15 + [100, 120, 155])),
    change(colors=bytes([50, 60, 70] * 16)),
  ]  # half of its brightness
  for other in near:
    assert alike(base, other, limits) and alike(other, base, limits)
  for other in far:
    assert not alike(base, other, limits) and not alike(other, base, limits)


def test_without_the_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "imagehash", None)
  with pytest.raises(ValueError, match="run `pip install ImageHash`"):
    signature_of(draw("red"))
