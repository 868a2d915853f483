"""What a benchmark's row says of its image -> the image's source, in a folder or a zip file."""

import dataclasses
import math
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from caprl_jax.data.readers.image_spellings import (
  MAX_IMAGE_BYTES,
  find_image,
  is_file,
  spelled_image,
)
from caprl_jax.data.rows import ImageSource, PixelLimits
from caprl_jax.json_files import shown


@dataclasses.dataclass(frozen=True, slots=True)
class StoredZipImage:
  """A member of a zip file: `packed` bytes, stored or deflated, behind the member's header at byte
  `offset`; `size` bytes when they are unpacked.
  """

  path: pathlib.Path
  member: str
  offset: int
  packed: int
  size: int
  deflated: bool
  crc: int

  @property
  def where(self) -> str:
    return f"{self.path}, member {self.member!r}"

  def read(self) -> bytes:
    """Raises ValueError, with `where`, for a file that is gone, damaged, or too large."""
    if max(self.size, self.packed) > MAX_IMAGE_BYTES:
      most = f"an image may have {MAX_IMAGE_BYTES >> 20}; pack a smaller one"
      raise ValueError(f"{self.where}: {self.size >> 20:,} MiB, and {most}")
    # Not by zipfile, which would read the list of all members again for every image, and in every
    # process.
    try:
      with open(self.path, "rb") as file:
        file.seek(self.offset)
        header = file.read(30)
        file.seek(
          int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1
        )
        data = file.read(self.packed)
    except OSError as error:
      raise ValueError(f"{self.where}: {error.strerror}; put the zip file back") from error
    try:
      # A megabyte may be packed zeros that fill the memory.
      data = zlib.decompressobj(-15).decompress(data, self.size + 1) if self.deflated else data
    except zlib.error as error:
      raise ValueError(f"{self.where}: damaged ({error}); fetch the zip file again") from error
    if len(data) != self.size or zlib.crc32(data) != self.crc:
      raise ValueError(f"{self.where}: damaged (its checksum differs); fetch the zip file again")
    return data


class Finder:
  """An image's path in a file -> its source, in a folder or a zip file."""

  def __init__(self, root: pathlib.Path, members: dict[str, zipfile.ZipInfo] | None):
    self.root, self.members = root, members

  def __call__(self, image: str, where: str) -> ImageSource:
    for candidate in self._candidates(image.replace("\\", "/")):
      found = self._look(candidate)
      if found is not None:
        return found
    raise ValueError(
      f"{where}: image {shown(image)} is not in {self.root}; correct it, or pass the "
      "folder or zip file that the paths are relative to"
    )

  def _candidates(self, image: str) -> Sequence[str]:
    """The path itself, with the root's name before it, and what follows the root's name in it."""
    name = self.root.stem if self.members is not None else self.root.resolve().name
    parts = pathlib.PurePosixPath(image).parts
    tails = ["/".join(parts[i + 1 :]) for i, part in enumerate(parts[:-1]) if part == name]
    relative = image.lstrip("/").removeprefix("./")
    return [
      image,
      relative,
      f"{name}/{relative}",
      *(way for tail in tails for way in (tail, f"{name}/{tail}")),
    ]

  def _look(self, candidate: str) -> ImageSource | None:
    if self.members is None:
      file = self.root / candidate
      return file if is_file(file) else None
    info = self.members.get(candidate)
    if info is None:
      return None
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise ValueError(
        f"{self.root}, member {candidate!r}: encrypted or packed in a way that is "
        "not read here; unpack the zip file and pass the folder"
      )
    return StoredZipImage(
      self.root,
      candidate,
      info.header_offset,
      info.compress_size,
      info.file_size,
      info.compress_type == zipfile.ZIP_DEFLATED,
      info.CRC,
    )


def image_of(image: Any, parts: list[tuple[Any, dict]], find: Finder, where: str) -> ImageSource:
  """The one image in `image`: a text or an object as `image_spellings` reads them, {"image": such},
  or a list of such or of messages whose content has one. parts: as `image_parts`.
  """
  if len(parts) != 1 or not parts[0][0]:
    raise ValueError(
      f"{where}: image is {shown(image)}, with {len(parts)} image paths, but it must have one"
    )
  [(said, _)] = parts
  if isinstance(said, str) and said.startswith("file://") and not said.startswith("file:///"):
    said = said.removeprefix("file://")  # a relative path, as some tools write it
  spelled = spelled_image(said, pathlib.Path(), where)
  if isinstance(spelled.image, bytes):
    return find_image(spelled.image, [pathlib.Path()], where).image  # which opens it
  return find(str(spelled.image), where)


def image_parts(image: Any, around: dict[str, Any]) -> Iterator[tuple[str | dict, dict[str, Any]]]:
  """Every image in `image`, and what is said of it: by its own object and by those around it."""
  if isinstance(image, str):
    yield image, around
  elif isinstance(image, dict):
    if image.get("bytes") or image.get("path"):
      yield image, around | image
    elif "image" in image:
      yield from image_parts(image["image"], around | image)
    # a content that is a text is a turn without an image
    elif isinstance(image.get("content"), (list, dict)):
      yield from image_parts(image["content"], around | image)
  elif isinstance(image, list):
    for part in image:
      yield from image_parts(part, around)


def pixel_limits(said: dict[str, Any], where: str) -> PixelLimits | None:
  """What a row, or the object that its image stands in, says of the image's size in pixels."""
  found = {key: said[key] for key in ("min_pixels", "max_pixels") if said.get(key) is not None}
  for key, pixels in found.items():
    if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 1:
      raise ValueError(f"{where}: {key} is {shown(pixels)}, but it must be a positive integer")
  if found.get("min_pixels", 0) > found.get("max_pixels", math.inf):
    raise ValueError(
      f"{where}: min_pixels {found['min_pixels']} is more than max_pixels {found['max_pixels']}"
    )
  return PixelLimits(**found) if found else None


def open_images(root: pathlib.Path) -> Finder:
  if root.is_dir():
    return Finder(root, None)
  if not root.is_file():
    raise ValueError(
      f"image_root = {str(root)!r}: no such folder or zip file; pass "
      "bench_image_folder, unpacked or zipped"
    )
  try:
    with zipfile.ZipFile(root) as file:
      return Finder(root, {info.filename: info for info in file.infolist() if not info.is_dir()})
  except (zipfile.BadZipFile, OSError) as error:
    raise ValueError(
      f"image_root = {str(root)!r}: not a zip file that can be read ({error}); fetch it again"
    ) from error
