"""Mode `prism`: how much of an image a captioner's words carry.

Prism is CapRL's evaluation (arXiv 2509.22647, section 4.1): a captioner writes captions of a
benchmark's images, a language model that never sees the images answers the benchmark's questions
from each caption, the answers are scored. Several captioners are compared on the same images,
questions and answering model. Captions and answers are kept by content (`ResultCache`), so that an
interrupted evaluation goes on and a benchmark on the same images costs no caption.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.config import schema as configuration
from caprl_jax.config.named_values import parse_named
from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.image_check import ImageCheck
from caprl_jax.data.readers import benchmarks
from caprl_jax.data.readers.benchmarks import BenchmarkRow
from caprl_jax.data.rows import BadRows, CaptionRow, Question
from caprl_jax.data.usable_rows import ImageFacts, bad_row, fits
from caprl_jax.harness.process.run_record import RunRecord
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
from caprl_jax.progress import Bar
from caprl_jax.rl.sampling import SamplingConfig

log = logging.getLogger("caprl_jax.modes.prism.run")

LETTER_ONLY = "\nAnswer with the letter of the right option only."


@dataclasses.dataclass(frozen=True)
class PrismConfig:
  """The section `prism`.

  captioners: "name=checkpoint", joined by commas; the other settings are those of section
    `policy`. The others are compared with the first.
  benchmarks: "name=source", joined by commas: a file of CapRL-Evaluation-Files (lmm_eval_*.json),
    or a QA source (`qa_sources.py`).
  image_root: folder or .zip with the images of such files.
  max_rows: of each benchmark.
  captions: captions per image; CapRL takes 4 at temperature 1 and reports their mean. 1 at
    temperature 0 is greedy.
  captions_per: "image": the questions about an image are answered from the same captions; or
    "question": each has captions of its own, as released, which takes longer where an image has
    several questions.
  temperature, top_p: of the captions.
  max_tokens: longest caption.
  batch_size: images that are captioned at once.
  answers: "write", as CapRL: the answering model (section `judge`) writes; or "read": its reading
    of the options, as in training (rows with lettered options only; the others are left out and
    counted). Reading also tells a caption that says nothing from one that misleads.
  answer_tokens: longest written answer.
  answer_temperature: of written answers.
  answer_batch_size: answers that are written at once.
  blind: ask with an empty caption too, for the column `blind`.
  intervals: level of the confidence intervals.
  examples: questions on the page.
  cache: folder of captions and answers; None: in the workdir.
  bad_rows: "refuse" to start while a question or its image cannot be used, or "drop" and log it;
    the figures say how many are left out.
  """

  captioners: str
  benchmarks: str
  image_root: str | None = None
  max_rows: int | None = None
  captions: int = 4
  captions_per: Literal["image", "question"] = "image"
  temperature: float = 1.0
  top_p: float = 1.0
  max_tokens: int = 2048
  batch_size: int = 8
  answers: Literal["write", "read"] = "write"
  answer_tokens: int = 2048
  answer_temperature: float = 1.0
  answer_batch_size: int = 16
  blind: bool = True
  intervals: float = 0.95
  examples: int = 24
  cache: str | None = None
  bad_rows: BadRows = "refuse"

  @property
  def checkpoints(self) -> dict[str, str]:
    """Captioner's name -> checkpoint. Raises ValueError for a text that is not `name=value,...`."""
    example = "before=configs/quickstart_policy,after=runs/quickstart/policy"
    return parse_named(self.captioners, key="prism.captioners", example=example)

  @property
  def sources(self) -> dict[str, str]:
    """Benchmark's name -> source. Raises ValueError for a text that is not `name=value,...`."""
    return parse_named(self.benchmarks, key="prism.benchmarks", example="easy=easy_vqa:test")

  def __post_init__(self):
    if not self.checkpoints or not self.sources:
      raise ValueError(
        "prism.captioners and prism.benchmarks must name one at least, as name=value"
      )
    if prism_figures.BLIND in self.checkpoints:
      raise ValueError(
        f"prism.captioners: the name {prism_figures.BLIND!r} stands for no caption; use another"
      )
    for key, least in (
      ("captions", 1),
      ("batch_size", 1),
      ("answer_batch_size", 1),
      ("max_tokens", 1),
      ("answer_tokens", 1),
      ("temperature", 0),
      ("answer_temperature", 0),
      ("examples", 0),
    ):
      if not getattr(self, key) >= least:
        raise ValueError(f"prism.{key} = {getattr(self, key)} must be at least {least}")
    if not 0 < self.top_p <= 1:
      raise ValueError(
        f"prism.top_p = {self.top_p} must be above 0 and at most 1, which draws from all tokens"
      )
    if not 0 < self.intervals < 1:
      raise ValueError(
        f"prism.intervals = {self.intervals} must be between 0 and 1, as 0.95 for 95%"
      )
    if self.captions > 1 and self.temperature == 0:
      raise ValueError(
        f"prism.captions = {self.captions} greedy captions of an image are all the "
        "same; set captions = 1, or a temperature"
      )
    if self.captions_per == "question" and self.temperature == 0:
      raise ValueError(
        "prism.captions_per = 'question' writes the same greedy caption for each question of an "
        "image; set captions_per = 'image', or a temperature"
      )


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
  """Captions what `kept` does not hold yet. Returns the images that cannot be read any more; raises
  ValueError where such are refused."""
  keys, lost = list(images), set()
  # Numbers go into random keys: counted among all, so that those of two interrupted runs differ.
  left = [(number, images[key]) for number, key in enumerate(keys) if key not in kept]
  if not left:
    return lost
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
          lost.add(keys[item.number])
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
  if left:
    names = list(left)
    with Bar(len(left), "answers", "answer") as bar:
      for found in writer(list(left.values())):
        kept.put(
          {names[number]: {"text": text.text, "finish": text.finish} for number, text in found}
        )
        bar.update(len(found))
  return [kept[key]["text"] for key in keys]


