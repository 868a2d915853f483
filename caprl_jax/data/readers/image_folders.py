"""A folder -> the files in it that may be images or hold some, and what was passed over, counted.

What is passed over, by name: hidden files and folders (`.git`, `._a.png`, `.ipynb_checkpoints`),
leftovers of systems (`__MACOSX`, `Thumbs.db`, `@eaDir`), partial downloads and backups (`*.part`,
`*.crdownload`, `*.tmp`, `~$a`, `*~`). A file is an image by its suffix, if Pillow opens such;
files of any other suffix or none are looked into, except those that never are images (`.txt`).
"""

import collections
import dataclasses
import logging
import os
import pathlib
import stat
from collections.abc import Callable

from caprl_jax.image_files import HEAD_BYTES, advice, openable, openable_suffixes, sniff
from caprl_jax.json_files import shown

log = logging.getLogger("caprl_jax.data")

NO_IMAGE = "no image"
HIDDEN = "hidden"
LEFTOVER = "leftover of a system"
PARTIAL = "partial download or backup"
CANNOT_OPEN = "image that cannot be opened here: "
UNREADABLE = "folder or file that cannot be read"
NO_FILE = "no regular file"
DEAD_LINK = "link that leads nowhere"
LINKED_AGAIN = "link to what is found by another name"

SHOWN_NAMES = 3  # of each reason
_SHOWN_SUFFIXES = 12  # reasons of their own
_SYSTEM = (
  "__macosx",
  "thumbs.db",
  "ehthumbs.db",
  "desktop.ini",
  "icon\r",
  "@eadir",
  "#recycle",
  "@recycle",
  "@recently-snapshot",
  "network trash folder",
  "temporary items",
  "$recycle.bin",
  "system volume information",
  "lost+found",
)
_PARTIAL = (
  ".part",
  ".filepart",
  ".!qb",
  ".partial",
  ".crdownload",
  ".download",
  ".opdownload",
  ".incomplete",
  ".aria2",
  ".!ut",
  ".tmp",
  ".temp",
  ".bak",
  ".swp",
  "~",
)
_RAW = tuple(
  ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mrw .nef .nrw .orf .pef .raf .raw .rw2 .sr2 "
  ".srf .srw .x3f".split()
)
_KNOWN_AS_IMAGES = {  # suffix: format, for advice where nothing in the file tells
  ".heic": "HEIF",
  ".heif": "HEIF",
  ".hif": "HEIF",
  ".avif": "AVIF",
  ".jxl": "JXL",
  ".svg": "SVG",
  ".svgz": "SVG",
  ".eps": "EPS",
  ".ps": "EPS",
  ".ai": "EPS",
  ".pdf": "PDF",
  ".exr": "EXR",
}
_OTHER_IMAGES = (".wmf", ".emf", ".xcf", ".kra", ".psb", ".hdr", ".djvu", ".cdr")
_NO_IMAGES = tuple(
  ".txt .caption .json .jsonl .csv .tsv .md .html .htm .xml .yaml .yml .toml .py .ipynb .npy .npz "
  ".pt .pth .safetensors .cls .tags .log .mp4 .mov .mkv .webm .avi .mp3 .wav .flac .gz .bz2 .xz "
  ".zst .zip .rar .7z .lock .sh .db .arrow".split()
)


class PassedOver:
  """Counts of files that were left out, by reason, with a few names of each."""

  def __init__(self):
    self.counts: collections.Counter[str] = collections.Counter()
    self._names: dict[str, list[str]] = {}

  def add(self, reason: str, name: str, count: int = 1) -> None:
    """Counts a file, or as many as a folder of this name holds."""
    suffixes = sum(known.startswith(NO_IMAGE) for known in self.counts)
    if reason.startswith(NO_IMAGE) and reason not in self.counts and suffixes >= _SHOWN_SUFFIXES:
      reason = f"{NO_IMAGE} (another suffix)"
    self.counts[reason] += count
    names = self._names.setdefault(reason, [])
    if len(names) < SHOWN_NAMES:
      names.append(name)

  def figures(self) -> dict[str, object]:
    """Files in all, and by reason."""
    return {"files": self.counts.total(), "by_reason": dict(self.counts.most_common())}

  def __str__(self) -> str:
    told = []
    for reason, count in self.counts.most_common():
      names = self._names[reason]
      more = ", ..." if count > len(names) else ""
      told.append(f"{count} {reason} ({', '.join(shown(name) for name in names)}{more})")
    return "; ".join(told)

  def say(self, source: str) -> None:
    """One line of log, a warning where images are lost to what could be mended."""
    if self.counts:
      lost = (CANNOT_OPEN, UNREADABLE, DEAD_LINK)
      level = logging.WARNING if any(r.startswith(lost) for r in self.counts) else logging.INFO
      log.log(level, "%s: passed over %d files: %s", source, self.counts.total(), self)


def left_out(name: str) -> str:
  """Why a file or folder of this name is passed over, "" where it is not."""
  small = name.lower()
  if small in _SYSTEM:
    return LEFTOVER
  if small.endswith(_PARTIAL) or name.startswith("~$"):
    return PARTIAL
  return HIDDEN if name.startswith(".") else ""


