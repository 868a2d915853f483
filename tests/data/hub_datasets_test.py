"""Datasets of the hub, read from a local cache that is laid out as the hub lays it out."""

import os
import pathlib
import subprocess
import sys

import huggingface_hub
import pytest
from helpers.qa_rows import ROWS, plain
from huggingface_hub import constants, errors

from caprl_jax.data.readers import caprl_parquet
from caprl_jax.data.readers.image_sources import find_images
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import image_bytes
from caprl_jax.hub_datasets import HubDataset, parse_source, split_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
license: cc-by-nc-4.0
configs:
- config_name: default
  data_files:
  - split: train
    path: parts/a-*
  - split: held_out
    path: [parts/b-0.parquet]
- config_name: other
  data_files: "other/**/*.parquet"
---
# A dataset
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def lay_out(cache: pathlib.Path, *names: str, card: str = "", name: str = "owner/qa") -> None:
  """A cached dataset: blobs, a snapshot of links to them, the branch main; a file has one row."""
  place = cache / f"datasets--{name.replace('/', '--')}"
  for folder in ("blobs", "refs"):
    (place / folder).mkdir(parents=True)
  (place / "refs" / "main").write_text(COMMIT)
  snapshot = place / "snapshots" / COMMIT
  for number, file in enumerate((*names, "README.md") if card else names):
    blob = place / "blobs" / f"{number:064d}"
    if file.endswith(".parquet"):
      caprl_parquet.write_parquet(blob, [ROWS[number]])
    else:
      blob.write_text(card)
    link = snapshot / file
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))


SHARDS = [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]


def test_a_source_of_questions(tmp_path):
  lay_out(tmp_path / "cache", *SHARDS, "data/test-00000-of-00001.parquet")
  for source in ("hf:owner/qa", "hf:owner/qa:train", f"hf:owner/qa@{COMMIT}:train"):
    assert [plain(row) for row in read_qa_rows(source, 0)] == [plain(row) for row in ROWS[:2]]
  [row] = read_qa_rows("hf:owner/qa:test", 0)
  assert plain(row) == plain(ROWS[2])
  assert len(read_qa_rows("0.5*hf:owner/qa@main:test + 0.5*hf:owner/qa", 0)) == 3


def test_a_source_of_images(tmp_path):
  lay_out(tmp_path / "cache", *SHARDS)
  found = find_images("hf:owner/qa")
  assert [image_bytes(row) for row in found] == [row.image for row in ROWS[:2]]


@pytest.mark.parametrize(
  "split, chosen, others",
  [
    ("", ["train.parquet"], ["val.parquet"]),
    ("validation", ["val.parquet"], ["train.parquet"]),
    ("val", ["validation/0.parquet"], ["train/0.parquet"]),
    ("", ["default/test/0000.parquet"], []),
    ("", ["x.parquet", "y.parquet"], []),
    ("train", ["train-0001.parquet", "train-0002.parquet"], ["test-0001.parquet"]),
    ("extra", ["data/extra-00000-of-00001.parquet"], ["data/x.parquet"]),
  ],
)
def test_splits_by_the_names_of_files(split, chosen, others, tmp_path):
  lay_out(tmp_path / "cache", *chosen, *others)
  found = split_files(f"hf:owner/qa:{split}" if split else "hf:owner/qa")
  assert [str(file).partition(f"{COMMIT}/")[2] for file in found] == chosen


def test_splits_by_the_readme(tmp_path):
  files = ["parts/a-0.parquet", "parts/a-1.parquet", "parts/b-0.parquet", "other/x/y.parquet"]
  lay_out(tmp_path / "cache", *files, card=CARD)
  names = lambda source: [file.name for file in split_files(source)]
  assert names("hf:owner/qa") == ["a-0.parquet", "a-1.parquet"]
  assert names("hf:owner/qa:held_out") == ["b-0.parquet"]
  assert names("hf:owner/qa:other/train") == ["y.parquet"]
  with pytest.raises(ValueError, match="no split 'test'; it has held_out, train"):
    split_files("hf:owner/qa:test")
  with pytest.raises(ValueError, match="has the configs default, other; write"):
    split_files("hf:owner/qa:none/train")


