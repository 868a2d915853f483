"""Where images lie -> rows to caption: folders, JSON lines, tar files (WebDataset), parquet,
TFDS.
"""

import collections
import dataclasses
import glob
import json
import logging
import os
import pathlib
import tarfile
from collections.abc import Iterable, Iterator

from caprl_jax.data.rows import CaptionRow

log = logging.getLogger("caprl_jax.data")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
SHOWN_BROKEN = 10
_BLOCK = 512  # bytes: a tar file is made of such
# What a folder is searched for: the first of these kinds that it holds.
_FOLDER_KINDS = ("images", "packed", "tar", "parquet")


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTarImage:
  """A member of an uncompressed tar file: `size` bytes from `offset` on."""

  path: pathlib.Path
  offset: int
  size: int
  member: str

  @property
  def where(self) -> str:
    return f"{self.path}, member {self.member!r} at byte {self.offset}"

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


def find_images(source: str) -> list[CaptionRow]:
  """The images to caption: files sorted by path, what is in a file as it stands there. Nothing is
  decoded.

  A row is named by what `image` will say in the output, and no two rows have the same name. The
  source may be

    an image, or a folder, which is searched whole     named by the path
    a .jsonl file with an `image` in each line         by what the line says; a path from the
                                                       file's folder
    a .tar file, or a folder of them (WebDataset)      "shard.tar/member"; members that are no
                                                       images are passed over
    a .parquet file, or a folder of them               as `caprl_parquet.scan_images` says;
                                                       "file.parquet/row" where that would name
                                                       two alike
    tfds:FOLDER:SPLIT, a prepared TFDS dataset         as `tfds.scan_images` says, else
                                                       "SPLIT/record"
    a pattern of any of these files: shards/*.tar      as one file; tars by their path from the
                                                       pattern's fixed part

  Of a folder that holds several kinds, images come before tars and tars before parquet; a warning
  names what is left alone. The same image listed twice is one row, and the log counts such.

  Raises:
    ValueError: a source that is not there or holds no image; a line without an `image`; a tar file
      that is compressed, damaged or cut off, with its name and the byte (all such are named at
      once); two images of one name.
  """
  if source.startswith("tfds:"):
    return _unique(_tfds(source), source)
  path = pathlib.Path(source).expanduser()
  base = base_folder(source)
  if path.is_dir():
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return _unique(_rows_of(_one_kind(files, source), base), source)
  if path.is_file():
    files = [path]
  elif glob.has_magic(source):
    files = sorted(
      pathlib.Path(found)
      for found in glob.glob(os.path.expanduser(source), recursive=True)
      if os.path.isfile(found)
    )
    if not files:
      raise ValueError(f"caption.input = {source!r}: no file fits this pattern")
    kinds = sorted({_kind(file) for file in files})
    if len(kinds) > 1:
      raise ValueError(
        f"caption.input = {source!r} fits files of several kinds "
        f"({', '.join(kinds)}); name one kind, as in 'shards/*.tar'"
      )
  else:
    raise ValueError(
      f"caption.input = {source!r}: no such file or folder; name a folder of "
      "images, a .jsonl, .tar or .parquet file, a pattern such as 'shards/*.tar', "
      "or tfds:FOLDER:SPLIT"
    )
  return _unique(_rows_of(files, base), source)


def base_folder(source: str) -> pathlib.Path:
  """The folder that images of a source are named or mirrored from."""
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    return path
  if path.is_file() or not glob.has_magic(source):
    return path.parent
  fixed = []
  for part in path.parts[:-1]:
    if glob.has_magic(part):
      break
    fixed.append(part)
  return pathlib.Path(*fixed)


def mirrored(row: CaptionRow, base: pathlib.Path) -> pathlib.PurePath:
  """The row's path below `base`, for a tree of outputs that looks like that of the images.

  Raises ValueError for an image outside `base`.
  """
  path = pathlib.PurePath(row.name)
  if isinstance(row.image, pathlib.Path) and row.image.is_relative_to(base):
    path = row.image.relative_to(base)
  if path.is_absolute() or ".." in path.parts:
    raise ValueError(
      f"row {row.name!r} lies outside {base}, so its text has no place below the "
      "output folder; caption such images into .jsonl or .parquet"
    )
  return path


def _kind(file: pathlib.Path) -> str:
  name = file.name.lower()
  if name.endswith(IMAGE_SUFFIXES):
    return "images"
  if name.endswith(PACKED_SUFFIXES):
    return "packed"
  return {".tar": "tar", ".parquet": "parquet", ".jsonl": "jsonl"}.get(file.suffix.lower(), "other")


def _one_kind(files: list[pathlib.Path], source: str) -> list[pathlib.Path]:
  """Of a folder's files those of the first kind that it holds."""
  by_kind: dict[str, list[pathlib.Path]] = {}
  for file in files:
    by_kind.setdefault(_kind(file), []).append(file)
  there = [kind for kind in _FOLDER_KINDS if kind in by_kind]
  if not there:
    raise ValueError(
      f"caption.input = {source!r}: no image in this folder (looked for "
      f"{', '.join(IMAGE_SUFFIXES)}, .tar and .parquet)"
    )
  if len(there) > 1:
    log.warning(
      "%s: only its %d %s are read, not %s; a pattern names others, as in '%s'",
      source,
      len(by_kind[there[0]]),
      there[0],
      ", ".join(f"{len(by_kind[kind])} {kind}" for kind in there[1:]),
      f"{source}/**/*.tar",
    )
  return by_kind[there[0]]


