"""Two processes of two fake devices are one process of four: same metrics, same files."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import tiny
from helpers.processes import CONFIG, start, wait

from caprl_jax import sharding
from caprl_jax.data.batches import eval_batches, train_iterator
from caprl_jax.harness.metrics import read_metrics
from caprl_jax.hub.load import load_policy

# After mode `train`, in the same processes: two steps of LoRA on a rounded base, with captions that
# are tokenised anew between rollout and judge, as where the vocabularies differ. And the captioner
# of mode `train`, read from its checkpoints.
LORA_MODE = """
import dataclasses, json
import jax, ml_collections
from caprl_jax import sharding
from caprl_jax.config import schema as configuration
from caprl_jax.harness.sections import PolicySection
from caprl_jax.harness.settings import read_settings
from caprl_jax.harness.setup import set_up
from caprl_jax.harness.training.rounding import rounding_effect
from caprl_jax.hub.load import save_policy
from caprl_jax.inference.retokenise import Translator
from caprl_jax.models.trainable import merge_params
from caprl_jax.modes.train.run import save_captioner, train

def run(config, workdir):
  config = ml_collections.ConfigDict(config.to_dict())
  config.policy.trainable, config.train.steps = "lora", 2
  config.policy.lora = dict(rank=16, alpha=32.0, base_weights="nf4")
  settings, place = read_settings(config), workdir / "lora"
  with jax.set_mesh(sharding.make_mesh(settings.mesh)):
    made = set_up(settings)
    limit = settings.step.rollout.sampling.max_tokens
    translator = Translator(made.policy.tokenizer, made.judge.tokenizer, limit)
    made = dataclasses.replace(made, translator=translator)
    place.mkdir(exist_ok=True)
    effect = rounding_effect(made)
    if jax.process_index() == 0:
      (place / "rounding.json").write_text(json.dumps(effect))
    state = train(made, configuration.to_plain(config), place)
    params = merge_params(state.params, made.frozen.base)
    save_captioner(settings, place, made.policy, params, ["adapters", "policy"])
    read = PolicySection(str(workdir)).load(made.mesh)
    save_policy(place / "read", read, read.params)
"""
PROGRAM = (
  "-c",
  "import gc, sys; gc.disable(); from caprl_jax import main; "
  "from caprl_jax.config import registry; "
  "registry.MODES['lora'] = registry.Mode('lora_mode', '', '', {}); "
  "sys.exit(main.main(sys.argv))",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Tiny models and data, and a config file that main reads: of a part of the model, with a
  reference."""
  folder = tmp_path_factory.mktemp("tiny")
  config = tiny.write_all(folder)
  config.mode = "train,lora"
  config.policy.trainable = "decoder"
  config.policy_update.loss.kl = 0.1
  config.evaluate.group_images = 0  # one program less to compile
  config.mesh = dict(data=1, fsdp=2, tensor=2)  # parameters are split over the processes
  (folder / "config.py").write_text(CONFIG.format(text=config.to_json()))
  (folder / "lora_mode.py").write_text(LORA_MODE)
  return folder


@pytest.fixture(scope="module")
def one(folder):
  """The workdir of one process with four devices."""
  wait(start(folder, folder / "one", 1, 4, program=PROGRAM), folder / "one")
  return folder / "one"


@pytest.fixture(scope="module")
def two(folder):
  """The workdir of two processes with two devices each."""
  wait(start(folder, folder / "two", 2, 2, program=PROGRAM), folder / "two")
  return folder / "two"


@pytest.fixture(scope="module")
def moved(folder, two):
  """The run of two processes as a kill after its second step would have left it, taken up by one
  process with two devices."""
  workdir = folder / "moved"
  shutil.copytree(two, workdir, ignore=shutil.ignore_patterns("lora", "policy", "report.html"))
  shutil.rmtree(workdir / "checkpoints" / "4")
  for name, keys in (("record_train", ["complete"]), ("summary", ["after"])):
    path = workdir / f"{name}.json"
    held = {key: value for key, value in tiny.read_back(path).items() if key not in keys}
    path.write_text(json.dumps(held))
  flags = ("--config.mode=train", "--config.mesh.tensor=1")
  wait(start(folder, workdir, 1, 2, *flags, program=PROGRAM), workdir)
  return workdir


def files_of(workdir):
  found = {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()}
  return {name for name in found if not name.startswith(("checkpoints/", "lora/"))}


def one_device():
  return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


def assert_close(a, b, name, rtol=1e-4):
  assert a.keys() == b.keys(), name
  for key in a:
    if not key.startswith("time/"):
      np.testing.assert_allclose(b[key], a[key], rtol=rtol, atol=1e-6, err_msg=f"{name}: {key}")


def test_metrics_and_figures_are_those_of_one_process(one, two):
  rows = [read_metrics(workdir / "metrics.jsonl") for workdir in (one, two)]
  assert [row["step"] for row in rows[1]] == [1, 2, 3, 4]
  for a, b in zip(*rows, strict=True):
    assert_close(a, b, f"step {a['step']}")
  a, b = (tiny.read_back(workdir / "summary.json") for workdir in (one, two))
  for stage in ("before", "after"):
    assert_close(a[stage], b[stage], stage)
  assert a["counts"] == b["counts"] and a["versions"] == b["versions"]
  assert (two / "log.txt").read_text().count("0 compilations after the first step") == 2


