"""A machine of Google's cloud that is about to be taken away -> SIGTERM, before the machine sends
it.

The metadata server of such a machine answers when it is to be preempted, or stopped for
maintenance: half a minute before its processes hear of it, and on some machines they never do.
"""

import contextlib
import http.client
import logging
import os
import pathlib
import signal
import threading
from collections.abc import Iterator

log = logging.getLogger("caprl_jax.harness.process.preemption")

HOST = "GCE_METADATA_HOST"  # Google's own libraries read it, and the next one
NOT_GOOGLE = "NO_GCE_CHECK"
PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
PATH = "/computeMetadata/v1/instance/"
PREEMPTED, MAINTENANCE = "preempted", "maintenance-event"
# What is answered where the machine will be stopped; others can be moved while they run.
TAKEN = {PREEMPTED: "TRUE", MAINTENANCE: "TERMINATE_ON_HOST_MAINTENANCE"}
WAIT_SECS = 60  # after which the server answers that nothing has changed
PAUSE_SECS = 5.0  # after an answer that is none, or says nothing new


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """While it is entered threads wait for the machine's notices, and send SIGTERM to this process
  where one comes. On machines that are not Google's nothing is asked.

  Maintenance that was announced before is only said: a machine may go on for an hour after that,
  and a run that was started again would end at once.
  """
  host, ended = metadata_host(), threading.Event()
  if host:
    for what in TAKEN:
      watch = threading.Thread(target=_watch, args=(host, what, ended), name=what, daemon=True)
      watch.start()
  try:
    yield
  finally:
    ended.set()


def metadata_host() -> str | None:
  """The metadata server's address; None where this machine has none."""
  if os.environ.get(NOT_GOOGLE, "").lower() == "true":
    return None
  if HOST in os.environ:
    return os.environ[HOST]
  try:
    is_google = PRODUCT.read_text().startswith("Google")
  except OSError:
    return None
  return "metadata.google.internal" if is_google else None


def _watch(host: str, what: str, ended: threading.Event) -> None:
  known: str | None = None
  tag = ""
  while not ended.is_set():
    try:
      value, tag = _ask(host, what, tag)
    except FileNotFoundError:
      log.debug("the metadata server of %s does not know %s", host, what)
      return
    except (OSError, http.client.HTTPException, ValueError) as error:
      log.debug("the metadata server of %s does not answer: %s", host, error)
      ended.wait(PAUSE_SECS)
      continue
    before, known = known, value
    if value == before:
      ended.wait(PAUSE_SECS)
    elif value == TAKEN[what] and before is None and what == MAINTENANCE:
      log.warning("this machine will be stopped for maintenance (%s): checkpoint often", value)
    elif value == TAKEN[what] and not ended.is_set():
      log.warning("this machine is about to be taken away (%s: %s)", what, value)
      _terminate()
      return


def _ask(host: str, what: str, tag: str) -> tuple[str, str]:
  """A value, and the tag of this state of it; with a tag, when it has changed, or after a while.

  Raises:
    FileNotFoundError: the server has no such value.
    OSError, HTTPException, ValueError: it does not answer as it should.
  """
  waiting = f"?wait_for_change=true&timeout_sec={WAIT_SECS}&last_etag={tag}" if tag else ""
  # not by urllib, which would ask a proxy
  connection = http.client.HTTPConnection(host, timeout=WAIT_SECS + 10)
  try:
    connection.request("GET", f"{PATH}{what}{waiting}", headers={"Metadata-Flavor": "Google"})
    answer = connection.getresponse()
    text = answer.read(1000).decode("ascii").strip()
    if answer.status == 404:
      raise FileNotFoundError(what)
    if answer.status != 200 or answer.getheader("Metadata-Flavor") != "Google":
      raise ValueError(f"{answer.status} {text[:100]}")
    return text, answer.getheader("ETag") or ""
  finally:
    connection.close()


def _terminate() -> None:
  """As the system would, and wakes the main thread."""
  main = threading.main_thread().ident
  if main is not None and callable(signal.getsignal(signal.SIGTERM)):
    signal.pthread_kill(main, signal.SIGTERM)
