"""Mode `curate`: images in, filtered questions out, as CapRL made its training set (arXiv
2509.22647, section 3.1).

Five stages, each in shards on disk that all hosts share (`ShardedJob`), each taken up where it was
stopped:

  1 images      every image is read and hashed; repeated ones and those like a benchmark's images go
  2 questions   a vision-language model, here or behind an endpoint, writes questions
  3 answers     they are parsed, and a (smaller) model answers each with the image and without, in
                several orders
  4 selection   kept is what is answered with the image and not without; what asks nearly the same
                goes
  5 output      the rows, the funnel, a page to browse

Selection is cheap and always done anew: other thresholds need no model.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json, write_text
from caprl_jax.config import schema as configuration
from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.readers.image_sources import find_images
from caprl_jax.data.readers.jsonl import plain_questions
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import (
  CaptionRow,
  QARow,
  Question,
  image_bytes,
)
from caprl_jax.data.usable_rows import fits
from caprl_jax.harness.process.run_record import RunRecord
from caprl_jax.harness.row_shards import RowResult, ShardedJob, manifest
from caprl_jax.harness.sections import PolicySection
from caprl_jax.inference.captioner import (
  Captioner,
  CaptionerConfig,
  CaptionerOutput,
  open_captioner,
)
from caprl_jax.inference.endpoint import Endpoint, EndpointConfig
from caprl_jax.inference.open_vqa import letter_answerer
from caprl_jax.inference.vqa import VqaRunner
from caprl_jax.modes.curate import generated
from caprl_jax.modes.curate.images import Numbered, benchmark_signatures, choose_images, look
from caprl_jax.modes.curate.page import write_page
from caprl_jax.modes.curate.prompts import GenerationPrompt, read_prompt
from caprl_jax.modes.curate.released_rows import write_released_rows
from caprl_jax.modes.curate.section import CurateConfig
from caprl_jax.modes.curate.selection import funnel, funnel_text, select
from caprl_jax.modes.dataset.outputs import check_output, write_output

log = logging.getLogger("caprl_jax.modes.curate.run")


@dataclasses.dataclass
class Stages:
  """The folders of the stages, for one host of several."""

  folder: pathlib.Path
  host: int
  hosts: int
  shard_rows: int

  def run(
    self,
    name: str,
    settings: dict[str, Any],
    rows: Sequence[CaptionRow | QARow],
    open_worker: Callable[[], contextlib.AbstractContextManager[Any]],
    work: Callable[[Any, Numbered], Iterator[list[RowResult]]],
  ) -> ShardedJob:
    """Does this host's shards of a stage, as `ShardedJob.run`, and waits for the others'.

    Args:
      settings: all that its rows depend on.
    """
    names = [row.name for row in rows]
    parts = ShardedJob(
      self.folder / name,
      rows,
      manifest(settings, names, self.shard_rows),
      host=self.host,
      hosts=self.hosts,
    )
    parts.open()
    parts.run(open_worker, work, what=name[2:])
    parts.wait()
    return parts


# ---- 2: questions ----


def _generate(captioner: Captioner, rows: Numbered) -> Iterator[list[RowResult]]:
  for batch in captioner(rows):
    yield [RowResult(out.number, out.row, _reply(out), out.about()) for out in batch]


def _reply(output: CaptionerOutput) -> dict[str, Any]:
  reply = {"image": output.row.name, "text": None, "error": None, "finish": None}
  if output.error is not None:
    return reply | {"error": str(output.error)}
  (written,) = output.captions
  return reply | {"text": written.text, "finish": written.finish}


def _ask(endpoint: Endpoint, prompt: GenerationPrompt, rows: Numbered) -> Iterator[list[RowResult]]:
  row_of = dict(rows)  # replies come in any order, with the number that was asked
  requests = ((number, prompt.system, prompt.user, image_bytes(row)) for number, row in rows)

  # kept only when a later request gets through: a server that died has refused no image
  failed: list[RowResult] = []
  for number, reply in endpoint.ask_all(requests):
    row = row_of[number]
    found = {
      "image": row.name,
      "text": reply.text,
      "error": reply.error,
      "finish": reply.finish,
    }
    item = RowResult(number, row, found, {"attempts": reply.attempts})
    if reply.error is not None:
      failed.append(item)
      continue
    yield [*failed, item]
    failed = []
  if failed:
    yield failed


# ---- 3: answers ----


def parse(
  item: RowResult, provenance: str, repeats: bool = False
) -> tuple[list[Question], list[dict[str, str]]]:
  """A generator's text -> its questions, and what of it could not be read, with the reasons.
  repeats: `curate.repeated_questions`."""
  if item.row.get("error"):
    return [], [{"reason": "no reply", "text": item.row["error"]}]
  questions, failures = generated.parse_generated(item.row["text"] or "", repeats)
  cut = item.row.get("finish") == "length"
  return (
    [dataclasses.replace(question, provenance=provenance) for question in questions],
    [
      {
        "reason": ("cut at max_tokens: " if cut and failure is failures[-1] else "")
        + failure.reason,
        "text": failure.text,
      }
      for failure in failures
    ],
  )


def _answer(
  answerer: VqaRunner, rows: Numbered, failures: dict[int, list]
) -> Iterator[list[RowResult]]:
  for batch in answerer(rows):
    yield [
      RowResult(
        result.number,
        result.row,
        {
          "image": result.row.name,
          "questions": plain_questions(result.row),
          "verdicts": [dataclasses.asdict(answer) for answer in result.answers],
          "failures": failures.get(result.number, []),
          "error": "" if result.error is None else str(result.error),
        },
        {},
      )
      for result in batch
    ]


# ---- the mode ----


def run(config, workdir: pathlib.Path) -> None:
  """Runs all stages; writes `curate.output`, and funnel.json, left_out.jsonl and curation.html to
  the workdir.
  """
  cfg = configuration.load_section(config, "curate", CurateConfig)
  check_output(cfg.output, "curate.output", cfg.name, workdir)
  answerer_section = configuration.load_section(config, "answerer", PolicySection).settled()
  seed = config.get("seed", 0)
  mesh_section = configuration.load_section(config, "mesh", sharding.MeshConfig)
  mesh = sharding.make_mesh(mesh_section, jax.local_devices())
  for name, size in (
    ("curate.batch_size", cfg.batch_size),
    ("curate.answers.batch_size", cfg.answers.batch_size),
  ):
    sharding.check_batch_size(size, mesh, name)
  prompt = None if cfg.questions == "given" else read_prompt(cfg.prompt)
  bad = BadRowList(cfg.bad_rows_rule, workdir / "bad_rows.jsonl", "--config.curate.bad_rows")
  rows = _read(cfg, seed, bad)
  shown = [answerer_section]
  if cfg.questions == "generator":
    shown.append(configuration.load_section(config, "generator", PolicySection))
  checks = [fits(section.pixels()) for section in shown]
  stages = Stages(workdir / "stages", jax.process_index(), jax.process_count(), cfg.shard_rows)
  looked = stages.run("1_images", {}, rows, contextlib.nullcontext, look)
  benchmark = benchmark_signatures(cfg, bad)
  kept, gone, out = choose_images(looked, benchmark, cfg, checks, bad)
  log.info(
    "%d images: %d go on, %s",
    len(rows),
    len(kept),
    ", ".join(f"{n} {why}" for why, n in gone.items()) or "none left out",
  )
  if not kept:
    raise ValueError(
      f"no image of {cfg.input} is left: {dict(gone)}; see curate.min_side and similar_bits"
    )
  written, provenance = None, ""
  if prompt is not None:
    written, provenance = _questions_stage(stages, config, cfg, prompt, kept, mesh, seed)
  answers = _answers_stage(
    stages,
    cfg,
    answerer_section,
    rows=kept,
    written=written,
    provenance=provenance,
    mesh=mesh,
    seed=seed,
  )
  if stages.host == 0:
    with answers.lock("output"):
      sections = {"seed": seed, "mesh": mesh_section, "curate": cfg, "answerer": answerer_section}
      record = _begin_record(workdir, sections, looked, written, answers)
      _write(answers, cfg, looked.count, gone=gone, out=out, workdir=workdir, seed=seed)
      record.finish(looked.count)
  else:
    log.info(
      "host %d of %d: its shards are done; host 0 writes the output", stages.host, stages.hosts
    )


def _begin_record(
  workdir: pathlib.Path,
  sections: dict[str, Any],
  looked: ShardedJob,
  written: ShardedJob | None,
  answers: ShardedJob,
) -> RunRecord:
  """The run's record, with what the output will be made of. What must not change, the stages'
  manifests have compared; selection is always done anew."""
  record = RunRecord(workdir, "curate", alone=True)
  record.begin(sections, ("*",))
  record.reopen()
  found = {"curate.input": looked.manifest["names_sha256"]}
  if written is not None and "checkpoint_sha256" in written.manifest:
    found["generator.checkpoint"] = written.manifest["checkpoint_sha256"]
  record.renew({**found, "answerer.checkpoint": answers.manifest["checkpoint_sha256"]})
  return record


def _read(cfg: CurateConfig, seed: int, bad: BadRowList) -> Sequence[CaptionRow | QARow]:
  """The images, or the rows that are given. Raises ValueError for bad ones that are refused."""
  if cfg.questions != "given":
    return find_images(cfg.input, "curate.input")
  rows = read_qa_rows(cfg.input, seed, bad_rows=bad)
  bad.settle()
  return rows


def _questions_stage(
  stages: Stages, config, cfg: CurateConfig, prompt: GenerationPrompt, rows, mesh, seed
) -> tuple[ShardedJob, str]:
  sampling = {key: getattr(cfg, key) for key in ("max_tokens", "temperature", "repetition_penalty")}
  settings = prompt._asdict()
  if cfg.questions == "endpoint":
    endpoint_cfg = configuration.load_section(config, "endpoint", EndpointConfig)
    settings |= {
      "model": endpoint_cfg.model,
      "max_tokens": endpoint_cfg.max_tokens,
      "temperature": endpoint_cfg.temperature,
      "repetition_penalty": endpoint_cfg.repetition_penalty,
    }

    def make():
      endpoint = Endpoint(endpoint_cfg)
      endpoint.check()
      return endpoint

    def ask(endpoint: Endpoint, left: Numbered) -> Iterator[list[RowResult]]:
      return _ask(endpoint, prompt, left)

    return stages.run("2_questions", settings, rows, make, ask), endpoint_cfg.model
  section = configuration.load_section(config, "generator", PolicySection).settled()
  settings |= sampling | section.identity() | {"seed": seed}
  captioner_cfg = CaptionerConfig(
    prompt.user,
    prompt.system,
    batch_size=cfg.batch_size,
    **sampling,
  )
  parts = stages.run(
    "2_questions",
    settings,
    rows,
    lambda: open_captioner(section.load, captioner_cfg, mesh=mesh, seed=seed),
    _generate,
  )
  return parts, section.checkpoint


def _answers_stage(
  stages: Stages,
  cfg: CurateConfig,
  section: PolicySection,
  rows,
  written: ShardedJob | None,
  provenance: str,
  mesh,
  seed,
) -> ShardedJob:
  failures: dict[int, list] = {}
  settings = section.identity() | {
    "answers": dataclasses.asdict(cfg.answers),
    "seed": seed,
    "questions": written.manifest if written else cfg.input,
  }
  if cfg.repeated_questions:
    settings["repeated_questions"] = True
  asked = list(rows)
  if written:
    for item in written.read():
      questions, failures[item.number] = parse(item, provenance, cfg.repeated_questions)
      asked[item.number] = QARow(item.source.image, tuple(questions), item.source.name)
  with jax.set_mesh(mesh):
    return stages.run(
      "3_answers",
      settings,
      asked,
      lambda: letter_answerer(section.load(mesh), cfg.answers, mesh, seed),
      lambda answerer, left: _answer(answerer, left, failures),
    )


def _write(
  answers: ShardedJob[QARow],
  cfg: CurateConfig,
  images: int,
  gone: Counter,
  out: list[dict],
  workdir: pathlib.Path,
  seed,
) -> None:
  pairs = [(item, select(item, cfg)) for item in answers.read()]
  if cfg.answers_output:
    path = pathlib.Path(cfg.answers_output).expanduser()
    count = write_released_rows(path, (item for item, _ in pairs), cfg.answers.permutations)
    log.info("wrote the answers about %d images to %s", count, path)
  figures = funnel(images, gone, pairs, len(pairs))
  write_json(workdir / "funnel.json", figures)
  for item, selected in pairs:
    out += [{"image": item.row["image"], **failure} for failure in item.row["failures"]]
    out += [
      {"image": item.row["image"], "reason": reason, "question": dataclasses.asdict(question)}
      | ({"verdict": dataclasses.asdict(found)} if found else {})
      for question, found, reason in selected.dropped
    ]
  write_text(
    workdir / "left_out.jsonl", "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in out)
  )
  log.info("%s\n%s", cfg.input, funnel_text(figures))
  write_page(
    workdir / "curation.html", cfg.input, figures, [selected for _, selected in pairs], seed
  )
  left = [selected.row for _, selected in pairs if selected.kept]
  log.info(
    "page: %s   what was left out and why: %s",
    workdir / "curation.html",
    workdir / "left_out.jsonl",
  )
  if not left:
    raise ValueError(
      f"no question is left of {figures['questions']['parsed']}; see "
      f"{workdir / 'left_out.jsonl'} and the thresholds curate.min_visual = "
      f"{cfg.min_visual} and max_blind = {cfg.max_blind}"
    )
  path = write_output(left, cfg.output, cfg.split, cfg.name, workdir)
  log.info("wrote %d rows to %s", len(left), path)
