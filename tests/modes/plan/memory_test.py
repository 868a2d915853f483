"""Memory by estimate, beside programs that libtpu compiled, and what follows from it."""

import dataclasses
import json

import pytest
from helpers.paths import ROOT

from caprl_jax import sharding
from caprl_jax.config.loading import load_config
from caprl_jax.config.schema import load_section
from caprl_jax.harness.settings import read_settings
from caprl_jax.modes.plan import changes, memory, report
from caprl_jax.modes.plan.chips import CHIPS, GIB, USUAL, machine_of, read_prices
from caprl_jax.modes.plan.estimate import Known, as_json, estimate
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.sharding import MeshConfig


def read(name, **plan):
  config = load_config(str(ROOT / "configs" / f"{name}.py"))
  settings = read_settings(config)
  return settings, dataclasses.replace(load_section(config, "plan", PlanConfig), **plan)


def estimated(name="caprl_3b", topology="v5e:4x4", layers=None, change=lambda s: s):
  settings, plan = read(name, layers=layers)
  settings = change(settings)
  return estimate(settings, Known.of(settings, plan), machine_of(topology), 1.0).memory


def on(mesh, **update):
  """The same on another mesh, with other microbatches or chunks, or a judge gathered anew."""

  def change(settings):
    settings = dataclasses.replace(settings, mesh=mesh)
    if "microbatches" in update:
      settings = changes.with_update(settings, update["microbatches"])
    if "gather_once" in update:
      settings = changes.with_judge(settings, gather_once=update["gather_once"])
    return (
      changes.with_sampling(settings, chunks=update["chunks"]) if "chunks" in update else settings
    )

  return change


def test_arguments_and_temporaries_are_those_of_the_compiled_step():
  """configs/caprl_3b_v5e16.py on v5e:4x4, compiled on 2026-11-30 (docs/tpu.md)."""
  found = estimated("caprl_3b_v5e16")
  assert sum(found.arguments.values()) / GIB == pytest.approx(3.053, rel=0.01)
  assert found.arguments["policy, trained"] * 16 / GIB == pytest.approx(13.99, rel=0.01)
  assert found.temporaries / GIB == pytest.approx(10.94, rel=memory.ERROR)


@pytest.mark.parametrize(
  "stage, gib, layers, mesh, more",
  [
    # Stages compiled alone for v5e:4x4 on 2026-11-29 (benchmarks/LOG.md).
    ("rollout", 11.13, None, MeshConfig(1, 8, 2), dict(chunks=8)),
    ("rollout", 16.75, None, MeshConfig(1, 8, 2), dict(chunks=4)),
    ("judge", 4.24, None, MeshConfig(1, 8, 2), dict(gather_once=False)),
    ("update", 8.87, None, MeshConfig(1, 8, 2), {}),
    ("judge", 4.30, 2, MeshConfig(1, 16, 1), dict(microbatches=8, gather_once=False)),
    ("update", 3.97, 2, MeshConfig(1, 16, 1), dict(microbatches=8)),
  ],
)
def test_a_stage_is_estimated_within_the_error_that_is_said(stage, gib, layers, mesh, more):
  kinds = estimated(layers=layers, change=on(mesh, **more)).stages[stage]
  assert sum(kinds.values()) / GIB == pytest.approx(gib, rel=memory.ERROR), kinds


def test_an_estimate_is_careful():
  """configs/colab_lora.py with one layer, compiled for v5e:1x1; the judge of
  configs/caprl_3b_v5e16.py, gathered once, alone; configs/caprl_qwen3vl_4b.py, whole, for
  v5p:2x2x2."""
  low, high = 1 - memory.ERROR, 1 + memory.MUCH
  found = estimated("colab_lora", "v5e:1x1", layers=1)
  assert sum(found.arguments.values()) / GIB == pytest.approx(1.124, rel=0.01)
  assert low < found.temporaries / GIB / 0.805 < high
  judge = estimated("caprl_3b_v5e16").stages["judge"]
  assert low < sum(judge.values()) / GIB / 5.13 < high
  whole = estimated("caprl_qwen3vl_4b", "v5p:2x2x2")
  assert sum(whole.arguments.values()) / GIB == pytest.approx(4.09, rel=0.01)
  assert low < whole.temporaries / GIB / 49.58 < high


def test_rounding_the_judge_and_training_adapters_take_less():
  whole = estimated("caprl_3b_v5e16").arguments
  small = estimated("caprl_3b_v5e16", change=lambda s: changes.with_judge(s, int8=True)).arguments
  # a byte in place of two for the layers' matrices; the embedding stays
  assert 0.55 < small["judge"] / whole["judge"] < 0.6
  lora = dict(trainable="lora", param_dtype="bfloat16")
  few = estimated("caprl_3b_v5e16", change=lambda s: changes.with_policy(s, **lora)).arguments
  assert few["policy, trained"] + few["optimizer"] < 0.2 * whole["policy, trained"]
  assert few["policy, frozen"] == pytest.approx(whole["policy, trained"] / 2, rel=0.01)


