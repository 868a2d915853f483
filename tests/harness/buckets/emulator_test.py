"""A run's folder in a bucket of Google's protocol: gcsfs and Orbax, and an emulator on loopback."""

import contextlib
import json
import os
import pathlib
import socket
import sys

import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from helpers.launching.fake_mode import FAKE_MODE, PROGRAM
from helpers.processes import CONFIG, start, wait

from caprl_jax.data.batches import train_iterator
from caprl_jax.harness.buckets import addresses, mirror

FOLDER = "CAPRL_JAX_BUCKETS"  # where launch/test.sh has put the two packages
WHY = f"needs gcp-storage-emulator and gcsfs, installed or in the folder {FOLDER} names"


@pytest.fixture
def bucket(monkeypatch):
  """The address of an empty bucket."""
  monkeypatch.setattr(sys, "path", [*sys.path, os.environ.get(FOLDER, "")])
  gcsfs = pytest.importorskip("gcsfs", reason=WHY)
  server = pytest.importorskip("gcp_storage_emulator.server", reason=WHY)
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  emulator = server.create_server("localhost", port, in_memory=True, default_bucket="caprl")
  _tell_generations(monkeypatch)
  emulator.start()
  monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google which kind it is
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{port}")  # of Orbax
  backend.fsspec_backend._get_filesystem.cache_clear()
  gcsfs.GCSFileSystem.clear_instance_cache()
  yield "gs://caprl"
  emulator.stop()
  backend.fsspec_backend._get_filesystem.cache_clear()


def _tell_generations(monkeypatch):
  """Google's storage says with each file that it sends which generation of it that is; the emulator
  does not, and Orbax's storage cannot read a file a second time without it."""
  from gcp_storage_emulator.exceptions import NotFound
  from gcp_storage_emulator.handlers import objects

  download = objects.download

  def telling(request, response, storage, *args, **more):
    place = request.params["bucket_name"], request.params["object_id"]
    with contextlib.suppress(NotFound):
      response["x-goog-generation"] = storage.get_file_obj(*place)["generation"]
    return download(request, response, storage, *args, **more)

  monkeypatch.setattr(objects, "download", telling)


def test_a_run_s_folder_goes_to_the_bucket_and_comes_back(bucket, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  here, there = tmp_path / "here", f"{bucket}/runs/a"
  state, large = here / "checkpoints" / "1" / "state", bytes(range(256)) * 4096
  with mirror.mirrored([mirror.Mirror(there, here)]):
    state.parent.mkdir(parents=True)
    state.write_bytes(large)
    (here / "metrics.jsonl").write_text("1\n2\n")
    (here / "record_train.json").write_text("{}")
  another = mirror.Mirror(there, tmp_path / "another")
  another.fetch()
  assert (tmp_path / "another" / "metrics.jsonl").read_text() == "1\n2\n"
  copied = tmp_path / "another" / "checkpoints" / "1" / "state"
  assert copied.read_bytes() == large
  copied.unlink()
  another.push()
  assert not (epath.Path(there) / "checkpoints" / "1" / "state").exists()
  (epath.Path(bucket) / "rows.jsonl").write_text("{}\n")
  assert pathlib.Path(addresses.fetch(f"{bucket}/rows.jsonl")).read_text() == "{}\n"
  with pytest.raises(ValueError, match="no such file or folder in the bucket"):
    addresses.fetch(f"{bucket}/none.jsonl")


# As on machines of their own: each process has its own folders.
APART = """
import os, sys
sys.path.append(os.environ["CAPRL_JAX_BUCKETS"])
os.environ["XDG_CACHE_HOME"] += os.environ["JAX_PROCESS_ID"]
from caprl_jax.harness.buckets import shared
shared.MODES += ("fake",)
"""


def test_two_processes_write_a_run_into_a_bucket_and_one_goes_on(bucket, tmp_path):
  """On another machine. The first process copies what one would, and each writes its part of the
  checkpoints."""
  (tmp_path / "fake_mode.py").write_text(FAKE_MODE)
  config = dict(mode="fake", train=dict(steps=8))
  (tmp_path / "config.py").write_text(CONFIG.format(text=json.dumps(config)))

  def run(name, processes, event="::"):
    return start(
      tmp_path,
      tmp_path / name,
      processes,
      4 // processes,
      f"--workdir={bucket}/run",
      program=("-c", APART + PROGRAM),
      XDG_CACHE_HOME=str(tmp_path / f"cache_of_{name}_"),
      FAKE_EVENT=event,
    )

  wait(run("two", 2, "1:4:SIGTERM"), tmp_path / "two", 75)
  there = epath.Path(bucket) / "run"
  parts = {path.name for path in (there / "checkpoints" / "3" / "state").iterdir()}
  assert {"ocdbt.process_0", "ocdbt.process_1"} <= parts
  assert not [*tmp_path.glob("cache_of_two_*/**/checkpoints")]
  assert [json.loads(line)["step"] for line in _lines(there)] == [1, 2, 3]
  wait(run("one", 1), tmp_path / "one")
  rows = [json.loads(line) for line in _lines(there)]
  assert [row["step"] for row in rows] == list(range(1, 9))
  np.testing.assert_allclose([row["loss"] for row in rows], _losses(8), rtol=1e-4)


def _lines(workdir):
  return (workdir / "metrics.jsonl").read_text().splitlines()


def _losses(steps):
  """Those of the mode `fake`."""
  example = lambda index, rng: dict(row=np.int32(index), noise=rng.normal())
  iterator, params, found = train_iterator(example, 11, 8, 0), np.zeros(8), []
  for _ in range(steps):
    batch = next(iterator)
    params = params * 0.9 + batch["noise"] + batch["row"]
    found.append(params.sum())
  return found
