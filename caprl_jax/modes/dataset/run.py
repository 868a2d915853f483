"""Mode `dataset`: what is in a QA dataset and what is wrong with it, as a table and a page; and a
copy in another format.

Every row is read, every image decoded, every question checked. Rows that cannot be used are listed
with file and line; they are refused, or dropped where the config says so. Where the config names
kinds of images, a model says which each image is, and each kind has a copy of its own.
"""

import dataclasses
import itertools
import json
import logging
import pathlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json, write_text
from caprl_jax.config import schema as configuration
from caprl_jax.data.bad_rows import reasons_text
from caprl_jax.data.batches import ImageShape, shape_bucket
from caprl_jax.data.image_check import ImageCheck
from caprl_jax.data.readers.qa_sources import parse_mixture, scan_qa_rows
from caprl_jax.data.rows import BadRow, QARow, image_bytes
from caprl_jax.data.usable_rows import ImageFacts, fits, usable
from caprl_jax.harness.process.first import one_process_only
from caprl_jax.harness.process.workdir_lock import only_writer
from caprl_jax.harness.sections import PolicySection
from caprl_jax.models.image_processor import SmartResize
from caprl_jax.modes.dataset import image_kinds
from caprl_jax.modes.dataset.image_kinds import ImageKind
from caprl_jax.modes.dataset.outputs import check_output, output_path, write_output
from caprl_jax.modes.dataset.section import DatasetConfig
from caprl_jax.pages import cards
from caprl_jax.pages.markup import card, embedded, page, percent, table, text
from caprl_jax.progress import counted

log = logging.getLogger("caprl_jax.modes.dataset.run")

QWEN25_VL = SmartResize(
  patch_size=14, merge_size=2, min_pixels=3136, max_pixels=1_000_000, window_units=4
)
PAGE_IMAGES = 24
PAGE_QUESTIONS = 12  # of each
LISTED = 20  # bad rows and repeated images in the log; files hold all of them


def read_all(
  cfg: DatasetConfig, seed: int, pixels, workdir: pathlib.Path
) -> tuple[list[QARow], list[ImageFacts], list[BadRow]]:
  """All rows whose image and questions are good, their images' facts, and the bad rows.

  Args:
    pixels: an image processor, as `PolicyConfig.vision.pixels`, that has to take the images.
    workdir: where the facts are kept for the next time.
  """
  found: list[QARow] = []
  bad: list[BadRow] = []
  for part in parse_mixture(cfg.input):
    first = itertools.islice(scan_qa_rows(part.source, seed), cfg.max_rows)
    for row in counted(first, "reading", "row"):
      problem = row if isinstance(row, BadRow) else None
      if problem is None and cfg.repeated_questions == "refuse":
        problem = _problem(row)
      found.append(row) if problem is None else bad.append(problem)
  rows, facts, known = [], [], ImageCheck(workdir)(found)
  for row, fact in zip(usable(found, known, [fits(pixels)]), known, strict=True):
    if isinstance(row, BadRow):
      bad.append(row)
    else:
      rows.append(row)
      facts.append(fact)
  return rows, facts, bad


def _problem(row: QARow) -> BadRow | None:
  """Questions are checked where they are read; what is left is asking one thing twice."""
  stems = [question.stem.strip() for question in row.questions]
  twice = [stem for stem, times in Counter(stems).items() if times > 1]
  if not twice:
    return None
  where = row.where or row.name
  return BadRow(
    where,
    f"{where}: the question {twice[0]!r} is asked {stems.count(twice[0])} times; keep one of them",
    "a question asked twice",
  )


def repeated(facts: Sequence[ImageFacts]) -> list[tuple[int, int]]:
  """(row, the first row with the same bytes) of each image that was there before."""
  first: dict[str, int] = {}
  return [
    (i, first[fact.sha256]) for i, fact in enumerate(facts) if first.setdefault(fact.sha256, i) != i
  ]


