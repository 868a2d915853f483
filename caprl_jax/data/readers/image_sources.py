"""Where images lie -> rows to caption: folders, lists (JSON lines, CSV, ...), tar files
(WebDataset), parquet, TFDS.
"""

import collections
import dataclasses
import fnmatch
import glob
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator

from caprl_jax.data.readers.image_folders import (
  CANNOT_OPEN,
  LINKED_AGAIN,
  PassedOver,
  file_or_reason,
  folder_files,
  left_out,
)
from caprl_jax.data.readers.image_lists import LIST_SUFFIXES, scan_list
from caprl_jax.data.readers.image_tars import scan_tars
from caprl_jax.data.readers.inputs.options import NOTHING_MORE, ListingOptions
from caprl_jax.data.rows import CaptionRow
from caprl_jax.json_files import shown
from caprl_jax.progress import going_on

log = logging.getLogger("caprl_jax.data")

PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
# What a folder is searched for: the first of these kinds that it holds.
_FOLDER_KINDS = ("images", "packed", "tar", "parquet")
_OTHER = "other"


@dataclasses.dataclass(frozen=True)
class ImageListing:
  """What a source holds: rows to caption, and the files and members that are none, counted."""

  rows: list[CaptionRow]
  passed_over: PassedOver


def find_images(source: str, key: str = "caption.input") -> list[CaptionRow]:
  """The rows of `list_images`."""
  with going_on(f"looking for images in {source}"):
    return list_images(source, key).rows


def list_images(
  source: str, key: str = "caption.input", options: ListingOptions = NOTHING_MORE
) -> ImageListing:
  """The images to caption: files sorted by path, what is in a file as it stands there. Nothing is
  decoded. What is passed over is said in one line of log.

  A row is named by what `image` will say in the output, and no two rows have the same name. The
  source may be

    an image, or a folder, which is searched whole     named by the path; which files are images
                                                       and which are passed over:
                                                       `image_folders`
    a list: .jsonl, .json, .csv, .tsv, .txt            as `image_lists.scan_list` says
    a .tar file, or a folder of them (WebDataset)      "shard.tar/member"; members are passed over
                                                       as files of a folder are
    a .parquet file, or a folder of them               as `caprl_parquet.scan_images` says;
                                                       "file.parquet/row" where that would name
                                                       two alike
    tfds:FOLDER:SPLIT, a prepared TFDS dataset         as `tfds.scan_images` says, else
                                                       "SPLIT/record"
    hf:OWNER/NAME:SPLIT, a dataset on the hub          as a .parquet file
    a pattern of any of these files: shards/*.tar      as one file; tars by their path from the
                                                       pattern's fixed part; folders that fit are
                                                       searched whole

  Of a folder that holds several kinds, images come before tars and tars before parquet; a warning
  names what is left alone. The same image listed twice is one row, and the log counts such.

  Args:
    key: what the source stands in; begins messages.
    options: the column of images in lists and parquet, fields of rows to keep, addresses fetched.

  Raises:
    ValueError: a source that is not there or holds no image; a line without an `image`; a tar file
      that is compressed, damaged or cut off, with its name and the byte (all such are named at
      once); two images of one name.
  """
  passed = PassedOver()
  rows = _unique(_find(source, key, passed, options), source)
  passed.say(source)
  return ImageListing(rows, passed)


def _find(
  source: str, key: str, passed: PassedOver, options: ListingOptions
) -> Iterable[CaptionRow]:
  said = f"{key} = {shown(source)}"
  if source.startswith("tfds:"):
    return _tfds(source, said, options)
  if source.startswith("hf:"):
    return _hub(source, options)
  if not source.strip():
    raise ValueError(
      f"{said} is empty; name a folder of images, a list, or a .tar or .parquet file"
    )
  path = _expanded(source)
  base = base_folder(source)
  if os.path.isdir(path):  # pathlib's own raises for names that are too long
    files = _one_kind(folder_files(path, passed), path, said, passed)
    return _rows_of(files, base, passed, options)
  if os.path.isfile(path):
    return _rows_of({_named_kind(path, said): [path]}, base, passed, options)
  if glob.has_magic(source):
    return _rows_of(_fitting(source, base, said, passed), base, passed, options)
  raise ValueError(
    f"{said}: no such file or folder; name a folder of images, a list "
    f"({', '.join(LIST_SUFFIXES)}), a .tar or .parquet file, a pattern such as 'shards/*.tar', "
    "tfds:FOLDER:SPLIT, or hf:OWNER/NAME:SPLIT"
  )


