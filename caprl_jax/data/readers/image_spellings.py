"""What a row says of its image -> the file, or the encoded image that stands in the row itself.

A path may be relative, absolute, begin with `~` or be a `file://` address. An image in the row may
be bytes, a data: URI or plain base64 (url-safe and broken into lines as well), or an object of
path and bytes as Hugging Face datasets have it. A list of one is its one. Nothing is fetched.
"""

import base64
import binascii
import dataclasses
import hashlib
import pathlib
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

from caprl_jax.image_files import HEAD_BYTES, open_image, sniff
from caprl_jax.json_files import shown

MAX_IMAGE_BYTES = 256 << 20  # of an encoded image that stands in a row
LONGEST_PATH = 4096  # characters: what is longer is no path of any file system
_LEAST_BASE64 = 64  # characters: the smallest images have more
_BYTES_KEYS = ("bytes", "base64", "data", "b64_json")
_PLACE_KEYS = ("path", "url", "image_url", "image", "file_name")
_NESTED = 4  # lists and objects inside one another that are looked into
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # two letters or more: C:\ is a drive
_NO_BASE64 = re.compile(rb"[^A-Za-z0-9+/]")


@dataclasses.dataclass(frozen=True)
class SpelledImage:
  """image: a path, which may not exist, or an encoded image. name: short, for messages and outputs:
  the path as it was written, or `sha256-` and 16 digits for an image that has none."""

  image: pathlib.Path | bytes
  name: str


def spelled_image(value: Any, root: pathlib.Path, where: str) -> SpelledImage:
  """Reads what a row says of its image.

  Args:
    value: a string, bytes, a path, an object of path and bytes, or a list of one of these.
    root: the folder of relative paths.
    where: the row's place; begins the message.

  Raises:
    ValueError: no image, several, an address on the web, a `file://` of another machine, base64
      that cannot be decoded, or an image of more than `MAX_IMAGE_BYTES`.
  """
  name = None
  for _ in range(_NESTED):
    if isinstance(value, (list, tuple)):
      value = _only(value, where)
    elif isinstance(value, dict):
      value, said = _of_object(value, where)
      name = name or said
    else:
      break
  if isinstance(value, pathlib.PurePath):
    value = str(value)
  if isinstance(value, (bytes, bytearray, memoryview)):
    data = _plain_bytes(bytes(value), where)
  elif isinstance(value, str) and value.strip():
    found = _of_text(value, root, where)
    if isinstance(found, pathlib.Path):
      return SpelledImage(found, name or value)
    data = found
  elif value is None or isinstance(value, str):
    raise ValueError(f"{where}: it names no image; add one or drop the row")
  else:
    raise ValueError(
      f"{where}: image {shown(value)} is no path, data: URI or base64; write one of these"
    )
  if len(data) > MAX_IMAGE_BYTES:
    raise _too_large(len(data), where)
  return SpelledImage(data, name or f"sha256-{hashlib.sha256(data).hexdigest()[:16]}")


def spelled_or_found(value: Any, root: pathlib.Path, where: str) -> SpelledImage:
  """As `spelled_image`; a text that is the name of a file, however it is spelled, is that file."""
  path = next(filter(is_file, _places(value, root)), None)
  return SpelledImage(path, value) if path is not None else spelled_image(value, root, where)


def find_image(
  value: Any, roots: Sequence[pathlib.Path], where: str, remedy: str = "correct it"
) -> SpelledImage:
  """The file or the encoded image of `spelled_image`.

  Besides, a path that is no file is tried with slashes for its backslashes, and `file://a.png` as
  a relative path.

  Args:
    value: what the row says.
    roots: folders of relative paths, tried in this order.
    where: the row's place; begins every message, if it is not "".
    remedy: ends the message of a path that is no file.

  Raises:
    ValueError: as `spelled_image`; a file that is not there; an encoded image in no known format.
  """
  try:
    return _find_image(value, roots, where, remedy)
  except ValueError as error:
    if where:
      raise
    raise ValueError(str(error).removeprefix(": ")) from error


