"""The modes and the sections of a config that each of them reads, in one place.

`--help`, the check of a config's top-level keys, the command line's types, the table in
docs/configuration.md and the tests read this. Modules and dataclasses are named, not imported:
`--help` and a mistyped flag do not wait for jax.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from caprl_jax.config import schema
from caprl_jax.json_files import shown


@dataclasses.dataclass(frozen=True)
class Mode:
  """What `config.mode` may name.

  module: has `run(config: ConfigDict, workdir: pathlib.Path) -> None`.
  line: one line of help. example: the arguments of a command that runs it.
  sections: name of a section -> its dataclass, as "module:Class" below `caprl_jax`.
  workdir: where logs go when --workdir is not given; None: it must be given.
  """

  module: str
  line: str
  example: str
  sections: Mapping[str, str]
  workdir: str | None = None


# Keys of a config that are no sections: annotation and meaning.
TOP_LEVEL: dict[str, tuple[Any, str]] = {
  "mode": (str, "what to run; several, joined by commas, run in a row"),
  "seed": (int, "of every random draw; 0 where a config has none"),
  "preset": (
    str | None,
    "a published recipe that fills in what the config leaves open (`config/presets.py`)",
  ),
}

_MESH = {"mesh": "sharding:MeshConfig"}
_POLICY = {"policy": "harness.sections:PolicySection"}
_JUDGE = {"judge": "inference.judge:JudgeSection"}
_DATA = {"data": "harness.sections:DataSection"}
_GATE = {"gate": "harness.sections:GateSection"}
_CHECKPOINT = {"checkpoint": "harness.checkpoints:CheckpointConfig"}
_TRAINING = {
  **_MESH,
  **_POLICY,
  **_JUDGE,
  **_DATA,
  "question_filter": "harness.question_filter:QuestionFilterConfig",
  **_GATE,
  "rollout": "rl.rollout:RolloutConfig",
  "reward": "rl.reward:RewardConfig",
  "advantage": "rl.advantages:AdvantageConfig",
  "policy_update": "rl.update:UpdateConfig",
  "optimizer": "rl.optimizer:OptimizerConfig",
  "train": "harness.sections:TrainSection",
  "evaluate": "harness.sections:EvaluateSection",
  **_CHECKPOINT,
}

MODES: dict[str, Mode] = {
  "train": Mode(
    "caprl_jax.modes.train.run",
    "CapRL: the policy captions, the judge answers from the captions, the policy improves",
    "--config=configs/quickstart.py --workdir=runs/quickstart",
    _TRAINING,
  ),
  "sft": Mode(
    "caprl_jax.modes.sft.run",
    "teach a policy to see and to speak from given captions, before CapRL",
    "--config=configs/quickstart_sft.py --workdir=runs/quickstart_sft",
    {
      "sft": "modes.sft.section:SFTConfig",
      "policy": "modes.sft.section:NewPolicyConfig",
      **_CHECKPOINT,
      **_MESH,
    },
  ),
  "pretrain": Mode(
    "caprl_jax.modes.pretrain.run",
    "what captions are worth: train a captioner in stages on captions and conversations, then ask "
    "it about images",
    "--config=configs/pretrain_language.py --workdir=runs/pretrain_language",
    {
      "pretrain": "modes.pretrain.section:PretrainConfig",
      "pretrain_policy": "modes.pretrain.policy:PretrainPolicyConfig",
      **_MESH,
    },
  ),
  "evaluate": Mode(
    "caprl_jax.modes.evaluate.run",
    "a captioner on the held-out rows of a training config: the judge's accuracy from its captions",
    "--config=configs/quickstart.py --workdir=runs/evaluate --config.mode=evaluate",
    _TRAINING,
  ),
  "prism": Mode(
    "caprl_jax.modes.prism.run",
    "how much of an image captions carry: a model without eyes answers benchmarks from them",
    "--config=configs/prism_quickstart.py --workdir=runs/prism",
    {"prism": "modes.prism.section:PrismConfig", **_POLICY, **_JUDGE, **_MESH},
  ),
  "calibrate": Mode(
    "caprl_jax.modes.calibrate.run",
    "whether a judge can be trusted: accuracy by caption, position bias, how stable its rewards "
    "are, the margin to abstain by",
    "--config=configs/quickstart.py --workdir=runs/calibrate --config.mode=calibrate",
    {
      "calibrate": "modes.calibrate.section:CalibrateConfig",
      **_JUDGE,
      **_DATA,
      **_GATE,
      **_MESH,
    },
  ),
  "curate": Mode(
    "caprl_jax.modes.curate.run",
    "images in, filtered questions out: a model writes them, another answers with the image and "
    "without",
    "--config=configs/curate.py --workdir=runs/curate "
    "--config.curate.input=IMAGES --config.curate.output=qa.parquet",
    {
      "curate": "modes.curate.section:CurateConfig",
      "generator": "harness.sections:PolicySection",
      "answerer": "harness.sections:PolicySection",
      "endpoint": "inference.endpoint:EndpointConfig",
      **_MESH,
    },
  ),
  "dataset": Mode(
    "caprl_jax.modes.dataset.run",
    "what is in a QA dataset and what is wrong with it; a copy in another format, or one for each "
    "kind of images",
    "--config=configs/dataset.py --config.dataset.input=easy_vqa:test",
    {
      "dataset": "modes.dataset.section:DatasetConfig",
      "answerer": "harness.sections:PolicySection",
      **_MESH,
    },
    workdir="runs/dataset",
  ),
  "caption": Mode(
    "caprl_jax.modes.caption.run",
    "caption images in folders, JSON lines, tar files, parquet or TFDS, on one host or many",
    "--config=configs/caption.py --config.policy.checkpoint=DIR --config.caption.input=FOLDER "
    "--config.caption.output=captions.jsonl",
    {"caption": "modes.caption.section:CaptionConfig", **_POLICY, **_MESH},
    workdir="runs/caption",
  ),
  "gallery": Mode(
    "caprl_jax.modes.gallery.run",
    "a page that shows what several captioners wrote about the same images, side by side",
    "--config=configs/gallery.py --config.gallery.captions=before=a.jsonl,after=b.jsonl",
    {"gallery": "modes.gallery.run:GalleryConfig", **_JUDGE, **_MESH},
    workdir="runs/gallery",
  ),
  "demo": Mode(
    "caprl_jax.modes.demo.run",
    "a local page: drop an image in, read its caption, watch the judge answer from the words",
    "--config=configs/demo.py --config.policy.checkpoint=runs/quickstart/policy",
    {"demo": "modes.demo.section:DemoConfig", **_POLICY, **_JUDGE, **_MESH},
    workdir="runs/demo",
  ),
  "plan": Mode(
    "caprl_jax.modes.plan.run",
    "what a training config's step takes on a machine that need not be here: memory, time, cost",
    "--config=configs/caprl_3b.py --config.mode=plan --config.plan.topology=v5p:2x2x2",
    {"plan": "modes.plan.section:PlanConfig", **_TRAINING},
    workdir="runs/plan",
  ),
  "export": Mode(
    "caprl_jax.modes.export",
    "a run's captioner (or any checkpoint) as a directory that transformers and vLLM load",
    "--config=configs/export.py --config.export.run=runs/quickstart --config.export.output=DIR",
    {"export": "modes.export:ExportConfig", **_POLICY, **_MESH},
    workdir="runs/export",
  ),
}


# ---- old names ----


class Renamed(NamedTuple):
  """A key's new name. `but_in`: the mode that has a key of the old name by now."""

  key: str
  but_in: str | None = None