def _fitting(
  source: str, base: pathlib.Path, said: str, passed: PassedOver
) -> dict[str, list[pathlib.Path]]:
  """The files of a pattern, all of one kind. Of a file that fits by several names, through links,
  the shortest counts.
  """
  pattern = _expanded(source).parts[len(base.parts) :]
  found: set[pathlib.Path] = set()
  if "**" in pattern:  # not by glob, which walks circles of links
    found.update(file for file in folder_files(base, passed) if _fits(file, base, pattern))
  else:
    for name in glob.glob(os.path.join(*pattern), root_dir=base):
      parts = pathlib.PurePath(name).parts
      if reason := next(filter(None, (left_out(part) for part in parts if part != "..")), ""):
        passed.add(reason, name)
      elif os.path.isdir(base / name):
        found.update(folder_files(base / name, passed))
      elif os.path.isfile(base / name):
        found.add(base / name)
  once: dict[str, pathlib.Path] = {}
  for file in sorted(found, key=lambda file: (len(file.parts), file)):
    if once.setdefault(os.path.realpath(file), file) is not file:
      passed.add(LINKED_AGAIN, str(file.relative_to(base)))
  by_kind = _by_kind(sorted(once.values()), base, passed)
  if not by_kind:
    raise ValueError(f"{said}: no file fits this pattern" + (f" ({passed})" if found else ""))
  if len(by_kind) > 1:
    raise ValueError(
      f"{said} fits files of several kinds ({', '.join(sorted(by_kind))}); name one kind, as in "
      "'shards/*.tar'"
    )
  return by_kind


def _fits(file: pathlib.Path, base: pathlib.Path, pattern: tuple[str, ...]) -> bool:
  """Whether a file, or a folder that holds it, fits a pattern; ** stands for any folders in it."""

  def fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
      return True
    if pattern[0] == "**":
      return any(fits(parts[i:], pattern[1:]) for i in range(len(parts)))
    return (
      bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and fits(parts[1:], pattern[1:])
    )

  return fits(file.relative_to(base).parts, pattern)


def _expanded(source: str) -> pathlib.Path:
  return pathlib.Path(os.path.expanduser(source))  # pathlib's own raises where ~name is no user


def base_folder(source: str) -> pathlib.Path:
  """The folder that images of a source are named or mirrored from."""
  path = _expanded(source)
  if os.path.isdir(path):
    return path
  if os.path.isfile(path) or not glob.has_magic(source):
    return path.parent
  base = pathlib.Path()
  for part in path.parts[:-1]:
    if glob.has_magic(part) and not os.path.isdir(base / part):  # "[2020]" may be a folder's name
      break
    base /= part
  return base


def mirrored(row: CaptionRow, base: pathlib.Path) -> pathlib.PurePath:
  """The row's path below `base`, for a tree of outputs that looks like that of the images.

  Raises ValueError for an image outside `base`.
  """
  path = pathlib.PurePath(row.name)
  if isinstance(row.image, pathlib.Path):  # its name may be an address, or begin with ~
    path = row.image.relative_to(base) if row.image.is_relative_to(base) else row.image.absolute()
  if path.is_absolute() or ".." in path.parts:
    raise ValueError(
      f"row {shown(row.name)} lies outside {base}, so its text has no place below the "
      "output folder; caption such images into .jsonl or .parquet"
    )
  return path


def _named_kind(file: pathlib.Path, said: str) -> str:
  """Of a file that the source names itself. Raises ValueError for an image that cannot be opened
  here.
  """
  kind = _packed_kind(file)
  if kind != _OTHER or file.suffix.lower() in LIST_SUFFIXES:
    return "lists" if kind == _OTHER else kind
  reason = file_or_reason(file)
  if reason.startswith(CANNOT_OPEN):
    raise ValueError(f"{said}: {reason}")
  return "lists" if reason else "images"


def _packed_kind(file: pathlib.Path) -> str:
  name = file.name.lower()
  if name.endswith(PACKED_SUFFIXES):
    return "packed"
  return {".tar": "tar", ".parquet": "parquet"}.get(file.suffix.lower(), _OTHER)


def _by_kind(
  files: list[pathlib.Path], base: pathlib.Path, passed: PassedOver
) -> dict[str, list[pathlib.Path]]:
  """Files that are images or hold some, by kind; lists count as such only where no image is."""
  found: dict[str, list[pathlib.Path]] = {}
  lists: list[pathlib.Path] = []
  for file in files:
    kind = _packed_kind(file)
    if kind == _OTHER:
      reason = file_or_reason(file)
      if reason and file.suffix.lower() in LIST_SUFFIXES:
        lists.append(file)
      elif reason:
        passed.add(reason, str(file.relative_to(base)))
      kind = _OTHER if reason else "images"
    if kind != _OTHER:
      found.setdefault(kind, []).append(file)
  if lists and not found:
    return {"lists": lists}
  for file in lists:
    passed.add(file_or_reason(file), str(file.relative_to(base)))
  return found


