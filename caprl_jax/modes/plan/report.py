"""What mode `plan` found -> lines for people."""

from collections.abc import Sequence
from typing import Any

from caprl_jax.modes.plan.arithmetic import decode_bytes, needed
from caprl_jax.modes.plan.changes import Tried
from caprl_jax.modes.plan.chips import GIB, PRICES_OF, Machine
from caprl_jax.modes.plan.estimate import Estimate
from caprl_jax.modes.plan.memory import ERROR, MUCH
from caprl_jax.modes.plan.roofline import ASSUMED, HOST_LINK
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.progress import duration

MOST_ALTERNATIVES = 8


def memory_lines(found: Estimate) -> list[str]:
  """A chip's memory by kind: what is exact, then what is estimated, stage by stage."""
  memory = found.memory
  lines = [f"{kind:>28} {count / GIB:8.2f} GiB" for kind, count in memory.arguments.items()]
  for stage, kinds in memory.stages.items():
    total = sum(kinds.values())
    parts = ", ".join(f"{kind} {count / GIB:.2f}" for kind, count in kinds.items())
    lines.append(f"{'temporaries, ' + stage:>28} {total / GIB:8.2f} GiB: {parts}")
  lines.append(f"{'arguments + largest stage':>28} {memory.total / GIB:8.2f} GiB")
  lines.append(f"{'a program can have':>28} {found.room / GIB:8.2f} GiB")
  return lines


def host_lines(found: Estimate, machine: Machine) -> list[str]:
  """What lies in the memory of the machine's hosts, where something does."""
  each, chips = found.memory.host / GIB, machine.chips_per_host
  if not each:
    return []
  return [
    f"{'optimizer, in host memory':>28} {each:8.2f} GiB a chip, {chips * each:.2f} GiB a host of "
    f"{chips}; it comes and goes at {HOST_LINK / 1e9:.0f} GB/s a chip, if this holds"
  ]


def work_lines(found: Estimate) -> list[str]:
  """What each stage needs and takes on all chips, and its time."""
  chips, wanted = found.mesh.chips, needed(found.step)
  lines = [f"{'':>8} {'needed':>14} {'executed':>14} {'time':>9}"]
  for name, stage in found.stages.items():
    executed = stage.flops * chips
    lines.append(
      f"{name:>8} {wanted[name] / 1e12:>8,.0f} TFLOP {executed / 1e12:>8,.0f} TFLOP "
      f"{stage.secs:>7.1f} s"
    )
  least, read = decode_bytes(found.step, found.mesh.parts), found.stages["rollout"].read * chips
  lines.append(
    f"decoding must read {least / 1e12:.1f} TB on this mesh, and reads {read / 1e12:.1f} TB"
  )
  return lines


def elsewhere_lines(found: Estimate) -> list[str]:
  """What a step waits for that is not on the chips."""
  judge, custom = found.settings.judge, found.settings.step.reward.custom
  lines = []
  if judge.endpoint is not None:
    lines.append(f"the judge is {judge.name}: the time that a step waits for it is not counted")
  elif not judge.named:
    lines.append("there is no judge")
  if custom:
    lines.append(f"reward.custom = {custom} is not counted")
  return lines


def run_line(found: Estimate, images: int, what: str) -> str:
  """Hours and cost of so many images."""
  hours = found.hours(images)
  return f"{what}: {images:,} images, {_hours(hours)}, {hours * found.price:,.0f} USD"


def estimate_text(found: Estimate, plan: PlanConfig, machine: Machine) -> str:
  """Everything about one machine."""
  step, steps = found.step, found.settings.train.steps
  mean, longest = step.length_BG.mean(), step.length_BG.max()
  rate = 3600 / found.secs
  return "\n".join(
    [
      f"{machine.name} ({machine.count} x {machine.chip.name}), {mesh_text(found)}: estimated, not "
      "compiled",
      "memory of a chip (arguments exact; temporaries by formulas, which were up to "
      f"{ERROR:.0%} too small and {MUCH:.0%} too large where the program was compiled too):",
      *memory_lines(found),
      *host_lines(found, machine),
      f"fits: {found.fits}",
      f"work of a step of {step.images} x {step.length_BG.shape[1]} captions ({mean:.0f} tokens, "
      f"the longest {longest}) and {step.prompt} tokens of image and prompt:",
      *work_lines(found),
      *elsewhere_lines(found),
      f"a step: {secs_text(found.secs)}; {rate * step.learned:,.0f} images and "
      f"{rate * step.length_BG.size:,.0f} captions an hour, if this holds: {ASSUMED}",
      run_line(found, steps * step.learned, f"train.steps = {steps:,}"),
      run_line(found, plan.images, "plan.images"),
      f"prices change: {found.price / found.mesh.chips:.2f} USD a chip and hour was assumed "
      f"(plan.prices; {PRICES_OF})",
    ]
  )


