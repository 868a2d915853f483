"""Images that cannot be used, each in another way, and some that only look so."""

import io
import zlib

import numpy as np
from PIL import Image


def noise(size=(48, 40), seed=0) -> Image.Image:
  """An RGB picture of noise; size: width, height."""
  pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
  return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
  """The picture as a file of that kind."""
  file = io.BytesIO()
  image.save(file, kind, **settings)
  return file.getvalue()


def turned(by: int) -> Image.Exif:
  """An EXIF block with that orientation."""
  exif = Image.Exif()
  exif[0x0112] = by
  return exif


def huge_png(side: int) -> bytes:
  """The header of a square PNG and no pixels, in a few bytes."""
  whole = bytearray(encoded(Image.new("L", (1, 1))))
  whole[16:24] = side.to_bytes(4, "big") * 2
  whole[29:33] = zlib.crc32(bytes(whole[12:29])).to_bytes(4, "big")
  return bytes(whole)


# kind -> bytes and the reason that is counted
BAD = {
  f"cut {kind}": (encoded(noise(), kind)[:-200], "damaged image")
  for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
} | {
  "progressive, cut": (encoded(noise(), "JPEG", progressive=True)[:1500], "damaged image"),
  "empty": (b"", "not an image"),
  "text": (b"<html>404</html>", "not an image"),
  "zeros": (bytes(500), "not an image"),
  "a bomb": (huge_png(60_000), "too many pixels"),
}

GOOD = {
  "CMYK": encoded(noise().convert("CMYK"), "JPEG"),
  "palette with transparency": encoded(noise().convert("P"), "PNG", transparency=3),
  "16 bits": encoded(Image.fromarray(np.arange(1920, dtype=np.uint16).reshape(40, 48) * 30)),
  "one bit": encoded(noise().convert("1")),
  "grey and alpha": encoded(noise().convert("LA")),
  "animated": encoded(noise(), "GIF", save_all=True, append_images=[noise(seed=1)]),
  "its second picture is cut": encoded(
    noise(), "GIF", save_all=True, append_images=[noise(seed=1)]
  )[:-400],
  **{
    f"{kind} turned by {by}": encoded(noise(), kind, exif=turned(by))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF")
    for by in (3, 6, 9)
  },
}
