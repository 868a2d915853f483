"""An evaluation -> the gallery's page beside it: what each captioner wrote about the same images.

The first caption of each image stands there, with some of its questions and, where the judge read
its answers, what it answered from that caption.
"""

import pathlib
import re
from collections.abc import Iterator

import numpy as np

from caprl_jax.data.rows import QARow, Question, read_image
from caprl_jax.modes.gallery.figures import figures, pick
from caprl_jax.modes.gallery.page import NOBODY, ComparedImage, GivenCaption, write_page
from caprl_jax.modes.prism.evaluation import BLIND, Evaluation
from caprl_jax.modes.prism.questions import gold_index

PER_IMAGE = 6  # questions


def write_gallery(path: pathlib.Path, evaluation: Evaluation, images: int, seed: int) -> None:
  """Writes the page: `images` of them, half drawn at random, half those where captioners differ
  most."""
  compared = list(_compared(evaluation))
  files = {who: {one.name: one.said[who] for one in compared} for who in evaluation.captions}
  judged = [one for one in compared if one.choices]
  write_page(
    path,
    figures(files, compared, judged),
    *pick(judged or compared, images, np.random.default_rng(seed)),
    lambda shared: read_image(shared.row) if shared.row else None,
    lambda shared: shared.name,
  )


def _compared(evaluation: Evaluation) -> Iterator[ComparedImage]:
  """Every image once, whatever benchmarks and questions it stands in."""
  seen: set[str] = set()
  for benchmark, shown in evaluation.shown.items():
    rows_of: dict[str, list[int]] = {}
    for i, key in enumerate(shown):
      rows_of.setdefault(key, []).append(i)
    for key, rows in rows_of.items():
      digest = evaluation.digests[benchmark][rows[0]]
      if digest not in seen:
        seen.add(digest)
        yield _one(evaluation, benchmark, key, rows)


def _one(evaluation: Evaluation, benchmark: str, key: str, rows: list[int]) -> ComparedImage:
  image, asked = evaluation.images[key], evaluation.rows[benchmark]
  said = {who: _given(captions[key][0]) for who, captions in evaluation.captions.items()}
  answered = evaluation.answered[benchmark]
  read = all(found.dtype != object for found in answered.values()) and BLIND in answered
  known = [(i, gold) for i in rows if (gold := gold_index(asked[i])) is not None]
  some = known[:: -(-len(known) // PER_IMAGE) or 1]  # of many, some from the whole list
  questions = tuple(
    Question(asked[i].stem, asked[i].options, gold, asked[i].kind) for i, gold in some
  )
  choices: dict[str, list[int | None]] = (
    {
      NOBODY if who == BLIND else who: [int(found[i, 0]) for i, _ in some]
      for who, found in answered.items()
    }
    if read and some
    else {}
  )
  name = f"{benchmark}: {re.sub(', question [0-9]+$', '', image.name)}"
  return ComparedImage(name, said, QARow(image.image, questions, image.name), choices)


def _given(one: dict) -> GivenCaption:
  return GivenCaption(one["caption"], "", one["tokens"], one["finish"] == "length")
