"""A run's folder in a bucket of Google's protocol: gcsfs, and an emulator on loopback."""

import os
import pathlib
import socket
import sys

import pytest
from etils import epath
from etils.epath import backend

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
  emulator.start()
  monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google which kind it is
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
  backend.fsspec_backend._get_filesystem.cache_clear()
  gcsfs.GCSFileSystem.clear_instance_cache()
  yield "gs://caprl"
  emulator.stop()
  backend.fsspec_backend._get_filesystem.cache_clear()


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