def merge_repeated(
  rows: Sequence[QARow], facts: Sequence[ImageFacts]
) -> tuple[list[QARow], list[ImageFacts]]:
  """One row per image: the first with it, and the questions of the others that it does not ask
  yet.
  """
  questions: dict[str, dict[str, object]] = {}
  first: dict[str, int] = {}
  for i, (row, fact) in enumerate(zip(rows, facts, strict=True)):
    first.setdefault(fact.sha256, i)
    for question in row.questions:
      questions.setdefault(fact.sha256, {}).setdefault(question.stem.strip(), question)
  kept = sorted(first.values())
  return (
    [
      dataclasses.replace(rows[i], questions=tuple(questions[facts[i].sha256].values()))
      for i in kept
    ],
    [facts[i] for i in kept],
  )


def survey(
  rows: Sequence[QARow], facts: Sequence[ImageFacts], bad: Sequence[BadRow], pixels
) -> dict:
  """The figures of the table. `pixels`: an image processor, as `PolicyConfig.vision.pixels`."""
  questions = [question for row in rows for question in row.questions]
  kinds: dict[str, dict] = {}
  for question in questions:
    kind = kinds.setdefault(
      question.kind or "(none)",
      {"questions": 0, "options": Counter(), "gold": Counter(), "longest": 0},
    )
    kind["questions"] += 1
    kind["options"][len(question.options)] += 1
    kind["gold"]["ABCDEFGHIJKLMNOPQRSTUVWXYZ"[question.gold]] += 1
    lengths = [len(option) for option in question.options]
    kind["longest"] += lengths[question.gold] == max(lengths) and lengths.count(max(lengths)) == 1
  shapes = [ImageShape(*pixels.shape(fact.height, fact.width)) for fact in facts]
  buckets = Counter(shape_bucket(shape, 4) for shape in shapes)
  tokens = [shape.tokens for shape in shapes]
  per_image = [len(row.questions) for row in rows]
  return {
    "rows": len(rows) + len(bad),
    "bad": len(bad),
    "images": len({fact.sha256 for fact in facts}),
    "repeated_images": len(repeated(facts)),
    "questions": len(questions),
    "questions_an_image": _spread(per_image),
    "formats": dict(Counter(fact.format for fact in facts).most_common()),
    "width": _spread([fact.width for fact in facts]),
    "height": _spread([fact.height for fact in facts]),
    "megabytes": sum(fact.bytes for fact in facts) / 1e6,
    "image_tokens": _spread(tokens),
    "too_narrow": sum(row.reason == "too narrow" for row in bad),
    "buckets": [
      {"tokens": bucket.tokens, "images": images}
      for bucket, images in sorted(buckets.items(), key=lambda item: item[0].tokens)
    ],
    "kinds": {
      name: {
        **kind,
        "options": dict(sorted(kind["options"].items())),
        "gold": dict(sorted(kind["gold"].items())),
      }
      for name, kind in sorted(kinds.items())
    },
    "with_facts": sum(row.facts is not None for row in rows),
    "provenance": dict(
      Counter(question.provenance or "(none)" for question in questions).most_common(10)
    ),
  }


def _spread(values: Sequence[int]) -> dict[str, int]:
  """Least, median and greatest."""
  if not len(values):
    return {}
  return {"min": int(min(values)), "median": int(np.median(values)), "max": int(max(values))}


