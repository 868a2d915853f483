"""Uncompressed tar files (WebDataset) -> the images in them, read where they lie."""

import dataclasses
import logging
import os
import pathlib
import tarfile
from collections.abc import Callable, Iterator
from typing import TypeVar

from caprl_jax.data.readers.image_folders import (
  NO_FILE,
  PassedOver,
  image_or_reason,
  left_out,
)
from caprl_jax.data.readers.inputs.options import NOTHING_MORE, ListingOptions
from caprl_jax.data.readers.inputs.tar_fields import SampleTexts
from caprl_jax.data.rows import CaptionRow
from caprl_jax.image_files import HEAD_BYTES
from caprl_jax.json_files import listed, shown

log = logging.getLogger("caprl_jax.data")

Result = TypeVar("Result")

_BLOCK = 512  # bytes: a tar file is made of such


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTarImage:
  """A member of an uncompressed tar file: `size` bytes from `offset` on."""

  path: pathlib.Path
  offset: int
  size: int
  member: str

  @property
  def where(self) -> str:
    return f"{self.path}, member {shown(self.member)} at byte {self.offset}"

  def read(self) -> bytes:
    """Raises ValueError, with `where`, for a file that is gone or has become shorter."""
    try:
      with open(self.path, "rb") as file:
        file.seek(self.offset)
        data = file.read(self.size)
    except OSError as error:
      raise ValueError(f"{self.where}: {error.strerror}; put the tar file back") from error
    if len(data) != self.size:
      raise ValueError(
        f"{self.where}: {len(data)} bytes of {self.size}: the tar file is cut off; fetch it again"
      )
    return data


def scan_tars(
  files: list[pathlib.Path],
  base: pathlib.Path,
  passed: PassedOver,
  options: ListingOptions = NOTHING_MORE,
) -> Iterator[CaptionRow]:
  """The images of tar files, named by the files' path from `base` and the member's. Fields of rows
  are as `SampleTexts` has them.

  Raises ValueError: files that `index_tar` refuses, all at once; no image in any of them.
  """
  broken, members = [], 0
  for file in files:
    name, before = file.relative_to(base).as_posix(), members
    texts = SampleTexts(file) if options.fields else None
    try:
      images = index_tar(file, passed, texts)
      for image in list(images) if texts else images:  # what belongs to an image may come after it
        members += 1
        if not broken:  # else they come to nothing
          fields = options.kept(texts.of(image.member)) if texts else None
          yield CaptionRow(image, "", f"{name}/{_plain(image.member)}", fields=fields)
    except ValueError as error:
      broken.append(str(error))
      continue
    if members == before:
      passed.add("tar file without an image", name)
  if broken:
    raise ValueError(listed(broken).strip())
  if not members:
    raise ValueError(
      f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}: no "
      f"image among the members (passed over: {passed})"
    )


def _plain(member: str) -> str:
  """A member's name as it would be extracted: tar -C folder . begins each with ./"""
  while member.startswith(("./", "/")):
    member = member[1:].lstrip("/")
  return member


def index_tar(
  path: pathlib.Path, passed: PassedOver, texts: SampleTexts | None = None
) -> Iterator[StoredTarImage]:
  """The images of an uncompressed tar file, found by reading its headers, and the first bytes of
  members whose suffix does not say what they are. Members are passed over as files of a folder are;
  `texts` takes note of those that say something about an image.

  Raises ValueError, with the file and the byte, where it is compressed, damaged or cut off.
  """
  end = 0
  try:
    with _named_error(lambda: tarfile.open(path, "r:", encoding="utf-8")) as tar:
      while True:
        end = tar.offset  # of the members read so far
        member = _named_error(tar.next)
        if member is None:
          break
        tar.members.clear()  # it would keep them all
        if member.isdir():
          continue
        if reason := _reason(tar, member):
          passed.add(reason, member.name)
          if texts and member.isreg():
            texts.add(member.name, member.offset_data, member.size)
        elif member.issparse():
          raise ValueError(
            f"{path}: member {shown(member.name)} at byte {member.offset} is stored "
            "sparse, in pieces; write the tar file without --sparse"
          )
        else:
          yield StoredTarImage(path, member.offset_data, member.size, member.name)
  except tarfile.TarError as error:
    with open(path, "rb") as file:
      packed = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
      size = file.seek(0, os.SEEK_END)
    if packed:
      raise ValueError(f"{path} is compressed; unpack it to a plain .tar first") from error
    what = (
      f"is cut off: its last member reaches to byte {end}"
      if end > size
      else f"is damaged at byte {end}"
    )
    raise ValueError(
      f"{path} {what}, the file has {size} ({error}); fetch it again or leave it out"
    ) from error
  except OSError as error:
    raise ValueError(f"{path}: {error.strerror}; check the file") from error
  _check_end(path, end)


def _check_end(path: pathlib.Path, end: int) -> None:
  """Raises ValueError where the end of a tar file does not begin behind its last member; warns
  where it has no end mark."""
  # tarfile takes whatever it cannot read for the end; the real one is marked by zeros.
  with open(path, "rb") as file:
    size = file.seek(0, os.SEEK_END)
    file.seek(end)
    block = file.read(_BLOCK)
    while (more := file.read(1 << 20)) and not any(more):
      pass
  if more and not any(block):
    raise ValueError(
      f"{path}: more stands behind the end mark at byte {end} of {size}, as where files are joined "
      "by cat or a download left a hole; fetch it again, or unpack it with tar -i and pack it anew"
    )
  if any(block) or 0 < len(block) < _BLOCK:
    raise ValueError(
      f"{path} is damaged at byte {end} of {size}: no member begins there, nor is "
      "it the end; fetch it again or leave it out"
    )
  if not block:
    log.warning(
      "%s has no end mark after byte %d; if it was cut off there, images are missing", path, size
    )


def _named_error(read: Callable[[], Result]) -> Result:
  """What `read` gives. Numbers in headers that are none are an error of the tar file's."""
  try:
    return read()
  except (ValueError, OverflowError, IndexError, EOFError) as error:
    raise tarfile.ReadError(f"{type(error).__name__}: {error}") from error


def _reason(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
  """Why a member is passed over, "" for an image."""
  parts = pathlib.PurePosixPath(_plain(member.name)).parts
  if reason := next(filter(None, (left_out(part) for part in parts if part != "..")), ""):
    return reason
  if member.issym() or member.islnk():
    return "link in a tar file"
  if not member.isreg():
    return NO_FILE

  def head() -> bytes:
    tar.fileobj.seek(member.offset_data)  # `next` finds its own place again
    return tar.fileobj.read(min(HEAD_BYTES, member.size))

  return image_or_reason(parts[-1] if parts else "", head)