def secs_text(secs: float) -> str:
  """A step's time, which may be less than a second."""
  return f"{secs:.1f} s" if secs < 10 else duration(secs)


def mesh_text(found: Estimate) -> str:
  """The mesh and the pieces that a config has."""
  update, mesh = found.settings.step.update, found.mesh
  axes = [
    f"{name} {size}"
    for name, size in (("data", mesh.data), ("fsdp", mesh.fsdp), ("tensor", mesh.tensor))
    if size > 1
  ]
  return f"{' x '.join(axes) or 'one chip'}, {update.microbatches} microbatches"


def alternatives_text(tried: Sequence[Tried]) -> str:
  """What was tried and fits; or what takes least, where nothing does."""
  fitting = [one for one in tried if one.found.fits != "no"]
  if not tried:
    return "nothing that was tried takes less; more chips do"
  head = "what would fit:" if fitting else "none of these fits; the smallest are:"
  lines = [
    f"  {one.found.memory.total / GIB:6.1f} GiB ({one.found.fits:>7}), "
    f"{one.found.step.learned / one.found.secs:5.2f} images/s: "
    + " ".join(f"--config.{change}" for change in one.named.split())
    for one in (fitting or tried)[:MOST_ALTERNATIVES]
  ]
  return "\n".join([head, *lines])


# ---- several machines ----

TITLES = ("machine", "fits", "GiB of", "room", "mesh, microbatches", "chunks", "a step")
TITLES_MORE = ("images/s", "hours", "USD")


def machine_row(machine: Machine, found: Estimate | None, plan: PlanConfig) -> list[str]:
  """Of the table of machines."""
  if found is None:
    return [machine.name, "no: the batch cannot be split", *[""] * 8]
  memory = [f"{found.memory.total / GIB:.1f}", f"{found.room / GIB:.1f}"]
  how = [mesh_text(found), str(found.settings.step.rollout.sampling.chunks)]
  if found.fits == "no":
    return [machine.name, "no", *memory, *how, *[""] * 4]
  hours = found.hours(plan.images)
  return [
    machine.name,
    found.fits,
    *memory,
    *how,
    secs_text(found.secs),
    f"{found.step.learned / found.secs:.2f}",
    f"{hours:.0f}" if hours >= 10 else f"{hours:.1f}",
    f"{hours * found.price:,.0f}",
  ]


def table(rows: Sequence[Sequence[str]]) -> str:
  """Rows of text under `TITLES`, in columns."""
  everything = [(*TITLES, *TITLES_MORE), *rows]
  widths = [max(len(row[i]) for row in everything) for i in range(len(everything[0]))]
  return "\n".join(
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in everything
  )


def why_not(found: Estimate) -> str:
  """The largest parts of what does not fit."""
  memory = found.memory
  stage, kinds = max(memory.stages.items(), key=lambda item: sum(item[1].values()))
  parts = {**memory.arguments, **{f"{kind} ({stage})": count for kind, count in kinds.items()}}
  largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
  return ", ".join(f"{kind} {count / GIB:.1f} GiB" for kind, count in largest)


def compiled_text(report: dict[str, Any]) -> str:
  """What the compiler found."""
  sizes = [f"{name:>12} {value:8.2f} GiB" for name, value in report["gib_per_device"].items()]
  kinds = [f"{name:>16} {value:8.2f} GiB" for name, value in report["gib_all_devices"].items()]
  lines = [
    f"compiled in {duration(report['compile_secs'])}; memory of a device:",
    *sizes,
    "arguments, all devices together:",
    *kinds,
    # the compiler counts a loop's body once
    f"compiler's count, loops' bodies once: {report['flops'] or 0:.3g} FLOPs, "
    f"{report['bytes_accessed'] or 0:.3g} bytes",
  ]
  if report["largest"]:
    lines.append("largest arrays:")
    lines += [f"{g:8.2f} GiB {what} {op} x{n}" for g, what, op, n in report["largest"]]
  return "\n".join(lines)


def _hours(hours: float) -> str:
  return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"