def table_text(figures: dict) -> str:
  """The table, as the log has it."""
  spread = lambda key: " / ".join(f"{v:,}" for v in figures[key].values()) or "-"
  most_common = lambda gold, n: max(gold.values()) / n
  lines = [
    f"rows        {figures['rows']:,}, of which bad {figures['bad']:,}",
    f"images      {figures['images']:,} distinct, {figures['repeated_images']:,} repeated; "
    + ", ".join(f"{kind} {count:,}" for kind, count in figures["formats"].items())
    + f"; {figures['megabytes']:,.1f} MB",
    f"size        width {spread('width')}, height {spread('height')} pixels (least / median / "
    "greatest)",
    f"tokens      {spread('image_tokens')} per image"
    + (
      f"; {figures['too_narrow']:,} too narrow for the processor" if figures["too_narrow"] else ""
    ),
    "buckets     "
    + ", ".join(
      f"{bucket['images']:,} of up to {bucket['tokens']:,}" for bucket in figures["buckets"][:12]
    )
    + (
      " tokens"
      if len(figures["buckets"]) <= 12
      else f" tokens, and {len(figures['buckets']) - 12} more"
    ),
    f"questions   {figures['questions']:,}; {spread('questions_an_image')} per image; "
    f"facts for {figures['with_facts']:,} rows",
    "",
    f"{'kind':<24}{'questions':>10}  {'options':<18}{'best letter':>12}{'longest':>9}",
  ]
  for name, kind in figures["kinds"].items():
    options = ", ".join(f"{count:,}x{n}" for n, count in kind["options"].items())
    lines.append(
      f"{name[:23]:<24}{kind['questions']:>10,}  {options:<18}"
      f"{most_common(kind['gold'], kind['questions']):>11.1%} "
      f"{kind['longest'] / kind['questions']:>8.1%}"
    )
  lines.append(
    "(best letter: right answers by always saying the same one; longest: by saying the "
    "one longest option)"
  )
  return "\n".join(lines)


def write_page(
  path: pathlib.Path,
  name: str,
  rows: Sequence[QARow],
  figures: dict,
  bad: Sequence[BadRow],
  seed: int,
  shown: Sequence[ImageKind] = (),
) -> None:
  """A page that shows the figures, some rows and what is wrong with the others. shown: the kind of
  each row's image, where that was asked."""
  numbers = [
    card("images", f"{figures['images']:,}", f"{figures['repeated_images']:,} repeated"),
    card("questions", f"{figures['questions']:,}", f"{len(figures['kinds'])} kinds"),
    card("bad rows", f"{figures['bad']:,}", f"of {figures['rows']:,}"),
  ]
  kinds = [
    [
      text(kind),
      f"{f['questions']:,}",
      text(", ".join(map(str, f["options"]))),
      percent(max(f["gold"].values()) / f["questions"]),
      percent(f["longest"] / f["questions"]),
    ]
    for kind, f in figures["kinds"].items()
  ]
  order = np.random.default_rng(seed).permutation(len(rows))[:PAGE_IMAGES]
  samples = [_sample(rows[i], shown[i] if shown else None) for i in sorted(order)]
  of_images = [
    [text(name), f"{f['images']:,}", percent(f["share"]), f"{f['unsure']:,}"]
    for name, f in figures.get("image_kinds", {}).items()
  ]
  problems = "".join(f"<li>{text(row.message)}</li>" for row in bad[:200])
  write_text(
    path,
    page(
      name,
      [
        f"<div class=cards>{''.join(numbers)}</div>",
        "<h2>Questions by kind</h2>"
        + table(["kind", "questions", "options", "best letter", "longest option"], kinds)
        + "<p class=soft>What always saying the same letter, or the longest option, would get "
        "right.</p>",
        "<h2>Images by what they show</h2>"
        + table(["kind", "images", "share", "not sure (below 0.9)"], of_images)
        if of_images
        else "",
        f"<h2>Bad rows</h2><ul>{problems}</ul>" if bad else "",
        f"<h2>{len(samples)} rows at random</h2><div class=samples>{''.join(samples)}</div>",
      ],
    ),
  )


def _sample(row: QARow, kind: ImageKind | None) -> str:
  """A row as the page shows it: image, name, what it shows, its first questions, facts."""
  listed = cards.question_list(
    [cards.question(q.stem, q.options, q.gold, kind=q.kind) for q in row.questions[:PAGE_QUESTIONS]]
  )
  left = len(row.questions) - PAGE_QUESTIONS
  more = f"<p class=soft>and {left} more</p>" if left > 0 else ""
  facts = (
    f"<p class=soft>{text(json.dumps(row.facts, ensure_ascii=False))}</p>" if row.facts else ""
  )
  shown = f"<p class=soft>{text(kind.name)} ({kind.probability:.2f})</p>" if kind else ""
  image = embedded(image_bytes(row), row.name)
  return cards.image_card(image, row.name, shown + listed + more + facts)


