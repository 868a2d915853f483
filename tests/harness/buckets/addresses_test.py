"""Addresses of buckets in a config: what is read is fetched, what is written has a place here."""

import pathlib

import ml_collections
import pytest
from helpers.faults import bucket as buckets

from caprl_jax.harness.buckets import addresses
from caprl_jax.harness.buckets.addresses import localise


@pytest.fixture
def bucket(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  return buckets.install(monkeypatch)


@pytest.fixture
def cache(tmp_path):
  return tmp_path / "caprl_jax" / "buckets" / "gs" / "b"


def config(**sections):
  return ml_collections.ConfigDict(sections)


def test_files_and_folders_that_are_read_are_fetched_once(bucket, cache, capsys):
  bucket.pipe({"gs://b/policy/config.json": b"{}", "gs://b/policy/tokens/a.txt": b"a"})
  bucket.pipe({"gs://b/rows.jsonl": b"1\n", "gs://b/00.tar": b"0", "gs://b/01.tar": b"1"})
  made = config(
    policy=dict(checkpoint="gs://b/policy"),
    data=dict(train="gs://b/rows.jsonl*2,tfds:gs://b/policy:train", limit=3),
    caption=dict(input="gs://b/*.tar"),
    stages=[dict(data="gs://b/rows.jsonl")],
    hub=dict(source="Qwen/Qwen2.5-3B"),
  )
  assert localise(made, "runs/a").workdir == "runs/a"
  assert made.policy.checkpoint == str(cache / "policy")
  assert (cache / "policy" / "tokens" / "a.txt").read_text() == "a"
  assert made.data.train == f"{cache / 'rows.jsonl'}*2,tfds:{cache / 'policy'}:train"
  assert made.caption.input == str(cache / "*.tar") and (cache / "01.tar").read_text() == "1"
  assert made.stages[0]["data"] == str(cache / "rows.jsonl")
  assert made.hub.source == "Qwen/Qwen2.5-3B" and made.data.limit == 3
  assert "2 files (0.0 MB) of gs://b/policy" in capsys.readouterr().err
  addresses.fetch("gs://b/policy")
  assert not capsys.readouterr().err
  bucket.pipe("gs://b/policy/config.json", b'{"new": 1}')
  addresses.fetch("gs://b/policy")
  assert "1 files" in capsys.readouterr().err
  assert (cache / "policy" / "config.json").read_text() == '{"new": 1}'


def test_a_list_brings_the_images_that_lie_beside_it(bucket, cache):
  bucket.pipe({"gs://b/set/rows.jsonl": b"1\n", "gs://b/set/images/0.png": b"p", "gs://b/c": b""})
  made = config(data=dict(train="gs://b/set/rows.jsonl"))
  localise(made, None)
  assert made.data.train == str(cache / "set" / "rows.jsonl")
  assert (cache / "set" / "images" / "0.png").read_bytes() == b"p" and not (cache / "c").exists()


def test_what_is_written_has_a_place_here_and_is_copied(bucket, cache):
  made = config(
    caption=dict(output="gs://b/out/captions.jsonl"),
    dataset=dict(output="tfds:gs://b/out/set", name="x"),
    curate=dict(answers_output="gs://b/answers.json"),
  )
  local = localise(made, "gs://b/runs/a")
  assert local.workdir == str(cache / "runs" / "a")
  assert made.caption.output == str(cache / "out" / "captions.jsonl")
  assert made.dataset.output == f"tfds:{cache / 'out' / 'set'}"
  found = {(str(mirror.there), mirror.here, mirror.only) for mirror in local.mirrors}
  assert found == {
    ("gs://b/runs/a", cache / "runs" / "a", ""),
    ("gs://b/out", cache / "out", "captions"),
    ("gs://b/out", cache / "out", "set"),
    ("gs://b", cache, "answers"),
  }
  assert not pathlib.Path("gs:").exists()


@pytest.mark.parametrize(
  "value", ["gs:/bucket/run", "file:///tmp/x", "hdfs://a/b", "hf://buckets/a"]
)
def test_other_addresses_are_not_written_to(value):
  with pytest.raises(ValueError, match=f"--workdir={value} is an address, and none of a bucket"):
    localise(config(), value)
  with pytest.raises(ValueError, match=f"--config.export.output={value} is an address, and none"):
    localise(config(export=dict(output=value)), None)


def test_what_is_not_there_is_named(bucket):
  with pytest.raises(ValueError, match="gs://b/rows.jsonl: no such file or folder in the bucket"):
    localise(config(data=dict(train="gs://b/rows.jsonl")), None)
