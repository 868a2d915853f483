"""Folders that cannot be loaded are named for what they are, with the step that helps; adapters are
merged as PEFT merges them."""

import json
import logging
import pathlib
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from helpers.paths import ROOT

from caprl_jax.hub import hub_files
from caprl_jax.hub.opened import open_captioner, open_decoder
from caprl_jax.hub.tokenizer import load_tokenizer

BASE = ROOT / "configs" / "quickstart_policy"
TENSORS = safetensors.numpy.load_file(BASE / "model.safetensors")
POINTER = (
  b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3357608\n"
)
QUERY = "model.layers.0.self_attn.q_proj.weight"


def change(path: pathlib.Path, **values) -> None:
  """Sets keys of a JSON file."""
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_weights(path: pathlib.Path, tensors: dict) -> None:
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def refusal(path) -> str:
  with pytest.raises(ValueError) as caught:
    open_captioner(str(path))
  return str(caught.value)


# ---- what a folder is


def test_git_lfs_pointers_of_any_file(folder):
  for name in ("model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf"{name} \(\d+ bytes\) is a git-lfs pointer.*lfs pull"):
      open_captioner(str(folder)).preprocessor()
      load_tokenizer(folder)
    (folder / name).write_bytes(whole)


def test_weights_that_are_not_there(folder):
  (folder / "model.safetensors").unlink()
  assert "model.safetensors: no such file. Download it" in refusal(folder)
  (folder / "model.gguf").touch()
  assert re.search("no model.safetensors, but a GGUF file.*name .*model.gguf", refusal(folder))
  (folder / "pytorch_model.bin").touch()
  message = refusal(folder)
  assert "only as pytorch_model.bin" in message
  assert "Qwen2_5_VLForConditionalGeneration.from_pretrained" in message and str(folder) in message
  for number in (1, 3):
    (folder / f"model-0000{number}-of-00003.safetensors").touch()
  message = refusal(folder)
  assert "without their index model.safetensors.index.json" in message
  assert "of its 3 shards 2 are absent" in message and "Download that file" in message
  (folder / hub_files.INDEX).write_text(json.dumps({"weight_map": {"x": "model-9.safetensors"}}))
  assert re.search("model-9.safetensors: no such file.*1 are absent", refusal(folder))
  for value in ({}, [], {"weight_map": {"x": "../x.safetensors"}}, {"weight_map": {"x": 3}}):
    (folder / hub_files.INDEX).write_text(json.dumps(value))
    assert hub_files.INDEX in refusal(folder)


def quantised(kind: str) -> tuple[dict, dict]:
  """Tensors and quantization_config as such checkpoints have them."""
  tensors = {k: v for k, v in TENSORS.items() if k != QUERY}
  stem, weight = QUERY.removesuffix(".weight"), TENSORS[QUERY]
  if kind in ("awq", "gptq"):
    added = {"qweight": np.zeros((128, 16), np.int32), "qzeros": np.zeros((1, 16), np.int32)}
    added |= {"g_idx": np.zeros(128, np.int32)} if kind == "gptq" else {}
    return tensors | {f"{stem}.{k}": v for k, v in added.items()}, {"quant_method": kind, "bits": 4}
  if kind == "bitsandbytes":
    added = {QUERY: np.zeros((8192, 1), np.uint8), f"{QUERY}.absmax": np.zeros(256, np.uint8)}
    return tensors | added, {"quant_method": kind, "load_in_4bit": True}
  if kind == "compressed-tensors":
    return tensors | {f"{stem}.weight_packed": np.zeros((128, 16), np.int32)}, {
      "quant_method": kind
    }
  small = weight.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
  return tensors | {QUERY: small, f"{QUERY}_scale_inv": np.ones((1, 1), np.float32)}, {
    "quant_method": kind
  }


@pytest.mark.parametrize(
  "kind, name",
  [
    ("awq", "AWQ, 4 bits"),
    ("gptq", "GPTQ, 4 bits"),
    ("bitsandbytes", "bitsandbytes"),
    ("compressed-tensors", "compressed-tensors"),
    ("fp8", "fp8"),
  ],
)
@pytest.mark.parametrize("said", [True, False])
def test_quantised_weights(folder, kind, name, said):
  tensors, settings = quantised(kind)
  write_weights(folder / "model.safetensors", tensors)
  if said:
    change(folder / "config.json", quantization_config=settings)
  message = refusal(folder)
  assert "weights are quantised" in message and "Name the unquantised checkpoint" in message
  assert not said or name in message


def test_plain_weights_that_config_calls_quantised(folder, caplog):
  """What merging adapters into a model that was loaded in 4 bits leaves."""
  change(folder / "config.json", quantization_config={"load_in_4bit": True})
  for _ in range(2):
    open_captioner(str(folder))
  [told] = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
  assert "bitsandbytes" in told and "no tensor is quantised" in told


@pytest.mark.parametrize(
  "prefix, words",
  [
    ("base_model.model.", "unmerged PEFT.*merge_and_unload"),
    ("module.", "wrapped model.*module.save_pretrained"),
    ("_orig_mod.", "wrapped model"),
  ],
)
def test_states_of_wrapped_models(folder, prefix, words):
  write_weights(folder / "model.safetensors", {prefix + k: v for k, v in TENSORS.items()})
  assert re.search(words, refusal(folder))


def test_an_unmerged_peft_state_without_its_prefix(folder):
  stem = QUERY.removesuffix(".weight")
  tensors = TENSORS | {f"{stem}.lora_A.default.weight": np.zeros((4, 128), np.float32)}
  write_weights(folder / "model.safetensors", tensors)
  assert "unmerged PEFT model" in refusal(folder)


def made(root: pathlib.Path, *names: str) -> pathlib.Path:
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("{}" if name.endswith(".json") else "abc")
  return root


@pytest.mark.parametrize(
  "names, words",
  [
    ((), "is an empty folder.*hf download"),
    (("x/config.json",), "its folder x does. Name that: .*/x"),
    (("checkpoint-5/config.json", "checkpoint-9/config.json"), "2 of its folders do. Name one"),
    (("refs/main", "snapshots/abc/config.json"), "hub's cache. Name the snapshot: .*/abc"),
    (("blobs/x", "snapshots/abc/x"), "no snapshot in it is whole"),
    (("summary.json", "policy/config.json"), "workdir of a training run. Name .*/policy"),
    (("config.json.old", "summary.json", "checkpoints/5/x"), "export.run"),
    (("zero_to_fp32.py", "latest", "global_step5/x"), "DeepSpeed.*zero_to_fp32"),
    (("__0_0.distcp", ".metadata"), "FSDP.*merge-weights"),
    (("model_world_size_8_rank_0.pt", "huggingface/config.json"), "verl.*model_merger"),
    (("_CHECKPOINT_METADATA", "state/x"), "Orbax"),
    (("model_index.json", "unet/diffusion.bin"), "diffusers"),
    (("params.json", "consolidated.00.pth"), "its maker's own layout"),
    (("adapter_model.safetensors",), "without their adapter_config.json"),
    (("a.txt",), "config.json: no such file; the directory holds"),
  ],
)
def test_what_a_folder_without_config_is(tmp_path, names, words):
  (tmp_path / "m").mkdir()
  assert re.search(words, refusal(made(tmp_path / "m", *names)))


# ---- adapters


def adapter_folder(path: pathlib.Path, base, tensors: dict, **settings) -> pathlib.Path:
  path.mkdir(parents=True)
  held = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8}
  (path / "adapter_config.json").write_text(json.dumps(held | settings))
  write_weights(path / "adapter_model.safetensors", tensors)
  return path


