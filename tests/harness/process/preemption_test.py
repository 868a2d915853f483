"""Notices of a machine of Google's cloud, from a server on loopback."""

import http.server
import threading
import time

import pytest

from caprl_jax.harness.process import preemption, signals


class Server(http.server.ThreadingHTTPServer):
  """Answers as Google's metadata server. `values` by path's last part; `asked` are all requests."""

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Answer)
    self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
    self.asked, self.changed = [], threading.Condition()

  def put(self, name, value):
    with self.changed:
      self.values[name] = value
      self.changed.notify_all()


class Answer(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    path, _, query = self.path.partition("?")
    name, server = path.rpartition("/")[2], self.server
    server.asked.append(self.path)
    with server.changed:
      tag = dict(pair.split("=") for pair in query.split("&")).get("last_etag") if query else None
      server.changed.wait_for(lambda: tag != f"tag-{server.values.get(name)}", timeout=0.1)
      value = server.values.get(name)
    known = path.startswith("/computeMetadata/v1/instance/") and value is not None
    allowed = self.headers["Metadata-Flavor"] == "Google"
    self.send_response(200 if known and allowed else 404)
    self.send_header("Metadata-Flavor", "Google")
    self.send_header("ETag", f"tag-{value}")
    self.end_headers()
    self.wfile.write(f"{value}\n".encode())

  def log_message(self, *_):
    pass


@pytest.fixture
def server(monkeypatch):
  made = Server()
  threading.Thread(target=made.serve_forever, daemon=True).start()
  monkeypatch.delenv(preemption.NOT_GOOGLE, raising=False)
  monkeypatch.setenv(preemption.HOST, f"127.0.0.1:{made.server_address[1]}")
  monkeypatch.setattr(preemption, "PAUSE_SECS", 0.05)
  yield made
  made.put("preempted", "the test is over")
  made.shutdown()
  made.server_close()


def work(secs=20.0):
  end = time.monotonic() + secs
  while time.monotonic() < end:
    time.sleep(0.02)


def until(condition):
  end = time.monotonic() + 10
  while not condition() and time.monotonic() < end:
    time.sleep(0.01)
  assert condition()


@pytest.mark.parametrize(
  "name, value",
  [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_a_notice_asks_the_run_to_stop(server, name, value, caplog):
  with pytest.raises(signals.Preempted, match="SIGTERM"):
    with signals.notices(), preemption.watched():
      until(lambda: sum("last_etag=tag-" in path for path in server.asked) >= 2)
      server.put(name, value)
      work()
  assert f"this machine is about to be taken away ({name}: {value})" in caplog.text


def test_what_is_no_notice_stops_nothing(server, caplog):
  """Maintenance that was announced before, that machines are moved for, and values that a server
  of another kind does not have."""
  server.put("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
  del server.values["preempted"]
  try:
    with signals.notices(), preemption.watched():
      until(lambda: "will be stopped for maintenance" in caplog.text)
      # which the server answers as before
      until(lambda: sum("last_etag" in path for path in server.asked) >= 3)
      server.put("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
      until(lambda: any("tag-MIGRATE" in path for path in server.asked))
      work(0.1)
  except signals.Preempted:
    pytest.fail("the run was stopped")
  assert sum("preempted" in path for path in server.asked) == 1


def test_other_machines_are_not_asked(monkeypatch, tmp_path):
  monkeypatch.delenv(preemption.HOST, raising=False)
  monkeypatch.delenv(preemption.NOT_GOOGLE, raising=False)
  monkeypatch.setattr(preemption, "PRODUCT", tmp_path / "product_name")
  monkeypatch.setattr(preemption, "_ask", lambda *_: pytest.fail("it was asked"))
  for product, host in (
    (None, None),
    ("Standard PC (Q35 + ICH9, 2009)\n", None),
    ("Google Compute Engine\n", "metadata.google.internal"),
  ):
    if product:
      preemption.PRODUCT.write_text(product)
    assert preemption.metadata_host() == host
    if host is None:
      with preemption.watched():
        pass
  monkeypatch.setenv(preemption.NOT_GOOGLE, "true")
  assert preemption.metadata_host() is None
