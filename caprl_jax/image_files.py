"""Encoded images -> Pillow's; what Pillow can open here; formats by first bytes.

Every image that the package reads is opened here, so that what one part reads all parts read.
"""

import functools
import importlib
import importlib.util
import io
import logging
import pathlib
import re
import stat
import struct

from PIL import Image, ImageFile, UnidentifiedImageError

log = logging.getLogger("caprl_jax.image_files")

HEAD_BYTES = 1024  # enough for `sniff`: an SVG may say so after a comment

_PLUGINS = (  # what Pillow lacks, where it is installed: module, what registers it
  ("pillow_heif", "register_heif_opener"),
  ("pillow_avif", None),
  ("pillow_jxl", None),
)
# Not pictures that can be decoded: PostScript is a program, which Ghostscript would run, and of
# MPEG Pillow reads the size alone. Formats that it only names (WMF, HDF5, ...) are found by class.
_LEFT_OUT = ("EPS", "MPEG")
_TEXT_BYTES = 1 << 20  # of a PNG's texts, where they are more than Pillow reads
_ADVICE = {
  "HEIF": "pip install pillow-heif",
  "AVIF": "pip install pillow-avif-plugin",
  "JXL": "pip install pillow-jxl-plugin",
  "SVG": "a drawing: render it to PNG",
  "PDF": "a document: render its pages to PNG",
  "EPS": "a drawing: render it to PNG",
  "EXR": "convert it to PNG",
}
_TEXTS = (  # other files that are found in an image's place
  (b"version https://git-lfs", "a git-lfs pointer: run git lfs pull"),
  (b"<!doctype html", "a web page, as a failed download leaves it: download the image again"),
  (b"<html", "a web page, as a failed download leaves it: download the image again"),
)


def open_image(source: pathlib.Path | bytes) -> Image.Image:
  """An image of which only the header is read. Of several frames or pages it is the first.

  Raises:
    PIL.UnidentifiedImageError: no image that can be opened here, with what it is and what helps.
    PIL.Image.DecompressionBombError: more than 179 million pixels.
    Exception: whatever Pillow stumbles over.
  """
  return _opened(source, load=False)


def load_image(source: pathlib.Path | bytes) -> Image.Image:
  """As `open_image`, with its pixels.

  A PNG is read whatever its texts and its colour profile hold: where they are more than Pillow
  reads, they are left aside unread.
  """
  image = _opened(source, load=True)
  _say_first_frame(source, image)
  return image


def openable_suffixes() -> frozenset[str]:
  """The suffixes of images that can be opened here, in small letters: ".png", ".jfif", ...

  AVIF and HEIF are among them where Pillow or a plug-in reads them (pillow-avif-plugin,
  pillow-heif, pillow-jxl-plugin).
  """
  return _suffixes()


def openable(kind: str) -> bool:
  """Whether a format, as `sniff` names it, can be opened here."""
  return kind in _formats()


def advice(kind: str) -> str:
  """What helps with a format that cannot be opened here, "" where nothing is known."""
  return "" if openable(kind) else _ADVICE.get(kind, "")


def _opened(source: pathlib.Path | bytes, load: bool) -> Image.Image:
  try:
    return _read(source, load)
  except ValueError:
    # So Pillow says that a PNG's texts are too long; they may stand behind its pixels, too.
    data = source if isinstance(source, bytes) else source.read_bytes()
    if sniff(data) != "PNG":
      raise
    return _read(_without_texts(data), load)


def check_regular(path: pathlib.Path) -> None:
  """Raises UnidentifiedImageError for a pipe or a device, which could be read for ever."""
  mode = path.stat().st_mode
  if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # to open a folder is an error of its own
    raise UnidentifiedImageError("it is no regular file")


def _read(source: pathlib.Path | bytes, load: bool) -> Image.Image:
  if not isinstance(source, bytes):
    check_regular(source)
  file = io.BytesIO(source) if isinstance(source, bytes) else source
  try:
    image = Image.open(file, formats=_formats())
  except UnidentifiedImageError:
    raise UnidentifiedImageError(_what_it_is(source)) from None
  if load:
    try:
      image.load()
    except BaseException:
      image.close()
      raise
  return image


def _what_it_is(source: pathlib.Path | bytes) -> str:
  """Of what cannot be opened."""
  if isinstance(source, bytes):
    head = source[:HEAD_BYTES]
  else:
    with source.open("rb") as file:
      head = file.read(HEAD_BYTES)
  kind = sniff(head)
  if not head:
    return "it is empty"
  if kind and not openable(kind):
    return f"it is {kind}, which cannot be opened here ({advice(kind)})"
  start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
  known = next((what for begin, what in _TEXTS if start.startswith(begin)), None)
  if known:
    return f"it is {known}"
  return f"it is damaged {kind}" if kind else "it is in no format that Pillow can open"