def read_answers(pairs: Sequence[Pair], host_judge: HostJudge) -> np.ndarray:
  """The option that the judge reads from each caption, int; -1 where it abstains."""
  question = lambda row: Question(row.stem, row.options, gold_index(row), row.kind)
  asks = [(caption, question(row)) for row, caption, _ in pairs]
  return host_judge.choices(asks, "answers")


def run(config, workdir: pathlib.Path) -> None:
  """Prism: writes prism.json, answers.jsonl and prism.html to the workdir."""
  cfg = configuration.load_section(config, "prism", PrismConfig)
  policy = configuration.load_section(config, "policy", PolicySection)
  section = configuration.load_section(config, "judge", JudgeSection)
  if jax.process_count() > 1:
    raise ValueError(
      "Prism runs in one process; name fewer benchmarks or captioners in each of several runs"
    )
  seed = config.get("seed", 0)
  mesh_section = configuration.load_section(config, "mesh", sharding.MeshConfig)
  mesh = sharding.make_mesh(mesh_section)
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
  with jax.set_mesh(mesh):
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
  evaluation = dataclasses.replace(evaluation, answered=answered)
  figures = prism_figures.summarise(evaluation, cfg, seed)
  write_json(workdir / "prism.json", figures)
  prism_figures.write_answers(workdir / "answers.jsonl", evaluation)
  log.info("\n%s", prism_figures.table_text(figures))
  page = workdir / "prism.html"
  write_page(page, figures, evaluation, examples=cfg.examples, seed=seed)
  record.finish(sum(map(len, asked.rows.values())))
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
  host_judge = open_judge(section, kinds=kinds, mesh=mesh, seed=seed)
  writer = None
  if kept is not None:
    sampling = SamplingConfig(cfg.answer_tokens, temperature=cfg.answer_temperature)
    writer = TextWriter(
      host_judge.judge, sampling, batch_size=cfg.answer_batch_size, mesh=mesh, seed=seed
    )
  answered: dict[str, dict[str, np.ndarray]] = {}
  for name, rows in evaluation.rows.items():
    answered[name] = {}
    for who, pairs in _pairs(evaluation, name, cfg.blind).items():
      found = (
        read_answers(pairs, host_judge)
        if kept is None
        else np.array(write_answers(pairs, kept, host_judge.judge, writer, cfg), object)
      )
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
