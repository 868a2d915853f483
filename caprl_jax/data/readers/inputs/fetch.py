"""Address of an image on the web -> its bytes: within limits of size, time and redirects, from
public addresses only, kept on the disk.

The standard library's HTTP, because what is connected to must be the address that was checked.
Proxies of the environment are not used: behind one, nothing could be checked.
"""

import contextlib
import dataclasses
import functools
import hashlib
import http.client
import logging
import pathlib
import random
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator

from caprl_jax import __version__
from caprl_jax.atomic_files import whole_file
from caprl_jax.data.readers.inputs.addresses import checked_address, is_public
from caprl_jax.json_files import shown

log = logging.getLogger("caprl_jax.data")

FAILED = "could not be fetched"
_REDIRECTS = (301, 302, 303, 307, 308)
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 30.0  # seconds between two attempts, whatever a server asks for
_CHUNK = 1 << 16


@dataclasses.dataclass(frozen=True)
class FetchConfig:
  """How images are fetched from the web, with `caption.allow_urls`.

  max_mb: largest image.
  timeout_secs: for one attempt, redirects and all.
  retries: attempts after the first, where a server is busy or a connection breaks.
  redirects: followed in an attempt; where each leads is checked as the first address is.
  cache: a folder that keeps what was fetched, for other jobs too; None: one beside the output,
    which goes when the job is done.
  """

  max_mb: int = 32
  timeout_secs: float = 20.0
  retries: int = 2
  redirects: int = 5
  cache: str | None = None

  def __post_init__(self):
    if self.max_mb < 1 or self.timeout_secs <= 0 or self.retries < 0 or self.redirects < 0:
      raise ValueError(
        f"max_mb = {self.max_mb} must be at least 1, timeout_secs = {self.timeout_secs} above 0, "
        f"retries = {self.retries} and redirects = {self.redirects} at least 0"
      )


@dataclasses.dataclass(frozen=True)
class WebImage:
  """An image on the web, fetched when it is read. Two are one if their addresses are."""

  address: str
  where: str = dataclasses.field(compare=False)
  fetcher: "Fetcher" = dataclasses.field(compare=False, repr=False)

  def read(self) -> bytes:
    """Raises ValueError, with `where`, for what cannot be fetched."""
    try:
      return self.fetcher.fetch(self.address)
    except ValueError as error:
      raise ValueError(f"{self.where}: {error}") from error


class _Transient(Exception):
  """What another attempt may mend. wait: seconds that the server asks for."""

  def __init__(self, why: str, wait: float = 0.0):
    super().__init__(why)
    self.wait = wait


