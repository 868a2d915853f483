"""Mode `plan`: what a training config's step needs on a TPU topology, compiled ahead of time
without a TPU.

The fused step is lowered with abstract arrays of the config's real sizes, sharded as in training,
and compiled by libtpu (`pip install libtpu`). Printed and written to plan.json: memory per device
by kind, the compiler's FLOPs and bytes, the largest arrays of the program.
"""

import collections
import dataclasses
import functools
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.config import schema as configuration
from caprl_jax.harness.settings import Settings, check_training_batch, read_settings
from caprl_jax.harness.training.programs import rollout_shardings
from caprl_jax.harness.training.state import abstract_state, make_optimizer, rollout_images
from caprl_jax.hub import hub_files
from caprl_jax.hub.load import init_decoder, init_policy
from caprl_jax.hub.published_configs import CONFIGS
from caprl_jax.inference.image_judge import step_prompt
from caprl_jax.inference.judge import JudgeSection
from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.families import family_of, is_vision_language
from caprl_jax.models.policy import Policy, PolicyConfig, limit_pixels
from caprl_jax.models.trainable import split_params, trainable_filter
from caprl_jax.rl.step import train_step
from caprl_jax.types import (
  Batch,
  Frozen,
  Images,
  JudgePrompt,
  Prompts,
  Questions,
  Sight,
  Vocabulary,
)

log = logging.getLogger("caprl_jax.modes.plan")

GIB = 2**30
ANSWER_TOKENS = 32  # between a caption and its score, where the judge sees the image
# Memory of a chip in bytes: cloud.google.com/tpu/docs, "System architecture".
HBM = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """The section `plan`. The token counts are the largest that the data has.

  topology: as libtpu names it ("v5p:2x2x2", "v5e:1x1"); None: the devices here.
  image: height and width of the largest image.
  prompt_tokens: of the instruction, the image's not counted.
  stem_tokens: of a question without its options.
  options: of a question.
  option_tokens: of one option.
  judge_prompt_tokens: around caption and question; the official prompt's by default.
  layers: of tower and decoders, to plan a shallower model of the same width; None: the real
    number.
  """

  topology: str | None = "v5p:2x2x2"
  image: tuple[int, ...] = (1000, 1000)
  prompt_tokens: int = 64  # the image's not counted
  stem_tokens: int = 48
  options: int = 4
  option_tokens: int = 16
  judge_prompt_tokens: int = 352  # the official prompt's
  layers: int | None = None


def read_config(source: str) -> dict:
  """config.json of a checkpoint: a directory's, a published one's, or the hub's. Raises ValueError
  where there is none."""
  path = pathlib.Path(source).expanduser()
  if path.exists() or source.startswith("package:"):
    found = hub_files.resolve_model(source)
    return hub_files.read_config(found) if found.is_dir() else hub_files.read_model(found)[0]
  if source in CONFIGS:
    return CONFIGS[source]
  try:
    return json.loads(
      pathlib.Path(huggingface_hub.hf_hub_download(source, "config.json")).read_text()
    )
  except Exception as error:  # the hub's errors and its HTTP client's have no common base
    raise ValueError(
      f"no config.json for {source!r}: it is no directory, none of "
      f"{sorted(CONFIGS)}, and the Hugging Face hub failed with "
      f"{type(error).__name__}: {error}"
    ) from error


def shallower(config: dict, layers: int | None) -> dict:
  """The same model with fewer layers."""
  if layers is None:
    return config
  cut = lambda c: {
    k: min(v, layers)
    if k in ("num_hidden_layers", "depth")
    else cut(v)
    if isinstance(v, dict)
    else v
    for k, v in c.items()
  }
  new = cut(config)
  vision = new.get("vision_config", {})
  for key in ("deepstack_visual_indexes", "fullatt_block_indexes"):
    if key in vision:
      vision[key] = sorted({min(i, layers - 1) for i in vision[key]})
  return new


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


def _placed(tree: Any, place) -> Any:
  """Arrays or structs -> structs with a sharding: one for all, or a tree of them."""
  one = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  if isinstance(place, jax.sharding.Sharding):
    return jax.tree.map(lambda x: one(x, place), tree)
  return jax.tree.map(one, tree, place)


