"""A config as an object, a workdir -> a training run, and what it found."""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import jax
import ml_collections

from caprl_jax.api.captioner import Captioner
from caprl_jax.api.results import Results, frame_of
from caprl_jax.config import keys, loading, presets, registry, schema
from caprl_jax.harness.buckets.addresses import localise
from caprl_jax.harness.buckets.mirror import mirrored
from caprl_jax.harness.metrics import FILE_NAME, read_metrics
from caprl_jax.harness.process.log_files import logging_to
from caprl_jax.harness.rewards.function import given_reward
from caprl_jax.harness.training.summary import read_summary, summary_path
from caprl_jax.json_files import cut, read_json
from caprl_jax.modes.evaluate import run as evaluate_mode
from caprl_jax.modes.train import run as train_mode

Config = ml_collections.ConfigDict
PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class SampledCaption:
  """A caption that a run kept to be read.

  image: the picture's file. name: the row's. reward: None where it could not be scored.
  right: questions answered right, of `questions`.
  """

  image: pathlib.Path
  name: str
  caption: str
  reward: float | None
  right: int
  questions: int


@dataclasses.dataclass(frozen=True)
class TrainingResult:
  """What a training run found; its files lie in `workdir`.

  step: the last one. before, after: held-out figures by name ("accuracy", "accuracy/KIND",
  "length_tokens", "flat_groups", ...). gate: the judge's accuracy from captions that are known to
  be good or to say nothing. counts: questions kept and dropped. secs: by stage.
  """

  workdir: pathlib.Path
  step: int
  before: dict[str, float]
  after: dict[str, float]
  gate: dict[str, float]
  counts: dict[str, float]
  secs: dict[str, float]

  @classmethod
  def read(cls, workdir: PathLike) -> "TrainingResult":
    """Of a finished run's workdir. Raises ValueError where there is none."""
    workdir = pathlib.Path(workdir)
    path = summary_path(workdir)
    found = read_summary(path) if path.exists() else {}
    if "after" not in found:
      raise ValueError(f"{str(workdir)!r} holds no finished training run (no `after` in {path})")
    of = lambda name: found.get(name) or {}
    metrics = read_metrics(workdir / FILE_NAME) if (workdir / FILE_NAME).exists() else []
    step = metrics[-1]["step"] if metrics else 0
    return cls(workdir, step, of("before"), of("after"), of("gate"), of("counts"), of("wall_secs"))

  @property
  def checkpoint(self) -> pathlib.Path:
    """The trained captioner, as transformers and vLLM load it."""
    return self.workdir / "policy"

  @property
  def report(self) -> pathlib.Path:
    """The run as a page."""
    return self.workdir / "report.html"

  @property
  def metrics(self) -> list[dict[str, Any]]:
    """The numbers of each step, by name (docs/training.md has all names)."""
    return read_metrics(self.workdir / FILE_NAME)

  def to_pandas(self) -> Any:
    """`metrics` as a pandas frame by step. Raises ValueError without pandas."""
    return frame_of(self.metrics).set_index("step")

  def samples(self, stage: str = "after") -> Results[SampledCaption]:
    """The captions that were kept of a stage: "before", "after", or "step_000010". Raises
    ValueError where there are none."""
    folder = self.workdir / "samples"
    path = folder / f"{stage}.json"
    if not path.exists():
      there = ", ".join(sorted(one.stem for one in folder.glob("*.json"))) or "none"
      raise ValueError(f"there are no samples of {cut(stage)!r} in {folder} (there: {there})")
    return Results(
      SampledCaption(
        folder / row["image"],
        row["name"],
        caption["text"],
        caption["reward"],
        sum(answer["correct"] for answer in caption["answers"]),
        len(caption["answers"]),
      )
      for row in read_json(path, halves=True)["rows"]
      for caption in row["captions"]
    )

  def captioner(self, **settings: Any) -> Captioner:
    """The trained captioner, ready to be called; settings as of `Captioner.from_pretrained`."""
    return Captioner.from_pretrained(str(self.checkpoint), **settings)