def test_moments_in_the_hosts_memory_leave_the_chips(tmp_path):
  settings, plan = read("caprl_3b_v5e16")
  there = dataclasses.replace(settings.optimizer, moment_memory="host")
  machine = machine_of("v5e-16")
  whole, found = (
    estimate(one, Known.of(one, plan), machine, 1.0)
    for one in (settings, dataclasses.replace(settings, optimizer=there))
  )
  moments = whole.memory.arguments["optimizer"]
  assert found.memory.host == pytest.approx(moments, rel=1e-4) and whole.memory.host == 0
  assert found.memory.arguments.get("optimizer", 0) < 100  # a count
  # While an update runs they are on the chip, beside the gradient.
  least = 2 * moments + found.memory.stages["update"]["gradients"] / 5
  assert sum(found.memory.stages["update"].values()) >= least
  assert found.memory.total < whole.memory.total - 0.9 * moments
  assert found.secs > whole.secs
  text = report.estimate_text(found, plan, machine)
  assert f"{4 * moments / GIB:.2f} GiB a host of 4" in text
  assert "in host memory" not in report.estimate_text(whole, plan, machine)
  assert as_json(found, plan)["gib_per_chip"]["host"] == pytest.approx(moments / GIB, rel=1e-4)
  named = [one.named for one in changes.alternatives(settings, plan, machine, 1.0)]
  assert "optimizer.moment_memory=host" in named
  counts = [machine_of(name).chips_per_host for name in ("v5e-8", "v5e:4x8", "v5p-16", "H100x16")]
  assert counts == [8, 4, 4, 8]


def test_activations_of_one_part_are_made_again():
  """Of the tower alone they take less than of nothing, and more than of both."""
  total = lambda **keys: estimated(
    "caprl_3b_v5e16", change=lambda s: changes.with_policy(s, **keys)
  ).stages["update"]["activations"]
  none, both = total(remat=False), total(remat=True)
  tower, decoder = total(remat=False, tower_remat=True), total(remat=True, tower_remat=False)
  assert both < min(tower, decoder) and max(tower, decoder) < none
  settings, _ = read("caprl_3b_v5e16")
  named = lambda **keys: {
    name for name, _ in changes.changes(changes.with_policy(settings, **keys), 8) if "remat" in name
  }
  assert named() == set() and named(remat=False) == {
    "policy.remat=True",
    "policy.tower_remat=False policy.decoder_remat=True",
    "policy.tower_remat=True policy.decoder_remat=False",
  }
  assert named(tower_remat=False) == {"policy.tower_remat=True policy.decoder_remat=True"}


def test_a_rollout_with_rounded_weights_reads_and_sends_less():
  settings, plan = read("caprl_3b_v5e16")
  rounded = changes.with_rollout(settings, weights="int8", end_cut=False)
  machine = machine_of("v5e-16")
  whole, small = (estimate(one, Known.of(one, plan), machine, 1.0) for one in (settings, rounded))
  assert small.stages["rollout"].read < 0.8 * whole.stages["rollout"].read
  assert small.stages["rollout"].sent < whole.stages["rollout"].sent
  gathered = [one.memory.stages["rollout"]["weights"] for one in (small, whole)]
  assert 0.5 < gathered[0] / gathered[1] < 0.65
  named = lambda s: [name for name, _ in changes.changes(s, 16)]
  assert "rollout.weights=int8" not in named(settings)  # it ends captions by hand
  assert "rollout.weights=int8" in named(changes.with_rollout(settings, end_cut=False))
  assert "rollout.weights=int8" not in named(rounded)


def test_a_base_in_four_bits_takes_a_quarter():
  half = dict(trainable="lora", param_dtype="bfloat16")
  settings, plan = read("caprl_3b_v5e16")
  settings = changes.with_policy(dataclasses.replace(settings, mesh=MeshConfig(1, 1, 1)), **half)
  few = changes.with_policy(
    settings, lora=dataclasses.replace(settings.policy.lora, base_weights="nf4")
  )
  found, rounded = (
    estimate(one, Known.of(one, plan), machine_of("v5e-1"), 1.0).memory for one in (settings, few)
  )
  matrices = 2_774_532_096  # of the decoder's layers (arithmetic_test.py)
  saved = found.arguments["policy, frozen"] - rounded.arguments["policy, frozen"]
  assert saved == matrices * (2 - 0.5 - 2 / 64)
  tried = changes.alternatives(settings, plan, machine_of("v5e-1"), 1.2)
  assert any("policy.lora.base_weights=nf4" in one.named for one in tried)