def test_the_captioner_is_that_of_one_process(one, two):
  a, b = (load_policy(str(workdir / "policy"), one_device()).params for workdir in (one, two))
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    # Adam moved them by up to 4e-3
    np.testing.assert_allclose(y, x, atol=2e-4, err_msg=jax.tree_util.keystr(path))


def test_a_run_is_read_as_a_captioner_by_all_processes(one, two):
  for workdir in (one, two):
    wanted, found = (
      safetensors.numpy.load_file(workdir / name / "model.safetensors")
      for name in ("policy", "lora/read")
    )
    for name, x in wanted.items():
      np.testing.assert_array_equal(found.pop(name), x, err_msg=name)
    assert not found


def test_adapters_are_those_of_one_process(one, two):
  rows = [read_metrics(workdir / "lora" / "metrics.jsonl") for workdir in (one, two)]
  assert len(rows[1]) == 2 and rows[1][1]["update/kl"] > 0 and "judge/cut" in rows[1][1]
  for a, b in zip(*rows, strict=True):
    assert_close(a, b, f"step {a['step']}")
  for file in ("adapters/adapter_model.safetensors", "policy/model.safetensors"):
    a, b = (safetensors.numpy.load_file(workdir / "lora" / file) for workdir in (one, two))
    assert a.keys() == b.keys()
    for name, x in a.items():
      np.testing.assert_allclose(b[name], x, atol=2e-4, err_msg=name)
    assert "policy" in file or any(x.any() for name, x in a.items() if "lora_B" in name)
  a, b = (tiny.read_back(workdir / "lora" / "rounding.json") for workdir in (one, two))
  assert_close(a, b, "rounding", rtol=1e-3)
  assert a["kl"] > 0


def test_a_run_goes_on_on_another_mesh_and_number_of_processes(two, moved):
  """Same rows, same schedule, each step once; figures but for the last digits of float32."""
  rows = [read_metrics(workdir / "metrics.jsonl") for workdir in (two, moved)]
  assert [row["step"] for row in rows[1]] == [1, 2, 3, 4]
  assert rows[1][:2] == rows[0][:2]  # made before the kill
  for a, b in zip(*rows, strict=True):
    assert_close(a, b, f"step {a['step']}")
    assert a["update/learning_rate"] == b["update/learning_rate"]
  drawn = [tiny.read_back(run / "samples" / "step_000004.json")["rows"] for run in (two, moved)]
  assert [row["row"] for row in drawn[0]] == [row["row"] for row in drawn[1]]
  a, b = (load_policy(str(workdir / "policy"), one_device()).params for workdir in (two, moved))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(y, x, atol=2e-4)
  said = (moved / "log.txt").read_text()
  assert "resuming after step 2" in said and "mesh.tensor was 2 and is 1" in said
  assert "with other versions: device was '4 x cpu' and is '2 x cpu'" in said
  assert tiny.read_back(moved / "record_train.json")["complete"]["step"] == 4


def test_one_process_writes(one, two):
  assert files_of(two) == files_of(one) | {"log.1.txt", "row_check.1.jsonl"}
  for name in ("before.json", "after.json", "step_000001.json", "step_000004.json"):
    a, b = (tiny.read_back(workdir / "samples" / name)["rows"] for workdir in (one, two))
    texts = [
      [(row["row"], row["questions"], [c["text"] for c in row["captions"]]) for row in rows]
      for rows in (a, b)
    ]
    assert texts[0] == texts[1], name
  errors = (two.parent / "two_stderr_1.txt").read_text()
  assert "CapRL" not in errors and "report:" not in errors


def light(index, rng):
  return dict(row=np.int32(index), noise=rng.integers(0, 1 << 30))


@pytest.mark.parametrize(
  "shares", [[range(0, 4), range(4, 8)], [range(0, 8, 2), range(1, 8, 2)], [range(8), range(8)]]
)
def test_batches_do_not_depend_on_the_number_of_processes(shares):
  """Each process's share is its part of the one batch; a state of one continues the others."""
  whole = train_iterator(light, 10, 8, 3)
  parts = [train_iterator(light, 10, 8, 3, share) for share in shares]
  state = whole.get_state()
  for number in range(4):
    batch = next(whole)
    if number == 2:
      for part in parts:
        part.set_state(state)
    for share, part in zip(shares, parts, strict=True):
      some = next(part)
      for name in batch:
        np.testing.assert_array_equal(some[name], batch[name][list(share)])
    state = whole.get_state()
  for share in shares:
    for (batch, real), (some, also) in zip(
      eval_batches(light, 13, 8, 3), eval_batches(light, 13, 8, 3, share), strict=True
    ):
      assert real == also and all(
        np.array_equal(some[name], batch[name][list(share)]) for name in batch
      )
