"""Images on the web: limits, retries, redirects, addresses that are not public; a server on this
machine stands in for all of it.
"""

import contextlib
import http.server
import io
import json
import threading
import time

import pytest
from PIL import Image

from caprl_jax.data.readers.image_sources import list_images
from caprl_jax.data.readers.inputs.addresses import checked_address, is_public
from caprl_jax.data.readers.inputs.fetch import FetchConfig, Fetcher
from caprl_jax.data.readers.inputs.options import ListingOptions
from caprl_jax.data.rows import failure_reason, image_bytes, read_image


def png() -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (9, 7), "red").save(file, "PNG")
  return file.getvalue()


class Answers(http.server.BaseHTTPRequestHandler):
  """Does as the path says, and counts who asks."""

  asked: dict[str, int] = {}

  def do_GET(self):
    path = self.path.partition("?")[0]
    count = self.asked[path] = self.asked.get(path, 0) + 1
    status, kind, body = 200, "image/png", png()
    location = None
    if path == "/page":
      kind, body = "text/html; charset=utf-8", b" <!DOCTYPE html><p>log in"
    elif path == "/gone":
      status = 404
    elif path == "/busy" and count < 3:
      status = 503
    elif path == "/down":
      status = 500
    elif path == "/empty":
      body = b""
    elif path == "/large":
      body = b"\x89PNG" + b"x" * (2 << 20)
    elif path == "/here":
      status, location = 302, "/a.png"
    elif path == "/inside":
      status, location = 302, "http://10.0.0.7/secret.png"
    elif path == "/file":
      status, location = 302, "file:///etc/passwd"
    elif path == "/round":
      status, location = 302, "/round"
    elif path in ("/hangs", "/drips"):
      if path == "/drips":
        self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n\x89PNG")
      time.sleep(1.5)
      return
    self.send_response(status)
    self.send_header("Content-Type", kind)
    if location:
      self.send_header("Location", location)
    if path != "/endless":
      self.send_header("Content-Length", str(len(body) + (5 if path == "/torn" else 0)))
    self.end_headers()
    with contextlib.suppress(OSError):
      self.wfile.write(body)

  def log_message(self, *_):
    pass


@pytest.fixture(scope="module")
def server():
  running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
  threading.Thread(target=running.serve_forever, daemon=True).start()
  yield f"http://127.0.0.1:{running.server_port}"
  running.shutdown()
  running.server_close()


def fetcher(tmp_path, permitted=lambda ip: ip == "127.0.0.1", **limits) -> Fetcher:
  limits = {"timeout_secs": 5.0, "max_mb": 1, "retries": 2} | limits
  return Fetcher(
    FetchConfig(**limits), tmp_path / "cache", permitted=permitted, sleep=lambda _: None
  )


def test_what_is_fetched_is_kept_and_asked_for_once(server, tmp_path):
  Answers.asked.clear()
  web = fetcher(tmp_path)
  assert web.fetch(f"{server}/a.png?x=1 2") == png() == web.fetch(f"{server}/here")
  assert web.fetch(f"{server}/busy") == png() and Answers.asked["/busy"] == 3
  before = dict(Answers.asked)
  again = fetcher(tmp_path, permitted=lambda _: False)
  assert again.fetch(f"{server}/busy") == png() and Answers.asked == before


@pytest.mark.parametrize(
  "path, message, asked",
  [
    ("/page", r"the answer is a page \(HTML\), not an image", 1),
    ("/gone", "answered 404", 1),
    ("/down", r"answered 500 .*tried 3 times", 3),
    ("/empty", "the answer is empty", 1),
    ("/large", "caption.fetch.max_mb = 1 are taken", 1),
    ("/torn", r"IncompleteRead.*tried 3 times", 3),
    ("/inside", "10.0.0.7 is 10.0.0.7, which is no address of the public internet", 1),
    ("/file", "no address of http or https", 1),
    ("/round", "redirected more than 5 times", 6),
  ],
)
def test_what_is_no_image_is_said(path, message, asked, server, tmp_path):
  Answers.asked.clear()
  web = fetcher(tmp_path)
  for _ in range(2):  # it is not asked again
    with pytest.raises(ValueError, match=rf"{path}'? could not be fetched: .*{message}"):
      web.fetch(server + path)
  assert Answers.asked[path] == asked and not list((tmp_path / "cache").rglob("*.*"))


@pytest.mark.parametrize("path", ["/hangs", "/drips"])
def test_what_hangs_is_given_up(path, server, tmp_path):
  began = time.monotonic()
  with pytest.raises(ValueError, match=r"took longer than 0.2 s"):
    fetcher(tmp_path, timeout_secs=0.2, retries=0).fetch(server + path)
  assert time.monotonic() - began < 1.2


def test_only_public_addresses_are_connected_to(server, tmp_path):
  for address in (
    "127.0.0.1 10.1.2.3 192.168.0.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 "
    "::1 :: fe80::1 fe80::1%eth0 fd00::1 ff02::1 ::ffff:127.0.0.1 ::7f00:1 2002:7f00:1:: "
    "64:ff9b::7f00:1"
  ).split():
    assert not is_public(address), address
  for address in ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"):
    assert is_public(address), address
  with pytest.raises(ValueError, match="localhost is .*no address of the public internet"):
    checked_address("localhost", 80, is_public)
  Answers.asked.clear()
  for address in (f"{server}/a.png", "http://me:secret@8.8.8.8/a.png", "http://[::1]/a.png"):
    with pytest.raises(ValueError, match="could not be fetched"):
      Fetcher(FetchConfig(retries=0), tmp_path / "cache").fetch(address)
  assert not Answers.asked


def test_lists_and_parquet_of_addresses(server, tmp_path):
  import pyarrow as pa
  import pyarrow.parquet as pq

  addresses = [f"{server}/a.png", f"{server}/gone"]
  (tmp_path / "list.csv").write_text("url,tags\n" + "".join(f"{a},x\n" for a in addresses))
  table = pa.table({"url": addresses, "tags": ["x", "x"]})
  pq.write_table(table, tmp_path / "list.parquet")
  options = ListingOptions("url", {"tags"}, fetcher(tmp_path))
  for name in ("list.csv", "list.parquet"):
    rows = list_images(str(tmp_path / name), options=options).rows
    assert [row.name for row in rows] == addresses and rows[0].fields == {"tags": "x"}
    assert image_bytes(rows[0]) == png()
    with pytest.raises(ValueError, match="could not be fetched: the server answered 404") as raised:
      read_image(rows[1])
    assert failure_reason(raised.value) == "not fetched"
    for column in ("adress", None):
      with pytest.raises(ValueError, match=r"\['url', 'tags'\]"):
        list_images(str(tmp_path / name), options=ListingOptions(column))
  assert set(options.seen) == {"tags", "url"}
  values = {"url": addresses[0]}, [{"image_url": {"url": addresses[1]}}]
  lines = "".join(json.dumps({"image": value}) + "\n" for value in values)
  (tmp_path / "list.jsonl").write_text(lines)
  options = ListingOptions(fetch=fetcher(tmp_path))
  rows = list_images(str(tmp_path / "list.jsonl"), options=options).rows
  assert [row.name for row in rows] == addresses and image_bytes(rows[0]) == png()
