"""A stand-in for the hub's HTTP API, as far as files are sent to a dataset."""

import base64
import contextlib
import hashlib
import http.server
import json
import urllib.parse
from collections.abc import Iterator

from helpers.servers.background import in_background


class Hub(http.server.ThreadingHTTPServer):
  """Holds the files of one dataset. `commits`: what was asked for, each a list of paths.
  `fails_at`: a path whose commit ends in an error of the server's; `token`: who may write.
  """

  daemon_threads = True

  def __init__(self, repo: str, token: str):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.repo, self.token, self.fails_at = repo, token, None
    self.made: list[dict] = []
    self.files: dict[str, bytes] = {}
    self.commits: list[list[str]] = []

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def _say(self, status: int, body) -> None:
    data = json.dumps(body).encode()
    self.send_response(status)
    self.send_header("content-type", "application/json")
    self.send_header("content-length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def _body(self) -> bytes:
    if "chunked" not in (self.headers["transfer-encoding"] or ""):
      return self.rfile.read(int(self.headers["content-length"] or 0))
    data = b""
    while size := int(self.rfile.readline(), 16):
      data += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return data

  def do_POST(self):
    hub, body, path = self.server, self._body(), urllib.parse.urlsplit(self.path).path
    of = f"/api/datasets/{hub.repo}"
    if self.headers["authorization"] != f"Bearer {hub.token}":
      self._say(401, {"error": "Invalid username or password."})
    elif path == "/api/repos/create":
      hub.made.append(json.loads(body))
      self._say(200, {"url": f"{hub.url}/datasets/{hub.repo}"})
    elif path == "/api/validate-yaml":
      self._say(200, {"errors": [], "warnings": []})
    elif path == f"{of}/paths-info/main":
      asked = urllib.parse.parse_qs(body.decode())["paths"]
      self._say(200, [_info(name, hub.files[name]) for name in asked if name in hub.files])
    elif path == f"{of}/preupload/main":
      files = [
        {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
        for one in json.loads(body)["files"]
      ]
      self._say(200, {"files": files})
    elif path == f"{of}/commit/main":
      lines = [json.loads(line) for line in body.splitlines() if line]
      files = [line["value"] for line in lines if line["key"] == "file"]
      if hub.fails_at in [one["path"] for one in files]:
        self._say(500, {"error": "out of order"})
        return
      hub.files |= {one["path"]: base64.b64decode(one["content"]) for one in files}
      hub.commits.append([one["path"] for one in files])
      self._say(
        200, {"success": True, "commitOid": "0", "commitUrl": f"{hub.url}/datasets/x/y/commit/0"}
      )
    else:
      self._say(404, {"error": path})


def _info(name: str, data: bytes) -> dict:
  oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
  return {"type": "file", "path": name, "size": len(data), "oid": oid}


@contextlib.contextmanager
def hub_of(repo: str, token: str) -> Iterator[Hub]:
  """The hub while it is entered."""
  hub = Hub(repo, token)
  with in_background(hub):
    yield hub
