"""An output on its way to the hub, which a class here stands in for; HfApi's own signatures say
what it may be asked.
"""

import hashlib
import logging
import types
from unittest import mock

import pytest
from helpers.servers.hub import hub_of
from huggingface_hub import HfApi
from huggingface_hub.utils import close_session

from caprl_jax.errors import UserError
from caprl_jax.modes.caption.formats.place import Place
from caprl_jax.modes.caption.upload import UploadConfig, check_upload, upload


class Hub:
  """A dataset's files, and what was asked of it."""

  def __init__(self):
    self.files, self.sent, self.made, self.fails_at = {}, [], [], None

  def create_repo(self, repo_id, *, repo_type, private, exist_ok):
    assert repo_type == "dataset" and exist_ok
    self.made.append((repo_id, private))

  def get_paths_info(self, repo_id, paths, *, repo_type, revision):
    assert repo_type == "dataset" and revision == "main"
    return [
      types.SimpleNamespace(path=path, size=len(data), **self.digest(path, data))
      for path, data in self.files.items()
      if path in paths
    ]

  def digest(self, path, data):
    if path.endswith(".parquet"):
      return {"lfs": types.SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()), "blob_id": "x"}
    return {"lfs": None, "blob_id": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}

  def upload_file(
    self, *, path_or_fileobj, path_in_repo, repo_id, repo_type, revision, commit_message
  ):
    if path_in_repo == self.fails_at:
      raise ConnectionError("reset, token hf_abcdefghijklmnop")
    self.files[path_in_repo] = path_or_fileobj.read_bytes()
    self.sent.append(path_in_repo)


def api(hub: Hub):
  """What makes an HfApi that is the hub."""
  stand_in = mock.create_autospec(HfApi, instance=True)
  for name in ("create_repo", "get_paths_info", "upload_file"):
    getattr(stand_in, name).side_effect = getattr(hub, name)
  return lambda: stand_in


def test_an_upload_goes_on_file_by_file(tmp_path, caplog):
  folder = tmp_path / "set"
  (folder / "data").mkdir(parents=True)
  for name in ("README.md", "data/train-0.parquet", "data/train-1.parquet"):
    (folder / name).write_text(name)
  (tmp_path / "set.stats.json").write_text("{}")
  place, cfg, hub = Place(folder, "hf", tmp_path), UploadConfig("me/set", folder="v1"), Hub()
  hub.fails_at = "v1/data/train-1.parquet"
  with pytest.raises(UserError, match="the same command goes on") as raised:
    upload(cfg, place, api(hub))
  assert "hf_abc" not in str(raised.value) and raised.value.__suppress_context__
  hub.fails_at = None
  with caplog.at_level(logging.INFO, "caprl_jax"):
    upload(cfg, place, api(hub))
  assert hub.sent == [
    f"v1/{name}"
    for name in ("data/train-0.parquet", "data/train-1.parquet", "README.md", "set.stats.json")
  ]
  assert "me/set: 1 of 4 files are there already" in caplog.text
  (folder / "README.md").write_text("README.mb")  # of the same size
  upload(cfg, place, api(hub))
  assert hub.sent[4:] == ["v1/README.md"] and hub.made[0] == ("me/set", True)


def test_what_the_hubs_own_client_sends(tmp_path, monkeypatch):
  """Through `huggingface_hub`, to a server with the hub's HTTP API: a commit for each file, what is
  there is not sent again, and whoever has no token is told so."""
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  close_session()
  folder = tmp_path / "set"
  folder.mkdir()
  for n in range(3):
    (folder / f"{n:05d}.tar").write_bytes(bytes([n]) * 100)
  (tmp_path / "set.stats.json").write_text("{}")
  place, cfg = Place(folder, "webdataset", tmp_path), UploadConfig("me/set")
  with hub_of("me/set", "hf_mine") as hub:
    mine = lambda: HfApi(hub.url, token="hf_mine")
    with pytest.raises(UserError, match=r"no leave to write there \(status 401\)"):
      check_upload(cfg, place, lambda: HfApi(hub.url, token="hf_other"))
    check_upload(cfg, place, mine)
    hub.fails_at = "00001.tar"
    with pytest.raises(UserError, match="upload failed with HfHubHTTPError.*the same command goes"):
      upload(cfg, place, mine)
    hub.fails_at = None
    upload(cfg, place, mine)
    names = ["00000.tar", "00001.tar", "00002.tar", "set.stats.json"]
    assert hub.commits == [[name] for name in names]
    assert hub.files["00002.tar"] == b"\2" * 100
    upload(cfg, place, mine)
    assert len(hub.commits) == 4
    assert {(one["name"], one["organization"], one["type"]) for one in hub.made} == {
      ("set", "me", "dataset")
    }
  close_session()


def test_what_cannot_be_uploaded_is_said_before_anything_is_captioned(tmp_path):
  class Refused(Exception):
    response = types.SimpleNamespace(status_code=403)

  def refuse(*_, **__):
    raise Refused

  hub = Hub()
  hub.create_repo = refuse
  with pytest.raises(UserError, match=r"no leave to write there \(status 403\); run `hf auth"):
    check_upload(UploadConfig("me/set"), Place(tmp_path, "hf", tmp_path), api(hub))
  with pytest.raises(ValueError, match="set caption.format to hf or webdataset"):
    check_upload(UploadConfig("me/set"), Place(tmp_path, "txt", tmp_path), api(Hub()))
  check_upload(UploadConfig(), Place(tmp_path, "txt", tmp_path), refuse)
  with pytest.raises(ValueError, match="write OWNER/NAME"):
    UploadConfig("set")
