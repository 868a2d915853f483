"""A run's folder and its copy in a bucket: what a machine that is lost leaves, and who goes on."""

import json
import shutil
import sys

import pytest
from etils.epath import backend
from fsspec.registry import _registry
from helpers.faults import bucket as buckets

from caprl_jax.harness.buckets import mirror
from caprl_jax.harness.buckets.mirror import Mirror, mirrored


@pytest.fixture
def bucket(monkeypatch):
  return buckets.install(monkeypatch)


def write(folder, **texts):
  for name, text in texts.items():
    path = folder / name.replace("__", "/").replace("_DOT_", ".")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def held(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_text()
    for path in folder.rglob("*")
    if path.is_file() and not path.name.startswith(".")
  }


def run(folder):
  """What a training run leaves after step 2."""
  write(
    folder,
    log_DOT_txt="begun",
    metrics_DOT_jsonl="1\n2\n",
    checkpoints__1__state="one",
    checkpoints__2__state="two",
    record_train_DOT_json='{"config": {}}',
  )
  write(folder / "checkpoints" / "3.orbax-checkpoint-tmp", state="half")
  write(folder, **{".lock": "held", ".summary.json.12.tmp": "half"})
  return folder


def test_another_machine_goes_on_with_what_was_copied(bucket, tmp_path):
  first = Mirror("gs://b/runs/a", run(tmp_path / "first"))
  first.push()
  second = Mirror("gs://b/runs/a", tmp_path / "second")
  second.fetch()
  wanted = held(tmp_path / "first")
  del wanted["checkpoints/3.orbax-checkpoint-tmp/state"]
  assert held(tmp_path / "second") == wanted
  write(tmp_path / "second", metrics_DOT_jsonl="1\n2\n3\n", checkpoints__3__state="three")
  shutil.rmtree(tmp_path / "second" / "checkpoints" / "1")
  bucket.writes.clear()
  second.push()
  assert bucket.writes == [
    f"b/runs/a/{name}"
    for name in ("checkpoints/3/state", "metrics.jsonl", "mirror.json", "record_train.json")
  ]
  assert not bucket.exists("gs://b/runs/a/checkpoints/1/state")
  again = Mirror("gs://b/runs/a", tmp_path / "first")  # whose copy is older than the bucket now
  again.fetch()
  assert held(tmp_path / "first") == held(tmp_path / "second")


def test_what_is_here_stays_where_nobody_else_has_written(bucket, tmp_path):
  Mirror("gs://b/a", run(tmp_path)).push()
  write(tmp_path, metrics_DOT_jsonl="1\n2\n3\n")  # a kill came before it was copied
  again = Mirror("gs://b/a", tmp_path)
  again.fetch()
  assert (tmp_path / "metrics.jsonl").read_text() == "1\n2\n3\n"
  again.push()
  assert bucket.cat("gs://b/a/metrics.jsonl") == b"1\n2\n3\n"


def test_two_runs_in_one_place_are_told(bucket, tmp_path):
  one, two = (Mirror("gs://b/a", tmp_path / name) for name in ("one", "two"))
  for mirror_ in (one, two):
    mirror_.fetch()
  write(tmp_path / "one", a="1")
  write(tmp_path / "two", a="2")
  one.push()
  with pytest.raises(ValueError, match="another run writes to gs://b/a: stop one of them"):
    two.push()
  assert bucket.cat("gs://b/a/a") == b"1"


def test_a_copy_that_was_cut_short_is_as_if_it_had_not_begun(bucket, tmp_path, monkeypatch):
  """The machine is lost while it copies: the index of the copy before says what counts."""
  first = Mirror("gs://b/a", run(tmp_path / "first"))
  first.push()
  write(tmp_path / "first", checkpoints__3__state="three", policy__config_DOT_json="{}")
  write(tmp_path / "first", record_train_DOT_json='{"complete": {"step": 3}}')
  copy, copied = mirror.copy_file, []

  def dying(source, target):
    if copied:
      raise OSError("lost")
    copied.append(copy(source, target))

  monkeypatch.setattr(mirror, "copy_file", dying)
  with pytest.raises(ValueError, match="cannot be read or written .OSError: lost"):
    first.push()
  monkeypatch.undo()
  monkeypatch.setattr(
    type(mirror.epath.backend.fsspec_backend), "fs", lambda self, path: bucket, raising=True
  )
  second = Mirror("gs://b/a", tmp_path / "second")
  second.fetch()
  assert not (tmp_path / "second" / "checkpoints" / "3").exists()
  assert json.loads((tmp_path / "second" / "record_train.json").read_text()) == {"config": {}}


def test_only_what_belongs_to_an_output_is_copied(bucket, tmp_path):
  bucket.pipe("gs://b/other.jsonl", b"x")
  bucket.pipe("gs://b/captions2.jsonl", b"x")
  bucket.pipe("gs://b/captions.jsonl.parts/0.jsonl", b"kept")
  bucket.writes.clear()
  made = Mirror("gs://b", tmp_path, "captions")
  made.fetch()
  assert held(tmp_path) == {"captions.jsonl.parts/0.jsonl": "kept"}
  write(tmp_path, captions_DOT_jsonl="1", captions_images__a="2", captions2_DOT_html="3")
  made.push()
  assert sorted(bucket.writes) == [
    "b/captions.jsonl",
    "b/captions.jsonl.parts/0.jsonl",
    "b/captions.mirror.json",
    "b/captions_images/a",
  ]


def test_it_is_copied_meanwhile_and_at_the_end_whatever_ends_the_run(
  bucket, tmp_path, monkeypatch, caplog, capsys
):
  monkeypatch.setattr(mirror, "EVERY_SECS", 0.05)
  seen = []

  class Told(Mirror):
    def push(self):
      super().push()
      seen.append(bucket.exists("gs://b/a/a"))

  with pytest.raises(KeyError), mirrored([Told("gs://b/a", tmp_path)]):
    write(tmp_path, a="1")
    while not any(seen):
      pass
    write(tmp_path, b="2")
    raise KeyError
  assert bucket.cat("gs://b/a/b") == b"2"
  bucket.broken = PermissionError("403")
  with pytest.raises(KeyError), mirrored([]):
    raise KeyError
  with pytest.raises(ValueError, match="gs://b/a cannot be read or written .PermissionError: 403"):
    Mirror("gs://b/a", tmp_path).push()


def test_without_its_library_the_remedy_is_said(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)  # where it is installed
  for name in ("gs", "gcs"):
    monkeypatch.delitem(_registry, name, raising=False)
  backend.fsspec_backend._get_filesystem.cache_clear()
  with pytest.raises(ValueError, match=r"gs://b/a: .*pip install gcsfs.* or mount the bucket"):
    Mirror("gs://b/a", tmp_path).fetch()


def test_long_copying_says_where_it_is(capsys, monkeypatch):
  assert list(mirror.one_by_one(["a", "b"], "gs://b/run")) == ["a", "b"]
  assert not capsys.readouterr().err
  monkeypatch.setattr(mirror, "SAY_SECS", 0.0)
  assert list(mirror.one_by_one(["a", "b"], "gs://b/run")) == ["a", "b"]
  assert capsys.readouterr().err == "gs://b/run: 1 of 2 files copied\n"