def _find_image(value: Any, roots: Sequence[pathlib.Path], where: str, remedy: str) -> SpelledImage:
  if isinstance(value, str) and not value.strip():
    raise ValueError(f"{where}: image {shown(value)} is not a file; name one or drop the row")
  # Looked for now: otherwise a wrong root would show after the compile, in the middle of training.
  for root in roots:
    if (path := next(filter(is_file, _places(value, root)), None)) is not None:
      return SpelledImage(path, value)
  found: list[SpelledImage] = []
  for root in roots:
    found.append(spelled_image(value, root, where))
    image = found[-1].image
    if isinstance(image, bytes):
      _check_opens(image, where)
      return found[-1]
    for path in (image, root / str(image).replace("\\", "/")):
      if is_file(path):
        return dataclasses.replace(found[-1], image=path)
  places = " or ".join(str(root.absolute()) for root in roots)
  raise ValueError(f"{where}: image {shown(found[0].name)} is not a file in {places}; {remedy}")


def _places(value: Any, root: pathlib.Path) -> Iterator[pathlib.Path]:
  """Where a text's file may be that would be read in another way, if it were not there; with
  slashes for backslashes, and with accents composed or apart, as macOS writes names."""
  if not isinstance(value, str) or not 0 < len(value) <= LONGEST_PATH:
    return
  for text in dict.fromkeys((value, value.removeprefix("file://"))):
    spelled = (text, text.replace("\\", "/"))
    forms = (unicodedata.normalize(form, text) for text in spelled for form in ("NFC", "NFD"))
    yield from (root / form for form in dict.fromkeys((*spelled, *forms)))


def is_file(path: pathlib.Path) -> bool:
  """As `Path.is_file`; False for what no file can be called."""
  try:
    return path.is_file()
  except (OSError, ValueError):
    return False


def _check_opens(data: bytes, where: str) -> None:
  try:
    open_image(data).close()
  except Exception as error:  # decoders raise whatever they stumble over
    raise ValueError(
      f"{where}: its image ({len(data):,} bytes) cannot be opened: {str(error):.200}; replace it "
      "or drop the row"
    ) from error


def _only(values: list | tuple, where: str) -> Any:
  if len(values) != 1:
    raise ValueError(
      f"{where}: {len(values)} images, but a row has one; "
      + ("make a row of each" if values else "add one or drop the row")
    )
  return values[0]


def _of_object(value: dict, where: str) -> tuple[Any, str | None]:
  """What an object holds: bytes before a path, which then is the name."""
  place = next((value[key] for key in _PLACE_KEYS if value.get(key)), None)
  data = next((value[key] for key in _BYTES_KEYS if value.get(key)), None)
  if data is None:
    if place is None and value:
      raise ValueError(
        f"{where}: image {shown(value)} has neither bytes nor a path; give it one of the keys "
        "'path' and 'bytes'"
      )
    return place, None
  short = isinstance(place, str) and len(place) <= LONGEST_PATH and not place.startswith("data:")
  if isinstance(data, str) and not data.startswith("data:"):
    data = _decoded(data, where)
  elif isinstance(data, list) and all(isinstance(x, int) and 0 <= x < 256 for x in data):
    data = bytes(data)
  return data, place if short else None


def _of_text(text: str, root: pathlib.Path, where: str) -> pathlib.Path | bytes:
  scheme = _SCHEME.match(text.lstrip()[:32])
  name = scheme.group(1).lower() if scheme else ""
  if name == "data":
    return _of_data_uri(text.strip(), where)
  if name == "file":
    return root / _of_file_uri(text.strip(), where)
  if text.lstrip()[len(name) :].startswith("://"):
    raise ValueError(
      f"{where}: image {shown(text)} lies on another machine, and nothing is fetched here; "
      "download it first and name the file"
    )
  if _is_base64(text) and not _is_file(root, text):
    return _decoded(text, where)
  return root / _path(text, where)


def _path(text: str, where: str) -> pathlib.Path:
  if len(text) > LONGEST_PATH or "\0" in text:
    raise ValueError(
      f"{where}: image {shown(text)} is neither a path nor an encoded image; correct it or drop "
      "the row"
    )
  path = pathlib.Path(text)
  if text.startswith("~"):
    try:
      return path.expanduser()
    except RuntimeError:
      return path  # no such user: a file's name may begin so
  return path