class Fetcher:
  """Fetches images and keeps them in a folder. Threads may share one.

  Args:
    cache: the folder.
    permitted: which IP addresses may be connected to.
  """

  def __init__(
    self,
    cfg: FetchConfig,
    cache: pathlib.Path,
    *,
    permitted: Callable[[str], bool] = is_public,
    sleep: Callable[[float], None] = time.sleep,
  ):
    self.cfg, self.cache, self.permitted, self.sleep = cfg, cache, permitted, sleep
    self._failed: dict[str, str] = {}  # an image is asked for several times

  def image(self, address: str, where: str) -> WebImage:
    """As `options.Fetch`."""
    return WebImage(address, where, self)

  def fetch(self, address: str) -> bytes:
    """The bytes at an address, from the disk if they are there.

    Raises:
      ValueError: too large, too slow, too many redirects, no public address, a page (HTML) in place
        of an image, a status other than 200, nothing at all; with the address and the reason.
    """
    digest = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
    kept = self.cache / digest[:2] / digest
    if kept.exists():
      return kept.read_bytes()
    if address in self._failed:
      raise ValueError(self._failed[address])
    try:
      data = self._attempts(address)
    except ValueError as error:
      self._failed[address] = f"{shown(address, 200)} {FAILED}: {error}"
      raise ValueError(self._failed[address]) from None  # this is what a failure is counted by
    try:
      with whole_file(kept) as temporary:
        temporary.write_bytes(data)
    except OSError as error:  # it is there; a full disk is said by what has to be written
      log.warning("%s: what is fetched cannot be kept (%s)", self.cache, error.strerror)
    return data

  def _attempts(self, address: str) -> bytes:
    for attempt in range(self.cfg.retries + 1):
      try:
        return self._attempt(address)
      except _Transient as error:
        said, wait = str(error), error.wait
      if attempt < self.cfg.retries:
        self.sleep(min(max(wait, 2.0**attempt * random.uniform(0.5, 1.0)), _LONGEST_WAIT))
    again = f" (tried {self.cfg.retries + 1} times)" if self.cfg.retries else ""
    raise ValueError(f"{said}{again}")

  def _attempt(self, address: str) -> bytes:
    deadline = time.monotonic() + self.cfg.timeout_secs
    for _ in range(self.cfg.redirects + 1):
      try:
        with self._answer(address, deadline) as answer:
          if answer.status in _REDIRECTS and (target := answer.headers.get("Location")):
            address = urllib.parse.urljoin(address, target)
            continue
          return self._body(answer, deadline)
      except (OSError, http.client.HTTPException) as error:
        if time.monotonic() >= deadline:
          raise _Transient(f"it took longer than {self.cfg.timeout_secs:g} s") from error
        raise _Transient(f"{type(error).__name__}: {str(error) or 'the connection broke'}") from (
          error
        )
    raise ValueError(f"it was redirected more than {self.cfg.redirects} times")

  @contextlib.contextmanager
  def _answer(self, address: str, deadline: float) -> Iterator[http.client.HTTPResponse]:
    """A server's answer, with its body unread; whatever happens, it ends by the deadline."""
    try:
      parts = urllib.parse.urlsplit(address)
      host, port = parts.hostname or "", parts.port
      name = host.encode("idna").decode() if host else ""
    except (ValueError, UnicodeError) as error:
      raise ValueError(f"{shown(address)} is no address ({error})") from error
    if parts.scheme not in ("http", "https") or not name:
      raise ValueError(f"{shown(address)} is no address of http or https")
    if parts.username is not None:
      raise ValueError("it holds a user's name; write the address without it")
    port = port or (443 if parts.scheme == "https" else 80)
    ip = checked_address(name, port, self.permitted)
    connection = _Connection(name, ip, port, parts.scheme == "https", deadline)
    stop = threading.Timer(max(deadline - time.monotonic(), 0.01), connection.cut_off)
    stop.daemon = True
    stop.start()
    try:
      path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
      query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]")
      headers = {
        "User-Agent": f"caprl_jax/{__version__}",
        "Accept": "image/*,*/*;q=0.5",
        "Accept-Encoding": "identity",
        "Connection": "close",
      }
      connection.request("GET", f"{path}?{query}" if query else path, headers=headers)
      yield connection.getresponse()
    finally:
      stop.cancel()
      connection.close()

  def _body(self, answer: http.client.HTTPResponse, deadline: float) -> bytes:
    if answer.status in _AGAIN:
      wait = answer.headers.get("Retry-After", "")
      raise _Transient(
        f"the server answered {answer.status} {answer.reason}",
        float(wait) if wait.isdecimal() else 0.0,
      )
    if answer.status != 200:
      raise ValueError(f"the server answered {answer.status} {answer.reason}")
    kind = answer.headers.get_content_type()
    limit = self.cfg.max_mb << 20
    if (answer.length or 0) > limit:
      raise self._too_large(answer.length or 0)
    data = bytearray()
    while chunk := answer.read(min(_CHUNK, limit + 1 - len(data))):
      data += chunk
      if len(data) > limit:
        raise self._too_large(len(data))
    if time.monotonic() >= deadline:
      raise TimeoutError
    if answer.length:
      raise http.client.IncompleteRead(bytes(data[:0]), answer.length)
    start = bytes(data[:256]).lstrip().lower()
    declared = kind in ("text/html", "application/xhtml+xml")
    if declared and not _is_binary(start) or start.startswith((b"<!doctype html", b"<html")):
      raise ValueError(
        "the answer is a page (HTML), not an image; the image may be gone, or want a log-in"
      )
    if not data:
      raise ValueError("the answer is empty")
    return bytes(data)

  def _too_large(self, size: int) -> ValueError:
    return ValueError(
      f"it has {size:,} bytes or more, and caption.fetch.max_mb = {self.cfg.max_mb} are taken"
    )


def _is_binary(start: bytes) -> bool:
  return any(byte < 9 or byte > 126 for byte in start[:16])


@functools.cache
def _certificates() -> ssl.SSLContext:
  return ssl.create_default_context()


class _Connection(http.client.HTTPConnection):
  """A connection to an address that was looked up before."""

  def __init__(self, host: str, ip: str, port: int, secure: bool, deadline: float):
    super().__init__(host, port)
    self._ip, self._secure, self._deadline = ip, secure, deadline
    self.default_port = 443 if secure else 80  # the header Host names any other

  def connect(self) -> None:
    left = max(self._deadline - time.monotonic(), 0.01)
    self.sock = socket.create_connection((self._ip, self.port), timeout=left)
    if self._secure:
      shaking: ssl.SSLSocket = _certificates().wrap_socket(
        self.sock, server_hostname=self.host, do_handshake_on_connect=False
      )
      self.sock = shaking  # what the deadline cuts off, also within the handshake
      shaking.do_handshake()

  def cut_off(self) -> None:
    """Ends whatever waits for the other side."""
    with contextlib.suppress(OSError):
      if self.sock is not None:
        self.sock.shutdown(socket.SHUT_RDWR)