RECIPES = sorted(
  path.relative_to(ROOT / "configs").with_suffix("").as_posix()
  for pattern in ("caprl_*.py", "gpu_*.py", "qlora_*.py", "colab_*.py", "ablations/*.py")
  for path in (ROOT / "configs").glob(pattern)
)


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_fits_the_machine_that_its_file_names(name):
  settings, plan = read(name)
  found = estimate(settings, Known.of(settings, plan), machine_of(plan.topology), 1.0)
  least = "perhaps" if name == "caprl_3b_v5e16" else "yes"  # compiled whole, it fits
  assert found.fits in ("yes", least), found.memory


@pytest.mark.parametrize(
  "name, machine",
  [("qlora_7b_16gb", "v5e-1"), ("qlora_7b_16gb", "T4"), ("qlora_3b_8gb", "RTX4060")],
)
def test_the_recipes_in_four_bits_fit_small_chips(name, machine):
  settings, plan = read(name)
  found = estimate(settings, Known.of(settings, plan), machine_of(machine), 1.0)
  assert found.fits == "yes", found.memory


def test_what_does_not_fit_is_said_with_what_would():
  settings, plan = read("caprl_3b_v5e16")
  machine, settings = machine_of("v5e-16"), changes.with_sampling(settings, chunks=4)
  found = estimate(settings, Known.of(settings, plan), machine, 1.2)
  assert found.fits == "no" and machine.topology == "v5e:4x4"
  tried = changes.alternatives(settings, plan, machine, 1.2)
  text = report.alternatives_text(tried)
  assert "what would fit:" in text and "--config.rollout.sampling.chunks=8" in text
  assert all(one.found.memory.total < found.memory.total for one in tried)


def test_where_no_change_is_enough_several_are():
  settings, plan = read("gpu_24gb_lora")
  machine = machine_of("v5e-1")
  settings = changes.with_sampling(settings, max_tokens=4096)
  tried = changes.alternatives(settings, plan, machine, 1.0)
  [chain] = [one for one in tried if one.found.fits != "no"]
  assert len(chain.named.split()) > 1 and chain is tried[0]
  assert "--config." in report.alternatives_text(tried)


def test_the_best_way_on_a_machine_is_found_and_told(tmp_path):
  settings, plan = read("caprl_3b")
  machine = machine_of("H100x8")
  found = changes.best(settings, plan, machine, 2.5)
  assert found.fits == "yes" and found.mesh.chips == 8 and found.price == 20
  row = report.machine_row(machine, found, plan)
  assert row[0] == "H100x8" and row[1] == "yes" and float(row[-1].replace(",", "")) > 0
  values = json.loads(json.dumps(as_json(found, plan)))
  hours = values["run_of_images"]["hours"]
  assert hours == pytest.approx(plan.images / 128 * found.secs / 3600)
  assert values["run_of_images"]["usd"] == pytest.approx(20 * hours)
  text = report.estimate_text(found, plan, machine)
  for part in ("policy, trained", "optimizer", "decode caches", "gradients", "TFLOP", "USD"):
    assert part in text
  # 128 images cannot be split over three parts
  three = dataclasses.replace(settings, data=dataclasses.replace(settings.data, batch_size=3))
  assert changes.best(three, plan, machine_of("v5e-16"), 1.0) is None


def test_machines_and_prices():
  assert [machine_of(name).count for name in USUAL] == [1, 8, 16, 4, 8, 1, 8, 8]
  assert machine_of("v5e:2x2").chip is CHIPS["v5e"] and machine_of("v9:1x1") is None
  assert machine_of("rtx4090").count == 1 and machine_of("a100x4").chip is CHIPS["A100"]
  with pytest.raises(ValueError, match="'v5e-15' is no machine; did you mean 'v5e-1' or 'v5e-16'"):
    machine_of("v5e-15")


def test_prices_can_be_given(tmp_path):
  assert read_prices(None)["v5e"] == CHIPS["v5e"].price
  prices = read_prices("v5e=0.5, h100=2")
  assert prices["v5e"] == 0.5 and prices["H100"] == 2 and prices["v5p"] == CHIPS["v5p"].price
  (tmp_path / "prices.json").write_text('{"v6e": 1.5}')
  assert read_prices(str(tmp_path / "prices.json"))["v6e"] == 1.5
  for wrong, said in (
    ("v5e=free", "v5e = 'free' is no price"),
    ("v12=1", "'v12' is none of v4"),
    ("nowhere.json", "there is no such file"),
  ):
    with pytest.raises(ValueError, match=said):
      read_prices(wrong)


def test_an_abstract_mesh_has_the_sizes_of_a_real_one():
  mesh = sharding.abstract_mesh(MeshConfig(-1, 2, 2), 16)
  assert tuple(mesh.shape.values()) == (4, 2, 2) == sharding.mesh_sizes(MeshConfig(-1, 2, 2), 16)
  with pytest.raises(ValueError, match="does not multiply to the 6 devices"):
    sharding.abstract_mesh(MeshConfig(1, 4, -1), 6)
