"""Mode `gallery`: what several captioners wrote about the same images, side by side on a page;
judged, if asked.
"""

import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.config import schema as configuration
from caprl_jax.config.named_values import parse_named
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import QARow, kinds
from caprl_jax.harness.process.first import from_first
from caprl_jax.harness.process.workdir_lock import only_writer
from caprl_jax.inference.endpoint_judge import EndpointJudge
from caprl_jax.inference.judge import Ask, HostJudge, JudgeSection, check_text_judge
from caprl_jax.inference.run_judge import open_text_judge
from caprl_jax.modes.gallery.captions import Pictures, common_images, match_names, read_captions
from caprl_jax.modes.gallery.figures import figures, pick
from caprl_jax.modes.gallery.page import NOBODY, ComparedImage, write_page

log = logging.getLogger("caprl_jax.modes.gallery.run")

FIGURES = "gallery.json"


@dataclasses.dataclass(frozen=True)
class GalleryConfig:
  """The section `gallery`.

  captions: name -> a .jsonl as mode `caption` writes it (image and caption are all it needs); or
    the same as one text, "before=a.jsonl,after=b.jsonl".
  pictures: where the captioned images lie, as `caption.input`; None: with the questions, or the
    rows' own paths, from here or from the file's folder.
  questions: a source (`qa_sources.py`) of questions about them; with a `judge` section it answers
    them from each caption.
  kinds: kinds of questions that are asked; empty: all.
  per_image: questions per image, drawn at random with turns between kinds.
  judged: images, drawn at random, whose questions are asked. Accuracy is over these, and over the
    same questions for all: where a captioner failed, they count as not answered.
  images: cards on the page; half of them drawn at random, half those where the captioners differ
    most (among the judged ones in what they got right, then in their words).
  output: the page; None: gallery.html in the workdir.
  """

  captions: dict[str, str] | str
  pictures: str | None = None
  questions: str | None = None
  kinds: tuple[str, ...] = ()
  per_image: int = 4
  judged: int = 200
  images: int = 24
  output: str | None = None

  def __post_init__(self):
    if min(self.images, self.judged, self.per_image) < 1:
      raise ValueError(
        f"images = {self.images}, judged = {self.judged} and per_image = "
        f"{self.per_image} must be at least 1"
      )
    if not self.files:
      raise ValueError("captions names no file; write name=FILE.jsonl, several joined by commas")

  @property
  def files(self) -> dict[str, str]:
    """Captioner's name -> file. Raises ValueError for a text that is not `name=value,...`."""
    if not isinstance(self.captions, str):
      return self.captions
    return parse_named(self.captions, key="captions", example="before=a.jsonl,after=b.jsonl")


def judge_images(
  images: Sequence[ComparedImage], host_judge: HostJudge | EndpointJudge
) -> list[ComparedImage]:
  """The images with what the judge answered from each caption, and from none. A question that a
  judge behind an endpoint left unanswered for one captioner is left out for all, and so is an image
  without any other."""
  asks: list[Ask] = []
  for shared in images:
    for caption in [*(said.caption for said in shared.said.values()), ""]:
      asks += [(caption, q) for q in shared.questions if caption is not None]
  answers = iter(host_judge.choices(asks).tolist())
  answered = iter(host_judge.answered(asks).tolist())
  judged, failed = [], 0
  for shared in images:
    choices: dict[str, list[int | None]] = {}
    whole = [True] * len(shared.questions)
    for who, caption in [*((who, said.caption) for who, said in shared.said.items()), (NOBODY, "")]:
      choices[who] = [None if caption is None else next(answers) for _ in shared.questions]
      if caption is not None:
        whole = [one and next(answered) for one in whole]
    failed += whole.count(False)
    if any(whole):
      judged.append(_with_choices(shared, choices, whole))
  if failed:
    log.warning("%d questions are left out: an answer to them failed", failed)
  if images and not judged:
    raise ValueError("the judge's server answered none of the questions in full; see the log")
  return judged


def _with_choices(
  shared: ComparedImage, choices: dict[str, list[int | None]], kept: Sequence[bool]
) -> ComparedImage:
  """An image with those of its questions that are `kept`, and the answers to them."""
  row = shared.row
  assert row is not None, shared.name  # it has questions
  some = lambda values: [value for value, keep in zip(values, kept, strict=True) if keep]
  return dataclasses.replace(
    shared,
    row=dataclasses.replace(row, questions=tuple(some(row.questions))),
    choices={who: some(of) for who, of in choices.items()},
  )


