"""A config that does not fit -> what could be changed so that it would; and how it runs best on a
machine. By estimates alone.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from caprl_jax.harness.sections import PolicySection
from caprl_jax.harness.settings import Settings, refuses_rounded, rounds_steps_away
from caprl_jax.models.policy import Remat
from caprl_jax.modes.plan.abstract import judge_is_here
from caprl_jax.modes.plan.chips import Machine
from caprl_jax.modes.plan.estimate import Estimate, Known, estimate
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.sharding import MeshConfig

Change = tuple[str, Callable[[Settings], Settings]]
MOST_CHANGES = 6  # one after the other


def with_update(settings: Settings, microbatches: int) -> Settings:
  """The same with other microbatches of the update."""
  update = dataclasses.replace(settings.step.update, microbatches=microbatches)
  return dataclasses.replace(settings, step=dataclasses.replace(settings.step, update=update))


def with_judge(settings: Settings, **changes) -> Settings:
  """The same with other keys of the section judge."""
  judge = dataclasses.replace(settings.judge, **changes)
  step = dataclasses.replace(settings.step, judge=judge)
  return dataclasses.replace(settings, judge=judge, step=step)


def with_rollout(settings: Settings, **changes) -> Settings:
  """The same with other keys of the section rollout."""
  rollout = dataclasses.replace(settings.step.rollout, **changes)
  return dataclasses.replace(settings, step=dataclasses.replace(settings.step, rollout=rollout))


def with_sampling(settings: Settings, **changes) -> Settings:
  """The same with other keys of the section rollout.sampling."""
  sampling = dataclasses.replace(settings.step.rollout.sampling, **changes)
  return with_rollout(settings, sampling=sampling)


def with_policy(settings: Settings, **changes) -> Settings:
  """The same with other keys of the section policy."""
  return dataclasses.replace(settings, policy=dataclasses.replace(settings.policy, **changes))


def changes(settings: Settings, count: int) -> Iterator[Change]:
  """Single changes of a config on `count` chips, those first that change no result."""
  update, judge = settings.step.update, settings.step.judge
  sampling, policy = settings.step.rollout.sampling, settings.policy
  for value in (2 * update.microbatches, 4 * update.microbatches):
    yield f"policy_update.microbatches={value}", lambda s, v=value: with_update(s, v)
  for value in (2 * sampling.chunks, 4 * sampling.chunks):
    yield f"rollout.sampling.chunks={value}", lambda s, v=value: with_sampling(s, chunks=v)
  here = judge_is_here(settings)
  for value in (2 * judge.microbatches, 4 * judge.microbatches) if here else ():
    yield f"judge.microbatches={value}", lambda s, v=value: with_judge(s, microbatches=v)
  yield from _remats(policy)
  optimizer = settings.optimizer
  if optimizer.moment_memory == "device":
    there = dataclasses.replace(optimizer, moment_memory="host")
    yield "optimizer.moment_memory=host", lambda s: dataclasses.replace(s, optimizer=there)
  for mesh in _meshes(count):
    if mesh != settings.mesh:
      named = f"mesh.data=1 mesh.fsdp={mesh.fsdp} mesh.tensor={mesh.tensor}"
      yield named, lambda s, mesh=mesh: dataclasses.replace(s, mesh=mesh)
  if here and settings.judge.gather_once:
    yield "judge.gather_once=False", lambda s: with_judge(s, gather_once=False)
  if here and not settings.judge.int8 and not judge.sees_image:
    yield "judge.int8=True", lambda s: with_judge(s, int8=True)
  whole = settings.step.rollout.weights == "full" and policy.lora.base_weights is None
  if whole and not refuses_rounded(settings.step):
    yield "rollout.weights=int8", lambda s: with_rollout(s, weights="int8")
  if (optimizer.name, optimizer.moment_dtype) == ("adamw", "float32"):
    small = dataclasses.replace(optimizer, moment_dtype="bfloat16")
    yield "optimizer.moment_dtype=bfloat16", lambda s: dataclasses.replace(s, optimizer=small)
  half = dataclasses.replace(policy, param_dtype="bfloat16")
  if policy.param_dtype == "float32" and not rounds_steps_away(half, optimizer):
    yield "policy.param_dtype=bfloat16", lambda s: with_policy(s, param_dtype="bfloat16")
  if policy.trainable != "lora":
    lora = dict(trainable="lora", param_dtype="bfloat16")
    yield "policy.trainable=lora policy.param_dtype=bfloat16", lambda s: with_policy(s, **lora)
  elif policy.lora.base_weights != "nf4" and settings.step.rollout.weights == "full":
    few = dataclasses.replace(policy.lora, base_weights="nf4")
    yield "policy.lora.base_weights=nf4", lambda s: with_policy(s, lora=few)
  if sampling.max_tokens >= 512:
    half = sampling.max_tokens // 2
    yield f"rollout.sampling.max_tokens={half}", lambda s: with_sampling(s, max_tokens=half)
  images, pieces = settings.data.batch_size // 4, max(update.microbatches // 4, 1)
  if images:
    yield (
      f"data.batch_size={images} policy_update.microbatches={pieces}",
      lambda s: with_update(
        dataclasses.replace(s, data=dataclasses.replace(s.data, batch_size=images)), pieces
      ),
    )


def _remats(policy: PolicySection) -> Iterator[Change]:
  """More of a captioner's activations made again."""
  now = policy.remat_parts
  for more in (Remat(True, True), Remat(False, True), Remat(True, False)):
    if more == now or more.tower < now.tower or more.decoder < now.decoder:
      continue
    keys = dict(tower_remat=more.tower, decoder_remat=more.decoder)
    if policy.tower_remat is policy.decoder_remat is None and more == Remat(True, True):
      keys = dict(remat=True)
    named = " ".join(f"policy.{key}={value}" for key, value in keys.items())
    yield named, lambda s, keys=keys: with_policy(s, **keys)


