"""A config on a machine -> whether it fits, its time and cost, without compiling."""

import dataclasses
from typing import Any

from caprl_jax import sharding
from caprl_jax.harness.settings import Settings, check_training_batch
from caprl_jax.modes.plan import cuts, memory, roofline
from caprl_jax.modes.plan.arithmetic import Step, decode_bytes, needed
from caprl_jax.modes.plan.chips import GIB, Machine
from caprl_jax.modes.plan.memory import Memory
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.modes.plan.shapes import Shapes, read_shapes, step_of


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A config's step on a machine.

  room: bytes that a program can have on each chip.
  price: US dollars an hour of the whole machine.
  """

  settings: Settings
  mesh: cuts.Mesh
  step: Step
  memory: Memory
  stages: dict[str, roofline.Stage]
  room: float
  price: float

  @property
  def fits(self) -> str:
    """`yes`, `no`, or `perhaps` where the estimate's error decides."""
    if self.memory.careful <= self.room:
      return "yes"
    return "perhaps" if self.memory.total <= self.room else "no"

  @property
  def secs(self) -> float:
    """Of a step."""
    return sum(stage.secs for stage in self.stages.values())

  def hours(self, images: int) -> float:
    """Of so many images that are learned from."""
    return images / self.step.learned * self.secs / 3600


@dataclasses.dataclass(frozen=True)
class Known:
  """What estimates of one config have in common, on whatever mesh and in whatever pieces it runs.
  Of another config (models, dtypes, what is trained, sizes) it is another one."""

  plan: PlanConfig
  shapes: Shapes
  step: Step
  arguments: dict[cuts.Mesh, memory.Arguments] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, settings: Settings, plan: PlanConfig) -> "Known":
    """Raises ValueError where a model's config.json cannot be had."""
    shapes = read_shapes(settings, plan)
    return cls(plan, shapes, step_of(settings, plan, shapes))


def estimate(settings: Settings, known: Known, machine: Machine, price: float) -> Estimate:
  """Raises ValueError where the config's batch cannot be split over the machine's chips.

  Args:
    price: of one chip an hour.
  """
  check_training_batch(settings, sharding.abstract_mesh(settings.mesh, machine.count))
  mesh = cuts.Mesh(*sharding.mesh_sizes(settings.mesh, machine.count))
  if mesh not in known.arguments:
    known.arguments[mesh] = memory.arguments(settings, known.plan, known.shapes, mesh)
  arguments = known.arguments[mesh]
  return Estimate(
    settings,
    mesh,
    known.step,
    memory.estimate(settings, known.shapes, known.step, mesh, arguments),
    roofline.predict(known.step, settings, mesh, machine.chip, arguments.host),
    machine.chip.memory,
    price * machine.count,
  )


def as_json(found: Estimate, plan: PlanConfig) -> dict[str, Any]:
  """For plan.json: bytes in GiB, the rest in its own units."""
  gib = lambda kinds: {kind: count / GIB for kind, count in kinds.items()}
  wanted = needed(found.step)
  return {
    "mesh": dataclasses.asdict(found.mesh),
    "fits": found.fits,
    "gib_per_chip": {
      "arguments": gib(found.memory.arguments),
      "temporaries": {stage: gib(kinds) for stage, kinds in found.memory.stages.items()},
      "total": found.memory.total / GIB,
      "room": found.room / GIB,
      "host": found.memory.host / GIB,
    },
    "needed_flops": wanted,
    "needed_decode_bytes": decode_bytes(found.step, found.mesh.parts),
    "chip": {name: dataclasses.asdict(stage) for name, stage in found.stages.items()},
    "step_secs": found.secs,
    "images_per_hour": found.step.learned / found.secs * 3600,
    "captions_per_hour": found.step.length_BG.size / found.secs * 3600,
    "run": _run(found, found.settings.train.steps * found.step.learned),
    "images": plan.images,
    "run_of_images": _run(found, plan.images),
  }


def _run(found: Estimate, images: int) -> dict[str, float]:
  hours = found.hours(images)
  return {"hours": hours, "usd": hours * found.price}
