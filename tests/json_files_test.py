"""JSON as people have it: byte order marks, UTF-16, and errors with the place."""

import json

import pytest

from caprl_jax import json_files
from caprl_jax.json_files import cut, listed

VALUE = {"image": "a.png", "text": 'größer "\u4e2d"\u2028'}


@pytest.mark.parametrize(
  "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_encoding_with_a_mark_is_read(encoding, end, tmp_path):
  mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
  path = tmp_path / "a.json"
  path.write_bytes((mark + json.dumps(VALUE, ensure_ascii=False)).encode(encoding))
  assert json_files.read_json(path) == VALUE
  lines = mark + end.join([json.dumps(VALUE, ensure_ascii=False), "", "[1]"]) + end
  path.write_bytes(lines.encode(encoding))
  assert list(json_files.json_lines(path)) == [(f"{path}:1", VALUE), (f"{path}:3", [1])]
  assert json_files.starts_with(path) == "{"


@pytest.mark.parametrize(
  "data, reason",
  [
    (b"{", "not JSON"),
    (b'{"a": "\xff"}', "not JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
    (b'["\\ud800"]', "half of a surrogate pair"),
    (b"1" * 10_000, "not JSON"),
    (b"", "not JSON"),
  ],
)
def test_what_is_no_json_is_named_with_its_place(data, reason, tmp_path):
  path = tmp_path / "a.json"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=reason) as raised:
    json_files.read_json(path)
  assert str(raised.value).startswith(f"{path}: ") and len(str(raised.value)) < 300


def test_a_pair_of_surrogates_is_a_character():
  assert json_files.parse_json(b'"\\ud83d\\ude00"', "x") == "\U0001f600"


def test_a_bad_line_spoils_no_other(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"a": 1}\n{"a": \xff}\n{"a": 3}\n')
  (_, first), (where, bad), (_, last) = json_files.json_lines(path)
  assert (first, last) == ({"a": 1}, {"a": 3})
  assert isinstance(bad, ValueError) and where == f"{path}:2" and str(bad).startswith(where)


@pytest.mark.parametrize("read", [json_files.read_json, lambda p: list(json_files.json_lines(p))])
def test_a_file_that_is_not_there(read, tmp_path):
  with pytest.raises(ValueError, match="cannot be read: No such file"):
    read(tmp_path / "none.json")


def test_values_are_cut_for_messages():
  assert json_files.shown("a") == "'a'"
  for value in ("x" * 10**7, b"x" * 10**7, list(range(1000)), {"a": "b" * 1000}):
    assert len(json_files.shown(value)) <= 90, json_files.shown(value)


def test_texts_are_cut_in_the_middle():
  assert cut("short") == "short" and cut(ValueError("why")) == "why"
  assert cut("a" * 60 + "b" * 60) == "a" * 60 + " ... " + "b" * 15


def test_messages_are_listed_as_far_as_there_is_room():
  assert listed(["one", "two"]) == "\n  one\n  two"
  assert listed(["one", "two", "three"], most=1) == "\n  one\n  and 2 more"
  assert listed(["x" * 500] * 5) == "\n  " + "\n  ".join([cut("x" * 500, 400)] * 3 + ["and 2 more"])
  assert len(listed(["x" * 9999] * 9999)) < 1500


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "-Infinity"])
def test_a_record_holds_finite_numbers_only(number, tmp_path):
  path = tmp_path / "run.json"
  path.write_text(f'{{"at": {number}}}')
  json_files.read_json(path)  # as people write it
  with pytest.raises(ValueError, match=f"run.json: .*'{number}' is no finite number"):
    json_files.read_record(path)


def test_a_record_holds_names_of_any_bytes(tmp_path):
  path = tmp_path / "run.json"
  path.write_text(json.dumps({"name": "\udcff", "share": 0.5, "count": 3}))
  assert json_files.read_record(path) == {"name": "\udcff", "share": 0.5, "count": 3}