def _is_file(root: pathlib.Path, text: str) -> bool:
  if len(text) > LONGEST_PATH:
    return False
  try:
    return (root / text).is_file()
  except (OSError, ValueError):
    return False


def _of_file_uri(text: str, where: str) -> pathlib.Path:
  rest = text[len("file:") :]
  if rest.startswith("//"):
    host, slash, path = rest[2:].partition("/")
    if host.lower() not in ("", "localhost"):
      raise ValueError(
        f"{where}: image {shown(text)} lies on the machine {shown(host)}; write file:/// and the "
        "whole path, or the path alone"
      )
    rest = slash + path
  # As bytes: a name on disk need not be UTF-8.
  decoded = urllib.parse.unquote_to_bytes(rest).decode("utf-8", "surrogateescape")
  if not decoded.strip("/"):
    raise ValueError(f"{where}: image {shown(text)} names no file; write file:/// and its path")
  return _path(decoded, where)


def _of_data_uri(text: str, where: str) -> bytes:
  head, comma, body = text[len("data:") :].partition(",")
  if not comma:
    raise ValueError(f"{where}: image {shown(text)} is a data: URI without a comma before its data")
  kind, *parameters = head.lower().split(";")
  if kind.strip() and not kind.strip().startswith(("image/", "application/octet-stream")):
    raise ValueError(f"{where}: image {shown(text)} is a data: URI of {shown(kind)}, not an image")
  if any(parameter.strip() == "base64" for parameter in parameters):
    return _decoded(urllib.parse.unquote(body) if "%" in body else body, where)
  if len(body) > 3 * MAX_IMAGE_BYTES:
    raise _too_large(len(body) // 3, where)
  return _not_empty(urllib.parse.unquote_to_bytes(body), text, where)


def _is_base64(text: str) -> bool:
  """Whether a text without a scheme is an encoded image: its first bytes say so."""
  start = "".join(text[: 2 * HEAD_BYTES].split())[:HEAD_BYTES]
  if len(start) < _LEAST_BASE64 or not start.isascii():
    return False
  plain = start.rstrip("=").encode().translate(bytes.maketrans(b"-_", b"+/"))
  if _NO_BASE64.search(plain):
    return False
  return bool(sniff(base64.b64decode(plain[: len(plain) // 4 * 4])))


def _decoded(text: str | bytes, where: str) -> bytes:
  if len(text) > 2 * MAX_IMAGE_BYTES:
    raise _too_large(len(text) * 3 // 4, where)
  try:
    plain = text if isinstance(text, bytes) else text.encode("ascii")
    plain = b"".join(plain.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    if wrong := _NO_BASE64.search(plain):
      raise ValueError(
        f"{shown(wrong.group().decode())} at character {wrong.start()} is none of it"
      )
    data = base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
  except UnicodeEncodeError as error:
    wrong = shown(error.object[error.start])
    raise ValueError(
      f"{where}: image {shown(text)} is no base64 ({wrong} at character {error.start}); write it "
      "anew or drop the row"
    ) from None
  except (binascii.Error, ValueError) as error:
    raise ValueError(
      f"{where}: image {shown(text)} is no base64 ({error}); write it anew or drop the row"
    ) from None
  return _not_empty(data, text, where)


def _plain_bytes(data: bytes, where: str) -> bytes:
  """Bytes as they are; where they are base64, what they encode."""
  if not sniff(data[:HEAD_BYTES]) and _is_base64(data[: 2 * HEAD_BYTES].decode("latin-1")):
    return _decoded(data, where)
  return _not_empty(data, data, where)


def _not_empty(data: bytes, said: str | bytes, where: str) -> bytes:
  if not data:
    raise ValueError(f"{where}: image {shown(said)} holds no bytes; add them or drop the row")
  return data


def _too_large(size: int, where: str) -> ValueError:
  return ValueError(
    f"{where}: an image of {size >> 20:,} MiB stands in the row, and {MAX_IMAGE_BYTES >> 20} are "
    "read; save it as a file and name that"
  )