def _meshes(count: int) -> Iterator[MeshConfig]:
  """All parameters split over all chips, in several ways."""
  for tensor in (1, 2, 4, 8):
    if count % tensor == 0:
      yield MeshConfig(1, count // tensor, tensor)


@dataclasses.dataclass(frozen=True)
class Tried:
  """Changes, and what they lead to."""

  named: str
  found: Estimate


def alternatives(
  settings: Settings, plan: PlanConfig, machine: Machine, price: float
) -> list[Tried]:
  """What takes less than the config itself, the smallest first: each change alone; and where none
  of these fits, one after the other until something does."""
  begin = estimate(settings, Known.of(settings, plan), machine, price)
  found = _singles(settings, plan, machine, begin)
  if not any(one.found.fits != "no" for one in found):
    names: list[str] = []
    chain, last = found, begin
    while chain and last.fits == "no" and len(names) < MOST_CHANGES:
      smallest = min(chain, key=lambda one: one.found.memory.total)
      names.append(smallest.named)
      last = smallest.found
      chain = _singles(last.settings, plan, machine, last)
    if len(names) > 1:
      found.append(Tried(" ".join(names), last))
  return sorted(found, key=lambda one: one.found.memory.total)


def _singles(
  settings: Settings, plan: PlanConfig, machine: Machine, begin: Estimate
) -> list[Tried]:
  """Each change alone that takes less than `begin`."""
  found = []
  for name, change in changes(settings, machine.count):
    changed = change(settings)
    try:
      one = estimate(changed, Known.of(changed, plan), machine, begin.price / machine.count)
    except ValueError:  # a batch that this mesh or number of pieces cannot split
      continue
    if one.memory.total < 0.99 * begin.memory.total:
      found.append(Tried(name, one))
  return found


def best(settings: Settings, plan: PlanConfig, machine: Machine, price: float) -> Estimate | None:
  """The fastest way to run a config on a machine by the keys that change no result: mesh, pieces of
  update and judge, chunks. Where none fits, the one that takes least; None where the batch cannot
  be split over the machine's chips.
  """
  known = Known.of(settings, plan)
  found: list[Estimate] = []
  asked = (1, 4, 16, 64) if judge_is_here(settings) else (1,)
  meshes = [MeshConfig(machine.count, 1, 1), *_meshes(machine.count)]
  for mesh in dict.fromkeys(meshes):
    share = settings.data.batch_size // (mesh.data * mesh.fsdp) // settings.step.update.minibatches
    pieces = [n for n in range(1, max(share, 1) + 1) if share % n == 0]
    for micro, chunks, judged in itertools.product(pieces, (4, 8, 16), asked):
      changed = dataclasses.replace(settings, mesh=mesh)
      changed = with_judge(with_update(changed, micro), microbatches=judged)
      changed = with_sampling(changed, chunks=chunks)
      try:
        found.append(estimate(changed, known, machine, price))
      except ValueError:
        continue
  if not found:
    return None
  safe = [one for one in found if one.fits == "yes"] or [one for one in found if one.fits != "no"]
  if safe:
    return min(safe, key=lambda one: (one.secs, one.memory.total))
  return min(found, key=lambda one: one.memory.total)
