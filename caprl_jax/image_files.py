"""The first bytes of a file -> its format, by what no other file begins with."""

import re
import struct

HEAD_BYTES = 1024  # enough for `sniff`: an SVG may say so after a comment

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
