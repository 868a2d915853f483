"""Stages, blocks and judged pieces on a mesh of eight devices: what one device makes in one go."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import tiny
from helpers.paths import ROOT

# Rows are split over data and fsdp, parameters over fsdp and tensor.
MESHES = {"one": None, "mesh": dict(data=2, fsdp=2, tensor=2)}

# In a process of its own, since the number of CPU devices is set before jax starts.
PROGRAM = """
import gc, json, pathlib, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import ml_collections
import numpy as np
from caprl_jax import sharding
from caprl_jax.data.batches import train_iterator
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.setup import set_up
from caprl_jax.models.trainable import split_params, trainable_filter
from caprl_jax.rl import judge as judge_module, rollout as rollout_module, sampling
from caprl_jax.rl.groups import Rollout
from caprl_jax.rl.judge import Judge, JudgeIds, judge_ids
from caprl_jax.rl.loss import LossConfig
from caprl_jax.rl.rollout import RolloutConfig, sample_captions
from caprl_jax.rl.sampling import SamplingConfig
from caprl_jax.rl.update import Learner, UpdateConfig, loss_gradients

gc.disable()  # tracing makes many objects
B, G, T = 8, 4, 16
config = ml_collections.ConfigDict(json.loads(pathlib.Path(sys.argv[1]).read_text()))
settings, found = read_settings(config), {}
rng = np.random.default_rng(0)
length = rng.integers(1, T + 1, (B, G)).astype(np.int32)
advantage = rng.normal(size=(B, G)).astype(np.float32)
cfg = RolloutConfig(G, SamplingConfig(T))
for name, sizes in json.loads(sys.argv[2]).items():
  if sizes:  # one device does all in one size
    sampling.SMALLEST_CACHE, sampling.SMALLEST_CHUNK = T // 4, 2
    judge_module.SMALLEST_CAPTION, judge_module.SMALLEST_PIECE = T // 4, 1
    rollout_module.SMALLEST_BLOCK = rollout_module.FEWEST_TOKENS = G * (T - 1) // 4
  devices = jax.devices() if sizes else jax.devices()[:1]
  mesh = sharding.make_mesh(sharding.MeshConfig(**(sizes or {})), devices)
  with jax.set_mesh(mesh):
    made = set_up(settings)
    iterator = train_iterator(made.train.example, len(made.train_rows), B, 0)
    batch = sharding.put_batch(next(iterator), mesh)
    model, vocabulary = made.policy.model, made.frozen.vocabulary
    trained = trainable_filter("decoder", model.cfg.family)  # it has all that is split
    chosen, base = split_params(made.policy.params, trained)

    @jax.jit
    def sample(params, batch):
      return sample_captions(model, params, batch, jax.random.key(1), vocabulary, cfg, length)

    @jax.jit
    def judge(params, captions, questions):
      asked = Judge(made.judge.model, params, made.frozen.prompt), JudgeIds.of(captions, vocabulary)
      return judge_ids(*asked, questions, jax.random.key(2), settings.step.judge)

    @jax.jit
    def gradients(params, frozen, rollout):
      chunk = 8 if sizes else 1024  # tokens of the unembedding
      cfg = UpdateConfig(LossConfig(), microbatches=2, chunk_tokens=chunk)
      learner = Learner(model, None, cfg)
      return loss_gradients(learner, params, frozen, rollout)

    # Each is waited for: XLA's in-process collectives hang otherwise.
    captions = jax.block_until_ready(sample(made.policy.params, batch))
    answers = jax.block_until_ready(judge(made.frozen.judge, captions, batch.questions))
    rollout = Rollout(batch, captions, np.ones((B, G), bool), advantage)
    mean = jax.block_until_ready(gradients(chosen, made.frozen.replace(base=base), rollout))
    arrays = dict(
      tokens=captions.tokens_BGT,
      valid=captions.valid_BGT,
      logp=captions.logp_BGT,
      choice=answers.choice_BGK,
      credit=answers.credit_BGK,
      loss=mean.value,
    )
    found[name] = {key: np.asarray(x).tolist() for key, x in sharding.to_host(arrays).items()}
    grads = jax.tree.leaves(sharding.to_host(mean.grads))
    found[name]["norms"] = [float(np.linalg.norm(np.ravel(x))) for x in grads]
pathlib.Path(sys.argv[3]).write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mesh")
  (folder / "config.json").write_text(tiny.write_all(folder).to_json())
  arguments = [str(folder / "config.json"), json.dumps(MESHES), str(folder / "found.json")]
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, *arguments],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=420,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads((folder / "found.json").read_text())


def test_a_mesh_in_stages_makes_what_one_device_makes_in_one(found):
  one, got = found["one"], found["mesh"]
  lengths = np.sum(one["valid"], axis=-1)
  assert lengths.min() < 4 and lengths.max() > 12  # the case is worth something
  for key in ("tokens", "valid", "choice"):
    np.testing.assert_array_equal(got[key], one[key], err_msg=key)
  np.testing.assert_allclose(got["logp"], one["logp"], atol=1e-4)
  np.testing.assert_allclose(got["credit"], one["credit"], atol=1e-4)
  np.testing.assert_allclose(got["loss"], one["loss"], atol=1e-5)
  np.testing.assert_allclose(got["norms"], one["norms"], rtol=2e-3, atol=1e-5)
