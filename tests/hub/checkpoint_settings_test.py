"""What a checkpoint's files leave open is refused where transformers refuses it, or filled in as
transformers does and said once."""

import json
import logging
import pathlib
import shutil
import types

import numpy as np
import pytest
import transformers
from helpers import oracle
from helpers.paths import ROOT
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from caprl_jax.hub import hub_files
from caprl_jax.hub.folders.notices import warn_once
from caprl_jax.hub.folders.pixels import complete_processor
from caprl_jax.hub.folders.settings import complete_text, complete_vision
from caprl_jax.hub.opened import open_captioner, read_processor
from caprl_jax.inference.captioner import end_ids
from caprl_jax.models import qwen25_vl
from caprl_jax.models.decoder import DecoderConfig
from caprl_jax.models.policy import PolicyConfig

BASE = ROOT / "configs" / "quickstart_policy"
CONFIG = json.loads((BASE / "config.json").read_text())
PROCESSOR = json.loads((BASE / "preprocessor_config.json").read_text())
GONE = "taken away"


@pytest.fixture(autouse=True)
def _every_warning_is_new():
  warn_once.cache_clear()


def without_gone(values: dict) -> dict:
  return {k: v for k, v in values.items() if v is not GONE}


def warnings_of(caplog) -> list[str]:
  """What we warned of."""
  return [
    r.getMessage()
    for r in caplog.records
    if r.levelno >= logging.WARNING and r.name.startswith("caprl_jax")
  ]


PROCESSORS = [  # changes, what we say where transformers takes it: None refused, "" nothing
  ({}, ""),
  ({"size": {"height": 448, "width": 448}}, None),
  ({"size": {"shortest_edge": 1024}}, None),
  ({"size": {"longest_edge": 1024}}, None),
  ({"size": {"min_pixels": 1024, "max_pixels": 4096}}, None),
  ({"size": {"min_pixels": 1, "max_pixels": 4}, "min_pixels": 2048, "max_pixels": 9000}, ""),
  ({"size": {"height": 448, "width": 448}, "min_pixels": 1024, "max_pixels": 4096}, None),
  ({"size": {"shortest_edge": 1024, "longest_edge": 4096, "x": 3}}, None),
  ({"size": 448}, None),
  ({"size": [448, 448]}, None),
  ({"size": None}, "size = {'shortest_edge': 3136, 'longest_edge': 1003520}"),
  ({"size": GONE}, "size = {'shortest_edge': 3136, 'longest_edge': 1003520}"),
  ({"size": GONE, "min_pixels": 1024, "max_pixels": 4096}, ""),
  ({"size": GONE, "min_pixels": 1024}, "size = {'longest_edge': 1003520}"),
  ({"max_pixels": 4096}, ""),
  ({"max_pixels": "4096"}, None),
  ({"max_pixels": 0}, None),
  ({"image_mean": 0.5}, ""),
  ({"image_mean": [0.5]}, None),
  ({"image_mean": None}, None),
  ({"image_mean": GONE}, "image_mean"),
  ({"image_std": GONE}, "image_std"),
  ({"merge_size": GONE}, ""),
  ({"image_processor_type": "Qwen2VLImageProcessorFast"}, ""),
  ({"foo": 1}, ""),
]


@pytest.mark.parametrize("changes, said", PROCESSORS, ids=str)
def test_an_image_processor_is_read_as_transformers_reads_it(changes, said, tmp_path, caplog):
  changed = without_gone(PROCESSOR | changes)
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(changed))
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8))
  read = lambda: complete_processor(hub_files.read_preprocessor(tmp_path), CONFIG, tmp_path)
  if said is None:
    with pytest.raises((ValueError, TypeError)):
      Qwen2VLImageProcessorPil.from_pretrained(tmp_path)([picture], return_tensors="np")
    with pytest.raises(ValueError, match=str(tmp_path)):
      read()
    return
  theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
  for _ in range(2):
    pixels = PolicyConfig.from_hf(CONFIG, read()).vision.pixels
  assert pixels.min_pixels == theirs.size["shortest_edge"]
  assert pixels.max_pixels == theirs.size["longest_edge"]
  for ours, value in ((pixels.mean, theirs.image_mean), (pixels.std, theirs.image_std)):
    assert list(ours) == (list(value) if isinstance(value, (list, tuple)) else [value] * 3)
  grid = theirs([picture], return_tensors="np")["image_grid_thw"][0]
  assert pixels.shape(90, 70)[1] == grid.prod() // 4
  told = warnings_of(caplog)
  assert len(told) == bool(said) and all(said in message for message in told)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"patch_size": 14}, "of patch_size .* says 14, but the tower of config.json has 8"),
    ({"patch_size": GONE}, "of patch_size .* says nothing, which is 14"),
    ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor', but qwen2_5_vl has a"),
    ({"do_normalize": False}, "only bicubic resizing"),
    ({"resample": 2}, "only bicubic resizing"),
    ({"rescale_factor": 1 / 127.5}, "rescaling by 1/255"),
    ({"image_std": [0.5, 0, 0.5]}, "three numbers other than 0"),
  ],
)
def test_a_processor_that_does_not_fit_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    complete_processor(without_gone(PROCESSOR | changes), CONFIG, pathlib.Path("x"))


