"""A training config's step -> compiled ahead of time, for a TPU topology without a TPU.

The fused step is lowered with abstract arrays of the config's real sizes, sharded as in training,
and compiled by libtpu (`pip install libtpu`). That takes minutes in which Python answers no signal,
so it is done in a process of its own, which is ended at once with this one.
"""

import collections
import functools
import importlib.util
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import caprl_jax
from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.config import schema as configuration
from caprl_jax.harness.settings import Settings, check_training_batch, read_settings
from caprl_jax.harness.training.programs import judge_shardings, rollout_shardings
from caprl_jax.harness.training.state import abstract_state, make_optimizer
from caprl_jax.hub.load import init_policy
from caprl_jax.json_files import read_json
from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.policy import Policy, PolicyConfig
from caprl_jax.models.trainable import split_params, trainable_filter
from caprl_jax.modes.plan.abstract import (
  abstract_answers,
  abstract_batch,
  abstract_parameters,
  abstract_prompt,
  abstract_reward,
  judge_of,
  model_configs,
  policy_parameters,
  rounded,
  struct_of,
)
from caprl_jax.modes.plan.chips import GIB
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.progress import going_on
from caprl_jax.rl.step import train_step
from caprl_jax.types import Frozen, JudgePrompt, Vocabulary

log = logging.getLogger("caprl_jax.modes.plan.compiling")


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
  devices together. What an endpoint answers, a judge writes or a function of one's own gives are
  arguments then, which other programs make.
  """
  mesh = sharding.make_mesh(settings.mesh, devices)
  check_training_batch(settings, mesh)
  section = settings.policy
  cfg, judge_cfg = model_configs(settings, plan)
  boxed = sharding.abstract_params(lambda: init_policy(cfg)(jax.random.key(0)))
  policy_params, places = policy_parameters(section, boxed, mesh)
  whole = sharding.replicated(mesh)
  judge, judge_params, prompt = _judge(settings, plan, judge_cfg, mesh)
  kind = trainable_filter(section.trainable, cfg.family)
  (chosen, base), chosen_places = split_params(policy_params, kind), split_params(places, kind)[0]
  tx, _ = make_optimizer(settings)
  state = abstract_state(chosen, tx, chosen_places, mesh, settings.optimizer.moment_memory)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = state.replace(
    key=jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
  )

  V, struct = cfg.text.vocab_size, functools.partial(struct_of, whole)
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

  told = settings.judge.endpoint is not None or settings.judge.writes_scores
  elsewhere = dict(
    answers=abstract_answers(settings, plan, mesh) if told else None,
    own=abstract_reward(settings, mesh) if settings.step.reward.custom else None,
  )

  stages = functools.partial(
    train_step,
    policy=Policy(cfg),
    judge=judge,
    tx=tx,
    cfg=settings.step,
    rollout_shardings=rollout_shardings(places, mesh),
    judge_shardings=judge_shardings(settings.judge, judge_params, mesh),
  )
  state_places = jax.tree.map(lambda x: x.sharding, state)
  with jax.set_mesh(mesh):
    lowered = jax.jit(stages, donate_argnums=0, out_shardings=(state_places, None, None)).lower(
      state, frozen, batch, **elsewhere
    )
  return lowered, {
    "policy, trained": size_bytes(state.params),
    "optimizer": size_bytes(state.opt_state),
    "policy, frozen": size_bytes(base),
    "judge": size_bytes(judge_params),
    "reference": size_bytes(frozen.reference),
    "batch": size_bytes(batch),
  }


def _judge(
  settings: Settings,
  plan: PlanConfig,
  cfg: DecoderConfig | PolicyConfig | None,
  mesh: jax.sharding.Mesh,
) -> tuple[Decoder | Policy | None, Any, JudgePrompt | None]:
  """The judge's model, parameters and prompt, if there is one on the mesh."""
  if cfg is None:
    return None, None, None
  judge, text, init = judge_of(cfg)
  params, _ = abstract_parameters(init, settings.judge.dtype, mesh)
  if settings.judge.int8:
    params = rounded(params)
  return (
    judge,
    params,
    abstract_prompt(settings.judge, text.vocab_size, plan, sharding.replicated(mesh)),
  )


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