def _rows_of(files: list[pathlib.Path], base: pathlib.Path) -> Iterator[CaptionRow]:
  """The rows of files of one kind."""
  kind = _kind(files[0])
  if kind == "images":
    yield from (CaptionRow(file, "", str(file)) for file in files)
  elif kind == "packed":
    raise ValueError(
      f"{files[0]} is compressed, so no member of it can be read without reading "
      "all before it; unpack it to a plain .tar first (gzip -d, zstd -d, ...): "
      "images hardly shrink anyway"
    )
  elif kind == "tar":
    yield from _scan_tars(files, base)
  elif kind == "parquet":
    from caprl_jax.data.readers import caprl_parquet  # only here: it brings pyarrow

    yield from _told_apart(
      (row, f"{file.relative_to(base).as_posix()}/{number}")
      for file in files
      for number, row in enumerate(caprl_parquet.scan_images(file))
    )
  else:  # whatever it is called
    for file in files:
      yield from _scan_lines(file)


def _told_apart(found: Iterable[tuple[CaptionRow, str]]) -> list[CaptionRow]:
  """Rows of files that need not name their images, or may name two alike: such are named by their
  place.
  """
  found = list(found)
  counts = collections.Counter(row.name for row, _ in found)
  return [
    row if counts[row.name] == 1 else dataclasses.replace(row, name=place) for row, place in found
  ]


def _tfds(source: str) -> Iterable[CaptionRow]:
  folder, _, split = source.removeprefix("tfds:").rpartition(":")
  if not folder or not split:
    raise ValueError(
      f"caption.input = {source!r}: write tfds:FOLDER:SPLIT, as in "
      "tfds:~/tensorflow_datasets/mnist/3.0.1:train"
    )
  from caprl_jax.data.readers import tfds  # only here: it brings tensorflow_datasets

  return _told_apart(
    (row, f"{split}/{number}") for number, row in enumerate(tfds.scan_images(folder, split))
  )


def _scan_lines(path: pathlib.Path) -> Iterator[CaptionRow]:
  empty = True
  # bytes: only \n ends a line, and each says by itself what is wrong with it
  with open(path, "rb") as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        name = json.loads(line.decode("utf-8"))["image"]
        row = CaptionRow(path.parent / name, "", name)
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
          f"{path}:{number}: not a JSON object with an 'image' path "
          f"({type(error).__name__}: {error}); mend or drop the line"
        ) from error
      empty = False
      yield row
  if empty:
    raise ValueError(f"caption.input = {str(path)!r} has no rows")


def _scan_tars(files: list[pathlib.Path], base: pathlib.Path) -> Iterator[CaptionRow]:
  broken, members = [], 0
  for file in files:
    name = file.relative_to(base).as_posix()
    try:
      for image in index_tar(file):
        members += 1
        if not broken:  # else they come to nothing
          yield CaptionRow(image, "", f"{name}/{image.member}")
    except ValueError as error:
      broken.append(str(error))
  if broken:
    more = f"\n  and {len(broken) - SHOWN_BROKEN} more" if len(broken) > SHOWN_BROKEN else ""
    raise ValueError("\n  ".join(broken[:SHOWN_BROKEN]) + more)
  if not members:
    raise ValueError(
      f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}: no "
      f"image among the members (looked for {', '.join(IMAGE_SUFFIXES)})"
    )


def index_tar(path: pathlib.Path) -> Iterator[StoredTarImage]:
  """The images of an uncompressed tar file, found by reading its headers only.

  Raises ValueError, with the file and the byte, where it is compressed, damaged or cut off.
  """
  links, end = 0, 0
  try:
    with tarfile.open(path, "r:", encoding="utf-8") as tar:
      while True:
        end = tar.offset  # of the members read so far
        member = tar.next()
        if member is None:
          break
        tar.members.clear()  # it would keep them all
        if not member.name.lower().endswith(IMAGE_SUFFIXES):
          continue
        if member.issym() or member.islnk():
          links += 1
        elif member.issparse():
          raise ValueError(
            f"{path}: member {member.name!r} at byte {member.offset} is stored "
            "sparse, in pieces; write the tar file without --sparse"
          )
        elif member.isreg():
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
  # tarfile takes whatever it cannot read for the end; the real one is marked by zeros.
  with open(path, "rb") as file:
    size = file.seek(0, os.SEEK_END)
    file.seek(end)
    block = file.read(_BLOCK)
  if any(block) or 0 < len(block) < _BLOCK:
    raise ValueError(
      f"{path} is damaged at byte {end} of {size}: no member begins there, nor is "
      "it the end; fetch it again or leave it out"
    )
  if not block:
    log.warning(
      "%s has no end mark after byte %d; if it was cut off there, images are missing", path, size
    )
  if links:
    log.warning("%s: %d links to images are passed over", path, links)


def _unique(found: Iterable[CaptionRow], source: str) -> list[CaptionRow]:
  """The rows, each name once. Raises ValueError for two images of one name."""
  rows: dict[str, CaptionRow] = {}
  again = 0
  for row in found:
    first = rows.setdefault(row.name, row)
    if first is not row:
      if first.image != row.image:
        raise ValueError(
          f"{source}: two images are called {row.name!r}, so their captions could "
          "not be told apart; rename one"
        )
      again += 1
  if again:
    log.warning("%s: %d images are listed more than once and captioned once", source, again)
  return list(rows.values())
