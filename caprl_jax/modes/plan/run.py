"""Mode `plan`: what a training config's step needs on a TPU topology, compiled ahead of time
without a TPU.

The fused step is lowered with abstract arrays of the config's real sizes, sharded as in training,
and compiled by libtpu (`pip install libtpu`). Printed and written to plan.json: memory per device
by kind, the compiler's FLOPs and bytes, the largest arrays of the program.
"""

import collections
import functools
import logging
import os
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.config import schema as configuration
from caprl_jax.harness.process.device_memory import hold_planned, knobs
from caprl_jax.harness.settings import Settings, check_training_batch, read_settings
from caprl_jax.harness.training.programs import rollout_shardings
from caprl_jax.harness.training.state import abstract_state, make_optimizer
from caprl_jax.hub.load import init_policy
from caprl_jax.models.policy import Policy
from caprl_jax.models.trainable import split_params, trainable_filter
from caprl_jax.modes.plan.abstract import (
  abstract_batch,
  abstract_parameters,
  abstract_prompt,
  judge_of,
  model_configs,
  struct_of,
)
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.progress import going_on
from caprl_jax.rl.step import train_step
from caprl_jax.types import (
  Frozen,
  Vocabulary,
)

log = logging.getLogger("caprl_jax.modes.plan.run")

GIB = 2**30
# Memory of a chip in bytes: cloud.google.com/tpu/docs, "System architecture".
HBM = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}


def topology_devices(name: str | None) -> list:
  """Devices to compile for. Raises ValueError where libtpu is missing or does not know the
  topology.
  """
  if name is None:
    return jax.devices()
  # it would ask a metadata server which machine this is
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  # nothing runs on a chip, so a training run on this machine's may go on
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from jax.experimental import topologies

  chips = [int(n) for n in name.partition(":")[2].split("x")]
  # libtpu takes a host for four chips unless told otherwise.
  extra = (
    {"chips_per_host_bounds": tuple(chips + [1] * (3 - len(chips)))} if np.prod(chips) == 1 else {}
  )
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **extra).devices)
  except Exception as error:
    raise ValueError(
      f"plan.topology = {name!r}: {error}. `pip install libtpu` compiles for TPUs "
      "on any Linux machine; names are like v5p:2x2x2, v5e:4x4, v5e:1x1, "
      "v6e:2x2"
    ) from error


