"""Results by key: read back, added to after a kill, apart where the settings differ."""

import pytest

from caprl_jax.harness.result_cache import ResultCache

SETTINGS = {"model": "a", "max_tokens": 4}


def opened(folder, kind="captions", **settings) -> ResultCache:
  return ResultCache(folder / "cache", kind, SETTINGS | settings)


def test_what_was_put_is_there_when_it_is_opened_again(tmp_path):
  first = opened(tmp_path)
  assert dict(first) == {} and "x" not in first
  first.put({"x": {"text": "é\u2028"}, "y": None})
  first.put({"z": [1, 2.5]})
  first.put({"x": "newer"})
  again = opened(tmp_path)
  assert dict(again) == dict(first) == {"x": "newer", "y": None, "z": [1, 2.5]}
  assert len(again) == 3 and "y" in again
  with pytest.raises(KeyError):
    again["w"]


def test_the_order_of_the_settings_does_not_matter_but_their_values_do(tmp_path):
  opened(tmp_path).put({"x": 1})
  turned = ResultCache(tmp_path / "cache", "captions", dict(reversed(SETTINGS.items())))
  assert dict(turned) == {"x": 1}
  assert not opened(tmp_path, max_tokens=5) and not opened(tmp_path, kind="answers")


@pytest.mark.parametrize("tail", [b'["y", {"te', b"\0\0\0\n", b"[3]\n", b'["y", 2]\xff'])
def test_a_line_that_a_kill_has_torn_is_passed_over(tail, tmp_path, caplog):
  cache = opened(tmp_path)
  cache.put({"x": 1})
  cache.path.write_bytes(cache.path.read_bytes() + tail)
  again = opened(tmp_path)
  assert dict(again) == {"x": 1} and "1 lines that cannot be read" in caplog.text
  again.put({"y": 2})
  assert dict(opened(tmp_path)) == {"x": 1, "y": 2}


def test_a_line_that_is_spoilt_takes_no_other_with_it(tmp_path, caplog):
  cache = opened(tmp_path)
  for name in "abcde":
    cache.put({name: name * 9})
  lines = cache.path.read_bytes().splitlines(keepends=True)
  lines[3] = b"\xff" * len(lines[3])  # its line break is gone, too: the next line is part of it
  cache.path.write_bytes(b"".join(lines))
  assert dict(opened(tmp_path)) == {name: name * 9 for name in "abe"}
  assert "the first is line 4" in caplog.text


def test_two_processes_add_to_one_file(tmp_path):
  first, second = opened(tmp_path), opened(tmp_path)
  for i in range(20):
    (first if i % 2 else second).put({str(i): "x" * i})
  assert dict(opened(tmp_path)) == {str(i): "x" * i for i in range(20)}


def test_a_kill_while_the_settings_were_written(tmp_path):
  cache = opened(tmp_path)
  line = cache.path.read_bytes()
  cache.path.write_bytes(line[:5])
  opened(tmp_path).put({"x": 1})
  assert cache.path.read_bytes() == line + b'["x", 1]\n'
