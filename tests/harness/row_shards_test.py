"""Rows in shards: shared by hosts, taken up after kills, read in order."""

import contextlib
import logging
import threading
import time

import pytest

from caprl_jax.harness import row_shards
from caprl_jax.harness.row_shards import RowResult, Shard, ShardedJob


def make(folder, count=10, shard_rows=4, host=0, hosts=1, **settings) -> ShardedJob:
  names = [f"{i}.png" for i in range(count)]
  settings = row_shards.manifest({"prompt": "?"} | settings, names, shard_rows)
  return ShardedJob(folder, names, settings, host=host, hosts=hosts)


def finished(number: int) -> RowResult:
  return RowResult(
    number,
    f"{number}.png",
    {"image": f"{number}.png", "caption": f"é {number}\u2028", "tokens": [number], "finish": "end"},
    {"bucket": "4x1", "secs": 0.5},
  )


def fill(parts: ShardedJob, shard: int) -> None:
  with Shard(parts, shard) as kept:
    kept.put([finished(number) for number in reversed(kept.numbers) if number not in kept.done])


def test_shards_are_shared_and_read_in_order(tmp_path):
  hosts = [make(tmp_path / "parts", host=host, hosts=2) for host in range(2)]
  assert [list(parts.mine) for parts in hosts] == [[0, 2], [1]] and list(hosts[0].numbers(2)) == [
    8,
    9,
  ]
  for parts in hosts:
    parts.open()
    for shard in parts.mine:
      fill(parts, shard)
  assert hosts[0].missing() == [] and list(hosts[0].read()) == [
    finished(number) for number in range(10)
  ]
  assert hosts[1].path(1).name == "00001-of-00003.jsonl"
  hosts[0].remove()
  assert list(tmp_path.iterdir()) == []
  # a host may have nothing to do
  assert list(make(tmp_path / "x", count=3, host=2, hosts=3).mine) == []


@pytest.mark.parametrize(
  "tail", [b"", b'[2, {"ima', b"[2, {}, {}]", b"\0\0\0\n", b"[2]\n", b"[99, {}, {}]\n", b"7\n[3"]
)
def test_a_shard_goes_on_after_what_was_kept(tail, tmp_path):
  parts = make(tmp_path / "parts")
  parts.open()
  with Shard(parts, 0) as kept:
    kept.put([finished(3), finished(0)])
  assert parts.missing() == [0, 1, 2]
  with open(kept.partial, "ab") as file:
    file.write(tail)
  with Shard(parts, 0) as kept:
    assert kept.done == {0, 3}
    kept.put([finished(1)])
    with pytest.raises(AssertionError):
      kept.put([finished(1)])
    kept.put([finished(2)])
  assert parts.missing() == [1, 2] and not kept.partial.exists()
  for shard in (1, 2):
    fill(parts, shard)
  assert list(parts.read()) == [finished(number) for number in range(10)]


def test_a_kill_between_the_last_row_and_the_name(tmp_path, monkeypatch):
  parts = make(tmp_path / "parts")
  parts.open()

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(row_shards.os, "rename", killed)
  with pytest.raises(KeyboardInterrupt):
    fill(parts, 0)
  monkeypatch.undo()
  assert parts.missing() == [0, 1, 2]
  fill(parts, 0)
  assert parts.missing() == [1, 2]


def test_a_shard_has_one_writer(tmp_path):
  parts = make(tmp_path / "parts")
  parts.open()
  with Shard(parts, 0) as kept:
    kept.put([finished(0)])
    with pytest.raises(
      ValueError, match=r"another process is writing .*00000-of-00003.*caption\.host"
    ):
      Shard(parts, 0).__enter__()
  fill(parts, 0)
  with Shard(parts, 0) as kept:  # its other writer was just about to end
    assert kept.done == {0, 1, 2, 3}
  assert parts.missing() == [1, 2] and not kept.partial.exists()
  with (
    parts.lock("output"),
    pytest.raises(ValueError, match="another process"),
    parts.lock("output"),
  ):
    pass


