"""Mode `prism`: how much of an image a captioner's words carry.

Prism is CapRL's evaluation (arXiv 2509.22647, section 4.1): a captioner writes captions of a
benchmark's images, a language model that never sees the images answers the benchmark's questions
from each caption, the answers are scored. Several captioners are compared on the same images,
questions and answering model. Captions and answers are kept by content (`ResultCache`), so that an
interrupted evaluation goes on, several processes share the work, and a benchmark on the same
images costs no caption.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.config import schema as configuration
from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.image_check import ImageCheck
from caprl_jax.data.readers import benchmarks
from caprl_jax.data.readers.benchmarks import BenchmarkRow
from caprl_jax.data.rows import CaptionRow, Question
from caprl_jax.data.usable_rows import ImageFacts, bad_row, fits
from caprl_jax.harness.process import peers
from caprl_jax.harness.process.first import from_all, from_first
from caprl_jax.harness.process.run_record import RunRecord
from caprl_jax.harness.process.workdir_lock import only_run
from caprl_jax.harness.result_cache import ResultCache
from caprl_jax.harness.sections import PolicySection
from caprl_jax.harness.training.row_digests import digest_of_all, row_digests
from caprl_jax.hub.hub_files import fingerprint
from caprl_jax.hub.load import Loaded
from caprl_jax.inference.captioner import CaptionerConfig, open_captioner
from caprl_jax.inference.judge import HostJudge, JudgeSection, open_judge
from caprl_jax.inference.text_writer import TextWriter
from caprl_jax.modes.prism import figures as prism_figures
from caprl_jax.modes.prism.figures import Evaluation
from caprl_jax.modes.prism.page import write_page
from caprl_jax.modes.prism.questions import Questions, gold_index, read_questions
from caprl_jax.modes.prism.section import PrismConfig
from caprl_jax.progress import Bar
from caprl_jax.rl.sampling import SamplingConfig

log = logging.getLogger("caprl_jax.modes.prism.run")

LETTER_ONLY = "\nAnswer with the letter of the right option only."


def caption_all(
  images: dict[str, CaptionRow],
  kept: ResultCache,
  load,
  cfg: PrismConfig,
  instruction: str,
  mesh,
  seed: int,
  bad: BadRowList,
) -> set[str]:
  """Captions what `kept` does not hold yet, each process its part. Returns the images that cannot
  be read any more; raises ValueError where such are refused."""
  keys = list(images)
  # Numbers go into random keys: counted among all, so that those of two interrupted runs differ.
  # Not of what is left: another process may have kept some of it already.
  mine = range(jax.process_index(), len(keys), jax.process_count())
  left = [(number, images[keys[number]]) for number in mine if keys[number] not in kept]
  lost = _write_captions(left, keys, kept, load, cfg, instruction, mesh, seed, bad) if left else []
  peers.check()  # none waits for long in what comes now
  everywhere = {key for some in from_all(lost) for key in some}
  kept.await_others(key for key in keys if key not in everywhere)
  return everywhere


def _write_captions(
  left: Sequence[tuple[int, CaptionRow]],
  keys: Sequence[str],
  kept: ResultCache,
  load,
  cfg: PrismConfig,
  instruction: str,
  mesh,
  seed: int,
  bad: BadRowList,
) -> list[str]:
  """Captions numbered images, whose keys are `keys`; those of them that cannot be read any more."""
  lost = []
  settings = CaptionerConfig(
    instruction,
    captions=cfg.captions,
    max_tokens=cfg.max_tokens,
    temperature=cfg.temperature,
    top_p=cfg.top_p,
    batch_size=cfg.batch_size,
    repetition_penalty=1.0,
  )
  with (
    open_captioner(load, settings, mesh=mesh, seed=seed) as captioner,
    Bar(len(left), "captions", "image") as bar,
  ):
    for found in captioner(left):
      for item in found:
        if item.error is not None:
          bad.late(bad_row(item.row, item.error))
          lost.append(keys[item.number])
      kept.put(
        {
          keys[item.number]: [
            {"caption": one.text, "tokens": len(one.tokens), "finish": one.finish}
            for one in item.captions
          ]
          for item in found
          if item.error is None
        }
      )
      bar.update(len(found))
  return lost


class Prompts:
  """(row, caption) -> token ids that the answering model goes on from."""

  def __init__(self, judge: Loaded):
    self.tokenizer = judge.tokenizer
    self.chat = judge.tokenizer.backend.token_to_id("<|im_start|>") is not None

  def __call__(self, row: BenchmarkRow, caption: str) -> list[int]:
    """A caption that spells special tokens is tokenised by itself, as text: it cannot close the
    turn.
    """
    before, after = benchmarks.split_prompt(row)
    if row.benchmark == benchmarks.QUESTIONS:  # has no turns of its own
      after += LETTER_ONLY
      if self.chat:
        before, after = f"<|im_start|>user\n{before}", f"{after}<|im_end|>\n<|im_start|>assistant\n"
      else:
        after += "\nAnswer:"
    encode, plain = self.tokenizer.encode, self.tokenizer.encode_plain
    if encode(caption) == plain(caption):
      return encode(before + caption + after)
    return encode(before) + plain(caption) + encode(after)


# A row, a caption, and what the caption is: the key of what it was written of and its number among
# the captions of that.
Pair = tuple[BenchmarkRow, str, tuple[str, int]]


def write_answers(
  pairs: Sequence[Pair], kept: ResultCache, judge: Loaded, writer: TextWriter, cfg: PrismConfig
) -> list[str]:
  """The text that answers each row from each caption; what `kept` holds is not written again."""
  prompts = Prompts(judge)
  ids = [prompts(row, caption) for row, caption, _ in pairs]
  # Two captions with the same words, of one image or of two, are answered by themselves: at a
  # temperature, answers are draws, and one draw for several images would look like agreement.
  keys = [
    hashlib.sha256(json.dumps([one, which if cfg.answer_temperature else 0]).encode()).hexdigest()
    for one, (_, _, which) in zip(ids, pairs)
  ]
  left = {key: one for key, one in zip(keys, ids) if key not in kept}
  names = from_first(lambda: list(left))  # of which each process writes a part
  if names:
    prompt_of = dict(zip(keys, ids))
    with jax.set_mesh(writer.mesh), Bar(len(left), "answers", "answer") as bar:
      for found in writer([prompt_of[name] for name in names]):
        kept.put(
          {names[number]: {"text": text.text, "finish": text.finish} for number, text in found}
        )
        bar.update(len(found))
    peers.check()
    kept.await_others(keys)
  return [kept[key]["text"] for key in keys]


def read_answers(pairs: Sequence[Pair], host_judge: HostJudge) -> np.ndarray:
  """The option that the judge reads from each caption, int; -1 where it abstains."""
  question = lambda row: Question(row.stem, row.options, gold_index(row), row.kind)
  asks = [(caption, question(row)) for row, caption, _ in pairs]
  return host_judge.choices(asks, "answers")


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
    name: dataclasses.replace(policy, checkpoint=checkpoint)
    for name, checkpoint in cfg.checkpoints.items()
  }
  # All of them before the first caption: the last one, or the judge, may not be there.
  identities = {name: captioner.identity() for name, captioner in captioners.items()}
  judge = _answers_identity(section, cfg, seed)
  cache = pathlib.Path(cfg.cache).expanduser() if cfg.cache else workdir / "cache"
  kept = ResultCache(cache, "answers", judge) if cfg.answers == "write" else None
  bad = BadRowList(cfg.bad_rows, workdir / "bad_rows.jsonl", "--config.prism.bad_rows")
  checks = [fits(captioner.pixels()) for captioner in captioners.values()]
  asked = read_questions(cfg, seed, bad, ImageCheck(workdir), checks)
  sections = {"seed": seed, "mesh": mesh_section, "policy": policy, "judge": section, "prism": cfg}
  record = _begin_record(workdir, sections, identities, judge, asked)
  captions = {}
  for name, captioner in captioners.items():
    captions[name], lost = _captions_of(
      name, captioner, identities[name], asked.images, cache, cfg, mesh, seed, bad
    )
    asked = asked.without(lost)
  evaluation = Evaluation(
    asked.rows, asked.digests, asked.shown, asked.images, captions, {}, asked.left_out
  )
  answered = _answer_all(evaluation, section, cfg, kept, mesh, seed)
  if jax.process_index() == 0:
    _write(dataclasses.replace(evaluation, answered=answered), cfg, seed, workdir)
  record.finish(sum(map(len, asked.rows.values())))


def _write(evaluation: Evaluation, cfg: PrismConfig, seed: int, workdir: pathlib.Path) -> None:
  """Figures, answers and the page."""
  figures = prism_figures.summarise(evaluation, cfg, seed)
  write_json(workdir / "prism.json", figures)
  prism_figures.write_answers(workdir / "answers.jsonl", evaluation)
  log.info("\n%s", prism_figures.table_text(figures))
  page = workdir / "prism.html"
  write_page(page, figures, evaluation, examples=cfg.examples, seed=seed)
  log.info("page: %s", page)


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


def _answers_identity(section: JudgeSection, cfg: PrismConfig, seed: int) -> dict[str, Any]:
  """What written answers depend on, but for what is asked. Raises ValueError for a judge that is
  not there."""
  settings: dict[str, Any] = {
    "judge": section.source,
    "judge_sha256": fingerprint(section.source),
    "dtype": section.dtype,
  }
  if section.int8:  # the key is new: without it, what was kept stays valid
    settings["int8"] = True
  return settings | {
    "temperature": cfg.answer_temperature,
    "tokens": cfg.answer_tokens,
    "seed": seed,
  }


def _captions_of(
  name: str,
  captioner: PolicySection,
  identity: dict[str, Any],
  images: dict[str, CaptionRow],
  cache: pathlib.Path,
  cfg: PrismConfig,
  mesh: jax.sharding.Mesh,
  seed: int,
  bad: BadRowList,
) -> tuple[ResultCache, set[str]]:
  """One captioner's captions of all images, and the images that it could not read; those that an
  earlier run kept are not written again."""
  settings = {
    "instruction": captioner.instruction,
    "captions": cfg.captions,
    "temperature": cfg.temperature,
    "top_p": cfg.top_p,
    "max_tokens": cfg.max_tokens,
    "seed": seed,
  }
  captions = ResultCache(cache, "captions", identity | settings)
  log.info(
    "captioner %s: %d of %d images are captioned already",
    name,
    sum(key in captions for key in images),
    len(images),
  )
  lost = caption_all(images, captions, captioner.load, cfg, captioner.instruction, mesh, seed, bad)
  return captions, lost


def _answer_all(
  evaluation: Evaluation,
  section: JudgeSection,
  cfg: PrismConfig,
  kept: ResultCache | None,
  mesh: jax.sharding.Mesh,
  seed: int,
) -> dict[str, dict[str, np.ndarray]]:
  """`Evaluation.answered`. Texts go to `kept`; without one, options are read."""
  # One judge and one writer for all benchmarks: what is compiled for one serves the others.
  kinds = sorted({row.kind for rows in evaluation.rows.values() for row in rows})
  with jax.set_mesh(mesh):
    host_judge = open_judge(section, kinds=kinds, mesh=mesh, seed=seed)
  writer = None
  if kept is not None:
    sampling = SamplingConfig(cfg.answer_tokens, temperature=cfg.answer_temperature)
    writer = TextWriter(
      host_judge.judge,
      sampling,
      batch_size=cfg.answer_batch_size,
      mesh=mesh,
      seed=seed,
      share=(jax.process_index(), jax.process_count()),
    )
  answered: dict[str, dict[str, np.ndarray]] = {}
  for name, rows in evaluation.rows.items():
    answered[name] = {}
    for who, pairs in _pairs(evaluation, name, cfg.blind).items():
      if kept is None:
        with jax.set_mesh(mesh):
          found = read_answers(pairs, host_judge)
      else:
        found = np.array(write_answers(pairs, kept, host_judge.judge, writer, cfg), object)
      answered[name][who] = found.reshape(len(rows), -1)
  return answered


def _pairs(evaluation: Evaluation, benchmark: str, blind: bool) -> dict[str, list[Pair]]:
  """Captioner -> each question with each of its captions; with `blind`, also with none."""
  questions = list(zip(evaluation.rows[benchmark], evaluation.shown[benchmark], strict=True))
  pairs: dict[str, list[Pair]] = {
    who: [
      (row, one["caption"], (key, n))
      for row, key in questions
      for n, one in enumerate(captions[key])
    ]
    for who, captions in evaluation.captions.items()
  }
  if blind:
    pairs[prism_figures.BLIND] = [(row, "", (key, 0)) for row, key in questions]
  return pairs