def _without_texts(data: bytes) -> bytes:
  """A PNG without its colour profile and compressed texts; of the others up to `_TEXT_BYTES` stay,
  because a camera's orientation may be in one of them.
  """
  kept, at, left = [data[:8]], 8, _TEXT_BYTES
  while at + 12 <= len(data):
    length, kind = struct.unpack_from(">I4s", data, at)
    chunk = data[at : at + 12 + length]
    at += len(chunk)
    packed = kind == b"iTXt" and chunk[8:].partition(b"\0")[2][:1] == b"\1"
    if kind in (b"zTXt", b"iCCP") or packed:
      continue
    if kind in (b"tEXt", b"iTXt"):
      if length > left:
        continue
      left -= length
    kept.append(chunk)
  return b"".join(kept)


_said_first_frame: list[bool] = []  # so that it is said once


def _say_first_frame(source: pathlib.Path | bytes, image: Image.Image) -> None:
  # MPO: beside its photograph a phone keeps a preview or depths; PSD: layers, already put together.
  if _said_first_frame or image.format in ("MPO", "PSD", "ICNS"):
    return
  try:
    with _read(source, load=False) as again:  # looking for more frames may move in the file
      several = bool(getattr(again, "is_animated", False))
  except Exception as error:  # noqa: BLE001  of frames behind the first, which was read
    log.debug("frames after the first cannot be counted: %s", error)
    return
  if several:
    _said_first_frame.append(True)
    log.info("an image has several frames or pages; of such the first is taken (said once)")


@functools.cache
def _formats() -> tuple[str, ...]:
  """What can be opened, as Pillow names it; formats without a signature of their own come last."""
  Image.init()
  for name, register in _PLUGINS:
    if importlib.util.find_spec(name) is None:
      continue
    try:
      module = importlib.import_module(name)
      if register:
        getattr(module, register)()
    except (ImportError, OSError, AttributeError) as error:
      log.warning("%s is installed and cannot be used (%s)", name, error)

  def pictures(name: str) -> bool:
    factory = Image.OPEN[name][0]
    stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    return not stub and name not in _LEFT_OUT

  found = [name for name in Image.ID if pictures(name)]
  return tuple(sorted(found, key=lambda name: Image.OPEN[name][1] is None))


@functools.cache
def _suffixes() -> frozenset[str]:
  formats = {*_formats(), "MPO"}  # MPO is opened as JPEG
  return frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in formats)


_SIGNATURES = (  # the names are Pillow's, where it has one
  (b"\x89PNG\r\n\x1a\n", "PNG"),
  (b"\xff\xd8\xff", "JPEG"),
  (b"GIF87a", "GIF"),
  (b"GIF89a", "GIF"),
  (b"II*\0", "TIFF"),
  (b"MM\0*", "TIFF"),
  (b"II+\0", "TIFF"),
  (b"MM\0+", "TIFF"),
  (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
  (b"\xff\x4f\xff\x51", "JPEG2000"),
  (b"8BPS\0\1", "PSD"),
  (b"qoif", "QOI"),
  (b"DDS \x7c\0\0\0", "DDS"),
  (b"icns", "ICNS"),
  (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
  (b"\x76\x2f\x31\1", "EXR"),
  (b"%PDF-", "PDF"),
  (b"%!PS", "EPS"),
)
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def sniff(head: bytes) -> str:
  """The format of an image whose first bytes are `head` (up to `HEAD_BYTES`), "" for no image.

  Formats that Pillow cannot open are named too: JXL, HEIF, SVG, PDF, EPS, EXR.
  """
  head = bytes(head[:HEAD_BYTES])
  for signature, name in _SIGNATURES:
    if head.startswith(signature):
      return name
  if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
    return "WEBP"
  if head[:2] == b"BM" and len(head) >= 18:
    return "BMP" if struct.unpack_from("<I", head, 14)[0] in _BMP_HEADERS else ""
  if head[:4] == b"\0\0\1\0" and len(head) >= 22:
    return "ICO" if 0 < head[4] < 64 and head[5] == 0 and head[9] == 0 else ""
  if head[4:8] == b"ftyp":
    return _of_boxes(head)
  if re.match(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s+\d+\s", head):
    return "PPM"
  if re.match(rb"(\xef\xbb\xbf)?\s*(<\?xml|<!--|<!DOCTYPE svg|<svg)", head, re.I):
    return "SVG" if re.search(rb"<svg[\s>]", head, re.I) else ""
  return ""


def _of_boxes(head: bytes) -> str:
  """Of an ISO media file: its brands say whether it is AVIF, HEIF or a video."""
  end = min(struct.unpack_from(">I", head)[0], len(head))
  brands = [head[8:12], *(head[i : i + 4] for i in range(16, end - 3, 4))]
  if any(brand in _AVIF_BRANDS for brand in brands):
    return "AVIF"
  return "HEIF" if any(brand in _HEIF_BRANDS for brand in brands) else ""