def lower_step(
  settings: Settings, plan: PlanConfig, devices: list
) -> tuple[jax.stages.Lowered, dict[str, int]]:
  """The training step, lowered for some devices, and the bytes of its arguments by kind, all
  devices together.
  """
  mesh = sharding.make_mesh(settings.mesh, devices)
  check_training_batch(settings, mesh)
  section = settings.policy
  cfg, judge_cfg = model_configs(settings, plan)
  policy_params, places = abstract_parameters(init_policy(cfg), section.param_dtype, mesh)
  judge, text, init = judge_of(judge_cfg)
  judge_params, _ = abstract_parameters(init, settings.judge.dtype, mesh)
  kind = trainable_filter(section.trainable, cfg.family)
  (chosen, base), chosen_places = split_params(policy_params, kind), split_params(places, kind)[0]
  tx, _ = make_optimizer(settings)
  state = abstract_state(chosen, tx, chosen_places, mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = state.replace(
    key=jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
  )

  whole = sharding.replicated(mesh)
  V, struct = cfg.text.vocab_size, functools.partial(struct_of, whole)
  prompt = abstract_prompt(settings.judge, text.vocab_size, plan, whole)
  stamps = struct(V, 3, dtype=jnp.uint8) if settings.step.reward.timestamps else None
  vocabulary = Vocabulary(struct(V, dtype=jnp.bool_), struct(V), (0,), 0, stamps)
  frozen = Frozen(
    judge_params,
    prompt,
    vocabulary,
    chosen if settings.step.update.loss.has_kl else None,
    base or None,
  )
  batch = abstract_batch(settings, plan, cfg, judge_cfg, mesh)

  stages = functools.partial(
    train_step,
    policy=Policy(cfg),
    judge=judge,
    tx=tx,
    cfg=settings.step,
    rollout_shardings=rollout_shardings(places, mesh),
  )
  state_places = jax.tree.map(lambda x: x.sharding, state)
  with jax.set_mesh(mesh):
    lowered = jax.jit(stages, donate_argnums=0, out_shardings=(state_places, None, None)).lower(
      state, frozen, batch
    )
  return lowered, {
    "policy, trained": size_bytes(state.params),
    "optimizer": size_bytes(state.opt_state),
    "policy, frozen": size_bytes(base),
    "judge": size_bytes(judge_params),
    "reference": size_bytes(frozen.reference),
    "batch": size_bytes(batch),
  }


def size_bytes(tree: Any) -> int:
  """Of all arrays of a tree together."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


_ARRAY = re.compile(r"= \(?([a-z]+\d+|pred)\[([\d,]+)\]\S* ([a-z\-]+)")
_BITS = {"pred": 8, "bf16": 16}


def largest_arrays(text: str, count: int = 12) -> list[tuple[float, str, str, int]]:
  """(GiB, dtype and shape, operation, how often) of the largest arrays that a compiled program's
  text names.
  """
  found: collections.Counter = collections.Counter()
  for dtype, shape, operation in _ARRAY.findall(text):
    if operation not in (
      "parameter",
      "get-tuple-element",
      "tuple",
      "bitcast",
      "while",
      "copy-done",
    ):
      found[dtype, shape, operation] += 1

  def gib(item):
    (dtype, shape, _), _ = item
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype))
    return float(np.prod([float(n) for n in shape.split(",")])) * bits / 8 / GIB

  top = sorted(found.items(), key=gib, reverse=True)[:count]
  return [(gib(item), f"{item[0][0]}[{item[0][1]}]", item[0][2], item[1]) for item in top]


def run(config, workdir: pathlib.Path) -> None:
  """Compiles the step and reports. Raises ValueError when the memory of the topology's chips is not
  enough.
  """
  plan = configuration.load_section(config, "plan", PlanConfig)
  settings = read_settings(config)
  if plan.topology is not None:
    jax.config.update("jax_platforms", "cpu")  # whatever chips this machine may have
  devices = topology_devices(plan.topology)
  lowered, kinds = lower_step(settings, plan, devices)
  hold_planned(kinds, len(devices))  # said where the compiler finds that it does not fit
  log.info("compiling the step for %d x %s ...", len(devices), devices[0].device_kind)
  start = time.perf_counter()
  with going_on("compiling the step"):
    compiled = lowered.compile()
  report = {
    "topology": plan.topology,
    "devices": len(devices),
    "compile_secs": time.perf_counter() - start,
    **describe(compiled),
    "gib_all_devices": {k: v / GIB for k, v in kinds.items() if v},
  }
  write_json(workdir / "plan.json", report)
  _log(report)
  limit = HBM.get((plan.topology or "").partition(":")[0])
  total = report["gib_per_device"]["total"]
  if limit and total > limit / GIB:
    raise ValueError(
      f"the step needs {total:.1f} GiB per device, and a {plan.topology} chip "
      f"has {limit / GIB:.0f}. What takes less:\n{knobs()}"
    )


def describe(compiled: jax.stages.Compiled) -> dict[str, Any]:
  """Memory per device, the compiler's count of operations, and the largest arrays of a program."""
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  assert memory is not None
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  output = memory.output_size_in_bytes - memory.alias_size_in_bytes
  try:
    largest = largest_arrays(compiled.as_text())
  # libtpu may be newer than jaxlib, which then cannot read its programs
  except jax.errors.JaxRuntimeError as error:
    log.warning(
      "the largest arrays are not known: jaxlib cannot read the program that libtpu made (%s)",
      str(error).splitlines()[0],
    )
    largest = []
  return {
    "gib_per_device": {
      "arguments": arguments / GIB,
      "temporaries": temporaries / GIB,
      "output": output / GIB,
      "total": (arguments + temporaries + output) / GIB,
    },
    "flops": cost.get("flops"),
    "bytes_accessed": cost.get("bytes accessed"),
    "largest": largest,
  }


def _log(report: dict[str, Any]) -> None:
  lines = [f"{name:>12} {value:8.2f} GiB" for name, value in report["gib_per_device"].items()]
  log.info("memory of a device:\n%s", "\n".join(lines))
  log.info(
    "arguments, all devices together:\n%s",
    "\n".join(f"{name:>16} {value:8.2f} GiB" for name, value in report["gib_all_devices"].items()),
  )
  # The compiler counts a loop's body once.
  log.info(
    "compiler's count, loops' bodies once: %.3g FLOPs, %.3g bytes",
    report["flops"] or 0,
    report["bytes_accessed"] or 0,
  )
  if report["largest"]:
    log.info(
      "largest arrays:\n%s",
      "\n".join(f"{g:8.2f} GiB {what} {op} x{n}" for g, what, op, n in report["largest"]),
    )
