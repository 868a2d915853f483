"""Mode `gallery`: what several captioners wrote about the same images, side by side on a page;
judged, if asked.
"""

import dataclasses
import hashlib
import itertools
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.config import schema as configuration
from caprl_jax.config.named_values import parse_named
from caprl_jax.data.readers.image_sources import find_images
from caprl_jax.data.readers.image_spellings import spelled_image
from caprl_jax.data.readers.qa_sources import read_qa_rows
from caprl_jax.data.rows import CaptionRow, QARow, kinds, read_image
from caprl_jax.inference.judge import Ask, HostJudge, JudgeSection, open_judge
from caprl_jax.json_files import json_lines, shown
from caprl_jax.modes.gallery.page import NOBODY, ComparedImage, GivenCaption, write_page

log = logging.getLogger("caprl_jax.modes.gallery.run")


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


def read_captions(path: pathlib.Path) -> dict[str, GivenCaption]:
  """Image -> what was said of it, from JSON lines.

  Raises ValueError for a file that is not there or empty; with file and line, for one that is no
  row of mode `caption` and for an image that was there before.
  """
  found: dict[str, GivenCaption] = {}
  lines: dict[str, str] = {}
  if not path.is_file():
    raise ValueError(f"{path}: No such file; gallery.captions names .jsonl files of mode caption")
  for where, value in json_lines(path, halves=True):
    try:
      if isinstance(value, ValueError):
        raise value
      name, said = _parse(value)
    except ValueError as error:
      why = str(error).removeprefix(f"{where}: ")
      raise ValueError(
        f"{where}: not a row of mode caption ({why}); mend or drop the line"
      ) from error
    line = where.rpartition(":")[2]
    if name in found:
      raise ValueError(
        f"{where}: image {shown(name)} stands in line {lines[name]} too; keep one of them"
      )
    found[name], lines[name] = said, line
  if not found:
    raise ValueError(f"{path} has no rows")
  return found


def _parse(row: Any) -> tuple[str, GivenCaption]:
  if not isinstance(row, dict):
    raise ValueError(f"a {type(row).__name__}, not an object")
  for key, kind in (
    ("image", str),
    ("caption", str),
    ("error", str),
    ("finish", str),
    ("tokens", list),
  ):
    if key in row and row[key] is not None and not isinstance(row[key], kind):
      raise ValueError(f"{key} is {row[key]!r:.60}, not a {kind.__name__}")
  if row.get("image") is None:
    raise ValueError("the key 'image' is missing")
  if row.get("error") is not None:
    return row["image"], GivenCaption(None, row["error"])
  if row.get("caption") is None:
    raise ValueError("neither 'caption' nor 'error'")
  tokens = row.get("tokens")
  return row["image"], GivenCaption(
    row["caption"],
    "",
    None if tokens is None else len(tokens),
    row["finish"] == "length" if row.get("finish") is not None else None,
  )


