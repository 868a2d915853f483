"""Mode `plan`: what a training config's step takes on a machine that need not be here.

In seconds, by formulas: memory of a chip by kind, arithmetic and time of each stage, hours and cost
of a run, and what to change where it does not fit; for one machine, or as a table of the usual ones
(`plan.topology` = auto). In minutes, by libtpu: the step compiled (`compiling.py`), with the memory
that it really takes. Printed, and written to plan.json.
"""

import logging
import pathlib
from typing import Any

import jax

from caprl_jax.atomic_files import write_json
from caprl_jax.config import schema as configuration
from caprl_jax.harness.process.device_memory import hold_bytes, knobs
from caprl_jax.harness.settings import Settings, read_settings
from caprl_jax.modes.plan import report
from caprl_jax.modes.plan.changes import alternatives, best, with_policy
from caprl_jax.modes.plan.chips import (
  GIB,
  PRICES_OF,
  USUAL,
  Machine,
  machine_here,
  machine_of,
  read_prices,
)
from caprl_jax.modes.plan.compiling import can_compile, compile_apart, compile_here
from caprl_jax.modes.plan.data_shapes import DataShapes, read_data_shapes
from caprl_jax.modes.plan.estimate import Estimate, Known, as_json, estimate
from caprl_jax.modes.plan.section import PlanConfig
from caprl_jax.modes.plan.shapes import read_shapes

log = logging.getLogger("caprl_jax.modes.plan.run")

AUTO = "auto"


def run(config, workdir: pathlib.Path) -> None:
  """Estimates, compiles where that is asked for, and reports. Raises ValueError when the memory of
  the chips is not enough.
  """
  plan = configuration.load_section(config, "plan", PlanConfig)
  settings, prices = read_settings(config), read_prices(plan.prices)
  settings.policy.check_exact("mode plan is about training, which changes")
  if plan.topology is not None:
    jax.config.update("jax_platforms", "cpu")  # whatever chips this machine may have
  data = None
  if plan.data:
    shapes = read_shapes(settings, plan)
    data = read_data_shapes(settings, shapes.seeing)
    plan = data.buckets[-1].plan(plan)
  if plan.topology == AUTO:
    if data is not None:
      log.info("%s", data.text())
    _usual_machines(settings, plan, prices, workdir)
    return
  machine = machine_here(jax.devices()) if plan.topology is None else machine_of(plan.topology)
  topology = plan.topology if machine is None or plan.topology is None else machine.topology
  compiles = topology is not None or plan.topology is None
  if plan.compile and not compiles:
    raise ValueError(
      f"plan.compile: libtpu compiles for no {plan.topology}; leave it out for an estimate, or "
      "plan with plan.topology=None on such a machine"
    )
  written: dict[str, Any] = {"topology": plan.topology}
  found = None
  if machine is not None:
    found = _estimated(settings, plan, machine, prices[machine.chip.name])
    written["estimate"] = as_json(found, plan)
    if data is not None:
      written["data"] = _with_buckets(settings, plan, machine, data)
    write_json(workdir / "plan.json", written)
  elif data is not None:
    written["data"] = data.as_json()
    log.info("%s", data.text())
  if compiles and plan.compile is None and found is not None and not can_compile(topology):
    log.info(
      "not compiled, since libtpu is not installed: `pip install libtpu` compiles for TPUs on any "
      "Linux machine"
    )
  elif compiles and plan.compile is not False:
    compiled = (
      compile_here(settings, plan, None)
      if topology is None
      else compile_apart(settings, plan, topology)
    )
    write_json(workdir / "plan.json", written | compiled)
    log.info("%s", report.compiled_text(compiled))
    total = compiled["gib_per_device"]["total"]
    if machine is not None and total > machine.chip.memory / GIB:
      raise ValueError(_too_much("takes", total, machine))
    return
  if found is not None and found.fits == "no":
    raise ValueError(_too_much("takes, by estimate,", found.memory.total / GIB, machine))


def _too_much(takes: str, gib: float, machine: Machine | None) -> str:
  assert machine is not None
  return (
    f"the step {takes} {gib:.1f} GiB per device, and a program can have "
    f"{machine.chip.memory / GIB:.2f} on {machine.name}. What takes less:\n{knobs()}"
  )


def _estimated(settings: Settings, plan: PlanConfig, machine: Machine, price: float) -> Estimate:
  """The estimate for one machine, said; with what would fit where it does not."""
  found = estimate(settings, Known.of(settings, plan), machine, price)
  for kind, count in found.memory.arguments.items():
    hold_bytes(kind, round(count))  # said where the compiler finds that it does not fit
  log.info("%s", report.estimate_text(found, plan, machine))
  if found.fits != "yes":
    tried = alternatives(settings, plan, machine, price)
    log.info("%s", report.alternatives_text(tried))
  return found


def _with_buckets(
  settings: Settings, plan: PlanConfig, machine: Machine, data: DataShapes
) -> dict[str, Any]:
  """What a step takes with images of each bucket, said and for plan.json."""
  known = [Known.of(settings, bucket.plan(plan)) for bucket in data.buckets]
  secs = [estimate(settings, one, machine, 0.0).secs for one in known]
  log.info("%s", data.text(secs))
  return data.as_json() | {"step_secs": secs}


def _usual_machines(
  settings: Settings, plan: PlanConfig, prices: dict[str, float], workdir: pathlib.Path
) -> None:
  """The config on each of the usual machines, run as suits it, and what was found in one table."""
  rows, reasons, written = [], [], {}
  adapters = with_policy(settings, trainable="lora", param_dtype="bfloat16")
  machines = [machine for name in USUAL if (machine := machine_of(name))]
  for machine in machines:
    price = prices[machine.chip.name]
    found = best(settings, plan, machine, price)
    rows.append(report.machine_row(machine, found, plan))
    written[machine.name] = None if found is None else as_json(found, plan)
    if found is not None and found.fits == "no":
      small = best(adapters, plan, machine, price)
      said = "with adapters alone (policy.trainable=lora, bfloat16): " + (
        "no" if small is None else f"{small.fits}, {small.memory.total / GIB:.1f} GiB"
      )
      reasons.append(f"{machine.name}: {report.why_not(found)}; {said}")
    elif found is not None and plan.compile and machine.topology:
      compiled = compile_apart(found.settings, plan, machine.topology)
      written[machine.name] |= compiled
      total = compiled["gib_per_device"]["total"]
      reasons.append(f"{machine.name}: compiled, it takes {total:.2f} GiB")
    write_json(workdir / "plan.json", {"topology": AUTO, "machines": written})
  log.info(
    "%s, as it runs best on each machine (mesh, microbatches of update and judge, and chunks "
    "are chosen for it; estimated, not compiled):\n%s",
    settings.policy.checkpoint,
    report.table(rows),
  )
  for reason in reasons:
    log.info("%s", reason)
  log.info(
    "hours and USD are for %s images; %s. Prices change (plan.prices): %s",
    f"{plan.images:,}",
    report.ASSUMED,
    PRICES_OF,
  )
