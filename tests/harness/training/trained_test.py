"""A captioner in a run's checkpoints, by the names that a run has."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from helpers import counting, tiny

from caprl_jax import sharding
from caprl_jax.harness.buckets.shared import saved_steps
from caprl_jax.harness.checkpoints import CheckpointConfig, Checkpoints
from caprl_jax.harness.sections import PolicySection
from caprl_jax.harness.training.trained import Trained, find_run
from caprl_jax.hub.lora import merge_lora
from caprl_jax.models.trainable import split_lora
from caprl_jax.types import TrainState


def save(workdir, *states, config=None):
  checkpoints = Checkpoints(workdir, CheckpointConfig())
  for state in states:
    checkpoints.save(state, {}, config or {}, force=True)
  checkpoints.close()


def _bytes_read() -> int:
  found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
  return sum(value["value"] for metric in found for value in metric["values"])


def test_parameters_are_read_alone(tmp_path, caplog):
  """Without the moments, which have most of the bytes; and those of the checkpoint before where the
  newest one is damaged, unless it is the one that is asked for."""
  moments = (jax.random.normal(jax.random.key(1), (500_000,)),)  # noise, which nothing compresses
  first = counting.new_state().replace(step=jnp.int32(1), opt_state=moments)
  second = first.replace(step=jnp.int32(2), params={"w": first.params["w"] + 1})
  save(tmp_path, first, second)
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), second.params)
  before = _bytes_read()
  step, params = Trained(tmp_path).restore(like)
  assert step == 2 and _bytes_read() - before < 200_000
  np.testing.assert_array_equal(params["w"], second.params["w"])
  shutil.rmtree(tmp_path / "checkpoints" / "2" / "state" / "d")
  step, params = Trained(tmp_path).restore(like)
  assert step == 1
  np.testing.assert_array_equal(params["w"], first.params["w"])
  assert "checkpoint of step 2 cannot be read" in caplog.text
  assert saved_steps(tmp_path) == [1, 2], "another run's checkpoint stays where it is"
  with pytest.raises(ValueError, match=r"no parameters of step 2 can be read: .* step of \[1\]"):
    Trained(tmp_path, 2).restore(like)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
  """A LoRA run after step 4: its workdir, the section that it has, and its adapters."""
  folder = tmp_path_factory.mktemp("adapted")
  policy = tiny.write_policy(folder / "policy")
  section = dict(checkpoint=str(policy), trainable="lora", max_pixels=24 * 24)
  with jax.set_mesh(mesh()):
    loaded = PolicySection(**section).load(mesh())
  adapters = jax.tree.map(lambda x: x + 0.05, split_lora(loaded.params)[1])
  state = TrainState(jnp.int32(4), adapters, (), jax.random.key(0))
  config = dict(mode="train", policy=section, train=dict(steps=4))
  save(folder / "run", state.replace(step=jnp.int32(2)), state, config=config)
  return folder / "run", PolicySection(**section), adapters


def mesh():
  return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


def test_a_run_with_adapters_is_a_captioner(adapted):
  """Merged, with the image sizes that it was trained with, and with new adapters on top where it is
  to be trained on."""
  workdir, begun, adapters = adapted
  with jax.set_mesh(mesh()):
    base = begun.load(mesh())
    merged = PolicySection(str(workdir)).load(mesh())
    lora = base.model.cfg.text.lora
    wanted = merge_lora(_with(base.params, adapters), lora)
    jax.tree.map(np.testing.assert_array_equal, merged.params, wanted)
    assert merged.model.cfg.text.lora is None
    assert jax.tree.structure(merged.shardings) == jax.tree.structure(merged.params)
    again = PolicySection(str(workdir), trainable="lora", param_dtype="bfloat16").load(mesh())
    own, new = split_lora(again.params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted)
    jax.tree.map(np.testing.assert_array_equal, own, rounded)
    assert again.model.cfg.text.lora == lora
    assert not jax.tree.leaves(new["language_model"])[1].any(), "B begins at zero"
  assert PolicySection(str(workdir)).pixels().max_pixels == 24 * 24
  assert PolicySection(str(workdir)).sizes().vision.pixels.max_pixels == 24 * 24
  assert PolicySection(str(workdir)).base() == begun.checkpoint


def _with(params, adapters):
  if not isinstance(params, dict):
    return params if adapters is None else adapters
  of = lambda name: None if adapters is None else adapters.get(name)
  return {name: _with(value, of(name)) for name, value in params.items()}


def test_names_of_a_run(adapted):
  workdir, begun, _ = adapted
  steps = workdir / "checkpoints"
  assert find_run(str(workdir)) == find_run(str(steps)) == Trained(workdir)
  assert find_run(str(steps / "2")) == Trained(workdir, 2)
  assert find_run(begun.checkpoint) is None and find_run("Qwen/Qwen2.5-VL-3B-Instruct") is None
  with pytest.raises(ValueError, match=r"no such checkpoint; .* has those of steps \[2, 4\]"):
    find_run(str(steps / "3"))
  sections = [PolicySection(str(name)) for name in (workdir, steps / "4", steps / "2")]
  assert sections[0].settled() == sections[1] == sections[1].settled()
  digests = [section.digest() for section in sections]
  assert digests[0] == digests[1] != digests[2] and begun.digest() not in digests
  assert sections[0].settled().identity()["checkpoint_sha256"] == digests[0]


def test_what_is_no_captioner_is_named(adapted, tmp_path):
  workdir, _, _ = adapted
  state = counting.new_state().replace(step=jnp.int32(1))
  save(tmp_path / "phase_0", state, config=dict(mode="sft,train", policy={}, train={}, sft={}))
  with pytest.raises(ValueError, match="mode 'sft,train', not of a training run: name the folder"):
    PolicySection(str(tmp_path / "phase_0")).load(mesh())
  for name, change, message in (
    ("moved", dict(checkpoint="/nowhere/policy"), "began with policy.checkpoint = '/nowhere/pol"),
    ("itself", dict(checkpoint=str(tmp_path / "itself")), "says that it began with itself"),
  ):
    shutil.copytree(workdir, tmp_path / name)
    for config in (tmp_path / name).glob("checkpoints/*/config/metadata"):
      held = json.loads(config.read_text())
      config.write_text(json.dumps({**held, "policy": {**held["policy"], **change}}))
    with pytest.raises(ValueError, match=message):
      PolicySection(str(tmp_path / name)).load(mesh())
  for config in (tmp_path / "moved").glob("checkpoints/*/config/metadata"):
    config.write_text("{")
  with pytest.raises(ValueError, match="the config in it cannot be read"):
    PolicySection(str(tmp_path / "moved")).load(mesh())
