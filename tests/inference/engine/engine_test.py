"""Captions of the engine against those of the training step's rollout under the same random keys:
whatever stands in the other slots, on one device or two."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.paths import ROOT
from PIL import Image

from caprl_jax import sharding
from caprl_jax.data.batches import ImagePrompt, image_shape, stack
from caprl_jax.data.rows import CaptionRow
from caprl_jax.hub.load import load_policy
from caprl_jax.hub.vocabulary import own_vocabulary
from caprl_jax.inference import captioner as captioner_module
from caprl_jax.inference.captioner import Captioner, CaptionerConfig
from caprl_jax.inference.engine import engine as engine_module
from caprl_jax.inference.engine.engine import Asked, EngineConfig, Listed
from caprl_jax.inference.engine.programs import _put_row
from caprl_jax.models.attention import Rounded
from caprl_jax.rl.rollout import RolloutConfig, sample_captions
from caprl_jax.rl.sampling import SamplingConfig
from caprl_jax.types import Batch

SIZES = [(40, 30), (200, 90), (41, 30), (40, 31), (190, 95), (42, 30), (38, 30)]
CAPTIONS, TOKENS, SEED = 3, 40, 5
SAMPLING = dict(max_tokens=TOKENS, temperature=1.3, top_k=60, top_p=0.95)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("engine")
  tiny.write_policy(folder / "policy")
  rng = np.random.default_rng(0)
  for i, (w, h) in enumerate(SIZES):
    Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(folder / f"{i}.png")
  return folder


def numbered(folder):
  return [(100 + i, CaptionRow(folder / f"{i}.png", "", f"{i}.png")) for i in range(len(SIZES))]


def often_ending(loaded):
  """A vocabulary of which one token in eight ends a caption: captions of many lengths."""
  size = loaded.model.cfg.text.vocab_size
  return own_vocabulary(np.ones(size, bool), tuple(range(3, size, 8)))


def open_one(loaded, mesh, batch_size):
  cfg = CaptionerConfig(
    "Describe it.", captions=CAPTIONS, batch_size=batch_size, repetition_penalty=1.2, **SAMPLING
  )
  return Captioner(loaded, cfg, mesh=mesh, seed=SEED)


def tokens_of(captioner, rows):
  """Number of a row -> the ids of its captions."""
  found = [out for some in captioner(rows) for out in some]
  assert len(found) == len(rows) and not any(out.error for out in found)
  return {out.number: [caption.tokens for caption in out.captions] for out in found}


def by_rollout(loaded, rows):
  """The same of `sample_captions`, image by image, with keys of row and caption."""
  vocabulary, cfg = (
    often_ending(loaded),
    RolloutConfig(CAPTIONS, SamplingConfig(repetition_penalty=1.2, **SAMPLING)),
  )
  pieces, found = loaded.prompt_pieces("Describe it."), {}
  run = jax.jit(
    lambda params, batch, key: sample_captions(loaded.model, params, batch, key, vocabulary, cfg)
  )
  for number, row in rows:
    shape = image_shape([rows[1][1]], loaded.model.cfg)  # one that holds all
    example = Batch(*ImagePrompt(loaded.model.cfg, pieces, shape)(row), None, np.int32(number))
    key = jax.random.fold_in(jax.random.key(SEED), number)
    keys = jax.vmap(lambda c: jax.random.fold_in(key, c))(np.arange(CAPTIONS))
    made = jax.device_get(run(loaded.params, stack([example]), keys))
    found[number] = [t[v].tolist() for t, v in zip(made.tokens_BGT[0], made.valid_BGT[0])]
  return found


@pytest.fixture(scope="module")
def one_device(folder):
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  loaded = load_policy(str(folder / "policy"), mesh)
  with jax.set_mesh(mesh):
    yield loaded, mesh, by_rollout(loaded, numbered(folder))


def test_a_caption_is_its_own_whatever_is_beside_it(folder, one_device, monkeypatch):
  loaded, mesh, want = one_device
  monkeypatch.setattr(captioner_module, "caption_vocabulary", often_ending)
  monkeypatch.setattr(engine_module, "SMALLEST_CACHE", 8)  # caches of three lengths
  rows = numbered(folder)
  lengths = [len(ids) for group in want.values() for ids in group]
  assert min(lengths) < 8 and max(lengths) > 24 and len(set(lengths)) > 6  # the test could tell
  with open_one(loaded, mesh, 2) as few:
    assert tokens_of(few, rows) == want
    programs = [few.engine.prefill, few.engine.generate, few.engine.insert, few.engine.with_slots]
    compiled = [program._cache_size() for program in programs]
    # A bucket's second time, in another order, with a text of every length begun anew.
    assert tokens_of(few, rows[::-1]) == want
    assert [program._cache_size() for program in programs] == compiled
    assert compiled[0] == len(few._host.bucket(rows)[0]) > 1 and compiled[1] > 2

    pieces = list(few.stream(rows[1]))
    texts = [(out.captions[0].tokens, out.captions[0].finish) for out in pieces]
    assert texts[-1][0] == want[101][0] and texts[-1][1] in ("end", "length")
    assert len(texts) == -(-(len(want[101][0]) - 1) // 8) > 1
    for (before, finish), (after, _) in zip(texts, texts[1:]):
      assert finish == "" and len(before) < len(after) and after[: len(before)] == before
  monkeypatch.undo()
  monkeypatch.setattr(captioner_module, "caption_vocabulary", often_ending)
  with open_one(loaded, mesh, 5) as many:
    some = [rows[i] for i in (6, 1, 3)]
    assert tokens_of(many, some) == {number: want[number] for number, _ in some}


def test_int8_weights_and_cache_are_their_dequantised_selves(folder, monkeypatch):
  """Greedy ids over three pages of a cache; the rollout, which evaluation uses, has them too."""
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  rows = [numbered(folder)[i] for i in (0, 2, 5)]
  cfg = CaptionerConfig("Describe it.", max_tokens=20, batch_size=2, repetition_penalty=1.0)

  def ids(loaded):
    with jax.set_mesh(mesh), Captioner(loaded, cfg, mesh=mesh, seed=SEED) as captioner:
      return tokens_of(captioner, rows)

  small = load_policy(str(folder / "policy"), mesh, int8="both")
  found, of = ids(small), Rounded.of
  assert max(map(len, sum(found.values(), []))) == 20
  monkeypatch.setattr(Rounded, "of", lambda x: of(x).values * of(x).scale)
  assert ids(dataclasses.replace(small, params=tiny.dequantised(small.params))) == found
  monkeypatch.undo()
  model, pieces = small.model, small.prompt_pieces("Describe it.")
  shape = image_shape([row for _, row in rows], model.cfg)
  prompts = [ImagePrompt(model.cfg, pieces, shape)(row) for _, row in rows]
  batch = stack([Batch(*prompt, None, np.int32(0)) for prompt in prompts])
  vocabulary = captioner_module.caption_vocabulary(small)
  rollout = RolloutConfig(1, SamplingConfig(20, temperature=0.0))
  run = lambda *given: sample_captions(model, *given, jax.random.key(0), vocabulary, rollout)
  made = jax.device_get(jax.jit(run)(small.params, batch))
  for (number, _), tokens_1T, valid_1T in zip(rows, made.tokens_BGT, made.valid_BGT, strict=True):
    assert tokens_1T[valid_1T].tolist() == found[number][0]


PROGRAM = """
import json, pathlib, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from inference.engine import engine_test as here
from caprl_jax import sharding
from caprl_jax.hub.load import load_policy
folder = pathlib.Path(sys.argv[1])
here.captioner_module.caption_vocabulary = here.often_ending
found = []
for axis, int8 in (("data", "none"), ("tensor", "both")):
  mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, "fsdp": 1, axis: 2}))
  with jax.set_mesh(mesh):
    loaded = load_policy(str(folder / "policy"), mesh, int8=int8)
    kernel = loaded.params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert (str(kernel.dtype), kernel.sharding.is_fully_replicated) == (
      ("float32", True) if int8 == "none" else ("int8", False)
    )
    with here.open_one(loaded, mesh, 2) as captioner:
      found.append(here.tokens_of(captioner, here.numbered(folder)))