def test_no_image_processor_is_refused(tmp_path):
  shutil.copytree(BASE, tmp_path / "m")
  file = tmp_path / "m" / "preprocessor_config.json"
  file.rename(file.with_name("video_preprocessor_config.json"))
  with pytest.raises(OSError, match="Can't load image processor"):
    Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "m")
  for read in (lambda s: open_captioner(s).preprocessor(), read_processor):
    with pytest.raises(ValueError, match="no preprocessor_config.json.*Copy the file"):
      read(str(tmp_path / "m"))


def test_two_image_processors(tmp_path, caplog):
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
  place = tmp_path / "processor_config.json"
  for part, warned in (
    (PROCESSOR, 0),
    (PROCESSOR | {"size": {"shortest_edge": 2048, "longest_edge": 8192}}, 1),
    (None, 0),
  ):
    place.write_text(json.dumps({"image_processor": part}))
    caplog.clear()
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    for _ in range(2):
      ours = complete_processor(hub_files.read_preprocessor(tmp_path), CONFIG, tmp_path)
    assert ours["size"]["longest_edge"] == theirs.size["longest_edge"]
    assert len(warnings_of(caplog)) == warned


# ---- config.json


TEXTS = {
  "qwen2_5_vl_text": transformers.Qwen2_5_VLConfig().get_text_config(),
  "qwen3_vl_text": transformers.Qwen3VLConfig().get_text_config(),
  "qwen2": transformers.Qwen2Config(),
  "qwen3": transformers.Qwen3Config(),
  "llama": transformers.LlamaConfig(),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_what_a_decoder_leaves_open_is_transformers_default(kind, caplog):
  default = TEXTS[kind]
  sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
  held = {key: getattr(default, key) for key in (*sizes, "num_attention_heads")}
  if kind == "qwen2_5_vl_text":
    held["num_attention_heads"] = 64
  for _ in range(2):
    text = complete_text({"model_type": kind, **held}, "x")
  ours = DecoderConfig.from_hf(text)
  assert ours.rope_theta == default.rope_parameters["rope_theta"]
  assert ours.rms_norm_eps == default.rms_norm_eps and ours.activation == default.hidden_act
  [told] = warnings_of(caplog)
  assert f"rope_theta = {ours.rope_theta}" in told and "transformers' own default" in told
  assert ("mrope_section" in told) == kind.endswith("vl_text") == bool(ours.mrope_sections)
  caplog.clear()
  assert complete_text(text, "x") == text and not warnings_of(caplog)


@pytest.mark.parametrize("case", ["qwen2_5_vl", "qwen3_vl", "internvl-qwen3"])
def test_what_a_tower_leaves_open_is_transformers_default(case, caplog):
  config = oracle.CASES[case]()[0]
  default = type(config.vision_config)()
  kept = ("depth", "num_hidden_layers", "hidden_size", "intermediate_size", "out_hidden_size")
  vision = {k: v for k, v in config.vision_config.to_dict().items() if k in kept}
  said = {**config.to_dict(), "vision_config": vision}
  filled = complete_vision(said, "x")["vision_config"]
  assert filled.keys() - vision.keys()
  for key in filled.keys() - vision.keys():
    theirs = getattr(default, key)
    assert filled[key] == (list(theirs) if isinstance(theirs, tuple) else theirs), key
  [told] = warnings_of(caplog)
  assert "patch_size" in told


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"use_sliding_window": True}, "use_sliding_window = True"),
    ({"layer_types": ["sliding_attention"] * 3}, "only full_attention"),
    ({"hidden_act": "relu"}, "activation 'relu'.*supported: silu"),
    ({"hidden_act": ["silu"]}, "activation"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"mrope_section": [1, 2, 3]}}, "sum is half a head, 16"),
    ({"rope_parameters": 3}, "rope settings 3"),
  ],
)
def test_settings_that_are_not_ours_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    complete_text(CONFIG["text_config"] | changes, "x")


