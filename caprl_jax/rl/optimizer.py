"""Config -> optax chain and its learning-rate schedule."""

import dataclasses
from typing import Literal

import jax
import optax

from caprl_jax.sharding import MomentMemory
from caprl_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer and its learning rate over a run.

  name: adamw; adafactor, whose second moments are one row and one column per matrix; or muon for
    the matrices of layers with NAdamW, as optax has it, for everything else (embeddings, norms,
    biases).
  learning_rate: the peak; with muon, that of the matrices.
  adam_learning_rate: with muon, the peak of everything else.
  schedule: after the warm-up `constant`, or `cosine`, which falls to `final_fraction` of the peak
    at the last of `schedule_steps`.
  schedule_steps: length of the schedule in optimizer steps; None: of the run. A published run may
    have stopped long before its schedule ended: CapRL-3B's was written for 17,640 steps, and its
    rate had hardly fallen at step 1,800.
  warmup_steps: steps until the peak.
  warmup_fraction: the same as a share of `schedule_steps`.
  warmup_from_zero: the first update has rate 0, as with the schedulers of transformers and
    OpenRLHF, and the peak comes one step later; else the first has the peak over the warm-up's
    steps.
  final_fraction: of the peak, at the end of `cosine`.
  b1, b2: decay of the first and second moments.
  weight_decay: decoupled, as in AdamW.
  clip_norm: largest global norm of the gradient.
  moment_dtype: of adamw's first moment.
  moment_memory: where the moments lie between updates: in the `device`'s memory; or in the
    `host`'s, which leaves the devices more for writing captions, judging them and making gradients,
    and costs the time of bringing the moments there and back in each update. The numbers are the
    same.
  """

  name: Literal["adamw", "adafactor", "muon"] = "adamw"
  learning_rate: float = 1e-6
  adam_learning_rate: float | None = None
  schedule: Literal["constant", "cosine"] = "constant"
  schedule_steps: int | None = None
  warmup_steps: int = 0
  warmup_fraction: float | None = None
  warmup_from_zero: bool = False
  final_fraction: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of adamw's first moment
  moment_memory: MomentMemory = "device"

  def __post_init__(self):
    if self.learning_rate <= 0 or self.clip_norm <= 0 or self.warmup_steps < 0:
      raise ValueError(
        f"learning_rate = {self.learning_rate} and clip_norm = {self.clip_norm} "
        f"must be positive, warmup_steps = {self.warmup_steps} >= 0"
      )
    if self.schedule_steps is not None and self.schedule_steps <= self.warmup_steps:
      raise ValueError(
        f"schedule_steps = {self.schedule_steps} must be above warmup_steps = {self.warmup_steps}; "
        "None is the run's own length"
      )
    if self.warmup_fraction is not None and not 0 <= self.warmup_fraction < 1:
      raise ValueError(f"warmup_fraction = {self.warmup_fraction} must be from 0 to less than 1")
    if self.warmup_steps and self.warmup_fraction:
      raise ValueError(
        f"warmup_steps = {self.warmup_steps} and warmup_fraction = "
        f"{self.warmup_fraction}: set one of them, the other to 0"
      )


def _muon_dimensions(params: Params) -> Params:
  """Which parameters are matrices: kernels, with the layer axis in front where layers are
  stacked.
  """

  def dimensions(path: tuple, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
    if path[-1].key != "kernel":
      return None
    return optax.contrib.MuonDimensionNumbers(
      reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1
    )

  return jax.tree_util.tree_map_with_path(dimensions, params)


def warmup(cfg: OptimizerConfig, steps: int) -> int:
  """Steps of the warm-up in a run of `steps`, of which one is left at least."""
  return min(cfg.warmup_steps or round((cfg.warmup_fraction or 0) * steps), max(steps - 1, 0))


def learning_rate_schedule(cfg: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
  """Linear warm-up to `peak`, then constant or cosine until `cfg.schedule_steps` or, without it,
  the run's `steps`; after that the rate stays."""
  steps = cfg.schedule_steps or steps
  rising = warmup(cfg, steps)
  if cfg.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, max(steps - rising, 1), alpha=cfg.final_fraction)
  else:
    after = optax.constant_schedule(peak)
  if not rising:
    return after
  first = (
    optax.linear_schedule(0.0, peak, rising)
    if cfg.warmup_from_zero
    else optax.linear_schedule(peak / rising, peak, max(rising - 1, 1))
  )
  return optax.join_schedules([first, after], [rising])


def build_optimizer(
  cfg: OptimizerConfig, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The gradient transformation for a run of `steps` updates, and the schedule that metrics
  report.
  """
  schedule = learning_rate_schedule(cfg, cfg.learning_rate, steps)
  if cfg.name == "muon":
    rest = learning_rate_schedule(cfg, cfg.adam_learning_rate or cfg.learning_rate, steps)
    rule = optax.contrib.muon(
      schedule,
      adam_learning_rate=rest,
      adam_b1=cfg.b1,
      adam_b2=cfg.b2,
      weight_decay=cfg.weight_decay,
      adam_weight_decay=cfg.weight_decay,
      muon_weight_dimension_numbers=_muon_dimensions,
    )
  elif cfg.name == "adafactor":
    rule = optax.adafactor(
      schedule,
      multiply_by_parameter_scale=False,
      clipping_threshold=None,
      weight_decay_rate=cfg.weight_decay or None,
    )
  else:
    rule = optax.adamw(
      schedule, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mu_dtype=cfg.moment_dtype
    )
  return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), rule), schedule
