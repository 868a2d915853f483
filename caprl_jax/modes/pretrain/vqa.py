"""A captioner, questions about images -> its accuracy with the images and without them
(`vqa.json`).
"""

import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from tqdm import tqdm

from caprl_jax import sharding
from caprl_jax.atomic_files import write_json
from caprl_jax.data.rows import QARow
from caprl_jax.hub.load import Loaded
from caprl_jax.inference.open_vqa import OpenAnswerer, OpenVqaAnswer, check_ends
from caprl_jax.inference.vqa import AnswerConfig, Answerer, VqaAnswer, letter_ids
from caprl_jax.scoring.intervals import bootstrap_interval

log = logging.getLogger("caprl_jax.modes.pretrain.vqa")

EXAMPLES = 20  # answers in words that are written down


def summarise(
  rows: Sequence[QARow], verdicts: dict[int, list[VqaAnswer] | ValueError]
) -> dict[str, object]:
  """Figures of all questions and of each kind: `accuracy` is the share of orders of the options,
  mean over questions, in which the image's question is answered right (in words: of answers that
  are right); `blind` the same without the image; `..._probability` the mean probability of the
  right letter; `interval` of the accuracy, 95% over images."""
  groups: dict[str, list[VqaAnswer]] = {}
  errors, right_of_image = 0, []
  for number, row in enumerate(rows):
    found = verdicts[number]
    pairs = [] if isinstance(found, ValueError) else list(zip(row.questions, found, strict=True))
    errors += (
      len(row.questions)
      if isinstance(found, ValueError)
      else sum(bool(verdict.error) for verdict in found)
    )
    for question, verdict in pairs:
      if not verdict.error:
        groups.setdefault(question.kind, []).append(verdict)
    good = [verdict.visual for _, verdict in pairs if not verdict.error]
    if good:
      right_of_image.append(sum(good))
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
    raise ValueError(f"none of the {len(rows)} rows has a question that could be asked")
  # Images weigh as they have questions: the mean of these values is the accuracy.
  values = np.array(right_of_image) * len(right_of_image) / len(everything)
  return {
    **figures(everything),
    "interval": list(bootstrap_interval(values, 0)),
    "images": len(rows),
    "errors": errors,
    "kinds": {kind or "(none)": figures(found) for kind, found in sorted(groups.items())},
  }


def examples(
  rows: Sequence[QARow], verdicts: Mapping[int, list[VqaAnswer] | ValueError]
) -> list[dict[str, str]]:
  """The first answers in words, to be read."""
  found = (
    {
      "image": row.name,
      "question": question.stem,
      "right": question.options[question.gold],
      "written": verdict.written,
      "without the image": verdict.blind_written,
    }
    for number, row in enumerate(rows)
    if not isinstance(verdicts[number], ValueError)
    for question, verdict in zip(row.questions, verdicts[number])
    if isinstance(verdict, OpenVqaAnswer)
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
  verdicts: dict[int, list[VqaAnswer] | ValueError] = {}
  made = (
    OpenAnswerer(policy, cfg, mesh, seed, open_question, max_tokens)
    if open_question
    else Answerer(policy, cfg, mesh, seed)
  )
  with made as answerer, tqdm(total=len(rows), desc="questions", unit="image", disable=None) as bar:
    for found in answerer(rows, range(len(rows))):
      verdicts |= dict(found)
      bar.update(len(found))
  how = (
    {"open_question": open_question, "max_tokens": max_tokens}
    if open_question
    else dataclasses.asdict(cfg)
  )
  figures = {"source": source, "answer": how, **summarise(rows, verdicts)}
  if open_question:
    figures["examples"] = examples(rows, verdicts)
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
