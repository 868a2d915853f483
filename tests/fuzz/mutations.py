"""Changes to files: to bytes of any kind, and to formats from within."""

import codecs
import gzip
import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable

from fuzz import values

Change = Callable[[bytes, random.Random], tuple[bytes, str]]

STRANGERS = {
  "a web page": b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
  "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:"
  + b"0" * 64
  + b"\nsize 12345\n",
  "zeros": bytes(100_000),
  "a JSON list": b"[1, 2, 3]",
  "a JSON null": b"null",
  "a Parquet mark": b"PAR1" + bytes(40) + b"PAR1",
  "a zip mark": b"PK\x03\x04" + bytes(60),
  "a gzip mark": b"\x1f\x8b\x08" + bytes(20),
  "a PNG mark": b"\x89PNG\r\n\x1a\n",
  "one letter": b"x",
  "a line break": b"\n",
}


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
  """Any file, damaged as disks, networks and editors do."""
  size = max(1, len(data))
  at, other = sorted((rng.randrange(size), rng.randrange(size)))
  way = rng.choice(
    "truncate truncate behead flip flip cut double swap insert append empty stranger zeros".split()
    + "mark utf16 repeat".split()
  )
  if way == "truncate":
    return data[:at], f"truncated to {at} bytes"
  if way == "behead":
    return data[at:], f"without its first {at} bytes"
  if way == "flip":
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 20)) if data else 0):
      changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
    return bytes(changed), "bits flipped"
  if way == "cut":
    return data[:at] + data[other:], f"without bytes {at} to {other}"
  if way == "double":
    return data[:other] + data[at:], f"bytes {at} to {other} twice"
  if way == "swap":
    return data[at:other] + data[:at] + data[other:], f"bytes {at} to {other} moved to the front"
  if way in ("insert", "append"):
    at = at if way == "insert" else len(data)
    new = rng.choice((b"\x00", b"\x00" * 700, b"\xff\xfe", rng.randbytes(30), b"\n\n", b"}", b'"'))
    return data[:at] + new + data[at:], f"{new[:8]!r} ({len(new)}) at byte {at}"
  if way == "zeros":
    return data[:at] + bytes(other - at) + data[other:], f"bytes {at} to {other} zeroed"
  if way == "mark":
    mark = rng.choice((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"\xef\xbb"))
    return mark + data, f"{mark!r} before it"
  if way == "utf16":
    text = data.decode("utf-8", "replace")
    name = rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"))
    return text.encode(name, "replace"), f"as {name}"
  if way == "repeat":
    times = min(500, 2_000_000 // size)
    return data * times, f"{times} times"
  if way == "stranger":
    what = rng.choice(list(STRANGERS))
    return STRANGERS[what], what
  return b"", "empty"


def json_file(data: bytes, rng: random.Random) -> tuple[bytes, str]:
  return _text(values.mutate_json, data, rng)


def json_lines(data: bytes, rng: random.Random) -> tuple[bytes, str]:
  return _text(values.mutate_lines, data, rng)


def _text(change, data: bytes, rng: random.Random) -> tuple[bytes, str]:
  try:
    text, done = change(data.decode("utf-8"), rng)
  except (ValueError, IndexError, RecursionError):  # a change before this one broke the text
    return mutate_bytes(data, rng)
  return text.encode("utf-8", "surrogatepass"), done


# ---- PNG ----


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
  found, at = [], 8
  while at + 12 <= len(data):
    size = int.from_bytes(data[at : at + 4], "big")
    found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
    at += 12 + size
  return found


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
  parts = [b"\x89PNG\r\n\x1a\n"]
  for name, body in chunks:
    parts += [struct.pack(">I", len(body)), name, body, struct.pack(">I", zlib.crc32(name + body))]
  return b"".join(parts)


def png(data: bytes, rng: random.Random) -> tuple[bytes, str]:
  """A PNG whose checksums are right and whose chunks are not."""
  chunks = _chunks(data)
  if not chunks or chunks[0][0] != b"IHDR":
    return mutate_bytes(data, rng)
  number = rng.randrange(len(chunks))
  way = rng.choice("drop double swap size depth bomb text profile frames exif odd".split())
  if way == "drop":
    name = chunks.pop(number)[0]
    return _png(chunks), f"without {name}"
  if way == "double":
    chunks.insert(number, chunks[number])
  elif way == "swap":
    other = rng.randrange(len(chunks))
    chunks[number], chunks[other] = chunks[other], chunks[number]
  elif way == "size":
    width, height = rng.choice(
      ((0, 0), (1, 0), (60000, 60000), (2**31 - 1, 1), (1, 10000), (2**31 - 1, 2**31 - 1), (9, 9))
    )
    chunks[0] = (b"IHDR", struct.pack(">II", width, height) + chunks[0][1][8:])
    way = f"size {width}x{height}"
  elif way == "depth":
    body = bytearray(chunks[0][1])
    body[8 + rng.randrange(5)] = rng.choice((0, 1, 2, 3, 4, 5, 6, 8, 16, 255))
    chunks[0] = (b"IHDR", bytes(body))
  elif way == "odd":
    name = chunks[number][0]
    chunks[number] = (name, rng.choice((b"", bytes(4), rng.randbytes(20), bytes(70_000))))
  else:
    zeros = zlib.compress(bytes(80_000_000 if way in ("bomb", "text") else 1000), 9)
    new = {
      "bomb": (b"IDAT", zeros),
      "text": (b"zTXt", b"Comment\x00\x00" + zeros),
      "profile": (b"iCCP", b"p\x00\x00" + zeros),
      "frames": (b"acTL", struct.pack(">II", 2**31 - 1, 0)),
      "exif": (b"eXIf", rng.choice((b"Exif\0\0", b"II*\0" + b"\xff" * 40, rng.randbytes(60)))),
    }[way]
    chunks.insert(1, new)
  return _png(chunks), f"PNG: {way} {chunks[min(number, len(chunks) - 1)][0]!r}"


# ---- tar ----

_FIELDS = {  # where a field of a tar header begins, and how long it is
  "name": (0, 100),
  "mode": (100, 8),
  "size": (124, 12),
  "mtime": (136, 12),
  "type": (156, 1),
  "link": (157, 100),
  "magic": (257, 8),
  "prefix": (345, 155),
}
_FILLS = (
  b"\xff" * 12,
  b"\x80" + b"\xff" * 11,
  b"77777777777\0",
  b"-0000000001\0",
  b"99999999999\0",
  b"\0" * 12,
  b"            ",
  b"../../x.png\0",
  b"/x.png\0",
  b"\xff\xfe.png\0",
)


def tar(data: bytes, rng: random.Random) -> tuple[bytes, str]:
  """A tar file with an odd header (its checksum right), block or member."""
  blocks = [data[i : i + 512] for i in range(0, len(data), 512)]
  if len(blocks) < 3:
    return mutate_bytes(data, rng)
  heads = [i for i, block in enumerate(blocks) if block[257:262] == b"ustar"] or [0]
  way = rng.choice("field field field type swap drop member member pack nest".split())
  if way in ("field", "type"):
    at = rng.choice(heads)
    name = "type" if way == "type" else rng.choice(list(_FIELDS))
    start, size = _FIELDS[name]
    kind = rng.choice(b"01234567xgLKSVDMNA\0 ").to_bytes(1, "big")
    fill = kind if name == "type" else rng.choice(_FILLS)[:size]
    head = bytearray(blocks[at].ljust(512, b"\0"))
    head[start : start + len(fill)] = fill
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    blocks[at] = bytes(head)
    return b"".join(blocks), f"tar header {at}: {name} = {fill!r}"
  if way in ("swap", "drop"):
    one, other = rng.randrange(len(blocks)), rng.randrange(len(blocks))
    if way == "drop":
      del blocks[one]
    else:
      blocks[one], blocks[other] = blocks[other], blocks[one]
    return b"".join(blocks), f"tar block {one} {way}"
  if way == "pack":
    return gzip.compress(data, mtime=0), "tar packed with gzip"
  return _member(data, rng) if way == "member" else (tar_of({"in.tar": data, "in.png": data}), way)


def tar_of(members: dict[str, bytes]) -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as tar:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return file.getvalue()


def _member(data: bytes, rng: random.Random) -> tuple[bytes, str]:
  """The tar file with one member more before the others."""
  name = rng.choice(
    ("a.png", "../up.png", "/abs.png", "n" * 300 + ".png", "a\nb.png", "ü.png", "\udcff.png", "d/")
    + (".png", "._a.png", "x.PNG", "\u202egnp.png")
  )
  info = tarfile.TarInfo(name)
  info.type = rng.choice(
    (tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    + (tarfile.DIRTYPE,)
  )
  info.linkname = rng.choice(("a.png", "/etc/passwd", ""))
  body = b"x" * 10 if info.isreg() else b""
  info.size = len(body)
  odd = rng.choice(
    (
      {},
      {"size": "-1"},
      {"size": "99999999999999999999"},
      {"size": "a"},
      {"path": ""},
      {"path": "p\x00q.png"},
      {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s.png"},
      {"GNU.sparse.map": "0,1,x", "GNU.sparse.size": "9"},
      {"hdrcharset": "BINARY"},
      {"mtime": "nan"},
      {"mtime": "1e400"},
    )
  )
  info.pax_headers = dict(odd)
  style = tarfile.PAX_FORMAT if odd else rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
  head = info.tobuf(style, "utf-8", "surrogateescape")
  body = body.ljust(-(-len(body) // 512) * 512, b"\0")
  return head + body + data, f"tar: {name[:20]!r} of type {info.type!r}, {odd} before the others"


# ---- safetensors ----


def safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
  """A safetensors file with another header, its length right or not."""
  size = int.from_bytes(data[:8], "little")
  if not 0 < size <= len(data):
    return mutate_bytes(data, rng)
  way = rng.choice(("header",) * 6 + ("length", "data"))
  if way == "length":
    new = rng.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", new) + data[8:], f"safetensors: header of {new} bytes"
  if way == "data":
    body = rng.choice((b"", data[8 + size :][:-1], data[8 + size :] + b"\0"))
    return data[: 8 + size] + body, "safetensors: other data"
  try:
    header = json.loads(data[8 : 8 + size])
  except ValueError:
    return mutate_bytes(data, rng)
  name = rng.choice([key for key in header if key != "__metadata__"] or [""])
  entry = dict(header.get(name, {}))
  way = rng.choice("dtype shape offsets rename drop metadata json".split())
  if way == "dtype":
    kinds = ("F64", "I8", "BOOL", "BF16", "F8_E4M3", "F8_E5M2", "U64", "C64", "F4", "x", "", 1)
    entry["dtype"] = rng.choice(kinds)
  elif way == "shape":
    shapes = ([], [0], [1], [-1], [2**63], [2**32, 2**32], [1] * 70, None, "x", [1.5])
    entry["shape"] = rng.choice(shapes)
  elif way == "offsets":
    entry["data_offsets"] = rng.choice(([0, 0], [8, 0], [0, 2**60], [-1, 1], [0], None, [1, 9]))
  if way == "json":
    text, done = values.mutate_json(json.dumps(header), rng)
  else:
    if way in ("rename", "drop"):
      header.pop(name, None)
    if way == "rename":
      header[rng.choice(("", "base_model.model." + name, name + ".qweight", "x" * 5000))] = entry
    elif way == "metadata":
      header["__metadata__"] = rng.choice((None, 1, {"a": 1}, {"format": "tf"}, {}, "x"))
    elif way != "drop":
      header[name] = entry
    text, done = json.dumps(header), f"{way} of {name[:40]}: {entry}"
  head = text.encode("utf-8", "surrogatepass")
  return struct.pack("<Q", len(head)) + head + data[8 + size :], f"safetensors: {done}"


# ---- parquet ----

_NAMES = ["id", "image", "prompt", "data_source", "reward_model", "extra_info"]


def parquet(data: bytes, rng: random.Random) -> tuple[bytes, str]:
  """A parquet file of rows with other values, or of other column types."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  try:
    table = pq.read_table(io.BytesIO(data), use_threads=False)
  except (OSError, pa.ArrowException):
    return mutate_bytes(data, rng)
  if not table.num_rows or table.column_names != _NAMES:
    return mutate_bytes(data, rng)
  way = rng.choice("row row row type drop rename empty damage".split())
  if way == "damage":
    end = len(data) - rng.randrange(1, 1200)  # the footer, where the layout stands
    return data[:end] + mutate_bytes(data[end:], rng)[0], "parquet: damaged footer"
  if way == "empty":
    table = table.slice(0, 0)
  elif way in ("drop", "rename"):
    name = rng.choice(table.column_names)
    names = [f"{n}_" if n == name and way == "rename" else n for n in table.column_names]
    table = table.drop_columns([name]) if way == "drop" else table.rename_columns(names)
    way = f"{way} {name}"
  elif way == "type":
    name, column = rng.choice(_columns(table.num_rows))
    table = table.set_column(table.column_names.index(name), name, column)
    way = f"{name} of type {column.type}"
  else:
    return _other_row(data, table, rng)
  file = io.BytesIO()
  pq.write_table(table, file, compression=rng.choice(("snappy", "zstd", "gzip", "none")))
  return file.getvalue(), f"parquet: {way}"


def _columns(rows: int) -> list:
  import pyarrow as pa

  repeat = lambda value, kind=None: pa.array([value] * rows, kind)
  texts = {"question": "Q?", "choices": ["A) a", "B) b"], "answer": "A"}
  return [
    ("image", repeat("a.png")),
    ("image", repeat(b"x")),
    ("image", repeat(b"x", pa.large_binary())),
    ("image", repeat([1, 2])),
    ("image", repeat(None)),
    ("image", repeat({"path": "a.png"})),
    ("image", repeat({"bytes": "a", "path": "b"})),
    ("image", repeat({"bytes": b"a", "path": 3})),
    ("image", repeat({"bytes": 1})),
    ("image", repeat([{"bytes": b"a", "path": "b"}])),
    ("image", repeat(b"x").dictionary_encode()),
    ("id", repeat(7)),
    ("id", repeat(None)),
    ("id", repeat({"a": 1})),
    ("reward_model", repeat("x")),
    ("reward_model", repeat(3)),
    ("reward_model", repeat(None)),
    ("reward_model", repeat([texts])),
    ("reward_model", repeat(json.dumps({"ground_truth": [texts]}))),
    ("reward_model", repeat({"ground_truth": "A"})),
    ("reward_model", repeat({"ground_truth": ["A"]})),
    ("reward_model", repeat({"ground_truth": texts})),
    ("reward_model", repeat({"ground_truth": [{"question": "Q?"}]})),
    ("reward_model", repeat({"ground_truth": [texts | {"choices": "A) a"}]})),
    ("reward_model", repeat({"ground_truth": [texts | {"answer": 0}]})),
    ("reward_model", repeat({"ground_truth": [texts | {"question": ["Q"]}]})),
    ("extra_info", repeat({"index": 1})),
    ("extra_info", repeat(3)),
    ("extra_info", repeat("[1]")),
    ("extra_info", repeat('{"kinds": 3, "provenances": {}, "facts": [1], "name": []}')),
    ("extra_info", repeat('{"kinds": [1, null], "provenances": [[], 2]}')),
    ("extra_info", repeat('{"facts": {"a": 1}}')),
    ("extra_info", repeat('{"name": "\\ud800"}')),
  ]


def _other_row(data: bytes, table, rng: random.Random) -> tuple[bytes, str]:
  """A row whose texts are other texts, or nothing."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  rows = table.to_pylist()
  row = rng.choice(rows)
  if not isinstance(row["reward_model"], dict | None) or not isinstance(
    row["extra_info"], str | None
  ):
    return mutate_bytes(data, rng)
  text = rng.choice((None, *(s for s in values.STRINGS if "\ud800" not in s)))
  way = rng.choice("question choice choices answer truth image id extra".split())
  truth = (row["reward_model"] or {}).get("ground_truth")
  first = truth[0] if isinstance(truth, list) and truth else None
  if not isinstance(first, dict) or not isinstance(first.get("choices"), list):  # changed before
    row["reward_model"] = {"ground_truth": [{"question": "Q?", "choices": ["A) a", "B) b"]}]}
    truth = row["reward_model"]["ground_truth"]
  if way == "choice":
    truth[0]["choices"][:1] = [text]
  elif way == "choices":
    truth[0]["choices"] = rng.choice((None, [], [None], ["A) a"] * 40))
  elif way in ("question", "answer"):
    truth[0][way] = text
  elif way == "truth":
    row["reward_model"] = rng.choice((None, {"ground_truth": None}, {"ground_truth": [None]}))
  elif way == "image":
    row["image"] = rng.choice((None, {"bytes": None, "path": text}, {"bytes": b"", "path": ""}))
  elif way == "id":
    row["id"] = text
  elif rng.random() < 0.5:
    row["extra_info"] = text
  else:
    changed, _ = json_file((row["extra_info"] or "{}").encode(), rng)
    row["extra_info"] = changed.decode("utf-8", "replace")
  file = io.BytesIO()
  try:
    changed = pa.Table.from_pylist(rows, table.schema)
  except (pa.ArrowException, TypeError):  # a change before this one made other columns
    return mutate_bytes(data, rng)
  pq.write_table(changed, file)
  return file.getvalue(), f"parquet: {way} {text!r:.40}"