def _one_kind(
  files: list[pathlib.Path], folder: pathlib.Path, said: str, passed: PassedOver
) -> dict[str, list[pathlib.Path]]:
  """Of a folder's files those of the first kind that it holds."""
  by_kind = _by_kind(files, folder, passed)
  there = [kind for kind in _FOLDER_KINDS if kind in by_kind]
  if not there:
    lists = by_kind.get("lists", [])
    for file in lists:
      passed.add("list", str(file.relative_to(folder)))
    hint = f"; it has the list {shown(str(lists[0]))}, which may be named" if lists else ""
    raise ValueError(
      f"{said}: no image in this folder, nor a .tar or .parquet file"
      + (f" (passed over: {passed})" if passed.counts else " (it is empty)")
      + hint
    )
  if len(there) > 1:
    log.warning(
      "%s: only its %d %s are read, not %s; a pattern names others, as in '%s'",
      folder,
      len(by_kind[there[0]]),
      there[0],
      ", ".join(f"{len(by_kind[kind])} {kind}" for kind in there[1:]),
      f"{folder}/**/*.tar",
    )
    for kind in there[1:]:
      for file in by_kind[kind]:
        passed.add(f"{kind} file beside {there[0]}", str(file.relative_to(folder)))
  return {there[0]: by_kind[there[0]]}


def _rows_of(
  by_kind: dict[str, list[pathlib.Path]],
  base: pathlib.Path,
  passed: PassedOver,
  options: ListingOptions,
) -> Iterator[CaptionRow]:
  """The rows of files of one kind."""
  ((kind, files),) = by_kind.items()
  if kind == "images":
    yield from (CaptionRow(file, "", str(file)) for file in files)
  elif kind == "packed":
    raise ValueError(
      f"{files[0]} is compressed, so no member of it can be read without reading "
      "all before it; unpack it to a plain .tar first (gzip -d, zstd -d, ...): "
      "images hardly shrink anyway"
    )
  elif kind == "tar":
    yield from scan_tars(files, base, passed, options)
  elif kind == "parquet":
    from caprl_jax.data.readers import caprl_parquet  # only here: it brings pyarrow

    yield from _told_apart(
      (row, f"{file.relative_to(base).as_posix()}/{number}")
      for file in files
      for number, row in enumerate(caprl_parquet.scan_images(file, options))
    )
  else:
    for file in files:
      yield from scan_list(file, options)


def _told_apart(found: Iterable[tuple[CaptionRow, str]]) -> list[CaptionRow]:
  """Rows of files that need not name their images, or may name two alike: such are named by their
  place.
  """
  found = list(found)
  counts = collections.Counter(row.name for row, _ in found)
  return [
    row if counts[row.name] == 1 else dataclasses.replace(row, name=place) for row, place in found
  ]


def _tfds(source: str, said: str, options: ListingOptions) -> Iterable[CaptionRow]:
  folder, _, split = source.removeprefix("tfds:").rpartition(":")
  if not folder or not split:
    raise ValueError(
      f"{said}: write tfds:FOLDER:SPLIT, as in tfds:~/tensorflow_datasets/mnist/3.0.1:train"
    )
  from caprl_jax.data.readers import tfds  # only here: it brings tensorflow_datasets

  return _told_apart(
    (row, f"{split}/{number}")
    for number, row in enumerate(tfds.scan_images(folder, split, options))
  )


def _hub(source: str, options: ListingOptions) -> Iterable[CaptionRow]:
  from caprl_jax import hub_datasets
  from caprl_jax.data.readers import caprl_parquet  # only here: it brings pyarrow

  return _told_apart(
    (row, f"{file.name}/{number}")
    for file in hub_datasets.split_files(source)
    for number, row in enumerate(caprl_parquet.scan_images([file], options))
  )


def _unique(found: Iterable[CaptionRow], source: str) -> list[CaptionRow]:
  """The rows, each name once. Raises ValueError for two images of one name."""
  rows: dict[str, CaptionRow] = {}
  again = 0
  for row in found:
    first = rows.setdefault(row.name, row)
    if first is not row:
      if first.image != row.image:
        raise ValueError(
          f"{source}: two images are called {shown(row.name)}, so their captions could "
          "not be told apart; rename one"
        )
      again += 1
  if again:
    log.warning("%s: %d images are listed more than once and captioned once", source, again)
  return list(rows.values())
