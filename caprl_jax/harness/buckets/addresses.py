"""A config that names buckets -> the same with folders of this machine; what is to be copied."""

import dataclasses
import fnmatch
import os
import pathlib
import re
import sys
from typing import Any

import ml_collections
from etils import epath

from caprl_jax.atomic_files import whole_file, write_json
from caprl_jax.errors import UserError
from caprl_jax.harness.buckets.mirror import Mirror, copy_file, listed, named, one_by_one
from caprl_jax.json_files import cut, read_record

# In sources of rows an address stands among others: tfds:gs://b/folder:train, gs://b/a.jsonl*2.
ADDRESS = re.compile(r"(?<![\w+.-])(?:gs|s3|az)://[^\s,:=@\"']+")
OTHER = re.compile(r"(gs|s3|az|file|hdfs):/|[\w+.-]+://")  # no folder, and nothing that is copied
WRITTEN = ("*.output", "*.answers_output", "prism.cache")  # keys of what modes write
LISTS = (".jsonl", ".json", ".csv", ".tsv", ".txt")  # may name images that lie beside them
HELD = ".fetched.json"  # beside what was fetched: what the bucket had


@dataclasses.dataclass(frozen=True)
class Local:
  """workdir: here. mirrors: of all that is written, and lies in buckets."""

  workdir: str | None
  mirrors: list[Mirror]


def folder_of(address: str) -> pathlib.Path:
  """Where a bucket's file or folder lies on this machine."""
  scheme, _, place = address.partition("://")
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  return cache / "caprl_jax" / "buckets" / scheme / place.strip("/")


def localise(config: ml_collections.ConfigDict, workdir: str | None) -> Local:
  """Puts folders of this machine in the place of addresses of buckets, in the config too. What is
  read is fetched at once; what is written, `mirrored` fetches and copies.

  Raises:
    UserError: an address that is written to is none of a bucket, or a bucket cannot be read.
  """
  mirrors: list[Mirror] = []
  if workdir is not None and _is_bucket("--workdir", workdir):
    mirrors.append(Mirror(workdir, folder_of(workdir)))
    workdir = str(folder_of(workdir))

  def written(match: re.Match[str]) -> str:
    place = folder_of(match[0])
    parent = match[0].rstrip("/").rpartition("/")[0]
    mirrors.append(Mirror(parent, place.parent, place.stem))
    return str(place)

  def change(value: Any, key: str) -> Any:
    if isinstance(value, ml_collections.ConfigDict):
      with value.unlocked():
        for name in value.keys():
          found = change(value[name], f"{key}{name}.")
          if found is not value[name]:
            value[name] = found
    elif isinstance(value, dict):
      items = {name: change(item, f"{key}{name}.") for name, item in value.items()}
      return items if items != value else value
    elif isinstance(value, (list, tuple)):
      items = [change(item, key) for item in value]
      if any(new is not old for new, old in zip(items, value, strict=True)):
        return type(value)(items)
    elif isinstance(value, str):
      name = key.removesuffix(".")
      if any(fnmatch.fnmatchcase(name, pattern) for pattern in WRITTEN):
        if _is_bucket(f"--config.{name}", value):
          return ADDRESS.sub(written, value)
      elif ADDRESS.search(value):
        return ADDRESS.sub(lambda match: str(fetch(match[0])), value)
    return value

  change(config, "")
  return Local(workdir, mirrors)


def _is_bucket(key: str, value: str) -> bool:
  """Whether an address of a bucket is in a value that is written to. Raises UserError for another
  address: a folder of its name would be made here, and be lost with the machine."""
  if ADDRESS.search(value):
    return True
  if OTHER.match(value):
    raise UserError(
      f"{key}={cut(value)} is an address, and none of a bucket that can be written "
      "(gs://, s3://, az://): name one, or a folder"
    )
  return False


def fetch(address: str) -> pathlib.Path:
  """A file or folder of a bucket, here; what is here already and has not changed is not copied
  again. A name with `*` fetches all that it stands for, and a list of images the folder in which it
  lies.

  Raises:
    UserError: there is no such file or folder, or the bucket cannot be read.
  """
  place, folder = folder_of(address), epath.Path(address)
  with named(folder):
    if "*" in folder.name:
      for path in folder.parent.glob(folder.name):
        fetch(str(path))
      return place
    if folder.suffix in LISTS and folder.exists() and address.count("/") > 3:
      fetch(address.rpartition("/")[0])
      return place
    names = listed(folder) if folder.is_dir() else [""]
    held_in = place.with_name(f"{HELD}{place.name}")
    held = read_record(held_in) if held_in.exists() else {}
    stats = {name: (folder / name if name else folder).stat() for name in names}
    now = {name: [stat.length, stat.mtime] for name, stat in stats.items()}
    new = [n for n in names if held.get(n) != now[n] or not (place / n if n else place).exists()]
    if new:
      size = sum(stats[name].length for name in new) / 1e6
      print(f"copying {len(new)} files ({size:.1f} MB) of {address} to {place}", file=sys.stderr)
    for name in one_by_one(new, address):
      with whole_file(place / name if name else place) as target:  # several processes may fetch it
        copy_file(folder / name if name else folder, epath.Path(target))
    write_json(held_in, now)
  return place
