"""What a run is made of and how far it came <-> record_MODE.json in its workdir; whether another
start may go on with it.

A run that goes on must be made of what it was begun with, or its numbers are those of no run. The
record holds the config, digests of what the config only names (checkpoints, a judge, rows,
curated questions), the versions of each start and, once all that the mode leaves is on the disk,
the step after which it was complete.
"""

import dataclasses
import datetime
import fnmatch
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from caprl_jax.atomic_files import write_json
from caprl_jax.config.schema import to_plain
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.versions import versions
from caprl_jax.json_files import cut, read_record, shown

log = logging.getLogger("caprl_jax.harness.process.run_record")


@dataclasses.dataclass(frozen=True)
class Difference:
  """A key of the config, and what it was and is."""

  key: str
  then: Any
  now: Any

  def __str__(self) -> str:
    return f"{self.key} was {shown(self.then)} and is {shown(self.now)}"


def differences(then: Any, now: Any, key: str = "") -> Iterator[Difference]:
  """Where two configs differ.

  Args:
    then: as `to_plain` writes it. A key that it lacks, since it is older than the key, had its
      default.
    now: sections by name, as dataclasses or plain.
  """
  below = lambda name: f"{key}.{name}" if key else str(name)
  if dataclasses.is_dataclass(now) and isinstance(then, Mapping):
    for field in dataclasses.fields(now):
      value = getattr(now, field.name)
      if field.name in then:
        yield from differences(then[field.name], value, below(field.name))
      elif (default := _default(field)) is not dataclasses.MISSING and default != value:
        yield Difference(below(field.name), to_plain(default), to_plain(value))
  elif isinstance(now, Mapping) and isinstance(then, Mapping):
    for name in {**then, **now}:
      yield from differences(then.get(name), now.get(name), below(name))
  elif isinstance(now, (list, tuple)) and isinstance(then, list) and len(now) == len(then):
    for number, (one, other) in enumerate(zip(then, now, strict=True)):
      yield from differences(one, other, below(number))
  elif to_plain(now) != then:
    yield Difference(key, then, to_plain(now))


def _default(field: dataclasses.Field) -> Any:
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default


class RunRecord:
  """The record of a run of one mode. All processes make it and call its methods; the first one
  reads and writes the file.

  Args:
    alone: only the first process makes one. For modes whose hosts do not wait for each other.

  Raises ValueError, with the path, for a file that is no record.
  """

  def __init__(self, workdir: pathlib.Path, mode: str, *, alone: bool = False):
    self.path = workdir / f"record_{mode}.json"
    self._from_first = (lambda look: look()) if alone else from_first
    self.values = self._from_first(lambda: _read(self.path) if self.path.exists() else {})

  def begin(
    self,
    sections: Mapping[str, Any],
    free: Sequence[str],
    *,
    goes_on: bool = True,
    older: Mapping[str, Any] | None = None,
  ) -> list[Difference]:
    """A start of the run: writes its config and versions.

    Args:
      sections: the config, by name of section.
      free: patterns (`fnmatch`) of keys that may change when a run goes on.
      goes_on: the run has left something; where it has not, its config is free.
      older: the config of a run that was begun before there were records.

    Returns:
      What has changed of what may change, which the log says too.

    Raises:
      ValueError: a key has changed that must not, with all such keys and values.
    """
    then = self.values.get("config", older) if goes_on else None
    found = [] if then is None else list(differences(then, sections))
    is_free = lambda one: any(fnmatch.fnmatchcase(one.key, pattern) for pattern in free)
    bound = [str(one) for one in found if not is_free(one)]
    if bound:
      raise ValueError(
        f"{self.path.parent} holds a run of another config (differing: "
        f"{cut('; '.join(bound), 1200)}); use another --workdir, or give these keys their old "
        "values"
      )
    for one in found:
      log.info("this run goes on with another config: %s", one)
    if then is None:
      self.values = {}
    self.values["config"] = to_plain(sections)
    self._add_start()
    self._write()
    return found

  def bind(
    self, found: Mapping[str, str], refused: Mapping[str, str], said: Mapping[str, str]
  ) -> None:
    """Compares digests of what the config only names with those of the first start, and adds those
    that are new.

    Args:
      found: name -> sha256 or another digest; the first process's count.
      refused: name -> why a run cannot go on with another one, and what to do.
      said: name -> what it means for the run where another one is there; of those that may change.

    Raises:
      ValueError: a digest of `refused` has changed.
    """
    held = self.values.setdefault("made_of", {})
    for name, digest in self._from_first(lambda: dict(found)).items():
      if held.setdefault(name, digest) == digest:
        continue
      changed = f"{name} is not what this run was begun with ({held[name][:12]}, now {digest[:12]})"
      if name in refused:
        raise ValueError(f"{self.path}: {changed}: {refused[name]}")
      log.warning("%s: %s", changed, said[name])
    self._write()

  def renew(self, found: Mapping[str, str]) -> None:
    """As `bind`, for modes that make their results anew from what they kept: what is there now
    counts, and the log says what has changed."""
    for one in differences(self.values.get("made_of", found), found):
      log.info("the results are made anew of something else: %s", one)
    self.values["made_of"] = dict(found)
    self._write()

  def digest(self, name: str) -> str:
    """A digest that the run was begun with; empty where it has none of that name."""
    return self.values.get("made_of", {}).get(name, "")

  @property
  def complete_step(self) -> int | None:
    """The step after which the run was complete; None where it is not."""
    return (self.values.get("complete") or {}).get("step")

  def finish(self, step: int) -> None:
    """Says that all that the run leaves is on the disk; comes last.

    Args:
      step: the last one; in modes without steps, how many rows or questions there were.
    """
    self.values["complete"] = {"step": step, "at": _now()}
    self._write()

  def reopen(self) -> None:
    """Says that the run is not complete, or not any more."""
    if self.values.pop("complete", None) is not None:
      self._write()

  def _add_start(self) -> None:
    """Notes the versions of this start where they are others than those of the last one."""
    starts, now = self.values.setdefault("starts", []), versions()
    if starts and starts[-1]["versions"] == now:
      return
    if starts:
      for one in differences(starts[-1]["versions"], now):
        log.warning(
          "this run goes on with other versions: %s; numbers may differ in their last digits", one
        )
    starts.append({"at": _now(), "versions": now})

  def _write(self) -> None:
    if jax.process_index() == 0:
      write_json(self.path, self.values)


def _now() -> str:
  return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _read(path: pathlib.Path) -> dict[str, Any]:
  values = read_record(path)
  remedy = "restore the file, or delete it and the run's checkpoints and begin again"
  if not isinstance(values, dict):
    raise ValueError(f"{path}: holds {shown(values)}, not an object; {remedy}")
  for name, kind in (("config", dict), ("made_of", dict), ("complete", dict), ("starts", list)):
    if not isinstance(values.get(name, kind()), kind):
      raise ValueError(f"{path}: {name} is {shown(values[name])}; {remedy}")
  if type(values.get("complete", {}).get("step", 0)) is not int:
    raise ValueError(f"{path}: complete.step is no integer; {remedy}")
  if not all(isinstance(digest, str) for digest in values.get("made_of", {}).values()):
    raise ValueError(f"{path}: made_of holds what is no digest; {remedy}")
  for start in values.get("starts", []):
    if not isinstance(start, dict) or not isinstance(start.get("versions"), dict):
      raise ValueError(f"{path}: starts holds {shown(start)}; {remedy}")
  return values