print(json.dumps(found))
"""


def test_two_devices_write_the_same(folder, one_device, monkeypatch):
  """As they are, with the images split over them; in int8, with the matrices split."""
  mesh = one_device[1]
  monkeypatch.setattr(captioner_module, "caption_vocabulary", often_ending)
  with jax.set_mesh(mesh):
    small = load_policy(str(folder / "policy"), mesh, int8="both")
    with open_one(small, mesh, 2) as captioner:
      rounded = tokens_of(captioner, numbered(folder))
  assert rounded != one_device[2]  # the test could tell
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, str(folder)],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  for ids, want in zip(found, (one_device[2], rounded), strict=True):
    assert {int(number): captions for number, captions in ids.items()} == want


def test_prompts_are_run_before_they_are_needed():
  """One batch of them: a slot that becomes free does not wait for the next prompts to be run."""
  asked, run = [Asked([n], SimpleNamespace(number_B=jnp.zeros(1))) for n in range(3)], []
  engine = SimpleNamespace(
    cfg=EngineConfig(2, 1, SamplingConfig(4)),
    shards=1,
    params=None,
    prefill=lambda _, request: run.append(request),
  )
  turns = engine_module._Turns(engine, Listed(asked))
  for _ in range(2):  # what waits for an entry is not run twice, nor is more run
    turns.stage()
    assert run == [asked[0].request] and turns.staged is asked[1] and len(turns.ready) == 1
  turns.ready.clear()
  turns.stage()
  assert run[1:] == [asked[1].request] and turns.staged is asked[2]


def test_a_row_goes_to_its_own_shard():
  """Two shards of two entries: places are counted within a shard; -1 puts nothing."""
  old, new = np.zeros((4, 3)), np.arange(1, 13).reshape(4, 3)
  put = _put_row(old, new, np.array([1, 0]), np.array([0, -1]))
  np.testing.assert_array_equal(put, [[4, 5, 6], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
  keys, more = np.zeros((2, 4, 1, 1, 1)), np.arange(1, 9).reshape(2, 4, 1, 1, 1)
  put = _put_row(keys, more, np.array([0, 1]), np.array([1, 1]))
  np.testing.assert_array_equal(put[..., 0, 0, 0], [[0, 1, 0, 4], [0, 5, 0, 8]])
