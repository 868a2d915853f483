"""Processes decide together: with threads in their place, and real ones below."""

import concurrent.futures
import json
import re
import signal
import threading
import time

import pytest

from caprl_jax.harness.process import peers
from caprl_jax.harness.process.peers import Peers, PeerStopped, Stop
from caprl_jax.harness.process.signals import Preempted


class Store:
  """What Peers uses of jax's coordination service, in memory."""

  def __init__(self, count):
    self.values, self.count = {}, count
    self.barriers, self.lock = {}, threading.Lock()

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.values
    self.values[key] = value

  def key_value_dir_get(self, place):
    return [(key, value) for key, value in self.values.items() if key.startswith(f"{place}/")]

  def wait_at_barrier(self, name, timeout_in_ms):
    with self.lock:
      barrier = self.barriers.setdefault(name, threading.Barrier(self.count))
    try:
      barrier.wait(min(timeout_in_ms / 1000, 20))
    except threading.BrokenBarrierError as error:
      raise RuntimeError("DEADLINE_EXCEEDED: barrier timed out") from error


@pytest.fixture
def three(monkeypatch):
  monkeypatch.setattr(peers, "POLL_SECS", 0.05)
  monkeypatch.setattr(peers, "JOIN_SECS", 0.3)
  ended = []
  monkeypatch.setattr(peers.os, "_exit", ended.append)
  monkeypatch.setattr(peers.logging, "shutdown", lambda: None)
  store = Store(3)
  made = [Peers(store, number, 3) for number in range(3)]
  made[0].ended = ended
  yield made
  for one in made:
    one._closed.set()


def raised(call, *arguments):
  try:
    call(*arguments)
  except BaseException as error:  # noqa: BLE001  whatever it is
    return error
  return None


def together(*calls):
  with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
    return [found.result() for found in [pool.submit(raised, *call) for call in calls]]


def test_where_nobody_stops_all_go_on(three):
  for _ in range(3):
    assert together(*[(one.agree,) for one in three]) == [None] * 3


def test_an_error_of_one_ends_all_at_the_same_place(three):
  together(*[(one.agree,) for one in three])
  error = ValueError("row 7 has no image")
  found = together((three[0].agree,), (three[1].failed, error), (three[2].agree,))
  assert found[1] is None and three[1].failed(error)
  for other in (found[0], found[2]):
    assert isinstance(other, PeerStopped) and other.exit_code == 2
    assert str(other).startswith("process 1 (") and str(other).endswith("row 7 has no image")
  assert three[0].failed(found[0])  # it may save with the others


def test_each_raises_its_own_and_an_error_explains_a_notice(three):
  mine = FloatingPointError("loss is nan")
  three[0]._asked = Preempted("SIGTERM")
  found = together((three[0].agree,), (three[1].agree,), (three[2].agree, mine))
  assert found[2] is mine and [other.exit_code for other in found[:2]] == [3, 3]
  assert all("process 2" in str(other) for other in found[:2])


def test_a_notice_of_one_asks_all_to_be_started_again(three):
  three[1]._asked = Preempted("SIGTERM")
  found = together(*[(one.agree,) for one in three])
  assert isinstance(found[1], Preempted)
  assert [other.exit_code for other in (found[0], found[2])] == [75, 75]
  assert str(found[0]).endswith("stopped by SIGTERM")


def test_who_does_not_come_is_not_waited_for(three, monkeypatch):
  assert not three[0].failed(ValueError("x"))
  asked = []
  monkeypatch.setattr(three[1], "agree", lambda *_: asked.append(1))
  assert not three[1].failed(RuntimeError("UNKNOWN: Gloo all-reduce failed"))
  assert not asked, "the others have failed, too, and come to no meeting"


def test_a_signal_waits_for_the_others_and_a_second_one_does_not(three, interruptible):
  with three[0].deferred():
    signal.raise_signal(signal.SIGTERM)
    assert isinstance(three[0]._asked, Preempted)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)


def test_who_leaves_ends_those_who_do_not_come_to_agree(three, monkeypatch):
  monkeypatch.setattr(peers, "UNWIND_SECS", 0.2)
  monkeypatch.setattr(peers.signal, "pthread_kill", lambda *_: None)
  three[1].leave(Stop(1, 2, "row 7 has no image"))
  deadline = time.monotonic() + 10
  while len(three[0].ended) < 3 and time.monotonic() < deadline:
    time.sleep(0.05)
  assert three[0].ended == [2, 2, 2]
  assert str(three[0].told_exception()).endswith("row 7 has no image")


def test_who_shows_no_sign_of_life_is_named(three, monkeypatch):
  monkeypatch.setattr(peers, "HEARTBEAT_SECS", 1.0)
  time.sleep(0.3)
  assert three[0].who_died() is None
  three[2]._closed.set()
  deadline = time.monotonic() + 10
  while three[0].who_died() is None and time.monotonic() < deadline:
    time.sleep(0.05)
  assert re.fullmatch(r"process 2 \(.*, pid \d+\)", three[0].who_died())


def test_who_dies_right_after_it_has_joined_is_named(monkeypatch):
  """Before it has shown any sign of life."""
  monkeypatch.setattr(peers, "POLL_SECS", 0.02)
  monkeypatch.setattr(peers, "HEARTBEAT_SECS", 0.4)
  store = Store(2)
  store.key_value_set("caprl_jax/where/1", "host, pid 7")
  one = Peers(store, 0, 2)
  assert one.who_died() is None
  time.sleep(0.3)
  assert one.who_died() == "process 1 (host, pid 7)"
  one._closed.set()


def test_an_error_of_the_network_is_explained_by_who_has_left(three, monkeypatch):
  monkeypatch.setattr(peers.signal, "pthread_kill", lambda *_: None)
  three[1].client.key_value_set(
    "caprl_jax/left/1", json.dumps(dict(process=1, code=2, message="?"))
  )
  fault = RuntimeError("UNKNOWN: Gloo all-reduce failed: connection reset")
  error = three[0].cause_of(fault)
  assert error.exit_code == 2 and str(error).startswith("process 1 (")
  mine = ValueError("of my own")
  assert three[0].cause_of(mine) is mine
