"""How rows spell an image: paths, addresses of files, data: URIs, base64, objects, lists of one."""

import base64
import hashlib
import io
import pathlib
import urllib.parse

import pytest
from PIL import Image

from caprl_jax.data.readers import image_spellings
from caprl_jax.data.readers.image_spellings import spelled_image


def encoded(kind: str = "PNG") -> bytes:
  file = io.BytesIO()
  pixels = bytes(i * 37 % 251 for i in range(64 * 48 * 3))
  Image.frombytes("RGB", (64, 48), pixels).save(file, kind)
  return file.getvalue()


PNG = encoded()
TEXT = base64.b64encode(PNG).decode()
LINES = base64.encodebytes(PNG).decode()
URL_SAFE = base64.urlsafe_b64encode(PNG).decode().rstrip("=")
DIGEST = f"sha256-{hashlib.sha256(PNG).hexdigest()[:16]}"


@pytest.mark.parametrize(
  "value",
  [
    TEXT,
    LINES,
    LINES.replace("\n", "\r\n"),
    "  " + TEXT + "\n",
    URL_SAFE,
    TEXT.encode(),
    f"data:image/png;base64,{TEXT}",
    f"DATA:IMAGE/PNG;BASE64,{TEXT}",
    f"data:image/x-whatever;charset=utf-8;base64,{LINES}",
    f"data:;base64,{URL_SAFE}",
    f"data:application/octet-stream;base64,{urllib.parse.quote(TEXT)}",
    f"data:image/png,{urllib.parse.quote(PNG)}",
    PNG,
    bytearray(PNG),
    {"bytes": PNG},
    {"bytes": PNG, "path": None},
    {"bytes": TEXT, "path": ""},
    {"bytes": list(PNG)},
    {"url": f"data:image/png;base64,{TEXT}"},
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{TEXT}"}},
    [TEXT],
    [[{"bytes": PNG}]],
  ],
)
def test_an_image_in_the_row(value, tmp_path):
  found = spelled_image(value, tmp_path, "rows.jsonl:3")
  assert found.image == PNG
  assert found.name == DIGEST


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "JPEG2000"])
def test_base64_is_known_by_what_it_encodes(kind, tmp_path):
  data = encoded(kind)
  assert spelled_image(base64.b64encode(data).decode(), tmp_path, "x").image == data


@pytest.mark.parametrize(
  "value, path, name",
  [
    ("a.png", "ROOT/a.png", "a.png"),
    ("./a b/é.png", "ROOT/a b/é.png", "./a b/é.png"),
    ("/data/a.png", "/data/a.png", "/data/a.png"),
    ("~/a.png", "HOME/a.png", "~/a.png"),
    ("~nobody-of-this-name/a.png", "ROOT/~nobody-of-this-name/a.png", "~nobody-of-this-name/a.png"),
    ("file:///data/a%20b%23.png", "/data/a b#.png", "file:///data/a%20b%23.png"),
    ("file:///data/a#b?c.png", "/data/a#b?c.png", "file:///data/a#b?c.png"),
    ("file://localhost/data/a.png", "/data/a.png", "file://localhost/data/a.png"),
    ("file:/data/a.png", "/data/a.png", "file:/data/a.png"),
    ("file:a.png", "ROOT/a.png", "file:a.png"),
    ("file:///data/%ff.png", "/data/\udcff.png", "file:///data/%ff.png"),
    ("12:30.png", "ROOT/12:30.png", "12:30.png"),
    ("shot:1.png", "ROOT/shot:1.png", "shot:1.png"),
    (["a.png"], "ROOT/a.png", "a.png"),
    ({"path": "a.png", "bytes": None}, "ROOT/a.png", "a.png"),
    ({"path": "a.png"}, "ROOT/a.png", "a.png"),
    (pathlib.Path("a.png"), "ROOT/a.png", "a.png"),
    ("A" * 80, "ROOT/" + "A" * 80, "A" * 80),
  ],
)
def test_a_path(value, path, name, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  found = spelled_image(value, tmp_path, "x")
  path = path.replace("ROOT", str(tmp_path)).replace("HOME", str(tmp_path / "home"))
  assert found.image == pathlib.Path(path)
  assert found.name == name


def test_bytes_come_before_their_path_which_names_them(tmp_path):
  found = spelled_image({"path": "images/a.png", "bytes": PNG}, tmp_path, "x")
  assert found.image == PNG and found.name == "images/a.png"


def test_a_file_that_looks_like_base64_is_a_file(tmp_path):
  name = TEXT[:80].replace("/", "-").replace("+", "_")
  (tmp_path / name).write_bytes(PNG)
  assert spelled_image(name, tmp_path, "x").image == tmp_path / name


@pytest.mark.parametrize(
  "value, message",
  [
    ("", "names no image"),
    ("  ", "names no image"),
    (None, "names no image"),
    ({}, "names no image"),
    ({"path": None, "bytes": None}, "neither bytes nor a path"),
    ([], "0 images.*add one"),
    (["a.png", "b.png"], "2 images, but a row has one; make a row of each"),
    (3, "image 3 is no path"),
    (True, "image True is no path"),
    ({"width": 3}, "neither bytes nor a path"),
    ([[[[[["a.png"]]]]]], "is no path"),
    ("https://example.org/a.png", "another machine.*download it first"),
    ("s3://bucket/a.png", "another machine"),
    ("file://server/share/a.png", "machine 'server'"),
    ("file://a.png", "machine 'a.png'"),
    ("file://", "names no file"),
    ("a\0.png", "neither a path nor"),
    ("x" * 100_000, "neither a path nor"),
    ("data:image/png;base64", "without a comma"),
    ("data:image/png;base64,", "holds no bytes"),
    ("data:text/plain;base64,aGVsbG8=", "of 'text/plain', not an image"),
    ("data:image/png;base64,é" + TEXT, "no base64 .*at character 0"),
    (f"data:image/png;base64,{TEXT}$", "no base64"),
    ("data:image/png;base64,A", "no base64"),
    (b"", "holds no bytes"),
  ],
)
def test_what_is_no_image_is_one_short_message(value, message, tmp_path):
  with pytest.raises(ValueError, match=message) as failure:
    spelled_image(value, tmp_path, "rows.jsonl:3")
  assert str(failure.value).startswith("rows.jsonl:3: ") and len(str(failure.value)) < 250


def test_an_image_that_is_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
  monkeypatch.setattr(image_spellings, "MAX_IMAGE_BYTES", 200)
  for value in (TEXT, f"data:image/png;base64,{TEXT}", PNG, f"data:image/png,{'a' * 9000}"):
    with pytest.raises(ValueError, match="save it as a file") as failure:
      spelled_image(value, tmp_path, "x")
    assert len(str(failure.value)) < 250