def test_other_settings_and_missing_rows_are_refused(tmp_path):
  make(tmp_path / "parts").open()
  make(tmp_path / "parts").open()
  for other, message in (
    (make(tmp_path / "parts", prompt="!"), r"prompt was '\?' and is '!'"),
    (make(tmp_path / "parts", count=11), "images was 10 and is 11; names_sha256 was"),
    (make(tmp_path / "parts", shard_rows=5), "shard_rows was 4 and is 5"),
  ):
    with pytest.raises(ValueError, match=message):
      other.open()
  parts = make(tmp_path / "parts")
  for shard in range(3):
    fill(parts, shard)
  parts.path(1).write_bytes(b"".join(parts.path(1).read_bytes().splitlines(True)[1:]))
  with pytest.raises(ValueError, match="has 3 rows, not the 4"):
    list(parts.read())


def test_nobody_waits_for_ever_for_a_host_that_keeps_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(row_shards, "POLL_SECS", 0.05)
  monkeypatch.setattr(row_shards, "STILL_SECS", 0.4)
  parts, other = make(tmp_path / "parts", hosts=2), make(tmp_path / "parts", host=1, hosts=2)
  parts.open()
  fill(parts, 0)
  fill(parts, 2)
  began = time.monotonic()

  def keep_one():  # a row counts as life
    with Shard(other, 1) as kept:
      kept.put([finished(4)])

  later = threading.Timer(0.3, keep_one)
  later.start()
  with pytest.raises(ValueError, match="1 of 3 shards are missing, of host 1, and no row was"):
    parts.wait()
  assert time.monotonic() - began > 0.6
  later.join()


def test_waiting_names_the_hosts_that_are_late(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(row_shards, "POLL_SECS", 0.05)
  parts, other = make(tmp_path / "parts", hosts=2), make(tmp_path / "parts", host=1, hosts=2)
  parts.open()
  fill(parts, 0)
  later = [threading.Timer(0.3, fill, (parts, 2)), threading.Timer(0.6, fill, (other, 1))]
  for timer in later:
    timer.start()
  with caplog.at_level(logging.INFO, "caprl_jax"):
    parts.wait()
  assert parts.missing() == [] and caplog.text.count("waiting for") == 1
  assert "waiting for 2 of 3 shards, of hosts 0, 1" in caplog.text
  for timer in later:
    timer.join()


def test_the_loop_works_on_what_is_left_and_opens_no_worker_for_nothing(tmp_path, caplog):
  opened, asked = [], []

  @contextlib.contextmanager
  def open_worker():
    opened.append("open")
    yield "worker"
    opened.append("closed")

  def work(worker, rows):
    assert worker == "worker"
    asked.append(rows)
    for number, row in reversed(rows):
      assert row == f"{number}.png"
      yield [finished(number)]
      if number == 5:
        raise KeyboardInterrupt

  def job():
    parts = make(tmp_path / "parts", hosts=2)
    parts.open()
    fill_part(parts)
    return parts

  def fill_part(parts):
    with Shard(parts, 0) as kept:
      kept.put([finished(number) for number in (1, 2) if number not in kept.done])

  with caplog.at_level(logging.INFO, "caprl_jax"):
    job().run(open_worker, work, what="captions")
  assert asked == [
    [(0, "0.png"), (3, "3.png")],
    [(8, "8.png"), (9, "9.png")],
  ]
  assert opened == ["open", "closed"] and "captions: going on after 2 of 6 images" in caplog.text
  assert "captions: 4 images in" in caplog.text
  job().run(open_worker, work, what="captions")
  assert opened == ["open", "closed"] and len(asked) == 2

  other = make(tmp_path / "parts", host=1, hosts=2)
  with pytest.raises(KeyboardInterrupt):
    other.run(open_worker, work, what="captions")
  assert other.count_done(1) == 3  # 7, 6, 5
  other.run(open_worker, work, what="captions")
  assert asked[3:] == [[(4, "4.png")]] and other.missing() == []
  assert list(other.read()) == [finished(number) for number in range(10)]