def pair_of(module: str, rank: int = 4, rows: int = 128, columns: int = 128) -> dict:
  rng = np.random.default_rng(len(module))
  draw = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float32)
  name = f"base_model.model.{module}"
  return {f"{name}.lora_A.weight": draw(rank, columns), f"{name}.lora_B.weight": draw(rows, rank)}


def assert_close(ours, theirs, name):
  np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=0, atol=2e-6, err_msg=name)


def test_adapters_are_merged_as_peft_merges_them(tmp_path):
  """Ranks and scales by pattern, rsLoRA, an embedding and a head of their own."""
  peft = pytest.importorskip("peft")
  model = transformers.AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
  config = peft.LoraConfig(
    r=4,
    lora_alpha=8,
    use_rslora=True,
    target_modules=r".*language_model.*\.(q_proj|down_proj)|.*visual.*\.qkv",
    rank_pattern={"layers.1.self_attn.q_proj": 2, "qkv": 3},
    alpha_pattern={r"layers\.\d+\.mlp\.down_proj": 5},
    modules_to_save=["lm_head", "embed_tokens"],
  )
  torch.manual_seed(0)
  wrapped = peft.get_peft_model(model, config)
  for parameter in wrapped.parameters():
    if parameter.requires_grad:
      torch.nn.init.normal_(parameter, std=0.1)
  wrapped.peft_config["default"].base_model_name_or_path = str(BASE)
  wrapped.save_pretrained(tmp_path / "adapters")
  merged = wrapped.merge_and_unload().state_dict()
  found = open_captioner(str(tmp_path / "adapters"))
  assert not found.text["tie_word_embeddings"]
  changed = 0
  for name in found.tensors:
    theirs = (
      name.replace("model.", "model.language_model.", 1)
      if name.startswith("model.")
      else (name if name.startswith("lm_head") else f"model.{name}")
    )
    assert found.tensors.shape_of(name) == tuple(merged[theirs].shape)
    assert_close(found.tensors[name], merged[theirs].numpy(), name)
    changed += name not in TENSORS or not np.array_equal(found.tensors[name], TENSORS[name])
  assert changed == 2 * 3 + 4 + 2
  ours = load_tokenizer(tmp_path / "adapters")
  assert ours.backend.get_vocab() == load_tokenizer(BASE).backend.get_vocab()
  assert ours.end_ids == load_tokenizer(BASE).end_ids
  assert found.preprocessor() == open_captioner(str(BASE)).preprocessor()
  assert open_decoder(str(tmp_path / "adapters")).text == found.text


