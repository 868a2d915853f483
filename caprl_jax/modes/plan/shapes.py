"""A training config -> what is needed to plan its step: the models' parameters as shapes, and the
numbers that formulas read. No array is made, and no device is asked for.
"""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from caprl_jax import sharding
from caprl_jax.harness.settings import Settings
from caprl_jax.harness.training.state import rollout_images
from caprl_jax.hub.load import init_policy
from caprl_jax.models.decoder import DecoderConfig
from caprl_jax.models.policy import PolicyConfig
from caprl_jax.models.qwen25_vl import Qwen25VisionConfig
from caprl_jax.modes.plan.abstract import ANSWER_TOKENS, judge_of, model_configs
from caprl_jax.modes.plan.arithmetic import Asked, Step, Tower, draw_lengths
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.rl.judge_protocol import JudgeConfig

LABEL_TOKENS = TAIL_TOKENS = 8  # before each listed option, and after them all


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Captioner and judge: their architectures, and their parameters boxed with logical axes. The
  judge's are None where none is on the chips."""

  policy: PolicyConfig
  judge: DecoderConfig | PolicyConfig | None
  policy_params: Any
  judge_params: Any

  @property
  def seeing(self) -> list[PolicyConfig]:
    """Those that see the images, the captioner first."""
    return [cfg for cfg in (self.policy, self.judge) if isinstance(cfg, PolicyConfig)]

  @property
  def judge_text(self) -> DecoderConfig | None:
    """The judge's decoder."""
    return self.judge.text if isinstance(self.judge, PolicyConfig) else self.judge


def read_shapes(settings: Settings, plan: PlanConfig) -> Shapes:
  """Raises ValueError where a model's config.json cannot be had."""
  policy, judge = model_configs(settings, plan)
  judge_params = None if judge is None else _judge_params(judge)
  return Shapes(policy, judge, _policy_params(policy), judge_params)


@functools.lru_cache(maxsize=8)
def _policy_params(cfg: PolicyConfig) -> Any:
  init = init_policy(cfg)
  return sharding.abstract_params(lambda: init(jax.random.key(0)))


@functools.lru_cache(maxsize=8)
def _judge_params(cfg: DecoderConfig | PolicyConfig) -> Any:
  init = judge_of(cfg)[2]
  return sharding.abstract_params(lambda: init(jax.random.key(0)))


def tower_of(cfg: PolicyConfig, boxed: Any, image: tuple[int, ...]) -> Tower:
  """A captioner's tower on an image of this height and width."""
  patches, units = cfg.vision.pixels.shape(*image)
  per_patch = per_unit = 0
  visual = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed["visual"]))
  for path, leaf in visual:
    name = ".".join(["visual", *(part.key for part in path)])
    if name.endswith(".kernel"):
      if re.match(cfg.family.projector, name):
        per_unit += leaf.size
      else:
        per_patch += leaf.size
    elif name.endswith(".proj"):  # of pixels; a still image's frames share one product
      per_patch += leaf.shape[0] * leaf.shape[1] * leaf.shape[-1] * leaf.shape[-2]
  vision: Any = cfg.vision
  if isinstance(vision, Qwen25VisionConfig):
    whole = len(vision.full_attention_layers)
    seen = whole * patches + (vision.depth - whole) * vision.slots_multiple
  else:  # the whole image, or a tile where images are cut into tiles
    tile = getattr(vision.pixels, "tile_patches", patches)
    seen = vision.depth * tile
  return Tower(per_patch, per_unit, vision.hidden_size, patches * seen, patches, units)


def asked_of(settings: Settings, plan: PlanConfig, shapes: Shapes) -> Asked | None:
  """What the judge is shown about each caption; None without one."""
  if shapes.judge is None:
    return None
  cfg: JudgeConfig = settings.step.judge
  if isinstance(shapes.judge, PolicyConfig):
    tower = tower_of(shapes.judge, shapes.judge_params, plan.image)
    head = tower.units + plan.judge_prompt_tokens
    written = cfg.max_tokens if cfg.reading == "generate" else 0
    return Asked(head, 1, ANSWER_TOKENS, answer_tokens=written, blind=cfg.blind, images=tower)
  # A question drawn again is run once where its options stand in one order.
  once = cfg.reading == "option_pmi" or (not cfg.shuffle and cfg.reading != "generate")
  questions = settings.data.questions if once or not cfg.draws else cfg.draws
  if cfg.reading == "option_pmi":
    branch = plan.option_tokens - 1
    return Asked(
      plan.judge_prompt_tokens,
      questions,
      plan.stem_tokens,
      plan.options if branch else 0,
      branch,
      logits=1 + plan.options * branch,
      blind=cfg.blind,
    )
  listed = plan.options + (cfg.abstain != "none")
  return Asked(
    plan.judge_prompt_tokens,
    questions * cfg.permutations,
    plan.stem_tokens + listed * (LABEL_TOKENS + plan.option_tokens) + TAIL_TOKENS,
    answer_tokens=cfg.max_tokens if cfg.reading == "generate" else 0,
    blind=cfg.blind,
  )


def caption_tokens(settings: Settings, plan: PlanConfig) -> float:
  """Mean length of captions that a plan assumes."""
  limit = settings.step.rollout.sampling.max_tokens
  return min(plan.caption_tokens or max(0.15 * limit, 32), limit)


def step_of(settings: Settings, plan: PlanConfig, shapes: Shapes) -> Step:
  """The numbers that formulas read of a config."""
  rollout = settings.step.rollout
  tower = tower_of(shapes.policy, shapes.policy_params, plan.image)
  trainable = settings.policy.trainable
  return Step(
    tower,
    shapes.policy.text,
    tower.units + plan.prompt_tokens,
    draw_lengths(
      rollout_images(settings),
      rollout.group_size,
      caption_tokens(settings, plan),
      rollout.sampling.max_tokens,
    ),
    shapes.judge_text,
    asked_of(settings, plan, shapes),
    learned=settings.data.batch_size,
    trained=(trainable == "full", trainable in ("full", "decoder")),
    layer_item=1 if rollout.weights == "int8" else 2,
  )


def item_bytes(dtype: str) -> int:
  """Of one number."""
  return jnp.dtype(dtype).itemsize
