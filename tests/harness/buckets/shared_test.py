"""A run of several processes in a bucket: what is copied, what lies there, and who may go on."""

import pathlib

import pytest
from helpers.faults import bucket as buckets

from caprl_jax.harness.buckets import shared
from caprl_jax.harness.buckets.mirror import Mirror
from caprl_jax.harness.buckets.shared import saved_steps


@pytest.fixture
def bucket(monkeypatch):
  monkeypatch.setattr(shared, "_shared", {})
  monkeypatch.setattr(shared, "_copying", set())
  return buckets.install(monkeypatch)


def test_the_first_process_copies_all_but_checkpoints(bucket, tmp_path):
  first = Mirror("gs://b/run", tmp_path / "first")
  assert shared.of_several([first], ["sft", "train"], 0) == [first] and first.shared
  assert shared.of_several([Mirror("gs://b/run", tmp_path / "second")], ["train"], 1) == []
  first.fetch()
  (first.here / "metrics.jsonl").write_text("1\n")
  shared.copy_now(tmp_path / "second" / "phase_0")  # which is another process's
  assert not bucket.exists("gs://b/run/metrics.jsonl")
  shared.copy_now(tmp_path / "first" / "phase_0")
  assert bucket.cat("gs://b/run/metrics.jsonl") == b"1\n"
  place = shared.checkpoints_of(tmp_path / "second" / "phase_0")
  assert str(place) == "gs://b/run/phase_0/checkpoints" and shared.in_bucket(place)
  assert saved_steps(tmp_path / "second" / "phase_0") == []
  folder = "gs://b/run/phase_0/checkpoints"
  bucket.pipe({f"{folder}/2/commit_success.txt": b"", f"{folder}/2/state/d": b"2"})
  bucket.pipe({f"{folder}/4/state/d": b"half"})  # the machines were lost meanwhile
  assert saved_steps(tmp_path / "second" / "phase_0") == [2]
  shared.move(place / "2", place / "damaged" / "2")
  assert saved_steps(tmp_path / "second" / "phase_0") == []
  assert bucket.cat(f"{folder}/damaged/2/state/d") == b"2"
  assert shared.checkpoints_of(tmp_path) == tmp_path / "checkpoints"

  alone = Mirror("gs://b/run", tmp_path / "alone")  # one process goes on where several have begun
  alone.fetch()
  assert alone.shared and [path.name for path in alone.here.iterdir() if path.name[0] != "."] == [
    "metrics.jsonl"
  ]
  alone.push()
  assert bucket.exists(f"{folder}/4/state/d"), "what it does not know it does not take away"


@pytest.mark.parametrize("indexed", [True, False], ids=["of one process", "of a mounted bucket"])
def test_a_run_whose_checkpoints_were_copied_is_not_gone_on_with(indexed, bucket, tmp_path):
  bucket.pipe({"gs://b/run/checkpoints/2/state": b"2", "gs://b/run/summary.json": b"{}"})
  if indexed:
    one = Mirror("gs://b/run", tmp_path / "one")
    one.fetch()
    one.push()
  several = Mirror("gs://b/run", tmp_path / "several")
  shared.of_several([several], ["train"], 0)
  with pytest.raises(ValueError, match="a run of one process, or of a mounted bucket: go on with"):
    several.fetch()


@pytest.mark.parametrize(
  "address, modes, message",
  [
    (
      "gs://b/run",
      ["train", "caption"],
      "gs://b/run: several processes of mode caption need a",
    ),
    (
      "s3://b/run",
      ["train"],
      "several processes with another bucket than one in gs:// need",
    ),
  ],
)
def test_what_needs_one_folder_says_so(address, modes, message, bucket, tmp_path):
  with pytest.raises(ValueError, match=message):
    shared.of_several([Mirror(address, pathlib.Path(tmp_path))], modes, 1)
