"""Name of a dataset on the Hugging Face hub -> the parquet files of one of its splits."""

import dataclasses
import glob
import logging
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors

from caprl_jax.json_files import shown

log = logging.getLogger("caprl_jax.hub")

SYNTAX = "hf:OWNER/NAME, hf:OWNER/NAME:SPLIT or hf:OWNER/NAME@REVISION:SPLIT"
_SOURCE = re.compile(r"hf:([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?(?::(.+))?")
_SHARD = re.compile(r"(.*?)-(\d{5})-of-(\d{5})[^/]*\.parquet")
_PARTS = {  # how people call a split
  "train": "train",
  "training": "train",
  "validation": "validation",
  "valid": "validation",
  "val": "validation",
  "dev": "validation",
  "test": "test",
  "testing": "test",
}
_CARD = "README.md"


@dataclasses.dataclass(frozen=True)
class HubDataset:
  """A source `hf:...`. revision: a branch, tag or commit. split: "" for the only one, or train."""

  name: str
  revision: str = "main"
  split: str = ""


def parse_source(source: str) -> HubDataset:
  """Reads hf:OWNER/NAME[@REVISION][:SPLIT]. Raises ValueError for another text."""
  match = _SOURCE.fullmatch(source)
  if not match:
    raise ValueError(f"data source {shown(source)}: write {SYNTAX}")
  return HubDataset(match.group(1), match.group(2) or "main", match.group(3) or "")


def split_files(source: str, cache_dir: pathlib.Path | None = None) -> list[pathlib.Path]:
  """The parquet files of a split, in order, each downloaded if it is not in the hub's cache yet.

  Which files are of which split is what the dataset's README.md says in its `configs`, and without
  these what the files' names say: data/train-00000-of-00005.parquet, train/0.parquet,
  train.parquet. Of several configs it is the one called "default", or CONFIG in the split
  "CONFIG/SPLIT". With HF_HUB_OFFLINE, or where the hub cannot be reached, the cache alone is asked.

  Args:
    source: hf:OWNER/NAME[@REVISION][:SPLIT].
    cache_dir: the hub's cache; None: where huggingface_hub keeps it (HF_HUB_CACHE, HF_HOME).

  Raises:
    ValueError: no such dataset, revision or split (with the names that there are), no parquet in
      it, no leave to read it, no network and nothing in the cache, or only some of its files.
  """
  asked = parse_source(source)
  cache = pathlib.Path(cache_dir or constants.HF_HUB_CACHE)
  online = None if constants.HF_HUB_OFFLINE else _listing(asked, source)
  if online is None:
    folder = _cached(asked, source, cache)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
    return [folder / name for name in _chosen(asked, source, names, folder)]
  card = _download(asked, source, cache, [_CARD] if _CARD in online else [])
  wanted = _chosen(asked, source, sorted(online), card)
  folder = _download(asked, source, cache, wanted)
  return [folder / name for name in wanted]


def _listing(asked: HubDataset, source: str) -> list[str] | None:
  """The names of all files on the hub; None where it cannot be reached."""
  try:
    return huggingface_hub.HfApi().list_repo_files(
      asked.name, repo_type="dataset", revision=asked.revision
    )
  except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
    raise _refused(asked, source, error) from error
  except Exception as error:  # noqa: BLE001  the hub's errors and its HTTP client's have no common base
    log.warning(
      "%s: the hub cannot be reached (%s: %.200s); its cache is asked",
      source,
      type(error).__name__,
      error,
    )
    return None


def _refused(asked: HubDataset, source: str, error: Exception) -> ValueError:
  if isinstance(error, errors.GatedRepoError):
    return ValueError(
      f"{source}: the dataset is gated; ask for leave at https://huggingface.co/datasets/"
      f"{asked.name}, then run `hf auth login`"
    )
  if isinstance(error, errors.RevisionNotFoundError):
    return ValueError(f"{source}: the dataset has no revision {asked.revision!r}")
  if isinstance(error, errors.RepositoryNotFoundError):
    return ValueError(
      f"{source}: the hub has no dataset {asked.name!r}, or it is private; check the spelling, or "
      "run `hf auth login` first"
    )
  return ValueError(
    f"{source}: the download failed with {type(error).__name__}: {str(error):.300}; try again, or "
    "copy the files to this machine and name their folder"
  )


def _download(
  asked: HubDataset, source: str, cache: pathlib.Path, names: Sequence[str]
) -> pathlib.Path:
  """The folder of these files, which are downloaded where they are not in the cache."""
  if not names:
    return cache
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        asked.name,
        repo_type="dataset",
        revision=asked.revision,
        cache_dir=cache,
        allow_patterns=[glob.escape(name) for name in names],
      )
    )
  except Exception as error:  # as above
    raise _refused(asked, source, error) from error


def _cached(asked: HubDataset, source: str, cache: pathlib.Path) -> pathlib.Path:
  """The revision's folder in the cache."""
  place = cache / f"datasets--{asked.name.replace('/', '--')}"
  ref = place / "refs" / asked.revision
  commit = ref.read_text("utf-8").strip() if ref.is_file() else asked.revision
  folder = place / "snapshots" / commit
  if not folder.is_dir():
    raise ValueError(
      f"{source}: the hub cannot be asked (HF_HUB_OFFLINE, or no network), and its cache {cache} "
      f"does not hold revision {asked.revision!r} of this dataset; download it where there is a "
      f"network: hf download {asked.name} --repo-type dataset"
    )
  return folder


