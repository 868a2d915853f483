"""Mode `prism`: how much of an image a captioner's words carry.

Prism is CapRL's evaluation (arXiv 2509.22647, section 4.1): a captioner writes captions of a
benchmark's images, a language model that never sees the images answers the benchmark's questions
from each caption, the answers are scored. Several captioners are compared on the same images,
questions and answering model. Captions and answers are kept by content (`ResultCache`), so that an
interrupted evaluation goes on, several processes share the work, and a benchmark on the same
images costs no caption.
"""

import dataclasses
import logging
import pathlib
from typing import Any

import jax

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.config import schema as configuration
from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.image_check import ImageCheck
from caprl_jax.data.usable_rows import ImageFacts, fits
from caprl_jax.harness.process.run_record import RunRecord
from caprl_jax.harness.process.workdir_lock import only_run
from caprl_jax.harness.result_cache import ResultCache
from caprl_jax.harness.sections import PolicySection
from caprl_jax.harness.training.row_digests import digest_of_all, row_digests
from caprl_jax.inference.judge import JudgeSection
from caprl_jax.modes.prism.answers import answer_all, answers_identity, check_prompts
from caprl_jax.modes.prism.captions import captions_of
from caprl_jax.modes.prism.evaluation import Evaluation, write_answers
from caprl_jax.modes.prism.figures import summarise
from caprl_jax.modes.prism.gallery import write_gallery
from caprl_jax.modes.prism.page import write_page
from caprl_jax.modes.prism.questions import Questions, read_questions
from caprl_jax.modes.prism.section import PrismConfig
from caprl_jax.modes.prism.table import table_text

log = logging.getLogger("caprl_jax.modes.prism.run")


def run(config, workdir: pathlib.Path) -> None:
  """Prism: writes prism.json, answers.jsonl and prism.html to the workdir. Several processes share
  images and answers, and the first one writes."""
  with only_run(workdir):
    _run(config, workdir)


def _run(config, workdir: pathlib.Path) -> None:
  cfg = configuration.load_section(config, "prism", PrismConfig)
  policy = configuration.load_section(config, "policy", PolicySection)
  section = configuration.load_section(config, "judge", JudgeSection)
  seed = config.get("seed", 0)
  mesh_section = configuration.load_section(config, "mesh", sharding.MeshConfig)
  # Of this process's devices: each captions its images, and writes its answers.
  mesh = sharding.make_mesh(mesh_section, jax.local_devices())
  for name, size in (
    ("prism.batch_size", cfg.batch_size),
    ("prism.answer_batch_size", cfg.answer_batch_size),
  ):
    sharding.check_batch_size(size, mesh, name)
  captioners = {
    name: dataclasses.replace(policy, checkpoint=checkpoint).settled()
    for name, checkpoint in cfg.checkpoints.items()
  }
  # All of them before the first caption: the last one, or the judge, may not be there.
  identities = {name: captioner.identity() for name, captioner in captioners.items()}
  judge = answers_identity(section, cfg, seed)
  cache = pathlib.Path(cfg.cache).expanduser() if cfg.cache else workdir / "cache"
  kept = ResultCache(cache, "answers", judge) if cfg.answers == "write" else None
  bad = BadRowList(cfg.bad_rows, workdir / "bad_rows.jsonl", "--config.prism.bad_rows")
  checks = [fits(captioner.pixels()) for captioner in captioners.values()]
  asked = read_questions(cfg, seed, bad, ImageCheck(workdir), checks)
  if kept is not None:
    check_prompts(asked.rows, section)
  sections = {"seed": seed, "mesh": mesh_section, "policy": policy, "judge": section, "prism": cfg}
  record = _begin_record(workdir, sections, identities, judge, asked)
  captions = {}
  for name, captioner in captioners.items():
    captions[name], lost = captions_of(
      name,
      captioner,
      identity=identities[name],
      images=asked.images,
      cache=cache,
      cfg=cfg,
      mesh=mesh,
      seed=seed,
      bad=bad,
    )
    asked = asked.without(lost)
  evaluation = Evaluation(
    asked.rows, asked.digests, asked.shown, asked.images, captions, {}, asked.left_out
  )
  answered = answer_all(evaluation, section, cfg, kept=kept, mesh=mesh, seed=seed)
  evaluation = dataclasses.replace(evaluation, answered=answered).answered_in_full()
  if jax.process_index() == 0:
    _write(evaluation, cfg, seed, workdir)
  record.finish(sum(map(len, asked.rows.values())))


def _write(evaluation: Evaluation, cfg: PrismConfig, seed: int, workdir: pathlib.Path) -> None:
  """Figures, answers and the page."""
  figures = summarise(evaluation, cfg, seed)
  write_json(workdir / "prism.json", figures)
  write_answers(workdir / "answers.jsonl", evaluation)
  log.info("\n%s", table_text(figures))
  page, gallery = workdir / "prism.html", workdir / "gallery.html" if cfg.gallery else None
  write_page(
    page,
    figures,
    evaluation,
    examples=cfg.examples,
    seed=seed,
    gallery=gallery.name if gallery else None,
  )
  log.info("page: %s", page)
  if gallery:
    write_gallery(gallery, evaluation, cfg.gallery, seed)
    log.info("page: %s", gallery)


def _begin_record(
  workdir: pathlib.Path,
  sections: dict[str, Any],
  captioners: dict[str, dict[str, Any]],
  judge: dict[str, Any],
  asked: Questions,
) -> RunRecord:
  """The run's record, with what the figures will be made of. What was kept of earlier runs is kept
  by its contents, so all of it may change.

  Args:
    captioners, judge: their identities.
  """
  log.info(
    "%d images, %s",
    len(asked.images),
    ", ".join(f"{name}: {len(rows)} questions" for name, rows in asked.rows.items()),
  )
  record = RunRecord(workdir, "prism")
  record.begin(sections, ("*",))
  record.reopen()
  found = {f"captioner {name}": one["checkpoint_sha256"] for name, one in captioners.items()}
  for name, rows in asked.rows.items():
    facts = [ImageFacts(sha256=digest) for digest in asked.digests[name]]
    found[f"benchmark {name}"] = digest_of_all(row_digests(rows, facts))
  record.renew({"judge.source": judge["judge_sha256"], **found})
  return record
