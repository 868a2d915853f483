"""What a run of mode `pretrain` has done, in its workdir: pretrain.json, and whether a config may
go on with it.
"""

import fnmatch
import hashlib
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from caprl_jax.atomic_files import write_json
from caprl_jax.harness.buckets.shared import saved_steps
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.run_record import RunRecord, differences
from caprl_jax.harness.sections import PolicySection
from caprl_jax.hub.tokenizer import Tokenizer
from caprl_jax.json_files import cut, read_record, shown
from caprl_jax.modes.pretrain.policy import PretrainPolicyConfig

log = logging.getLogger("caprl_jax.modes.pretrain.record")

TRAINING = "training"  # folder in the workdir for metrics and checkpoints

# What may change when a stage goes on: how much is computed at once changes no result, and rows are
# compared by themselves.
FREE = (
  "pretrain_policy.remat",
  "pretrain_policy.tower_remat",
  "pretrain_policy.decoder_remat",
  "pretrain.stages.*.microbatches",
  "pretrain.stages.*.optimizer.moment_memory",
  "pretrain.stages.*.pack.bad_rows",
)


def _is_record(held: Any) -> bool:
  stages = held.get("stages") if isinstance(held, dict) else None
  return (
    isinstance(stages, dict)
    and {"seed", "pretrain_policy"} <= held.keys()
    and all(
      isinstance(stage, dict) and {"finished", "config"} <= stage.keys()
      for stage in stages.values()
    )
  )


def begin_run(
  workdir: pathlib.Path, sections: Mapping[str, Any], policy: PretrainPolicyConfig, stages: "Record"
) -> tuple[RunRecord, bool]:
  """The record of the run, with what it is made of, and whether anything is left to do: the
  run was not complete, or not with this config.

  Args:
    sections: the config. What must not change of it, `stages` has checked.

  Raises:
    ValueError: a model from which a stage goes on is another one now.
  """
  record = RunRecord(workdir, "pretrain")
  changed = record.begin(sections, ("*",), goes_on=bool(stages.stages))
  others = "a stage goes on from it; bring its files back as they were, or use another --workdir"
  unused = "nothing of it is used any more, since a stage has written its model"
  found, refused, said = {}, {}, {}
  for name in ("checkpoint", "vision", "language"):
    source, key = getattr(policy, name), f"pretrain_policy.{name}"
    if source is not None:
      found[key] = from_first(PolicySection(source).digest)
    (said if stages.finished() else refused)[key] = unused if stages.finished() else others
  record.bind(found, refused, said)
  return record, record.complete_step is None or bool(changed)


class Record:
  """pretrain.json: what each stage was and whether it is finished; read when a run goes on.

  A stage that is neither finished nor has a checkpoint has left nothing: its config is free to
  change. The last finished one is trained again where its model is not there any more.

  Raises ValueError where the workdir holds a run with another model, seed or stage.
  """

  def __init__(self, workdir: pathlib.Path, config: Mapping, order: Sequence[str]):
    self.path = workdir / "pretrain.json"
    self.config = {"seed": config["seed"], "pretrain_policy": config["pretrain_policy"]}
    self.wanted = {name: config["pretrain"]["stages"][name] for name in order}
    self.stages: dict[str, dict] = {}
    held = from_first(lambda: self._held(workdir))
    if held is not None:
      self.stages = held["stages"]
      if self.stages:
        self._check(held, workdir)

  def _held(self, workdir: pathlib.Path) -> dict[str, Any] | None:
    """The record that is there, with those of its stages that have left something."""
    if not self.path.exists():
      return None
    held = read_record(self.path)
    if not _is_record(held):
      raise ValueError(
        f"{self.path}: not what mode pretrain writes; restore it, or begin in another workdir"
      )
    stages = {
      name: stage
      for name, stage in held["stages"].items()
      if stage["finished"] or saved_steps(workdir / TRAINING / name)
    }
    while done := [name for name, stage in stages.items() if stage["finished"]]:
      if (workdir / done[-1] / "config.json").exists():
        break
      log.warning("%s is missing: stage %s is trained again", workdir / done[-1], done[-1])
      stages = {name: stage for name, stage in stages.items() if name in done[:-1]}
    return {**held, "stages": stages}

  def _check(self, held: Mapping, workdir: pathlib.Path) -> None:
    found = [
      one for key, value in self.config.items() for one in differences(held[key], value, key)
    ]
    for name, stage in self.stages.items():
      place = f"pretrain.stages.{name}"
      found += differences(stage["config"], self.wanted.get(name), place)
    is_free = lambda key: any(fnmatch.fnmatchcase(key, pattern) for pattern in FREE)
    differing = [str(one) for one in found if not is_free(one.key)]
    if list(self.wanted)[: len(self.stages)] != list(self.stages):
      differing.append("pretrain.order")
    if not differing:
      return
    *done, last = self.stages
    what = f"another config (differing: {cut(', '.join(differing), 500)})"
    if self.stages[last]["finished"] or not all(
      d.startswith(f"pretrain.stages.{last}.") for d in differing
    ):
      remedy = "use another --workdir, or give these keys their old values"
      raise ValueError(f"{workdir} holds a run of {what}; {remedy}")
    other = (
      (
        ", or use another --workdir with pretrain_policy.checkpoint = "
        f"{str(workdir / done[-1])!r} and pretrain.order = "
        f"{tuple(self.wanted)[len(done) :]}"
      )
      if done
      else ""
    )
    raise ValueError(
      f"{workdir / TRAINING / last} holds a checkpoint of {what}, and with one only "
      f"microbatches may change; remove that folder to begin the stage anew{other}"
    )

  def check_vocabulary(self, name: str, tokenizer: Tokenizer) -> None:
    """Raises ValueError where a stage was begun with another vocabulary: a compact one is made of
    all that the stages read and the model is asked, and its ids would mean something else."""
    found = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
    self._check_same(
      name,
      "vocabulary_sha256",
      found,
      "another vocabulary: pretrain_policy.compact makes it of what stages read and the evaluation "
      "asks; bring that back as it was",
    )

  def check_examples(self, name: str, number: int, digest: str) -> None:
    """Warns where a stage was begun with more or fewer examples that can be used.

    Raises:
      ValueError: they are as many, but others.
    """
    begun = self.stages.get(name, {})
    if begun.get("examples", number) != number:
      log.warning(
        "stage %s was begun with %d examples that can be used and has %d now: its next batches are "
        "others than they would have been",
        name,
        begun["examples"],
        number,
      )
      return
    source = shown(self.wanted[name]["data"])
    remedy = f"other examples: bring {source} and its images back as they were"
    self._check_same(name, "examples_digest", digest, remedy)
    self.put(name, examples=number)

  def _check_same(self, name: str, key: str, found: str, remedy: str) -> None:
    if self.stages.get(name, {}).get(key, found) != found:
      raise ValueError(
        f"stage {name!r} was begun with {remedy}, or remove "
        f"{self.path.parent / TRAINING / name} to begin the stage anew"
      )
    self.put(name, **{key: found})

  def put(self, name: str, **values) -> None:
    """Adds to what is known of a stage, and writes it."""
    self.stages[name] = {
      "finished": False,
      **self.stages.get(name, {}),
      "config": self.wanted[name],
      **values,
    }
    if jax.process_index() == 0:
      write_json(self.path, {**self.config, "stages": self.stages})

  def finished(self) -> list[str]:
    """Stages that need not be run again, in order."""
    return [name for name, stage in self.stages.items() if stage["finished"]]