# Old sections and keys that configs, scripts and the summaries of runs may still have.
RENAMED: dict[str, Renamed] = {
  "update": Renamed("policy_update"),
  "curation": Renamed("curate"),
  "curate.informed": Renamed("question_filter.informed"),
  "curate.mismatched": Renamed("question_filter.mismatched"),
  "curate.min_informed": Renamed("question_filter.min_informed"),
  "curate.max_blind": Renamed("question_filter.max_blind", but_in="curate"),
  "pretrain.stages.NAME.told": Renamed("pretrain.stages.NAME.context_text"),
}
ANY_NAME = "NAME"  # in the keys above: one that the user gives


def new_name(key: str, modes: Collection[str] = ()) -> str | None:
  """What an old dotted key is called now, in a run of these modes; None for a key that is not
  old."""
  parts = key.split(".")
  for old, renamed in RENAMED.items():
    pattern = old.split(".")
    begun = parts[: len(pattern)]
    given = [part for part, wanted in zip(begun, pattern) if wanted == ANY_NAME]
    filled = [part if wanted == ANY_NAME else wanted for part, wanted in zip(begun, pattern)]
    if begun == filled and len(begun) == len(pattern) and renamed.but_in not in modes:
      new = [given.pop(0) if part == ANY_NAME else part for part in renamed.key.split(".")]
      return ".".join([*new, *parts[len(pattern) :]])
  return None