def _chosen(
  asked: HubDataset, source: str, names: Sequence[str], folder: pathlib.Path
) -> list[str]:
  """The parquet files of the split that is asked for. folder: of README.md, if there is one."""
  parquet = [name for name in names if name.endswith(".parquet")]
  if not parquet:
    kinds = sorted({pathlib.PurePosixPath(name).suffix for name in names if "." in name} - {""})
    raise ValueError(
      f"{source}: there is no parquet file in it, but {', '.join(kinds[:8]) or 'nothing'}; the "
      f"hub's own conversion, if there is one, is hf:{asked.name}@refs/convert/parquet, or "
      "download it and name its files"
    )
  splits = _configured(asked, source, names, parquet, folder) or _by_name(parquet)
  known = {_PARTS.get(name, name): name for name in splits}
  wanted = asked.split.rpartition("/")[2] if asked.split not in splits else asked.split
  if not wanted:
    wanted = "train" if "train" in known or len(splits) > 1 else next(iter(splits))
  name = wanted if wanted in splits else known.get(_PARTS.get(wanted, wanted))
  if name is None:
    raise ValueError(
      f"{source}: no split {shown(wanted)}; it has {', '.join(sorted(splits))}. Write "
      f"hf:{asked.name}:{sorted(splits)[0]}"
    )
  _check_whole(source, splits[name])
  return splits[name]


def _configured(
  asked: HubDataset,
  source: str,
  names: Sequence[str],
  parquet: Sequence[str],
  folder: pathlib.Path,
) -> dict[str, list[str]]:
  """Files by split, as README.md says in `configs`; {} where it does not."""
  if _CARD not in names:
    return {}
  try:
    card = huggingface_hub.metadata_load(folder / _CARD)
  except Exception as error:  # noqa: BLE001  YAML's errors, and what a broken card leads to
    log.warning("%s: its README.md cannot be read (%.200s); files' names are asked", source, error)
    return {}
  listed = card.get("configs") if isinstance(card, Mapping) else None
  configs = {
    str(config.get("config_name", "default")): config["data_files"]
    for config in (listed if isinstance(listed, list) else [])
    if isinstance(config, Mapping) and config.get("data_files")
  }
  if not configs:
    return {}
  wanted, slash, _ = asked.split.partition("/")
  chosen = wanted if slash else ("default" if "default" in configs else "")
  chosen = chosen or (next(iter(configs)) if len(configs) == 1 else "")
  if chosen not in configs:
    raise ValueError(
      f"{source}: it has the configs {', '.join(sorted(configs))}; write "
      f"hf:{asked.name}:{sorted(configs)[0]}/train"
    )
  found: dict[str, list[str]] = {}
  for split, patterns in _patterns(configs[chosen]):
    fitting = [name for name in parquet if any(_fits(name, pattern) for pattern in patterns)]
    if fitting:
      found.setdefault(split, []).extend(fitting)
  return found


def _patterns(data_files: Any) -> list[tuple[str, list[str]]]:
  """(split, patterns) of `data_files` in its forms: a pattern, several, or objects of split and
  path.
  """
  texts = lambda held: [one for one in (held if isinstance(held, list) else [held]) if one]
  if isinstance(data_files, Mapping):
    return [(str(split), texts(path)) for split, path in data_files.items()]
  objects = [one for one in texts(data_files) if isinstance(one, Mapping)]
  if objects:
    return [(str(one.get("split", "train")), texts(one.get("path"))) for one in objects]
  return [("train", texts(data_files))]


def _fits(name: str, pattern: Any) -> bool:
  """Whether a file's path is of a pattern, in which only ** goes across folders."""
  if not isinstance(pattern, str):
    return False
  wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
  parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
  regex = "".join(wild.get(part) or re.escape(part) for part in parts)
  return re.fullmatch(regex, name) is not None


def _by_name(parquet: Sequence[str]) -> dict[str, list[str]]:
  """Files by the split that their names say; all are of "train" where none says one."""
  found: dict[str, list[str]] = {}
  unknown = []
  for name in parquet:
    split = _split_of(name)
    if split:
      found.setdefault(split, []).append(name)
    else:
      unknown.append(name)
  if not found:
    return {"train": list(parquet)}
  if unknown:
    log.warning("parquet files that belong to no split are left aside: %s", shown(unknown))
  return found


def _split_of(name: str) -> str:
  path = pathlib.PurePosixPath(name)
  if shard := _SHARD.fullmatch(path.name):
    return shard.group(1)
  word = re.match(r"[a-z]+", path.name.lower())
  words = [part.lower() for part in path.parts[:-1]] + ([word.group()] if word else [])
  return next((_PARTS[word] for word in reversed(words) if word in _PARTS), "")


def _check_whole(source: str, files: Sequence[str]) -> None:
  """Raises ValueError where a name says how many files there are, and there are fewer."""
  there: dict[tuple[str, str, str], set[str]] = {}
  for name in files:
    path = pathlib.PurePosixPath(name)
    if shard := _SHARD.fullmatch(path.name):
      key = str(path.parent), shard.group(1), shard.group(3)
      there.setdefault(key, set()).add(shard.group(2))
  for (parent, prefix, total), found in there.items():
    if len(found) < int(total):
      raise ValueError(
        f"{source}: {len(found)} of the {int(total)} files {parent}/{prefix}-* are there; download "
        "the others where there is a network, or unset HF_HUB_OFFLINE"
      )
