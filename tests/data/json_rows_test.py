"""Layouts of JSON files: lines, lists, one object, encodings; the suffix says nothing."""

import gzip
import json

import pytest

from caprl_jax.data.json_rows import read_items
from caprl_jax.data.rows import BadRow

ROWS = [{"image": "a.png", "text": "é\u2028\r"}, {"image": "b.png"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
  "text, places",
  [
    (LINES, [":1", ":2"]),
    ("\n" + LINES.replace("\n", "\n\n"), [":2", ":4"]),
    (LINES.replace("\n", "\r\n"), [":1", ":2"]),
    (json.dumps(ROWS), [", item 0", ", item 1"]),
    (json.dumps(ROWS, indent=1), [", item 0", ", item 1"]),
    (json.dumps({"data": ROWS}), [", data, item 0", ", data, item 1"]),
    (json.dumps({"version": 1, "rows": ROWS}, indent=1), [", rows, item 0", ", rows, item 1"]),
  ],
)
def test_layouts(text, places, encoding, name, tmp_path):
  path = tmp_path / name
  path.write_bytes(text.encode(encoding))
  assert list(read_items(path)) == [
    (f"{path}{place}", row) for place, row in zip(places, ROWS, strict=True)
  ]


def test_one_row_on_several_lines(tmp_path):
  path = tmp_path / "a.json"
  path.write_text(json.dumps(ROWS[0], indent=2))
  assert list(read_items(path)) == [(str(path), ROWS[0])]


def test_a_bad_line_spoils_no_other(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"{\n" + LINES.encode() + b'\n{"a": "\xff"}\n{"a": 1, "a": 2}\n[' + b"[" * 10**5)
  first, *good, binary, twice, deep = [value for _, value in read_items(path)]
  assert good == ROWS
  for number, bad in ((1, first), (4, binary), (5, twice), (6, deep)):
    assert isinstance(bad, BadRow) and bad.message.startswith(f"{path}:{number}: ")
    assert bad.message.count(str(path)) == 1 and len(bad.message) < 300


@pytest.mark.parametrize(
  "data, message",
  [
    # without a time: processes that run tests side by side must know them by one name
    (
      gzip.compress(LINES.encode(), mtime=0),
      r"a.jsonl is compressed; unpack it first \(gunzip a.jsonl\)",
    ),
    (b"[{]", "not JSON"),
    (b"{}", "holds dict, but it must be a list"),
    (b"\xff\xfe{", "not utf-16"),
  ],
)
def test_what_is_none(data, message, tmp_path):
  (tmp_path / "a.jsonl").write_bytes(data)
  with pytest.raises(ValueError, match=message):
    list(read_items(tmp_path / "a.jsonl"))
