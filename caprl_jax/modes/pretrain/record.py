"""What a run of mode `pretrain` has done, in its workdir: pretrain.json, and whether a config may
go on with it.
"""

import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from caprl_jax.atomic_files import write_json
from caprl_jax.harness.checkpoints import saved_steps
from caprl_jax.harness.process.first import from_first
from caprl_jax.hub.tokenizer import Tokenizer
from caprl_jax.json_files import cut, read_json

TRAINING = "training"  # folder in the workdir for metrics and checkpoints


def _differing(held: Any, wanted: Any, place: str) -> Iterator[str]:
  """Places at which two configs differ. What is not there is None: an older run lacks newer
  keys.
  """
  if isinstance(held, Mapping) and isinstance(wanted, Mapping):
    for key in {**held, **wanted}:
      yield from _differing(held.get(key), wanted.get(key), f"{place}.{key}")
  elif held != wanted:
    yield place


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


class Record:
  """pretrain.json: what each stage was and whether it is finished; read when a run goes on.

  A stage that is neither finished nor has a checkpoint has left nothing: its config is free to
  change.

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
    held = read_json(self.path)
    if not _is_record(held):
      raise ValueError(
        f"{self.path}: not what mode pretrain writes; restore it, or begin in another workdir"
      )
    stages = {
      name: stage
      for name, stage in held["stages"].items()
      if stage["finished"] or saved_steps(workdir / TRAINING / name)
    }
    return {**held, "stages": stages}

  def _check(self, held: Mapping, workdir: pathlib.Path) -> None:
    differing = [
      place for key, value in self.config.items() for place in _differing(held[key], value, key)
    ]
    for name, stage in self.stages.items():
      differing += _differing(stage["config"], self.wanted.get(name), f"pretrain.stages.{name}")
    # How much is computed at once changes no result.
    free = {
      "pretrain_policy.remat",
      *(f"pretrain.stages.{name}.microbatches" for name in self.stages),
    }
    differing = [place for place in differing if place not in free]
    if list(self.wanted)[: len(self.stages)] != list(self.stages):
      differing.append("pretrain.order")
    if not differing:
      return
    *done, last = self.stages
    what = f"another config (differing: {cut(', '.join(differing), 500)})"
    if self.stages[last]["finished"] or not all(
      d.startswith(f"pretrain.stages.{last}.") for d in differing
    ):
      raise ValueError(f"{workdir} holds a run of {what}; use another --workdir, or delete it")
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
    begun = self.stages[name].get("vocabulary_sha256", found)
    if begun != found:
      raise ValueError(
        f"stage {name!r} was begun with another vocabulary: pretrain_policy.compact "
        "makes it of what stages read and the evaluation asks; bring that back as "
        f"it was, or remove {self.path.parent / TRAINING / name} to begin the stage "
        "anew"
      )
    self.put(name, vocabulary_sha256=found)

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