def abstract_batch(
  settings: Settings,
  plan: PlanConfig,
  cfg: PolicyConfig,
  judge_cfg: DecoderConfig | PolicyConfig,
  mesh: jax.sharding.Mesh,
) -> Batch:
  """A batch's shapes, split over the mesh."""
  B, K = rollout_images(settings), settings.data.questions
  A, Q, O = plan.options, plan.stem_tokens, plan.option_tokens
  flag = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bool_)
  i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)

  def shown(cfg: PolicyConfig, prompt_tokens: int) -> tuple[Images, Prompts]:
    S, I = cfg.vision.pixels.shape(*plan.image)
    P, E = I + prompt_tokens, cfg.vision.in_channels * cfg.vision.pixels.patch_size**2
    patches = jax.ShapeDtypeStruct((B, S, E), jnp.uint8)
    return (
      Images(patches, i32(B, S, 2), flag(B, S), i32(B, I)),
      Prompts(i32(B, P), flag(B, P), i32(B, 3, P), i32(B)),
    )

  sees = isinstance(judge_cfg, PolicyConfig)
  batch = Batch(
    *shown(cfg, plan.prompt_tokens),
    Questions(
      stem_BKQ=i32(B, K, Q),
      stem_valid_BKQ=flag(B, K, Q),
      option_BKAO=i32(B, K, A, O),
      option_valid_BKAO=flag(B, K, A, O),
      gold_BK=i32(B, K),
      valid_BK=flag(B, K),
      kind_BK=i32(B, K),
      prior_BKA=jax.ShapeDtypeStruct((B, K, A), jnp.float32),
    ),
    i32(B),
    i32(B, K),
    Sight(*shown(judge_cfg, plan.judge_prompt_tokens)) if sees else None,
  )
  return _placed(batch, sharding.batch_sharding(mesh))


def model_configs(
  settings: Settings, plan: PlanConfig
) -> tuple[PolicyConfig, DecoderConfig | PolicyConfig]:
  """Architectures of captioner and judge, from their config.json alone."""
  section = settings.policy
  config = shallower(read_config(section.checkpoint), plan.layers)
  cfg = PolicyConfig.from_hf(
    config,
    {},
    dtype=jnp.dtype(section.dtype),
    remat=section.remat,
    lora=section.lora if section.trainable == "lora" else None,
  )
  cfg, notice = limit_pixels(cfg, section.min_pixels, section.max_pixels)
  if notice:
    log.warning("%s", notice)
  judge_config = shallower(read_config(settings.judge.source), plan.layers)
  if settings.judge.sees_image:
    judge_cfg = PolicyConfig.from_hf(judge_config, {}, dtype=jnp.dtype(settings.judge.dtype))
    return cfg, limit_pixels(judge_cfg, None, settings.judge.max_pixels)[0]
  if is_vision_language(judge_config):
    judge_config = family_of(judge_config).text(judge_config)
  return cfg, DecoderConfig.from_hf(judge_config, dtype=jnp.dtype(settings.judge.dtype))


def abstract_parameters(
  init: Callable[[jax.Array], Any], dtype: Any, mesh: jax.sharding.Mesh
) -> tuple[Any, Any]:
  """Shapes of the parameters that `init` makes, in `dtype` and placed on the mesh; and the places
  alone."""
  boxed = sharding.abstract_params(lambda: init(jax.random.key(0)))
  places = sharding.param_shardings(boxed, mesh)
  cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), nn.unbox(boxed))
  return _placed(cast, places), places


def abstract_prompt(
  judge: JudgeSection, judge_rows: int, plan: PlanConfig, place: jax.sharding.Sharding
) -> JudgePrompt:
  """Shapes of the judge's prompt. `judge_rows`: of the judge's embedding."""
  struct = functools.partial(_struct, place)
  if judge.sees_image:
    tail_L, score_A = struct(ANSWER_TOKENS), struct(len(judge.scores))
    return _placed(step_prompt(tail_L, score_A), place)
  labels = max(plan.options + 1, 6)
  spaced = (struct(judge_rows), struct()) if judge.prompt != "plain" else (None, None)
  writing = (None, None)
  if judge.reading == "generate":
    allowed = struct(judge_rows, dtype=jnp.bool_)
    writing = (struct(judge_rows), Vocabulary(allowed, struct(0), (0,), 0))
  return JudgePrompt(
    struct(plan.judge_prompt_tokens),
    struct(labels, 8),
    struct(labels, 8, dtype=jnp.bool_),
    struct(8),
    struct(labels),
    struct(0 if judge.abstain == "none" else 8),
    *spaced,
    *writing,
  )


def _judge_of(
  cfg: DecoderConfig | PolicyConfig,
) -> tuple[Decoder | Policy, DecoderConfig, Callable[[jax.Array], Any]]:
  """The judge's model, the settings of its decoder, and what makes its parameters."""
  if isinstance(cfg, PolicyConfig):
    return Policy(cfg), cfg.text, init_policy(cfg)
  return Decoder(cfg), cfg, init_decoder(cfg)


def _struct(place: jax.sharding.Sharding, *shape: int, dtype: Any = jnp.int32):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


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
  judge, text, init = _judge_of(judge_cfg)
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
  V, struct = cfg.text.vocab_size, functools.partial(_struct, whole)
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
  size = lambda tree: sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if x is not state.key
  )
  kinds = {
    "policy, trained": size(state.params),
    "optimizer": size(state.opt_state),
    "policy, frozen": size(base),
    "judge": size(judge_params),
    "reference": size(frozen.reference),
    "batch": size(batch),
  }
  return lowered, kinds


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
  log.info("compiling the step for %d x %s ...", len(devices), devices[0].device_kind)
  start = time.perf_counter()
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
      f"has {limit / GIB:.0f}; raise policy_update.microbatches or judge.microbatches, "
      "lower data.batch_size, rollout.group_size or max_tokens, or take more chips"
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
