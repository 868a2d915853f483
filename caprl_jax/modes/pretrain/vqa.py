"""A captioner, questions about images -> its accuracy with the images and without them
(`vqa.json`).
"""

import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.data.rows import QARow
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
  source: str,
  cfg: AnswerConfig,
  seed: int,
  mesh: jax.sharding.Mesh,
  path: pathlib.Path,
  open_question: str | None = None,
  max_tokens: int = 16,
) -> dict[str, object] | None:
  """Asks all questions of `rows`, logs and writes the figures: by letter or, with `open_question`,
  in words. With several processes, only says how to do it: None."""
  if jax.process_count() > 1:
    log.warning(
      "questions about images are asked in one process only: run the same command again in one"
    )
    return None
  sharding.check_batch_size(cfg.batch_size, mesh, "pretrain.answer.batch_size")
  results: list[VqaResult] = []
  made = (
    OpenAnswerer(policy, cfg, mesh, seed, wording=open_question, max_tokens=max_tokens)
    if open_question
    else Answerer(policy, cfg, mesh, seed)
  )
  with made as answerer, Bar(len(rows), "questions", "image") as bar:
    for found in answerer(enumerate(rows)):
      results += found
      bar.update(len(found))
  how = (
    {"open_question": open_question, "max_tokens": max_tokens}
    if open_question
    else dataclasses.asdict(cfg)
  )
  results.sort(key=lambda result: result.number)
  figures = {"source": source, "answer": how, **summarise(results)}
  if open_question:
    figures["examples"] = examples(results)
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