def match_names(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
  """Those of `names` that are in `others` -> what they are called there: the same, or one path ends
  in the other whole ("/data/images/1.png" and "images/1.png"), where just one does."""
  known = set(others)
  found = {name: name for name in names if name in known}
  left = [name for name in names if name not in found]
  if not left:
    return found
  tails: dict[str, set[str]] = {}
  for other in known:
    for tail in _tails(other):
      tails.setdefault(tail, set()).add(other)
  taken: dict[str, list[str]] = {}
  for name in left:
    fitting = tails.get("/".join(_parts(name)), set()) | {
      other
      for tail in _tails(name)
      for other in tails.get(tail, ())
      if "/".join(_parts(other)) == tail
    }
    if len(fitting) == 1:
      taken.setdefault(fitting.pop(), []).append(name)
  used = set(found.values())
  return found | {
    who[0]: other for other, who in taken.items() if len(who) == 1 and other not in used
  }


def _parts(name: str) -> list[str]:
  return [part for part in pathlib.PurePath(name).parts if part not in ("/", "..")]


def _tails(name: str) -> Iterator[str]:
  parts = _parts(name)
  return ("/".join(parts[i:]) for i in range(len(parts)))


def common_images(
  files: Mapping[str, Mapping[str, GivenCaption]], paths: Mapping[str, str]
) -> list[ComparedImage]:
  """The images of the first file that all others have. Raises ValueError where there are none."""
  (first, captions), *others = files.items()
  names = list(captions)
  called = {who: match_names(names, list(theirs)) for who, theirs in others}
  common = [name for name in names if all(name in table for table in called.values())]
  if not common:
    listed = "; ".join(
      f"{paths[who]} has {len(theirs):,}, such as {shown(next(iter(theirs)))}"
      for who, theirs in files.items()
    )
    raise ValueError(
      f"the captions have no image in common: {listed}. Caption one caption.input "
      "with each captioner"
    )
  for who, theirs in files.items():
    if len(theirs) > len(common):
      log.info(
        "%s: %d of its %d images are not in all files, and are left aside",
        who,
        len(theirs) - len(common),
        len(theirs),
      )
  return [
    ComparedImage(
      name,
      {first: captions[name]} | {who: files[who][table[name]] for who, table in called.items()},
    )
    for name in common
  ]


def difference(shared: ComparedImage) -> float:
  """How far the captions are from each other in words: the mean over pairs of 1 - shared words /
  all words.
  """
  sets = [{word.casefold() for word in said.words} for said in shared.said.values()]
  far = [1 - len(a & b) / len(a | b) if a | b else 0.0 for a, b in itertools.combinations(sets, 2)]
  return float(np.mean(far)) if far else 0.0


def judge_images(images: Sequence[ComparedImage], host_judge: HostJudge) -> list[ComparedImage]:
  """The images with what the judge answered from each caption, and from none."""
  asks: list[Ask] = []
  for shared in images:
    for caption in [*(said.caption for said in shared.said.values()), ""]:
      asks += [(caption, q) for q in shared.questions if caption is not None]
  answers = iter(host_judge.choices(asks).tolist())
  judged = []
  for shared in images:
    choices: dict[str, list[int | None]] = {}
    for who, caption in [*((who, said.caption) for who, said in shared.said.items()), (NOBODY, "")]:
      choices[who] = [None if caption is None else next(answers) for _ in shared.questions]
    judged.append(dataclasses.replace(shared, choices=choices))
  return judged


def pick(
  images: Sequence[ComparedImage], count: int, rng: np.random.Generator
) -> tuple[list[ComparedImage], list[ComparedImage]]:
  """Images drawn at random, and of the others those where the captioners differ most; half of
  `count` each.
  """
  several, count = len(images[0].said) > 1, min(count, len(images))
  drawn = sorted(rng.permutation(len(images))[: -(-count // 2) if several else count].tolist())
  rest = [i for i in range(len(images)) if i not in set(drawn)] if several else []

  def unlike(i: int) -> tuple[float, float]:
    shared = images[i]
    right = [sum(shared.right(who)) for who in shared.said if who in shared.choices]
    return (max(right) - min(right) if right else 0, difference(shared))

  most = sorted(rest, key=unlike, reverse=True)[: count - len(drawn)]
  return [images[i] for i in drawn], [images[i] for i in most]


def figures(
  files: Mapping[str, Mapping[str, GivenCaption]],
  common: Sequence[ComparedImage],
  judged: Sequence[ComparedImage],
) -> dict[str, Any]:
  """Of each captioner: rows of its file; over the common images its failures, mean lengths and
  share cut; over the judged ones its accuracy, by kind of question too. None where nothing is
  known."""
  mean = lambda values: float(np.mean(values)) if values else None
  out: dict[str, Any] = {
    "images": len(common),
    "judged_images": len(judged),
    "questions": sum(len(shared.questions) for shared in judged),
    "captioners": {},
  }
  for who in files:
    said = [shared.said[who] for shared in common]
    good = [one for one in said if one.caption is not None]
    out["captioners"][who] = {
      "images": len(files[who]),
      "failed": len(said) - len(good),
      "tokens": mean([one.tokens for one in good if one.tokens is not None]),
      "words": mean([len(one.words) for one in good]),
      "cut_share": mean([one.cut for one in good if one.cut is not None]),
    }
  if judged:
    names = kinds([shared.row for shared in judged])
    for who in [*files, NOBODY]:
      scored = [
        (q.kind, choice, q.gold)
        for shared in judged
        for q, choice in zip(shared.questions, shared.choices[who], strict=True)
      ]
      row = out["captioners"].setdefault(who, {})
      row["accuracy"] = mean([choice == gold for _, choice, gold in scored])
      row["misled"] = mean(
        [choice is not None and choice not in (-1, gold) for _, choice, gold in scored]
      )
      row["accuracy_by_kind"] = {
        kind: mean([choice == gold for k, choice, gold in scored if k == kind]) for kind in names
      }
    out["questions_by_kind"] = {
      kind: sum(q.kind == kind for shared in judged for q in shared.questions) for kind in names
    }
  return out


class Pictures:
  """Finds the picture of an image: among those of `gallery.pictures`, with its questions, or where
  its name points.

  `missing` counts those that `read` did not find.
  """

  def __init__(self, source: str | None, names: Sequence[str], folders: Sequence[pathlib.Path]):
    self.folders, self.missing = folders, 0
    alike = len(names) > 1 and len({os.path.isabs(name) for name in names}) == 1
    self.common = os.path.commonpath(names) if alike else None
    self.rows: dict[str, CaptionRow] = {}
    if source is not None:
      rows = {row.name: row for row in find_images(source, "gallery.pictures")}
      self.rows = {name: rows[other] for name, other in match_names(names, list(rows)).items()}
      if not self.rows:
        raise ValueError(
          f"gallery.pictures = {source!r}: none of its {len(rows):,} images, such "
          f"as {shown(next(iter(rows)))}, is one of those captioned, such as "
          f"{shown(names[0])}; give the caption.input that was captioned"
        )

  def short(self, shared: ComparedImage) -> str:
    """Its name without the folder that all have in common, which is nobody's business on a page
    that is passed on.
    """
    if self.common is None:
      return (os.path.basename(shared.name) or shared.name)[-255:]
    return os.path.relpath(shared.name, self.common) if self.common else shared.name

  def read(self, shared: ComparedImage) -> Image.Image | None:
    for row in self._rows(shared):
      try:
        return read_image(row)
      except ValueError:
        continue
    self.missing += 1
    return None

  def _rows(self, shared: ComparedImage) -> Iterator[CaptionRow | QARow]:
    if shared.name in self.rows:
      yield self.rows[shared.name]
    if shared.row:
      yield shared.row
    for folder in self.folders:
      try:  # other tools write data: URIs
        image = spelled_image(shared.name, folder, "").image
      except ValueError:
        return
      if isinstance(image, bytes) or os.path.isfile(image):  # long names: no error, as pathlib's
        yield CaptionRow(image, "", shared.name)


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
  section = None
  if cfg.questions is not None and config.get("judge"):
    section = configuration.load_section(config, "judge", JudgeSection)
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
  if cfg.questions is not None:
    common = with_questions(common, cfg.questions, cfg, seed)
    asked = [shared for shared in common if shared.questions]
    if section:
      judged = [asked[i] for i in sorted(rng.permutation(len(asked))[: cfg.judged].tolist())]
      mesh = sharding.make_mesh(configuration.load_section(config, "mesh", sharding.MeshConfig))
      with jax.set_mesh(mesh):
        names = kinds([shared.row for shared in judged])
        judged = judge_images(judged, open_judge(section, kinds=names, mesh=mesh, seed=seed))
  found = figures(files, common, judged)
  if jax.process_index() > 0:
    return
  output = (
    pathlib.Path(cfg.output).expanduser() if cfg.output is not None else workdir / "gallery.html"
  )
  write_page(output, found, *pick(judged or common, cfg.images, rng), pictures.read, pictures.short)
  write_json(workdir / "gallery.json", found)
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
