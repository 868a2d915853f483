"""A captioner, questions about images -> its accuracy with the images and without them
(`vqa.json`).
"""

import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from caprl_jax.atomic_files import write_json
from caprl_jax.data.rows import QARow
from caprl_jax.harness.process import peers
from caprl_jax.harness.process.first import from_all
from caprl_jax.hub.load import Loaded
from caprl_jax.inference.open_vqa import OpenAnswerer, OpenVqaAnswer, check_ends
from caprl_jax.inference.vqa import AnswerConfig, Answerer, VqaAnswer, VqaResult, letter_ids
from caprl_jax.progress import Bar
from caprl_jax.scoring.intervals import bootstrap_interval

log = logging.getLogger("caprl_jax.modes.pretrain.vqa")

EXAMPLES = 20  # answers in words that are written down


def summarise(results: Sequence[VqaResult]) -> dict[str, object]:
  """Figures of all questions and of each kind: `accuracy` is the share of orders of the options,
  mean over questions, in which the image's question is answered right (in words: of answers that
  are right); `blind` the same without the image; `..._probability` the mean probability of the
  right letter; `interval` of the accuracy, 95% over images."""
  groups: dict[str, list[VqaAnswer]] = {}
  errors, right_of_image = 0, []
  for result in results:
    good = []
    if result.error is None:
      pairs = zip(result.row.questions, result.answers, strict=True)
      good = [(question.kind, answer) for question, answer in pairs if not answer.error]
    errors += len(result.row.questions) - len(good)
    for kind, answer in good:
      groups.setdefault(kind, []).append(answer)
    if good:
      right_of_image.append(sum(answer.visual for _, answer in good))
  mean = lambda found, name: float(np.mean([getattr(v, name) for v in found]))
  fields = {"accuracy": "visual", "blind": "blind"}
  if not any(isinstance(verdict, OpenVqaAnswer) for found in groups.values() for verdict in found):
    fields |= {"probability": "visual_prob", "blind_probability": "blind_prob"}
  figures = lambda found: {
    "questions": len(found),
    **{name: mean(found, field) for name, field in fields.items()},
  }
  everything = [verdict for found in groups.values() for verdict in found]
  if not everything:
    raise ValueError(f"none of the {len(results)} rows has a question that could be asked")
  # Images weigh as they have questions: the mean of these values is the accuracy.
  values = np.array(right_of_image) * len(right_of_image) / len(everything)
  return {
    **figures(everything),
    "interval": list(bootstrap_interval(values, 0)),
    "images": len(results),
    "errors": errors,
    "kinds": {kind or "(none)": figures(found) for kind, found in sorted(groups.items())},
  }


def examples(results: Sequence[VqaResult]) -> list[dict[str, str]]:
  """The first answers in words, to be read."""
  found = (
    {
      "image": result.row.name,
      "question": question.stem,
      "right": question.options[question.gold],
      "written": answer.written,
      "without the image": answer.blind_written,
    }
    for result in results
    for question, answer in zip(result.row.questions, result.answers)
    if isinstance(answer, OpenVqaAnswer)
  )
  return list(itertools.islice(found, EXAMPLES))


def check_model(policy: Loaded, open_question: str | None) -> None:
  """Raises ValueError for a model that `ask` could not ask."""
  (check_ends if open_question else letter_ids)(policy.tokenizer)


def ask(
  policy: Loaded,
  rows: Sequence[QARow],
  path: pathlib.Path,
  *,
  source: str,
  cfg: AnswerConfig,
  seed: int,
  mesh: jax.sharding.Mesh,
  open_question: str | None = None,
  max_tokens: int = 16,
) -> dict[str, object]:
  """Asks all questions of `rows`, logs and writes the figures: by letter or, with `open_question`,
  in words. Several processes ask about a part of the images each, and the first one writes.

  Args:
    policy: the model, on `mesh`, which is of this process's devices.
  """
  count = jax.process_count()
  mine = [(number, rows[number]) for number in range(jax.process_index(), len(rows), count)]
  with jax.set_mesh(mesh):
    asked = _ask(policy, mine, cfg, seed, mesh, open_question, max_tokens)
  peers.check()  # none waits for long in what comes now
  told = from_all([_told(result) for result in asked])
  results = [_result(rows, one) for part in told for one in part]
  how = (
    {"open_question": open_question, "max_tokens": max_tokens}
    if open_question
    else dataclasses.asdict(cfg)
  )
  results.sort(key=lambda result: result.number)
  figures = {"source": source, "answer": how, **summarise(results)}
  if open_question:
    figures["examples"] = examples(results)
  if jax.process_index() == 0:
    write_json(path, figures)
  log.info(
    "%s: %d questions about %d images, accuracy %.3f [%.3f, %.3f], without the image %.3f (%s)",
    source,
    figures["questions"],
    figures["images"],
    figures["accuracy"],
    *figures["interval"],
    figures["blind"],
    ", ".join(
      f"{kind} {f['accuracy']:.3f}/{f['blind']:.3f}" for kind, f in figures["kinds"].items()
    ),
  )
  return figures


def _ask(
  policy: Loaded,
  rows: Sequence[tuple[int, QARow]],
  cfg: AnswerConfig,
  seed: int,
  mesh: jax.sharding.Mesh,
  open_question: str | None,
  max_tokens: int,
) -> list[VqaResult]:
  """Asks about numbered rows."""
  results: list[VqaResult] = []
  made = (
    OpenAnswerer(policy, cfg, mesh, seed, wording=open_question, max_tokens=max_tokens)
    if open_question
    else Answerer(policy, cfg, mesh, seed)
  )
  with made as answerer, Bar(len(rows), "questions", "image") as bar:
    for found in answerer(rows):
      results += found
      bar.update(len(found))
  return results


def _told(result: VqaResult) -> dict[str, Any]:
  """A result for the other processes."""
  return {
    "number": result.number,
    "error": result.error and str(result.error),
    "answers": [
      {"in_words": isinstance(answer, OpenVqaAnswer), **dataclasses.asdict(answer)}
      for answer in result.answers
    ],
  }


def _result(rows: Sequence[QARow], told: dict[str, Any]) -> VqaResult:
  answers = [
    (OpenVqaAnswer if answer.pop("in_words") else VqaAnswer)(**answer) for answer in told["answers"]
  ]
  error = None if told["error"] is None else ValueError(told["error"])
  return VqaResult(told["number"], rows[told["number"]], answers, error)
