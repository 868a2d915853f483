"""Checkpoints as people have them: what is read is what transformers reads, or is refused by name.

The base is configs/quickstart_policy, a real Qwen2.5-VL; nothing here is compiled.
"""

import codecs
import json
import logging
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from helpers import oracle, tiny
from helpers.paths import ROOT

from caprl_jax import sharding
from caprl_jax.hub import hub_files
from caprl_jax.hub.chat_template import find_template
from caprl_jax.hub.folders.notices import warn_once
from caprl_jax.hub.load import load_judge, load_policy, save_policy
from caprl_jax.hub.opened import open_captioner, open_decoder
from caprl_jax.hub.tokenizer import load_tokenizer

BASE = ROOT / "configs" / "quickstart_policy"
TENSORS = safetensors.numpy.load_file(BASE / "model.safetensors")
EMBEDDING = TENSORS["model.embed_tokens.weight"]
OTHER_HEAD = np.ascontiguousarray(EMBEDDING[::-1])
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def change(path: pathlib.Path, **values) -> None:
  """Sets keys of a JSON file; None takes one away."""
  held = json.loads(path.read_text()) | values
  path.write_text(json.dumps({k: v for k, v in held.items() if v is not None}))


def write_weights(path: pathlib.Path, tensors: dict) -> None:
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def write_shards(folder: pathlib.Path, tensors: dict, index: bool = True) -> None:
  names = sorted(tensors)
  parts = (names[: len(names) // 2], names[len(names) // 2 :])
  for shard, part in zip(SHARDS, parts):
    write_weights(folder / shard, {name: tensors[name] for name in part})
  if index:
    places = {name: shard for shard, part in zip(SHARDS, parts) for name in part}
    (folder / hub_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def load(path):
  return load_policy(str(path), sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))


def theirs(path):
  """transformers' model, and what it says of keys."""
  return transformers.AutoModelForImageTextToText.from_pretrained(
    path, dtype=torch.float32, output_loading_info=True
  )


def warnings_of(caplog) -> list[str]:
  """What we warned of."""
  return [
    r.getMessage()
    for r in caplog.records
    if r.levelno >= logging.WARNING and r.name.startswith("caprl_jax")
  ]


# ---- ties


@pytest.fixture(scope="module")
def family_folders(tmp_path_factory):
  """case -> a folder of transformers' random model, and its tensors without a head."""
  found = {}
  for case in ("qwen2_5_vl", "qwen3_vl", "internvl-qwen3"):
    folder = tmp_path_factory.mktemp(case)
    config, processor = oracle.CASES[case]()
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    [head] = [name for name in tensors if name.endswith("lm_head.weight")]
    found[case] = folder, head, {k: v for k, v in tensors.items() if k != head}
  return found


@pytest.mark.parametrize("head", ["none", "other"])
@pytest.mark.parametrize("case", ["qwen2_5_vl", "qwen3_vl", "internvl-qwen3"])
def test_ties_are_transformers(case, head, family_folders, caplog):
  """Whatever config.json says outside, inside or not at all. Without a head and a tie transformers
  draws one, which is refused; where the inner word alone says tied, it is believed with a warning.
  """
  folder, head_name, tensors = family_folders[case]
  [embedding] = [name for name in tensors if name.endswith("embed_tokens.weight")]
  other = {head_name: np.ascontiguousarray(tensors[embedding][::-1])}
  write_weights(folder / "model.safetensors", tensors | (other if head == "other" else {}))
  config = json.loads((folder / "config.json").read_text())
  for outer in (None, True, False):
    for inner in (None, True, False):
      for said, value in ((config, outer), (config["text_config"], inner)):
        said.pop("tie_word_embeddings", None)
        if value is not None:
          said["tie_word_embeddings"] = value
      (folder / "config.json").write_text(json.dumps(config))
      model, info = theirs(folder)
      where = f"{case} {outer} {inner}"
      warn_once.cache_clear()
      caplog.clear()
      if "lm_head.weight" in info["missing_keys"] and not inner:
        with pytest.raises(ValueError, match="transformers would draw a random one"):
          open_captioner(str(folder))
        continue
      found = open_captioner(str(folder))
      tied = "lm_head.weight" in info["missing_keys"] or (
        model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
      )
      assert found.text["tie_word_embeddings"] == tied, where
      assert found.captioner.text(found.config)["tie_word_embeddings"] == tied, where
      assert open_decoder(str(folder)).text["tie_word_embeddings"] == tied, where
      if not tied:
        np.testing.assert_array_equal(found.tensors[head_name], model.lm_head.weight.detach())
      told = warnings_of(caplog)
      differs = head == "other" and found.config != config
      believed = "lm_head.weight" in info["missing_keys"]
      assert len(told) == int(differs or believed), (where, told)


def test_a_differing_head_is_read_judged_and_written(folder, tmp_path):
  """What a PEFT merge leaves: tied by config.json, and another head in the file."""
  write_weights(folder / "model.safetensors", TENSORS | {"lm_head.weight": OTHER_HEAD})
  loaded = load(folder)
  read = lambda params: np.asarray(params["lm_head"]).astype(np.float32)
  np.testing.assert_array_equal(
    read(loaded.params["language_model"]), OTHER_HEAD.astype(np.float32)
  )
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  np.testing.assert_array_equal(
    read(load_judge(str(folder), mesh).params), OTHER_HEAD.astype(np.float32)
  )
  save_policy(tmp_path / "written", loaded, loaded.params)
  for path in (folder, tmp_path / "written"):
    model, info = theirs(path)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_array_equal(model.lm_head.weight.detach(), OTHER_HEAD.astype(np.float32))
  assert json.loads((tmp_path / "written" / "config.json").read_text())["tie_word_embeddings"] is (
    False
  )


def test_a_tied_head_may_stand_for_the_embedding(folder):
  tensors = {k: v for k, v in TENSORS.items() if k != "model.embed_tokens.weight"}
  write_weights(folder / "model.safetensors", tensors | {"lm_head.weight": OTHER_HEAD})
  assert torch.equal(
    theirs(folder)[0].get_input_embeddings().weight, theirs(folder)[0].lm_head.weight
  )
  found = load(folder).params["language_model"]
  assert "lm_head" not in found
  np.testing.assert_array_equal(found["embed_tokens"]["embedding"], OTHER_HEAD.astype(np.float32))


def test_tensors_that_nothing_takes_are_named(folder):
  again = {"lm_head.weight": EMBEDDING, "model.rotary_emb.inv_freq": np.ones(4, np.float32)}
  write_weights(folder / "model.safetensors", TENSORS | again)
  load(folder)
  write_weights(
    folder / "model.safetensors", TENSORS | {"v_head.summary.weight": np.ones((1, 4), np.float32)}
  )
  with pytest.raises(ValueError, match="1 tensors fit no parameter.*v_head.summary.weight"):
    load(folder)


# ---- weights in more than one file


def halved(tensors=TENSORS):
  return {k: (v.astype(np.float32) / 2).astype(v.dtype) for k, v in tensors.items()}


def assert_read(folder, expected):
  _, tensors = hub_files.read_directory(folder)
  assert set(tensors) == set(expected)
  for name, value in expected.items():
    np.testing.assert_array_equal(tensors[name], value, err_msg=name)


def test_whole_weights_beside_shards(folder, caplog):
  write_shards(folder, halved())
  model, _ = theirs(folder)
  norm = TENSORS["model.norm.weight"].astype(np.float32)
  np.testing.assert_array_equal(model.model.language_model.norm.weight.detach(), norm)
  assert_read(folder, TENSORS)
  hub_files.read_directory(folder)
  [told] = warnings_of(caplog)
  assert "model.safetensors is read, as transformers does" in told and "2 shards" in told
  caplog.clear()
  write_shards(folder, TENSORS)
  assert_read(folder, TENSORS)
  assert not warnings_of(caplog)  # both say the same
  (folder / SHARDS[0]).write_bytes(b"cut")
  assert_read(folder, TENSORS)


def test_shards_as_transformers_reads_them(folder, caplog):
  """A tensor that the index does not list is read; of one that is there twice, the last."""
  (folder / "model.safetensors").unlink()
  write_shards(folder, TENSORS)
  last = safetensors.numpy.load_file(folder / SHARDS[1])
  write_weights(folder / SHARDS[1], last | {"lm_head.weight": OTHER_HEAD})
  assert not torch.equal(
    theirs(folder)[0].lm_head.weight, theirs(folder)[0].get_input_embeddings().weight
  )
  assert_read(folder, TENSORS | {"lm_head.weight": OTHER_HEAD})
  assert not warnings_of(caplog)
  first = safetensors.numpy.load_file(folder / SHARDS[0])
  name = next(name for name in last if name.endswith("norm1.weight"))
  write_weights(folder / SHARDS[0], first | {name: last[name] * 2})
  write_weights(folder / SHARDS[1], last)
  assert_read(folder, TENSORS)
  [told] = warnings_of(caplog)
  assert name in told and SHARDS[0] in told and SHARDS[1] in told


def test_weights_that_config_names(folder):
  write_weights(folder / "other.safetensors", halved())
  change(folder / "config.json", transformers_weights="other.safetensors")
  norm = halved()["model.norm.weight"].astype(np.float32)
  np.testing.assert_array_equal(theirs(folder)[0].model.language_model.norm.weight.detach(), norm)
  assert_read(folder, halved())
  change(folder / "config.json", transformers_weights="../other.safetensors")
  with pytest.raises(ValueError, match="transformers_weights"):
    hub_files.read_directory(folder)


def test_weights_that_are_not_read_are_named(folder, caplog):
  write_weights(folder / "consolidated.safetensors", halved())
  (folder / "pytorch_model.bin").write_bytes(b"x")
  assert_read(folder, TENSORS)
  [told] = warnings_of(caplog)
  assert "consolidated.safetensors, pytorch_model.bin are not" in told


# ---- small files


@pytest.mark.parametrize(
  "bom, encoding", [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le")]
)
def test_byte_order_marks(folder, bom, encoding, tmp_path):

  def read():
    found = open_captioner(str(folder))
    template = find_template(hub_files.read_small_files(folder))
    ends = load_tokenizer(folder).end_ids
    return found.config, found.preprocessor(), template, ends, sorted(found.tensors)

  (folder / "model.safetensors").unlink()
  write_shards(folder, TENSORS)
  template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
  (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
  plain = read()
  for file in folder.glob("*.json"):
    file.write_bytes(bom + file.read_text().encode(encoding))
  assert read() == plain
  for name, data in hub_files.read_small_files(folder).items():  # what an export writes
    (tmp_path / name).write_bytes(data)
  transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_two_templates_are_said_once(folder, caplog):
  settings = json.loads((folder / "tokenizer_config.json").read_text())
  (folder / "chat_template.jinja").write_text(settings["chat_template"] + "\n")
  find_template(hub_files.read_small_files(folder))
  assert not warnings_of(caplog)
  (folder / "chat_template.json").write_text(
    json.dumps({"chat_template": settings["chat_template"] + "The"})
  )
  found, _ = transformers.Qwen2_5_VLProcessor.get_processor_dict(folder)
  for _ in range(2):
    assert find_template(hub_files.read_small_files(folder)) == found["chat_template"]
  [told] = warnings_of(caplog)
  assert "chat_template.json is taken" in told
  assert "chat_template.jinja and tokenizer_config.json differs" in told


def test_no_template_is_refused_when_it_is_asked_for(folder):
  change(folder / "tokenizer_config.json", chat_template=None)
  with pytest.raises(ValueError, match="no chat template .*transformers refuses it too"):
    load(folder).prompt_pieces("what?")


def test_a_vocabulary_beside_tokenizer_json(folder, caplog):
  model = json.loads((folder / "tokenizer.json").read_text())["model"]
  (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
  ours = load_tokenizer(folder)
  assert not warnings_of(caplog)
  one, other = list(model["vocab"])[40:42]
  swapped = model["vocab"] | {one: model["vocab"][other], other: model["vocab"][one]}
  (folder / "vocab.json").write_text(json.dumps(swapped))
  (folder / "merges.txt").write_text("#version: 0.2\n")
  expected = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
  assert load_tokenizer(folder).backend.get_vocab() == expected == ours.backend.get_vocab()
  [told] = warnings_of(caplog)
  assert "tokenizer.json is read" in told and "vocab.json" in told


def test_a_decoder_saved_without_its_head_has_no_prefix(tmp_path):
  """As `Qwen2Model.save_pretrained` writes it."""
  folder = tiny.write_judge(tmp_path / "judge")
  config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
  (folder / "config.json").write_text(json.dumps(config))
  held = safetensors.numpy.load_file(folder / "model.safetensors")
  held.pop("lm_head.weight", None)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  found = []
  for prefix in ("model.", ""):
    named = {prefix + name.removeprefix("model."): tensor for name, tensor in held.items()}
    safetensors.numpy.save_file(named, folder / "model.safetensors")
    found.append(load_judge(str(folder), mesh).params)
  jax.tree.map(np.testing.assert_array_equal, *found)
