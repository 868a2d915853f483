"""Mode `calibrate`: whether a judge can be trusted, before it is: a table, a plot and the margin to
abstain by.

Held-out questions are asked with captions whose worth is known: true ones, one that says nothing,
another image's, and none. A judge that can teach answers right from the first and abstains, or is
at chance, with the others. Every reading is asked, over rotated options, and compared with the
official sampled protocol.
"""

import dataclasses
import logging
import math
import pathlib
from typing import Any

import jax

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.config import schema as configuration
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.harness.process.workdir_lock import only_writer
from caprl_jax.harness.sections import DataSection, GateSection
from caprl_jax.inference.judge import JudgeSection, check_text_judge
from caprl_jax.modes.calibrate.figures import calibrate
from caprl_jax.modes.calibrate.judges import Judges
from caprl_jax.modes.calibrate.section import CalibrateConfig
from caprl_jax.modes.calibrate.show import draw, table
from caprl_jax.modes.calibrate.trials import make_trials

log = logging.getLogger("caprl_jax.modes.calibrate.run")

CALIBRATION = "calibration.json"
WRITTEN = "generate"  # the reading of written answers


def _in_json(value: Any) -> Any:
  """The same with null for numbers that are not finite, which JSON does not have: what could not be
  told, such as how far orders of the options agree where there is one."""
  if isinstance(value, dict):
    return {key: _in_json(held) for key, held in value.items()}
  if isinstance(value, list):
    return [_in_json(held) for held in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _in_words(cfg: CalibrateConfig) -> CalibrateConfig:
  """The same with the one reading that a server's answers have. Raises ValueError where it is not
  among those to be compared."""
  if WRITTEN not in cfg.readings:
    raise ValueError(
      f"calibrate.readings = {cfg.readings}: a judge behind an endpoint answers in words; name "
      f"{WRITTEN!r}, or set judge.source and judge.endpoint = None"
    )
  if len(cfg.readings) > 1:
    log.info("a judge behind an endpoint answers in words: only the reading %r is asked", WRITTEN)
  return dataclasses.replace(cfg, readings=(WRITTEN,))


def run(config, workdir: pathlib.Path) -> None:
  """Writes calibration.json and calibration.png, and prints the table."""
  cfg = configuration.load_section(config, "calibrate", CalibrateConfig)
  section = configuration.load_section(config, "judge", JudgeSection)
  check_text_judge(section)
  if section.endpoint is not None:
    cfg = _in_words(cfg)
  data, gate = (
    configuration.load_section(config, *x) for x in (("data", DataSection), ("gate", GateSection))
  )
  mesh = sharding.make_mesh(configuration.load_section(config, "mesh", sharding.MeshConfig))
  seed = config.get("seed", 0)
  with only_writer(workdir / CALIBRATION), jax.set_mesh(mesh):
    trials = make_trials(read_qa_rows(data.eval, seed, data.max_eval_rows), cfg, gate, seed)
    names = sorted({trial.question.kind for trial in trials})
    figures = calibrate(Judges(section, mesh, names, seed), trials, section, cfg, seed)
    if jax.process_index() > 0:
      return
    write_json(workdir / CALIBRATION, _in_json({"judge": section.name, **figures}))
    draw(figures, workdir / "calibration.png")
  log.info(
    "judge %s, %d held-out questions:\n%s",
    section.name,
    figures["questions"],
    table(figures, cfg.readings[-1]),
  )
  log.info("plot: %s", workdir / "calibration.png")