def with_questions(
  common: Sequence[ComparedImage], source: str, cfg: GalleryConfig, seed: int
) -> list[ComparedImage]:
  """The images with some questions about each, where there are any. Raises ValueError where no
  image has one.
  """
  found: dict[str, QARow] = {}
  for row in read_qa_rows(source, seed):
    # An image may have several rows.
    before = found[row.name].questions if row.name in found else ()
    found[row.name] = dataclasses.replace(row, questions=(*before, *row.questions))
  rows = {
    row.name: row
    for row in (_some_questions(row, cfg, seed) for row in found.values())
    if row.questions
  }
  if not rows:
    raise ValueError(
      f"gallery.kinds = {cfg.kinds} leaves no question; {source} has {kinds(found.values())}"
    )
  called = match_names([shared.name for shared in common], list(rows))
  if not called:
    raise ValueError(
      f"gallery.questions = {source!r}: none of its {len(rows):,} images, such as "
      f"{next(iter(rows))!r}, is one of those captioned, such as {common[0].name!r}"
    )
  if len(called) < len(common):
    log.info(
      "%d of %d images have no questions in %s", len(common) - len(called), len(common), source
    )
  return [
    dataclasses.replace(shared, row=rows[called[shared.name]]) if shared.name in called else shared
    for shared in common
  ]


def _some_questions(row: QARow, cfg: GalleryConfig, seed: int) -> QARow:
  """Up to `per_image` questions of a row, each kind's in turn; which ones depends on the row and
  the seed only.
  """
  rng = np.random.default_rng(
    [seed, *hashlib.sha256(row.name.encode("utf-8", "surrogatepass")).digest()[:8]]
  )
  turns: dict[str, list[int]] = {}
  for i in rng.permutation(len(row.questions)).tolist():
    kind = row.questions[i].kind
    if not cfg.kinds or kind in cfg.kinds:
      turns.setdefault(kind, []).append(i)
  order = sorted((turn, kind, i) for kind, group in turns.items() for turn, i in enumerate(group))[
    : cfg.per_image
  ]
  return dataclasses.replace(
    row, questions=tuple(row.questions[i] for i in sorted(i for *_, i in order))
  )


def run(config, workdir: pathlib.Path) -> None:
  """Writes the page, and gallery.json with its figures to the workdir."""
  cfg = configuration.load_section(config, "gallery", GalleryConfig)
  output = workdir / "gallery.html" if cfg.output is None else pathlib.Path(cfg.output).expanduser()
  with only_writer(output, workdir / FIGURES):
    _run(cfg, config, output, workdir)


def _run(cfg: GalleryConfig, config, output: pathlib.Path, workdir: pathlib.Path) -> None:
  section = None
  if cfg.questions is not None and config.get("judge"):
    section = configuration.load_section(config, "judge", JudgeSection)
    check_text_judge(section)
  seed = config.get("seed", 0)
  paths = {who: pathlib.Path(path).expanduser() for who, path in cfg.files.items()}
  if NOBODY in paths:
    raise ValueError(
      f"gallery.captions: the name {NOBODY!r} stands for the judge's guesses; use another"
    )
  files = {who: read_captions(path) for who, path in paths.items()}
  common = common_images(files, {who: str(path) for who, path in paths.items()})
  folders = list(dict.fromkeys([pathlib.Path(), *(path.parent for path in paths.values())]))
  pictures = Pictures(cfg.pictures, [shared.name for shared in common], folders)
  rng = np.random.default_rng(seed)
  judged: list[ComparedImage] = []
  failed = 0
  if cfg.questions is not None:
    common = with_questions(common, cfg.questions, cfg, seed)
    asked = [shared for shared in common if shared.questions]
    if section:
      judged = [asked[i] for i in sorted(rng.permutation(len(asked))[: cfg.judged].tolist())]
      mesh = sharding.make_mesh(configuration.load_section(config, "mesh", sharding.MeshConfig))
      with jax.set_mesh(mesh):
        names, drawn = kinds([shared.row for shared in judged]), judged
        host = open_text_judge(section, kinds=names, mesh=mesh, seed=seed, first=from_first)
        judged = judge_images(drawn, host)
        failed = sum(len(one.questions) for one in drawn) - sum(len(o.questions) for o in judged)
  found = figures(files, common, judged) | ({"questions_left_out": failed} if failed else {})
  if jax.process_index() > 0:
    return
  write_page(output, found, *pick(judged or common, cfg.images, rng), pictures.read, pictures.short)
  write_json(workdir / FIGURES, found)
  if pictures.missing:
    log.warning(
      "%d images of the page were not found; gallery.pictures may say where they lie, as "
      "caption.input did",
      pictures.missing,
    )
  for who, row in found["captioners"].items():
    accuracy = f", {row['accuracy']:.3f} of {found['questions']} questions right" if judged else ""
    about = (
      "the judge guesses"
      if who == NOBODY
      else f"{row['words'] or 0:.1f} words per caption, {row['failed']} failed"
    )
    log.info("%s: %s%s", who, about, accuracy)
  log.info("page: %s, of %d images", output, len(common))