def test_names_of_older_adapters_and_bases(tmp_path):
  """Module names moved in transformers 4.52; adapters and base may each have either."""
  expected = None
  for module in ("model.language_model.layers.0.self_attn.q_proj", QUERY.removesuffix(".weight")):
    tensors = dict(zip(pair_of(module), pair_of("x").values()))
    path = adapter_folder(tmp_path / module, BASE, tensors)
    merged = open_captioner(str(path)).tensors[QUERY]
    expected = merged if expected is None else expected
    assert merged.dtype == np.float32 and not np.array_equal(merged, TENSORS[QUERY])
    np.testing.assert_array_equal(merged, expected)


def test_where_the_base_lies(tmp_path, monkeypatch):
  tensors = pair_of("model.layers.0.self_attn.q_proj")
  shutil.copytree(BASE, tmp_path / "run" / "adapters" / "base")
  beside = adapter_folder(tmp_path / "run" / "adapters" / "new", "../base", tensors)
  open_captioner(str(beside))
  monkeypatch.chdir(tmp_path / "run")
  open_captioner(str(adapter_folder(tmp_path / "other", "adapters/base", tensors)))
  away = adapter_folder(tmp_path / "away", "/no/such/folder", tensors)
  assert re.search("adapters for the base.*not found.*base_model_name_or_path", refusal(away))
  itself = adapter_folder(tmp_path / "itself", ".", tensors)
  monkeypatch.chdir(itself)
  assert "is this folder itself" in refusal(itself)


def test_adapters_beside_the_weights_of_their_base(folder, caplog):
  shutil.copytree(
    adapter_folder(folder.parent / "a", "x", pair_of("model.layers.0.self_attn.q_proj")),
    folder,
    dirs_exist_ok=True,
  )
  assert not np.array_equal(open_captioner(str(folder)).tensors[QUERY], TENSORS[QUERY])
  (folder / "adapter_model.safetensors").unlink()
  np.testing.assert_array_equal(open_captioner(str(folder)).tensors[QUERY], TENSORS[QUERY])
  told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
  assert len(told) == 2
  assert "model.safetensors and adapter_model.safetensors; the adapters are merged" in told[0]
  assert "passed over" in told[1]