def _dotted(section: Any, depth: int) -> Iterator[str]:
  """The dotted keys of a config, down to so many names."""
  if depth and isinstance(section, schema.MAPPINGS):
    for name in section.keys():
      yield name
      yield from (f"{name}.{inner}" for inner in _dotted(section[name], depth - 1))


def with_new_names(config: Mapping[str, Any]) -> dict[str, Any]:
  """A training run's stored config, as plain dicts, with today's section names."""
  names = {"curation": "curate", "update": "policy_update"}
  old = {key.removeprefix("curate.") for key in RENAMED if key.startswith("curate.")}
  if set(config.get("curate", {})) <= old:  # else it is mode `curate`'s, whose input is required
    names["curate"] = "question_filter"
  return {names.get(key, key): value for key, value in config.items()}


# ---- checks ----


def modes_of(config: Any) -> dict[str, Mode]:
  """The modes that `config.mode` names, in order. Raises ValueError where one is none."""
  listed = ", ".join(MODES)
  mode = config.get("mode")
  if not isinstance(mode, str) or not mode:
    raise ValueError(
      f"config.mode is {shown(mode)}; set it to one of {listed}, or to several joined by commas"
    )
  names = [name.strip() for name in mode.split(",")]
  for name in names:
    if name not in MODES:
      hint = schema.did_you_mean(name, MODES)
      raise ValueError(f"config.mode {shown(name)} is not a mode{hint} (modes: {listed})")
  if len(set(names)) < len(names):
    raise ValueError(f"config.mode {shown(mode)} names a mode twice; name each once")
  return {name: MODES[name] for name in names}


def section_names() -> list[str]:
  """The sections of all modes, each once."""
  return list(dict.fromkeys(name for mode in MODES.values() for name in mode.sections))


def check_top_level(config: Any) -> None:
  """Raises ValueError where a config has a section that no mode has, or a key of an old name."""
  modes = modes_of(config) if "mode" in config else {}
  for key in _dotted(config, max(old.count(".") + 1 for old in RENAMED)):
    if (new := new_name(key, modes)) is not None:
      raise ValueError(f"config.{key} is called config.{new} now; rename it")
  schema.check_top_level(config, (*TOP_LEVEL, *section_names()))
  seed = config.get("seed")
  if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
    raise ValueError(f"config.seed is {shown(seed)}, but it must be an integer from 0 on")
  if "evaluate" in modes and config.get("prism"):
    raise ValueError(
      "config.mode is 'evaluate', which is about a training config's held-out rows, and the config "
      "has a section prism; Prism is a mode of its own: set config.mode = 'prism'"
    )
