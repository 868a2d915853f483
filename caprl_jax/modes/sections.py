"""A config's sections by name -> what modes read them as; so that a key can be set which a config
file leaves out.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from caprl_jax import sharding
from caprl_jax.harness import checkpoints, question_filter
from caprl_jax.harness import sections as shared_sections
from caprl_jax.inference import endpoint
from caprl_jax.modes import calibrate, demo, export, plan, sft
from caprl_jax.modes.caption import run as caption
from caprl_jax.modes.curate import run as curation
from caprl_jax.modes.dataset import run as dataset
from caprl_jax.modes.gallery import run as gallery
from caprl_jax.modes.pretrain import policy as pretrain_policy
from caprl_jax.modes.pretrain import run as pretrain
from caprl_jax.modes.prism import run as prism
from caprl_jax.rl import advantages, optimizer, reward, rollout, update

# Several: modes read a section of this name differently (mode sft makes a captioner, the others
# load one).
SECTIONS: dict[str, tuple[Any, ...]] = {
  "mode": (str,),
  "seed": (int,),
  "preset": (str | None,),
  "mesh": (sharding.MeshConfig,),
  "policy": (shared_sections.PolicySection, sft.NewPolicyConfig),
  "judge": (shared_sections.JudgeSection,),
  "data": (shared_sections.DataSection,),
  "question_filter": (question_filter.QuestionFilterConfig,),
  "gate": (shared_sections.GateSection,),
  "rollout": (rollout.RolloutConfig,),
  "reward": (reward.RewardConfig,),
  "advantage": (advantages.AdvantageConfig,),
  "policy_update": (update.UpdateConfig,),
  "optimizer": (optimizer.OptimizerConfig,),
  "train": (shared_sections.TrainSection,),
  "evaluate": (shared_sections.EvaluateSection,),
  "checkpoint": (checkpoints.CheckpointConfig,),
  "sft": (sft.SFTConfig,),
  "caption": (caption.CaptionConfig,),
  "export": (export.ExportConfig,),
  "plan": (plan.PlanConfig,),
  "calibrate": (calibrate.CalibrateConfig,),
  "dataset": (dataset.DatasetConfig,),
  "curate": (curation.CurateConfig,),
  "generator": (shared_sections.PolicySection,),
  "answerer": (shared_sections.PolicySection,),
  "endpoint": (endpoint.EndpointConfig,),
  "prism": (prism.PrismConfig,),
  "gallery": (gallery.GalleryConfig,),
  "demo": (demo.DemoConfig,),
  "pretrain": (pretrain.PretrainConfig,),
  "pretrain_policy": (pretrain_policy.PretrainPolicyConfig,),
}


def annotation_of(key: str) -> Any:
  """What the value at a dotted key is annotated as; None where no section has such a key."""
  name, *rest = key.split(".")
  found = (_find(section, rest) for section in SECTIONS.get(name, ()))
  return next((annotation for annotation in found if annotation is not None), None)


def keys() -> list[str]:
  """All dotted keys, but for those below a name that the user gives, such as a stage's."""
  return [
    key
    for name, sections in SECTIONS.items()
    for section in sections
    for key in _keys(section, name)
  ]


def alternatives(annotation: Any) -> list[Any]:
  """What an annotation allows besides None."""
  union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
  return [
    a for a in (typing.get_args(annotation) if union else (annotation,)) if a is not type(None)
  ]


def _find(annotation: Any, path: list[str]) -> Any:
  if not path:
    return annotation
  for one in alternatives(annotation):
    if dataclasses.is_dataclass(one):
      inner = typing.get_type_hints(one).get(path[0]) if path[0] in _fields(one) else None
    else:
      inner = typing.get_args(one)[1] if typing.get_origin(one) in (dict, Mapping) else None
    if inner is not None and (found := _find(inner, path[1:])) is not None:
      return found
  return None


def _fields(cls: type) -> list[str]:
  return [field.name for field in dataclasses.fields(cls) if field.init]


def _keys(annotation: Any, place: str) -> Iterator[str]:
  inner = [one for one in alternatives(annotation) if dataclasses.is_dataclass(one)]
  for one in inner:
    hints = typing.get_type_hints(one)
    for name in _fields(one):
      yield from _keys(hints[name], f"{place}.{name}")
  if not inner:
    yield place
