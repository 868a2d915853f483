"""A page in the browser that is installed, and what a script in it has measured."""

import json
import pathlib
import re
import shutil
import subprocess
from typing import Any

import pytest

BROWSER = next(
  filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)
needs_browser = pytest.mark.skipif(
  BROWSER is None, reason="no browser: apt-get install chromium lets this test look at the page"
)
QUIET = (
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--hide-scrollbars",
)
# The page that holds a frame takes over what the frame has measured: a window of a headless browser
# cannot be as narrow as a phone, a frame can.
LISTEN = '<script>addEventListener("message", e => document.body.dataset.probe = e.data)</script>'


def browse(folder: pathlib.Path, page: pathlib.Path, *flags: str) -> str:
  """Opens a page, with a profile of its own in `folder`; what the flags ask for."""
  done = subprocess.run(
    [BROWSER, *QUIET, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()],
    capture_output=True,
    timeout=120,
    check=True,
  )
  return done.stdout.decode()


def with_probe(page: str, probe: str) -> str:
  """A page with a script that runs before the page's own policy forbids scripts. The script leaves
  JSON in a `data-probe`."""
  return page.replace("<head>", "<head>" + probe, 1)


def on_a_phone(name: str, scheme: str) -> str:
  """A page that shows another one of its folder as a phone would, in a colour scheme."""
  frame = f'<iframe src="{name}" width=360 height=800 style="color-scheme:{scheme}">'
  return f"{LISTEN}<body>{frame}"


def read_probe(dom: str) -> Any:
  """What a script of `with_probe` has measured."""
  return json.loads(re.search(r'data-probe="([^"]*)"', dom)[1].replace("&quot;", '"'))