def test_two_rope_settings(caplog):
  changes = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 7, 7]}, "rope_theta": 77.0}
  changed = {**CONFIG, "text_config": CONFIG["text_config"] | changes}
  theirs = transformers.Qwen2_5_VLConfig(**changed).text_config.rope_parameters
  ours = DecoderConfig.from_hf(complete_text(changed["text_config"], "x"))
  assert ours.rope_theta == theirs["rope_theta"]
  assert list(ours.mrope_sections) == theirs["mrope_section"]
  [told] = warnings_of(caplog)
  assert "rope_scaling is taken" in told


@pytest.mark.parametrize("missing", ["vision_config", "text_config"])
def test_a_config_without_a_part(tmp_path, missing):
  shutil.copytree(BASE, tmp_path / "m")
  for value in (GONE, None, 3):
    changed = without_gone(CONFIG | {missing: value})
    (tmp_path / "m" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="config.json"):
      PolicyConfig.from_hf(*read_processor(str(tmp_path / "m")))


@pytest.mark.parametrize(
  "generation, config, ends, warned",
  [
    ([336, 334], 336, (336, 334), 0),
    ([334], 336, (334,), 1),
    (None, 336, (), 1),
    (GONE, 336, (336,), 0),
    (GONE, None, (), 1),
  ],
)
def test_what_ends_a_text(generation, config, ends, warned, caplog):
  """transformers: generation_config.json alone where there is one, else config.json."""
  files = {}
  if generation is not GONE:
    files["generation_config.json"] = json.dumps({"eos_token_id": generation}).encode()
  loaded = types.SimpleNamespace(files=files, config={"text_config": {"eos_token_id": config}})
  for _ in range(2):
    assert end_ids(loaded) == ends
  assert len(warnings_of(caplog)) == warned


def test_dynamic_rope_is_the_plain_one_up_to_its_length(caplog):
  """As published InternVL3 has it."""
  held = TEXTS["qwen2"].to_dict() | {"rope_parameters": None, "rope_theta": 1e6}
  text = complete_text(held | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "x")
  assert DecoderConfig.from_hf(text) == DecoderConfig.from_hf(complete_text(held, "y"))
  assert "'dynamic' in config.json is read as 'default'" in caplog.text


def test_a_decoder_of_its_own_has_nothing_from_outside_of_it():
  text = {k: v for k, v in CONFIG["text_config"].items() if k != "rms_norm_eps"}
  config = {**CONFIG, "text_config": text, "rms_norm_eps": 0.5}
  theirs = transformers.Qwen2_5_VLConfig(**config).text_config.rms_norm_eps
  ours = DecoderConfig.from_hf(complete_text(qwen25_vl.text_config(config), "x"))
  assert ours.rms_norm_eps == theirs != 0.5


def test_an_unknown_activation_between_tower_and_decoder_is_refused():
  config = oracle.CASES["internvl-qwen3"]()[0].to_dict() | {"projector_hidden_act": "relu"}
  with pytest.raises(ValueError, match="activation 'relu' in config.json is not supported"):
    complete_vision(config, "x")


def test_sizes_that_are_written_as_whole_floats(tmp_path):
  size = {"shortest_edge": 3136.0, "longest_edge": 16384.0}
  said = read_processor(str(ROOT / "configs" / "quickstart_policy"))[1]
  found = complete_processor(said | {"size": size}, CONFIG, tmp_path)["size"]
  assert found == size and all(isinstance(value, int) for value in found.values())


def test_tiles_of_which_the_processor_says_no_size_are_the_towers(caplog, tmp_path):
  config = oracle.CASES["internvl-qwen3"]()[0].to_dict()
  said = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_patches": 1, "max_patches": 6}
  complete_processor(said, config, tmp_path)
  assert "does not say size; tiles are the tower's" in " ".join(warnings_of(caplog))