def load_config(path: PathLike, changes: Mapping[str, Any] | None = None) -> Config:
  """A config file as an object, to be changed and given to `train`.

  All sections of the config's modes are there, also those that the file leaves out:
  `config.evaluate.every_steps = 10`. The run says what is no key or no value.

  Args:
    path: as --config of the command line takes it.
    changes: values by dotted key, as {"train.steps": 10}. A `preset` goes first, as on the command
      line.

  Raises:
    ValueError: the file is no config, or a key of `changes` is none.
  """
  config = loading.load_config(os.fspath(path)).unlock()
  changes = dict(changes or {})
  if "preset" in changes:
    presets.rename(config, changes.pop("preset"))
  else:
    presets.expand(config)
  for mode in registry.modes_of(config).values():
    for name in mode.sections:
      if name not in config:
        config[name] = ml_collections.ConfigDict()
  for key, value in changes.items():
    if keys.annotation_of(key) is None:
      raise ValueError(f"{cut(key)!r} is no key of a config{schema.did_you_mean(key, keys.keys())}")
    *sections, leaf = key.split(".")
    holder: Any = config
    for section in sections:
      if section not in holder:
        holder[section] = ml_collections.ConfigDict()
      holder = holder[section]
    holder[leaf] = value
  return config


def train(
  config: Config | PathLike, workdir: PathLike, *, reward: Callable[..., Any] | None = None
) -> TrainingResult:
  """Mode `train`: gate, evaluation, CapRL, evaluation, report. A run that was interrupted in this
  workdir goes on, bit for bit; one that is finished is read.

  Args:
    config: as `load_config` gives it, or a config file.
    workdir: gets all files of the run (docs/training.md lists them), log.txt among them.
    reward: a function in the place of `config.reward.custom` (docs/training.md, A reward of your
      own), as TRL's `reward_funcs` are. A run that goes on needs the same one.

  Raises:
    ValueError: a config, data or a model that cannot be used, with the place and the remedy.
    FloatingPointError: loss or gradient was not finite, or a rule of `train.stop_if` held; what was
      trained is saved.
    KeyboardInterrupt: after a checkpoint; the same call goes on.
  """
  return TrainingResult.read(_run(train_mode.run, "train", config, workdir, reward))


def evaluate(
  config: Config | PathLike, workdir: PathLike, *, reward: Callable[..., Any] | None = None
) -> dict[str, float]:
  """Mode `evaluate`: the figures of `policy.checkpoint` on the held-out rows `data.eval`.

  Arguments and errors are those of `train`.
  """
  where = _run(evaluate_mode.run, "evaluate", config, workdir, reward)
  return read_json(where / "evaluation.json")["figures"]


def _run(
  run: Callable[[Config, pathlib.Path], None],
  mode: str,
  config: Config | PathLike,
  workdir: PathLike,
  reward: Callable[..., Any] | None,
) -> pathlib.Path:
  """Runs a mode, and returns its workdir on this machine."""
  with given_reward(reward) if reward is not None else nullcontext() as custom:
    return _run_with(run, mode, config, workdir, custom)


def _run_with(
  run: Callable[[Config, pathlib.Path], None],
  mode: str,
  config: Config | PathLike,
  workdir: PathLike,
  custom: str | None,
) -> pathlib.Path:
  """As `_run`. custom: what `reward.custom` has to say; None: what the config says."""
  if not isinstance(config, ml_collections.ConfigDict):
    config = load_config(config)
  config = config.copy_and_resolve_references()
  config.unlock()
  config.mode = mode
  if custom is not None:
    config.reward = {**config.get("reward", {}), "custom": custom}
  for name in [*config]:
    if isinstance(config[name], ml_collections.ConfigDict) and not config[name]:
      del config[name]  # as if it had not been named
  registry.check_top_level(config)
  local = localise(config, os.fspath(workdir))
  where = pathlib.Path(local.workdir or workdir).expanduser()
  try:
    where.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"workdir {str(where)!r} cannot be made: {error.strerror}") from error
  terminal = not logging.root.handlers  # where a program has set up its log, that is left alone
  with mirrored(local.mirrors), logging_to(where, jax.process_index(), terminal=terminal):
    run(config, where)
  return where
