"""The sections that all modes share stand alone."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import pytest
from helpers.paths import ROOT

from caprl_jax import sharding
from caprl_jax.harness.sections import DataSection, PolicySection, without_penalty
from caprl_jax.modes.sft.section import SFTConfig

# What only training and its evaluation work with.
HEAVY = ("setup", "settings", "gate", "question_filter", "trackers", "loop", "metrics")


def test_who_reads_a_section_does_not_load_what_trains():
  code = (
    "import sys; import caprl_jax.harness.sections; print([name for name in sys.modules "
    "if name.startswith('caprl_jax.')])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert "caprl_jax.harness.sections" in done.stdout
  for name in [f"caprl_jax.harness.{name}" for name in HEAVY] + ["caprl_jax.rl.update"]:
    assert repr(name) not in done.stdout, name


def test_no_number_of_shapes_is_below_one():
  for section in (DataSection("a", "b", 1, 1), SFTConfig("a", ())):
    assert section.shape_buckets is None
    with pytest.raises(ValueError, match="shape_buckets = 0 must be at least 1"):
      dataclasses.replace(section, shape_buckets=0)


def test_a_bare_prompt_is_the_released_prisms_to_the_byte():
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  checkpoint = str(ROOT / "configs" / "quickstart_policy")
  own, bare = (
    PolicySection(checkpoint, template=template).load(mesh) for template in ("checkpoint", "bare")
  )
  pieces = bare.prompt_pieces("what shape?")
  before, after = (bare.tokenizer.backend.decode(ids, skip_special_tokens=False) for ids in pieces)
  assert before == "<|im_start|>user\n<|vision_start|>"
  assert after == "<|vision_end|>what shape?<|im_end|>\n<|im_start|>assistant\n"
  template = own.chat_template()[0]
  wordy = own.files | {"chat_template.jinja": b"You are helpful.\n" + template.encode()}
  own, told = (dataclasses.replace(one, files=wordy) for one in (own, bare))
  assert (
    own.chat_template()[0].startswith("You are") and told.prompt_pieces("what shape?") == pieces
  )
  identities = [PolicySection(checkpoint, template=t).identity() for t in ("checkpoint", "bare")]
  assert identities[1] == identities[0] | {"template": "bare"}


@pytest.mark.parametrize(
  "name, penalty",
  [
    ("CapRL-3B", 1.0),
    ("caprl-qwen3vl-2b", 1.0),
    ("models--internlm--CapRL-3B/snapshots/0123abc", 1.0),
    ("CapRL-Eval-3B", 1.05),  # no captioner
    ("my-caprl-3b", 1.05),
    ("Qwen2.5-VL-3B-Instruct", 1.05),
  ],
)
def test_caprls_captioners_are_sampled_without_a_penalty(name, penalty, tmp_path):
  """Their files name Qwen2.5-VL's, 1.05; the README samples without."""
  folder = tmp_path / name
  shutil.copytree(ROOT / "configs" / "quickstart_policy", folder)
  path = folder / "generation_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.05}))
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  found = PolicySection(str(folder)).load(mesh)
  assert json.loads(found.files["generation_config.json"])["repetition_penalty"] == penalty
  whole = without_penalty(found)
  assert json.loads(whole.files["generation_config.json"])["repetition_penalty"] == 1.0