@pytest.mark.parametrize(
  "files, source, message",
  [
    (SHARDS, "hf:owner/qa:dev", "no split 'dev'; it has train. Write hf:owner/qa:train"),
    (SHARDS[:1], "hf:owner/qa", r"1 of the 2 files data/train-\* are there"),
    (["train.jsonl"], "hf:owner/qa", "no parquet file in it, but .jsonl; .*@refs/convert/parquet"),
    (SHARDS, "hf:owner/none", "HF_HUB_OFFLINE.*hf download owner/none --repo-type dataset"),
    (SHARDS, "hf:owner/qa@v2", "does not hold revision 'v2'"),
    (SHARDS, "hf:qa", "write hf:OWNER/NAME"),
    (SHARDS, "hf:owner/qa:", "write hf:OWNER/NAME"),
  ],
)
def test_refusals(files, source, message, tmp_path):
  lay_out(tmp_path / "cache", *files)
  with pytest.raises(ValueError, match=message) as failure:
    split_files(source)
  assert str(failure.value).count(source) >= 1 and len(str(failure.value)) < 500


def test_a_revision_may_have_slashes():
  assert parse_source("hf:a/b@refs/convert/parquet:default/test") == HubDataset(
    "a/b", "refs/convert/parquet", "default/test"
  )


def test_only_the_splits_files_are_downloaded(tmp_path, monkeypatch):
  """The hub's two calls are replaced; what they are asked for is what matters."""
  asked = []
  files = [*SHARDS, "data/test-00000-of-00001.parquet", "README.md", "images/a.png"]
  lay_out(tmp_path / "cache", *files[:3], card="# no configs")

  def listed(self, name, *, repo_type, revision):
    assert (name, repo_type, revision) == ("owner/qa", "dataset", "main")
    return files

  def download(name, *, repo_type, revision, cache_dir, allow_patterns):
    asked.append(allow_patterns)
    return str(tmp_path / "cache" / "datasets--owner--qa" / "snapshots" / COMMIT)

  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert [file.name for file in split_files("hf:owner/qa")] == [
    pathlib.Path(name).name for name in SHARDS
  ]
  assert asked == [["README.md"], SHARDS]


@pytest.mark.parametrize(
  "kind, message",
  [
    (errors.GatedRepoError, "is gated; ask for leave at .*owner/qa, then run `hf auth login`"),
    (errors.RepositoryNotFoundError, "has no dataset 'owner/qa', or it is private"),
    (errors.RevisionNotFoundError, "no revision 'main'"),
  ],
)
def test_what_the_hub_refuses(kind, message, monkeypatch):
  def listed(*args, **kwargs):
    raise kind.__new__(kind)

  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
  with pytest.raises(ValueError, match=f"hf:owner/qa: .*{message}"):
    split_files("hf:owner/qa")


def test_without_a_network_the_cache_is_asked(tmp_path, monkeypatch, caplog):
  def listed(*args, **kwargs):
    raise ConnectionError("no route")

  lay_out(tmp_path / "cache", *SHARDS)
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
  assert len(split_files("hf:owner/qa")) == 2 and "cannot be reached" in caplog.text


def test_the_environment_says_where_the_cache_is(tmp_path):
  lay_out(tmp_path / "there", *SHARDS)
  code = (
    "from caprl_jax.data.readers.qa_sources import read_qa_rows; "
    "rows = read_qa_rows('hf:owner/qa', 0); assert len(rows) == 2 and rows[1].image.read()"
  )
  place = {"HF_HUB_CACHE": str(tmp_path / "there"), "HF_HUB_OFFLINE": "1"}
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=os.environ | place)
