"""Opening images: all that Pillow reads, texts of any length, plug-ins; formats by first bytes."""

import io
import logging
import os
import pathlib
import struct
import sys
import types
import zlib

import pytest
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError, features

from caprl_jax import image_files
from caprl_jax.data.rows import CaptionRow, failure_reason, image_bytes, read_image
from caprl_jax.image_files import load_image, open_image, sniff


def encoded(kind: str, **options) -> bytes:
  file = io.BytesIO()
  image = Image.frombytes("RGB", (64, 48), bytes(i * 37 % 251 for i in range(64 * 48 * 3)))
  image.save(file, kind, **options)
  return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(added: bytes, behind_pixels: bool) -> bytes:
  data = encoded("PNG")
  at = data.index(b"IEND" if behind_pixels else b"IDAT") - 4
  return data[:at] + added + data[at:]


BOMB = zlib.compress(bytes(3 << 20))
LONG = {
  "zTXt": chunk(b"zTXt", b"Comment\0\0" + BOMB),
  "iTXt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
  "iCCP": chunk(b"iCCP", b"profile\0\0" + BOMB),
  "many": chunk(b"tEXt", b"Comment\0" + b"x" * (1 << 20)) * 65,
}


@pytest.mark.parametrize("behind_pixels", [False, True])
@pytest.mark.parametrize("kind", LONG)
def test_a_png_is_read_whatever_its_texts_hold(kind, behind_pixels, tmp_path):
  data = with_chunk(LONG[kind], behind_pixels)
  (tmp_path / "a.png").write_bytes(data)
  plain = load_image(encoded("PNG")).tobytes()
  for source in (data, tmp_path / "a.png"):
    with open_image(source) as image:
      assert image.size == (64, 48)
    with load_image(source) as image:
      assert image.tobytes() == plain
  assert read_image(CaptionRow(data, "", "a")).size == (64, 48)


def test_the_orientation_beside_a_long_text_stays():
  xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'
  data = with_chunk(LONG["zTXt"] + chunk(b"iTXt", xmp), False)
  assert read_image(CaptionRow(data, "", "a")).size == (48, 64)


def test_exif_that_cannot_be_read_turns_nothing():
  data = encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
  assert read_image(CaptionRow(data, "", "a")).size == (64, 48)
  data = with_chunk(chunk(b"eXIf", b"nonsense"), False)
  assert read_image(CaptionRow(data, "", "a")).size == (64, 48)


