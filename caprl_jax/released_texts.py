"""Prompts of CapRL's released code, to the byte, from the release itself: its files are downloaded,
and known by the digests of their prompts. They are parsed, never run.
"""

import ast
import hashlib
import http.client
import logging
import os
import pathlib
import urllib.parse
import urllib.request
from typing import NamedTuple

from caprl_jax.atomic_files import write_bytes
from caprl_jax.errors import UserError
from caprl_jax.json_files import decode, shown

log = logging.getLogger("caprl_jax.released_texts")

OFFICIAL = "official"  # what a setting says in the place of a file
REPOSITORY = "https://raw.githubusercontent.com/InternLM/CapRL"
_SECONDS = 30
_LARGEST = 1_000_000  # bytes of a program


class Released(NamedTuple):
  """A string that a program of the release assigns. sha256: of its UTF-8."""

  commit: str
  path: str
  variable: str
  sha256: str

  @property
  def address(self) -> str:
    return f"{REPOSITORY}/{self.commit}/{urllib.parse.quote(self.path)}"

  def is_in(self, strings: dict[str, str]) -> bool:
    """Whether the released text is among a program's strings, to the byte."""
    return _digest(strings.get(self.variable, "")) == self.sha256


# What the model that writes questions is told.
CURATION = Released(
  "54954ff9f02afd88a9c45569a37cf331a5f35a08",
  "QA_data_curation/1_generate_qa/gen_qa.py",
  "SYS_PROMPT",
  "4e275e96ae0126609f8e7bfa1f03f56a2f015179ebd0c6c9d70dc598d1258fcf",
)
# What the judge that sees the video is asked.
IMAGE_JUDGE = Released(
  "6be7f2897870f631ff6637ddaeeaa5eddd0ab881",
  "CapRL++/train/verl/recipe/video_captionrl/serve_rm.py",
  "VL_JUDGE_PROMPT",
  "2d7f07b5accc9d7220afb0b573a0278318142b1616bdaebec66abc9ee273cf77",
)


def names_program(source: str) -> bool:
  """Whether a setting names the release, or a program of it; a text with places for values does
  not."""
  return source == OFFICIAL or (source.endswith(".py") and "{" not in source)


def read_strings(released: Released, source: str, key: str) -> dict[str, str]:
  """The strings that a program assigns at its top level, `released.variable` among them; of the
  release that one alone, since it alone is compared.

  Args:
    source: `OFFICIAL`: the release, downloaded once and kept in the user's cache; or a .py file,
      which the log compares with it.
    key: of the config, for messages.

  Raises:
    UserError: the download fails, or is of other bytes; the file cannot be read, is no Python, or
      assigns no such string.
  """
  if source == OFFICIAL:
    return _official(released, key)
  path = pathlib.Path(source).expanduser()
  try:
    text = decode(path.read_bytes())
  except (OSError, UnicodeError) as error:
    raise UserError(f"{key} = {source!r} cannot be read: {error}; check the path") from error
  found = _strings(text, f"{key} = {source!r}")
  if released.variable not in found:
    raise UserError(
      f"{key} = {source!r} assigns no string {released.variable}; name CapRL's {released.path}, or "
      f"say {OFFICIAL!r}"
    )
  if released.is_in(found):
    log.info("%s: the released text, to the byte", key)
  else:
    log.warning("%s: %s of %s is not the released one", key, released.variable, path)
  return found


def _official(released: Released, key: str) -> dict[str, str]:
  name, kept = released.variable, _kept(released)
  if kept is not None and kept.exists():
    try:
      found = _strings(decode(kept.read_bytes()), str(kept))
    except (OSError, ValueError):
      found = {}
    if released.is_in(found):
      log.info("%s: the released text, from %s", key, kept)
      return {name: found[name]}
    log.warning("%s is not the released program; it is downloaded again", kept)
  data = _download(released, key)
  try:
    found = _strings(decode(data), released.address)
  except ValueError:  # no Python, or no text: a network's own page may come in a file's place
    found = {}
  if not released.is_in(found):
    raise UserError(
      f"{key} = {OFFICIAL!r}: {released.address} does not hold the released {released.variable} "
      f"(its digest is another one); {_by_hand(released, key)}"
    )
  log.info("%s: the released text, from %s", key, released.address)
  try:
    if kept is not None:
      write_bytes(kept, data)
  except OSError as error:
    log.warning("it cannot be kept in %s (%s), and is downloaded each time", kept, error)
  return {name: found[name]}


def _kept(released: Released) -> pathlib.Path | None:
  """Where it is kept; None for a user without a home."""
  try:
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  except RuntimeError:
    return None
  return cache / "caprl_jax" / "released" / released.commit / pathlib.PurePosixPath(released.path)


def _download(released: Released, key: str) -> bytes:
  log.info("downloading %s", released.address)
  try:
    with urllib.request.urlopen(released.address, timeout=_SECONDS) as answer:
      data = answer.read(_LARGEST)
      if answer.length:
        raise OSError(f"{answer.length} bytes of it did not come")
      return data
  except (OSError, http.client.HTTPException, ValueError) as error:
    raise UserError(
      f"{key} = {OFFICIAL!r}: {released.address} cannot be downloaded ({error}); "
      f"{_by_hand(released, key)}"
    ) from error


def _by_hand(released: Released, key: str) -> str:
  name = pathlib.PurePosixPath(released.path).name
  return f"bring the file to this machine by another way, and name it: --config.{key}=FOLDER/{name}"


def _strings(code: str, where: str) -> dict[str, str]:
  """Names that a program's top level assigns string literals to. Raises UserError for what is no
  Python."""
  try:
    tree = ast.parse(code)
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    raise UserError(f"{shown(where, 300)} is no Python: {error}") from error
  return {
    target.id: node.value.value
    for node in tree.body
    if isinstance(node, ast.Assign)
    and isinstance(node.value, ast.Constant)
    and isinstance(node.value.value, str)
    for target in node.targets
    if isinstance(target, ast.Name)
  }


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