def test_adapters_beside_a_config_alone_are_merged_into_their_base(tmp_path):
  pair = pair_of("model.layers.0.self_attn.q_proj")
  folder = adapter_folder(tmp_path / "a", BASE, pair)
  merged = open_captioner(str(folder)).tensors[QUERY]
  shutil.copy(BASE / "config.json", folder)
  np.testing.assert_array_equal(open_captioner(str(folder)).tensors[QUERY], merged)
  assert not np.array_equal(merged, TENSORS[QUERY])


@pytest.mark.parametrize(
  "tensor, name",
  [(".W_q", "HQQ"), (".weight._data", "Quanto"), (".codebooks", "AQLM"), ("_blocks", "MXFP4")],
)
def test_weights_that_others_quantised(folder, tensor, name):
  kept = {key: value for key, value in TENSORS.items() if key != QUERY}
  stem = QUERY.removesuffix(".weight")
  write_weights(folder / "model.safetensors", kept | {f"{stem}{tensor}": np.zeros(4, np.uint8)})
  assert re.search(rf"its weights are quantised .*{name}", refusal(folder))


def test_own_files_of_adapters_go_before_the_bases(tmp_path):
  path = adapter_folder(tmp_path / "a", BASE, pair_of("model.layers.0.self_attn.q_proj"))
  shutil.copy(BASE / "tokenizer.json", path)
  (path / "chat_template.jinja").write_text("new")
  files = hub_files.files_of(path)
  assert files["chat_template.jinja"].parent == path and files["tokenizer.json"].parent == path
  assert "tokenizer_config.json" not in files  # with the base's template in it
  assert files["preprocessor_config.json"].parent == BASE
  first = hub_files.fingerprint(path)
  (path / "chat_template.jinja").write_text("newer")
  second = hub_files.fingerprint(path)
  write_weights(path / "adapter_model.safetensors", pair_of("model.layers.1.self_attn.q_proj"))
  assert len({first, second, hub_files.fingerprint(path)}) == 3


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"peft_type": "IA3"}, "kind 'IA3'; only LORA"),
    ({"use_dora": True}, "DoRA"),
    ({"lora_bias": True}, "lora_bias"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"init_lora_weights": "pissa_niter_4"}, "begins by changing the base"),
    ({"r": 8}, "rank 4, but adapter_config.json gives it 8"),
    ({"r": None}, "r = None; it must be a number"),
    ({"base_model_name_or_path": None}, "write there the directory or hub name"),
  ],
)
def test_adapters_that_are_not_merged(tmp_path, settings, words):
  tensors = pair_of("model.layers.0.self_attn.q_proj")
  assert words in refusal(adapter_folder(tmp_path / "a", BASE, tensors, **settings))


@pytest.mark.parametrize(
  "tensors, words",
  [
    (pair_of("model.layers.9.self_attn.q_proj"), "which the base .* lacks"),
    (pair_of("model.layers.0.self_attn.q_proj", columns=64), "do not fit"),
    (pair_of("visual.patch_embed.proj"), "do not fit"),
    ({"base_model.model.model.layers.0.q.lora_A.weight": np.ones((4, 4))}, "one of lora_A and"),
    ({"base_model.model.x.lora_magnitude_vector": np.ones(4)}, "not plain LoRA's"),
    (
      {
        "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 344), np.float32),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((128, 4), np.float32),
      },
      "which is the head as well",
    ),
  ],
)
def test_tensors_of_adapters_that_do_not_fit(tmp_path, tensors, words):
  assert re.search(words, refusal(adapter_folder(tmp_path / "a", BASE, tensors)))


def test_adapters_without_weights_in_safetensors(tmp_path):
  path = adapter_folder(tmp_path / "a", BASE, pair_of("model.layers.0.self_attn.q_proj"))
  (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
  assert re.search("there is adapter_model.bin, which is pickled", refusal(path))
