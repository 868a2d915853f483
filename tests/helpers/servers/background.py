"""A server in a thread of its own."""

import contextlib
import http.server
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def in_background(server: http.server.ThreadingHTTPServer) -> Iterator[None]:
  """It answers while this is entered."""
  threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
  try:
    yield
  finally:
    server.shutdown()
    server.server_close()
