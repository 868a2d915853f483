"""A finished output -> a dataset on the Hugging Face hub, file by file; an upload that was
interrupted goes on.
"""

import dataclasses
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from caprl_jax.errors import UserError
from caprl_jax.json_files import shown
from caprl_jax.modes.caption.formats.place import Place
from caprl_jax.progress import Bar

log = logging.getLogger("caprl_jax.modes.caption.upload")

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")


@dataclasses.dataclass(frozen=True)
class UploadConfig:
  """Where a finished output goes. The token is that of `hf auth login` or of the environment
  (HF_TOKEN), and stands nowhere else.

  repo: OWNER/NAME of a dataset on the hub, which is made if it is not there; None: nowhere.
  private: of a dataset that is made now.
  branch: that it goes to.
  folder: within the dataset; "" is its top.
  """

  repo: str | None = None
  private: bool = True
  branch: str = "main"
  folder: str = ""

  def __post_init__(self):
    if self.repo is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.repo):
      raise ValueError(f"repo = {shown(self.repo)}; write OWNER/NAME, as in me/captions")


def check_upload(cfg: UploadConfig, place: Place, api: Callable[[], Any] = huggingface_hub.HfApi):
  """Before anything is captioned: makes the dataset where it is not there. Raises ValueError for
  texts, which are too many files for a dataset, and where nobody is logged in or may write there.
  """
  if cfg.repo is None:
    return
  if place.kind == "txt":
    raise ValueError(
      "caption.upload.repo: texts beside images are too many files for a dataset on the hub; set "
      "caption.format to hf or webdataset, or end the output in .jsonl or .parquet"
    )
  _said(cfg, lambda: _made(cfg, api()))


def _made(cfg: UploadConfig, api: Any) -> None:
  api.create_repo(cfg.repo, repo_type="dataset", private=cfg.private, exist_ok=True)
  if cfg.branch != "main":
    api.create_branch(cfg.repo, repo_type="dataset", branch=cfg.branch, exist_ok=True)


def upload(cfg: UploadConfig, place: Place, api: Callable[[], Any] = huggingface_hub.HfApi) -> None:
  """Sends the files of a finished output that are not in the dataset yet, one after the other, so
  that what was sent stays sent.

  Raises:
    UserError: the hub refuses or cannot be reached; the same command goes on.
  """
  if cfg.repo is None:
    return
  hub, files = api(), files_of(place)
  _said(cfg, lambda: _made(cfg, hub))
  targets = [f"{cfg.folder.strip('/')}/{name}".lstrip("/") for name, _ in files]
  there = _said(cfg, lambda: _there(cfg, hub, targets))
  left = [
    (target, path)
    for target, (_, path) in zip(targets, files)
    if not _same(there.get(target), path)
  ]
  log.info("%s: %d of %d files are there already", cfg.repo, len(files) - len(left), len(files))
  with Bar(len(left), f"upload to {cfg.repo}", "file") as bar:
    for target, path in left:
      send = lambda target=target, path=path: hub.upload_file(
        path_or_fileobj=path,
        path_in_repo=target,
        repo_id=cfg.repo,
        repo_type="dataset",
        revision=cfg.branch,
        commit_message=f"{target} of {place.path.name}",
      )
      _said(cfg, send)
      bar.update()
  log.info("%s has the output: %d files", cfg.repo, len(files))


def files_of(place: Place) -> list[tuple[str, pathlib.Path]]:
  """The files of an output by their name in a dataset: the rows, then what tells of them, so that a
  dataset with a card is whole.
  """
  if place.path.is_dir():
    found = [path for path in sorted(place.path.rglob("*")) if path.is_file()]
    names = [path.relative_to(place.path).as_posix() for path in found]
    rows = sorted(zip(names, found), key=lambda file: file[0] == "README.md")
  else:
    rows = [(place.path.name, place.path)]
  beside = (place.failed_path, place.beside(".stats.json"))
  return rows + [(path.name, path) for path in beside if path.is_file()]


def _there(cfg: UploadConfig, api: Any, targets: Sequence[str]) -> dict[str, Any]:
  there: dict[str, Any] = {}
  for start in range(0, len(targets), 100):  # the hub's own limit is not documented
    some = list(targets[start : start + 100])
    found = api.get_paths_info(cfg.repo, some, repo_type="dataset", revision=cfg.branch)
    there |= {info.path: info for info in found}
  return there


def _same(info: Any, path: pathlib.Path) -> bool:
  """Whether a file on the hub has the bytes of one here: by SHA-256 for large ones, as git counts
  for others.
  """
  if info is None or getattr(info, "size", None) != os.path.getsize(path):
    return False
  lfs = getattr(info, "lfs", None)
  if lfs is not None:
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest() == lfs.sha256
  data = path.read_bytes()
  return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == info.blob_id


def _said(cfg: UploadConfig, call: Callable[[], Any]) -> Any:
  """What a call gives. What the hub refuses is put into words, without a token."""
  try:
    return call()
  except Exception as error:  # noqa: BLE001  the hub's errors and its HTTP client's have no common base
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
      raise UserError(
        f"caption.upload.repo = {cfg.repo}: the hub gives no leave to write there (status "
        f"{status}); run `hf auth login` with a token that may write, or set HF_TOKEN"
      ) from None
    said = " ".join(_TOKEN.sub("hf_...", str(error)).split())[:300]
    raise UserError(
      f"caption.upload.repo = {cfg.repo}: the upload failed with {type(error).__name__}: {said}; "
      "the output is whole here, and the same command goes on with the upload"
    ) from None