def describe(compiled: jax.stages.Compiled) -> dict[str, Any]:
  """Memory per device, the compiler's count of operations, and the largest arrays of a program."""
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  assert memory is not None
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  output = memory.output_size_in_bytes - memory.alias_size_in_bytes
  host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
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
      **({"host": host / GIB} if host else {}),
    },
    "flops": cost.get("flops"),
    "bytes_accessed": cost.get("bytes accessed"),
    "largest": largest,
  }


def compile_here(settings: Settings, plan: PlanConfig, topology: str | None) -> dict[str, Any]:
  """Compiles in this process: `describe`, and `devices`, `compile_secs`, `gib_all_devices`. Raises
  ValueError as `topology_devices`."""
  devices = topology_devices(topology)
  lowered, kinds = lower_step(settings, plan, devices)
  log.info("compiling the step for %d x %s ...", len(devices), devices[0].device_kind)
  start = time.perf_counter()
  with going_on("compiling the step"):
    compiled = lowered.compile()
  return {
    "devices": len(devices),
    "compile_secs": time.perf_counter() - start,
    **describe(compiled),
    "gib_all_devices": {k: v / GIB for k, v in kinds.items() if v},
  }


# ---- a process of its own ----


def can_compile(topology: str | None) -> bool:
  """Whether there is a compiler for a TPU topology; for the devices here (None) there is."""
  return topology is None or importlib.util.find_spec("libtpu") is not None


def compile_apart(settings: Settings, plan: PlanConfig, topology: str) -> dict[str, Any]:
  """As `compile_here`, in a process that ends with this one, whatever ends it.

  Raises:
    ValueError: as `compile_here`.
    MemoryError: this machine's memory was full.
    RuntimeError: the compiler's error.
  """
  config = {**settings.sections(), "plan": plan}
  with tempfile.TemporaryDirectory() as folder:
    answer = pathlib.Path(folder, "compiled.json")
    given = {"config": configuration.to_plain(config), "topology": topology, "answer": str(answer)}
    code = run_apart([sys.executable, "-m", __name__], json.dumps(given))
    if not answer.exists():
      if code == -9:
        raise MemoryError("the process that compiles was killed, as where memory is full")
      raise RuntimeError(f"the process that compiles ended with code {code}")
    found = read_json(answer)
  if "wrong" in found:
    raise ValueError(found["wrong"])
  if "error" in found:
    raise RuntimeError(found["error"])
  return found


def run_apart(command: Sequence[str], line: str) -> int:
  """Runs a command that reads one line, and returns its exit code. Its standard input stays open
  for as long as this process lives. What interrupts this process kills it."""
  root = str(pathlib.Path(caprl_jax.__file__).parents[1])
  path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
  with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
    try:
      assert process.stdin is not None
      try:
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
      except BrokenPipeError:  # it has ended, and its code says more
        pass
      return process.wait()
    finally:
      process.kill()


def _end_with_parent() -> None:
  """Waits for the end of standard input, which is that of the process that asked."""
  while os.read(0, 1):  # not sys.stdin, whose lock a thread at Python's own end may not hold
    pass
  os._exit(1)


def main() -> None:
  """Compiles what a line of standard input says."""
  given = json.loads(sys.stdin.buffer.readline())
  threading.Thread(target=_end_with_parent, daemon=True).start()
  logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
  logging.getLogger("caprl_jax").setLevel(logging.INFO)
  try:
    config = ml_collections.ConfigDict(given["config"])
    plan = configuration.load_section(config, "plan", PlanConfig)
    found = compile_here(read_settings(config), plan, given["topology"])
  except ValueError as error:
    found = {"wrong": str(error)}
  except Exception as error:  # the process that asked says it
    log.debug("error", exc_info=True)
    found = {"error": str(error) or repr(error)}
  write_json(pathlib.Path(given["answer"]), found)


if __name__ == "__main__":
  main()