KINDS = {
  "PNG": "png",
  "JPEG": "jfif",
  "GIF": "gif",
  "BMP": "bmp",
  "TIFF": "tif",
  "WEBP": "webp",
  "JPEG2000": "jp2",
  "PPM": "ppm",
  "ICO": "ico",
  "DDS": "dds",
  "QOI": "qoi",
  "ICNS": "icns",
  "TGA": "tga",
  "PCX": "pcx",
  "SGI": "sgi",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_pillow_writes_is_opened_and_known(kind):
  try:
    data = encoded(kind)
  except (OSError, KeyError):
    pytest.skip(f"this Pillow writes no {kind}")
  with load_image(data) as image:
    assert image.size[0] in (16, 48, 64, 1024) or kind == "ICNS"
  assert sniff(data[:64]) == ("" if kind in ("TGA", "PCX", "SGI") else kind)
  assert f".{KINDS[kind]}" in image_files.openable_suffixes()


def test_avif():
  if not features.check("avif"):
    pytest.skip("this Pillow reads no AVIF")
  data = encoded("AVIF")
  assert sniff(data) == "AVIF" and ".avif" in image_files.openable_suffixes()
  assert load_image(data).size == (64, 48)


@pytest.mark.parametrize(
  "head, kind",
  [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
    (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
    (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", ""),
    (b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="x">', "SVG"),
    (b"<svg>", "SVG"),
    (b"<?xml version='1.0'?><note>", ""),
    (b"%PDF-1.7", "PDF"),
    (b"BM of two letters begin a text that is no image", ""),
    (b"P5 is a text", ""),
    (b"P3\n# made\n2 2\n255\n", "PPM"),
    (b"\0\1\0\0\0\x0f\0\x80", ""),
    (b"", ""),
    (b"RIFF\0\0\0\0WAVE", ""),
  ],
)
def test_formats_by_first_bytes(head, kind):
  assert sniff(head) == kind


@pytest.mark.parametrize(
  "data, message",
  [
    (b"", "it is empty"),
    (b"nonsense", "in no format that Pillow can open"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    (b"\n<!DOCTYPE html><html>", "a web page, .*download the image again"),
    (b"<svg width='3'></svg>", "it is SVG.*render it to PNG"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "it is JXL.*pip install pillow-jxl-plugin"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is EPS"),
    (b"\xff\xd8\xff\xe0", "damaged JPEG"),
  ],
)
def test_what_cannot_be_opened_is_named(data, message, tmp_path):
  (tmp_path / "a.png").write_bytes(data)
  for source in (data, tmp_path / "a.png"):
    with pytest.raises(UnidentifiedImageError, match=message):
      open_image(source)


def test_a_pipe_and_a_device_are_no_images(tmp_path):
  os.mkfifo(tmp_path / "pipe.png")
  for path in (tmp_path / "pipe.png", pathlib.Path("/dev/zero")):
    for read in (read_image, image_bytes):
      with pytest.raises(ValueError, match="it is no regular file") as failure:
        read(CaptionRow(path, "", "a"))
      assert failure_reason(failure.value) == "not an image"
  with pytest.raises(ValueError, match=r"(?i)is a directory"):
    read_image(CaptionRow(tmp_path, "", "a"))


def test_no_suffix_stands_for_what_is_not_decoded():
  suffixes = image_files.openable_suffixes()
  assert {".png", ".jpg", ".jpe", ".jfif", ".apng", ".mpo", ".psd", ".pgm"} <= suffixes
  assert not {".pdf", ".eps", ".ps", ".mpg", ".h5", ".wmf", ".emf", ".svg"} & suffixes


def test_a_plug_in_that_is_installed_is_used(monkeypatch):
  class Picture(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self):
      self._size, self._mode, self.tile = (5, 3), "RGB", []

  def register():
    Image.register_open("HEIF", Picture, lambda prefix: prefix[4:12] == b"ftypheic")
    Image.register_extension("HEIF", ".heic")

  module = types.ModuleType("pillow_heif")
  module.register_heif_opener = register
  module.__spec__ = types.SimpleNamespace(name="pillow_heif")
  head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
  monkeypatch.setitem(sys.modules, "pillow_heif", module)
  monkeypatch.setattr(Image, "ID", list(Image.ID))
  monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
  monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
  image_files._formats.cache_clear()
  image_files._suffixes.cache_clear()
  try:
    assert ".heic" in image_files.openable_suffixes() and image_files.advice("HEIF") == ""
    assert open_image(head).size == (5, 3)
  finally:
    monkeypatch.undo()
    image_files._formats.cache_clear()
    image_files._suffixes.cache_clear()


def test_of_several_frames_the_first_is_taken_and_that_is_said_once(caplog, monkeypatch):
  monkeypatch.setattr(image_files, "_said_first_frame", [])
  frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
  with caplog.at_level(logging.INFO, "caprl_jax"):
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
      file = io.BytesIO()
      lossless = {"lossless": True} if kind == "WEBP" else {}
      frames[0].save(file, kind, save_all=True, append_images=frames[1:], **lossless)
      image_files._said_first_frame.clear()
      caplog.clear()
      for _ in range(2):
        with load_image(file.getvalue()) as image:
          assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
      assert caplog.text.count("of such the first is taken") == 1
    image_files._said_first_frame.clear()
    caplog.clear()
    load_image(encoded("GIF"))
  assert not caplog.text


def test_the_limits_of_pillow_stay_as_they_are():
  before = PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
  load_image(with_chunk(LONG["zTXt"], True))
  after = PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
  assert before == after