def image_or_reason(name: str, head: Callable[[], bytes]) -> str:
  """ "" for a file that is an image, else why it is none.

  Args:
    name: its suffix decides where Pillow opens such files.
    head: reads its first `HEAD_BYTES`; asked where the suffix does not decide.
  """
  suffix = os.path.splitext(name)[1].lower()
  if suffix in openable_suffixes():
    return ""
  if suffix in _RAW:
    return f"{CANNOT_OPEN}a camera's raw file; develop it to JPEG or PNG"
  if suffix in _NO_IMAGES:
    return f"{NO_IMAGE} ({suffix})"
  kind = sniff(head())
  if kind and openable(kind):
    return ""
  kind = kind or _KNOWN_AS_IMAGES.get(suffix, "")
  if kind:
    return f"{CANNOT_OPEN}{kind}; {advice(kind) or 'convert it to PNG'}"
  if suffix in _OTHER_IMAGES:
    return f"{CANNOT_OPEN}{suffix}; convert it to PNG"
  return f"{NO_IMAGE} ({suffix if suffix and len(suffix) <= 10 else 'no suffix'})"


def file_or_reason(path: pathlib.Path) -> str:
  """As `image_or_reason`, of a file on disk."""

  def head() -> bytes:
    with path.open("rb") as file:
      return file.read(HEAD_BYTES)

  try:
    return image_or_reason(path.name, head)
  except OSError:
    return UNREADABLE


def folder_files(root: pathlib.Path, passed: PassedOver) -> list[pathlib.Path]:
  """The files below a folder, sorted, but those that `left_out` names.

  Linked folders are searched after all others and each folder once, so that no circle of links is
  walked and no file comes twice. Of a linked file that is found by its own name, too, that counts,
  unless the link alone has the suffix of an image.

  Raises:
    ValueError: the folder itself cannot be read.
  """
  walk = _Walk(root, passed)
  walk.search(root)
  while walk.linked:
    link, identity = walk.linked.pop(0)
    if identity in walk.seen:
      passed.add(LINKED_AGAIN, f"{walk.name(link)}/")
    else:
      walk.search(link)
  if not walk.links:
    return sorted(walk.files)
  names = {os.path.join(walk.real(file.parent), file.name): file for file in walk.files}
  for link in sorted(walk.links):
    target = os.path.realpath(link)
    first = names.setdefault(target, link)
    if first is not link:
      if _says_image(link) and not _says_image(first):  # the hub's cache names files by digests
        names[target], link = link, first
      passed.add(LINKED_AGAIN, walk.name(link))
  return sorted(names.values())


def _says_image(path: pathlib.Path) -> bool:
  return path.suffix.lower() in openable_suffixes()


@dataclasses.dataclass
class _Walk:
  """files: found; links: to files; linked: folders behind links, with what the system calls them;
  seen: folders that were searched, or hold the root."""

  root: pathlib.Path
  passed: PassedOver
  files: list[pathlib.Path] = dataclasses.field(default_factory=list)
  links: list[pathlib.Path] = dataclasses.field(default_factory=list)
  linked: list[tuple[pathlib.Path, tuple[int, int]]] = dataclasses.field(default_factory=list)
  seen: set[tuple[int, int]] = dataclasses.field(default_factory=set)

  def __post_init__(self):
    self._real: dict[pathlib.Path, str] = {}
    self.seen.update(_identity(folder.stat()) for folder in self.root.resolve().parents)

  def real(self, folder: pathlib.Path) -> str:
    if folder not in self._real:
      self._real[folder] = os.path.realpath(folder)
    return self._real[folder]

  def name(self, path: pathlib.Path) -> str:
    return str(path.relative_to(self.root))

  def search(self, top: pathlib.Path) -> None:
    """Takes all below a folder but what stands behind links to folders, which come to `linked`."""
    folders = [top]
    while folders:
      folder = folders.pop()
      try:
        self.seen.add(_identity(folder.stat()))
        with os.scandir(folder) as found:
          entries = sorted(found, key=lambda entry: entry.name)
      except OSError as error:
        if folder == self.root:
          raise ValueError(f"{folder}: cannot be read: {error.strerror}; check the path") from error
        self.passed.add(UNREADABLE, f"{self.name(folder)}/")
        continue
      for entry in entries:
        try:
          if self._take(folder, entry):
            folders.append(folder / entry.name)
        except OSError:
          self.passed.add(UNREADABLE, self.name(folder / entry.name))

  def _take(self, folder: pathlib.Path, entry: os.DirEntry) -> bool:
    """Whether an entry is a folder to be searched; anything else is put where it belongs."""
    path = folder / entry.name
    is_folder = entry.is_dir(follow_symlinks=False)
    if reason := left_out(entry.name):
      count = sum(len(files) for _, _, files in os.walk(path)) if is_folder else 1
      if count:
        self.passed.add(reason, self.name(path) + ("/" if is_folder else ""), count)
      return False
    if is_folder:
      return True
    if entry.is_file(follow_symlinks=False):
      self.files.append(path)
      return False
    try:
      found = entry.stat()
    except OSError:
      self.passed.add(DEAD_LINK, self.name(path))
      return False
    if stat.S_ISDIR(found.st_mode):
      self.linked.append((path, _identity(found)))
    elif stat.S_ISREG(found.st_mode):
      self.links.append(path)
    else:
      self.passed.add(NO_FILE, self.name(path))
    return False


def _identity(found: os.stat_result) -> tuple[int, int]:
  return found.st_dev, found.st_ino
