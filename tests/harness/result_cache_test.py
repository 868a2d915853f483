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


@pytest.mark.parametrize("tail", [b'["y", {"te', b'["y", 2]', b"\0\0\0\n", b"[3]\n"])
def test_a_line_that_a_kill_has_torn_is_dropped(tail, tmp_path):
  cache = opened(tmp_path)
  cache.put({"x": 1})
  whole = cache.path.read_bytes()
  cache.path.write_bytes(whole + tail)
  again = opened(tmp_path)
  assert dict(again) == {"x": 1} and cache.path.read_bytes() == whole
  again.put({"y": 2})
  assert dict(opened(tmp_path)) == {"x": 1, "y": 2}


def test_a_kill_while_the_settings_were_written(tmp_path):
  cache = opened(tmp_path)
  line = cache.path.read_bytes()
  cache.path.write_bytes(line[:5])
  opened(tmp_path).put({"x": 1})
  assert cache.path.read_bytes() == line + b'["x", 1]\n'