def _processor(checkpoint: str | None):
  if checkpoint is None:
    return QWEN25_VL
  return PolicySection(checkpoint).pixels()


def run(config, workdir: pathlib.Path) -> None:
  """Writes dataset.json, dataset.html and, where there are any, bad_rows.jsonl to the workdir; then
  `dataset.output`."""
  cfg = configuration.load_section(config, "dataset", DatasetConfig)
  seed = config.get("seed", 0)
  one_process_only("dataset")
  outputs = cfg.outputs()
  for output in outputs.values():
    check_output(output, "dataset.output", cfg.name, workdir)
  asked = None
  if cfg.image_kinds:
    answerer = configuration.load_section(config, "answerer", PolicySection)
    asked = answerer, configuration.load_section(config, "mesh", sharding.MeshConfig)
  paths = [output_path(output, cfg.name) for output in outputs.values()]
  with only_writer(workdir / "dataset.json", *paths):
    _run(cfg, seed, workdir, asked)


def _run(
  cfg: DatasetConfig,
  seed: int,
  workdir: pathlib.Path,
  asked: tuple[PolicySection, sharding.MeshConfig] | None,
) -> None:
  """asked: who says what images show, and on which mesh."""
  pixels = _processor(cfg.checkpoint)
  rows, facts, bad = read_all(cfg, seed, pixels, workdir)
  figures = survey(rows, facts, bad, pixels)
  log.info("%s\n%s", cfg.input, table_text(figures))
  write_json(workdir / "dataset.json", figures)
  for row in bad[:LISTED]:
    log.warning("bad row: %s", row.message)
  if len(bad) > LISTED:
    log.warning("and %d more bad rows", len(bad) - LISTED)
  bad_file = workdir / "bad_rows.jsonl"
  bad_file.unlink(missing_ok=True)
  if bad:
    write_text(
      bad_file,
      "".join(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in bad),
    )
  for i, first in repeated(facts)[:LISTED]:
    log.info("row %r repeats the image of %r", rows[i].name, rows[first].name)
  write_page(workdir / "dataset.html", cfg.input, rows, figures, bad, seed)
  log.info("page: %s", workdir / "dataset.html")
  if bad and cfg.bad_rows == "refuse":
    raise ValueError(
      f"{len(bad)} bad rows of {figures['rows']} ({reasons_text(bad)}), listed in {bad_file}; mend "
      "them, or leave them out with --config.dataset.bad_rows=drop"
    )
  if bad:
    dropped = f"dropped {len(bad)} of {figures['rows']} rows ({reasons_text(bad)})"
    log.warning("%s; all are in %s", dropped, bad_file)
  if (cfg.output is not None or asked) and not rows:
    raise ValueError(f"{cfg.input}: no good row is left to write")
  if cfg.repeated_images == "merge":
    rows, facts = merge_repeated(rows, facts)
  shown: list[ImageKind] = []
  if asked:
    kinds, size = cfg.image_kinds, cfg.batch_size
    digests = [fact.sha256 for fact in facts]
    shown = image_kinds.kinds_of(
      rows, digests, kinds, *asked, batch_size=size, workdir=workdir, seed=seed
    )
    figures["image_kinds"] = image_kinds.figures(shown, [*kinds])
    log.info("what the images show\n%s", image_kinds.figures_text(figures["image_kinds"]))
    write_json(workdir / "dataset.json", figures)
    write_page(workdir / "dataset.html", cfg.input, rows, figures, bad, seed, shown)
  for kind, output in cfg.outputs().items():
    some = [row for i, row in enumerate(rows) if not kind or shown[i].name == kind]
    if not some:
      log.warning("%s is not written: no image shows %s", output, cfg.image_kinds[kind])
      continue
    path = write_output(some, output, cfg.split, cfg.name, workdir)
    log.info("wrote %d rows to %s", len(some), path)
