"""Images -> which of some kinds each shows, by the answers of a vision-language model.

How CapRL's ablation tells charts and documents from natural images (arXiv 2509.22647, with
Qwen2.5-VL-3B; its words were not found): one multiple-choice question about each image, read from
the letters' logits, the mean over orders of the options in which each kind stands at each letter.
"""

import dataclasses
import logging
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from caprl_jax import sharding
from caprl_jax.data.question_texts import orders
from caprl_jax.data.rows import QARow, Question
from caprl_jax.errors import UserError
from caprl_jax.harness.row_shards import RowResult, ShardedJob, manifest
from caprl_jax.harness.sections import PolicySection
from caprl_jax.inference.vqa import AnswerConfig, Answerer, VqaAnswer
from caprl_jax.json_files import cut

log = logging.getLogger("caprl_jax.modes.dataset.image_kinds")

STEM = "What does this image show?"
SHARD_ROWS = 1000


@dataclasses.dataclass(frozen=True)
class ImageKind:
  """What an image shows: the name of its kind, and how probable the model finds it."""

  name: str
  probability: float


@dataclasses.dataclass(frozen=True)
class _Probabilities(VqaAnswer):
  """of: mean probability of each option, in the question's order."""

  of: Sequence[float] = ()


class KindAnswerer(Answerer):
  """A model that says which option it finds likeliest, rather than whether it is right."""

  blind = False

  def verdict(
    self, question: Question, visual: np.ndarray, blind: np.ndarray | None
  ) -> _Probabilities:
    del blind
    logits_RA = visual[:, : len(question.options)].astype(np.float64)
    if not np.isfinite(logits_RA).all():
      raise ValueError(
        "the model gave numbers that are not finite for an image; check answerer.dtype"
      )
    p_RA = np.exp(logits_RA - logits_RA.max(1, keepdims=True))
    p_RA /= p_RA.sum(1, keepdims=True)
    shown = np.array(orders(question, self.cfg.permutations, self.seed))
    by_option = np.take_along_axis(p_RA, np.argsort(shown, axis=1), axis=1)
    return _Probabilities(of=by_option.mean(0).tolist())


def kinds_of(
  rows: Sequence[QARow],
  digests: Sequence[str],
  kinds: Mapping[str, str],
  section: PolicySection,
  mesh_section: sharding.MeshConfig,
  *,
  batch_size: int,
  workdir: pathlib.Path,
  seed: int,
) -> list[ImageKind]:
  """The kind of each row's image. What was answered before is kept in the workdir.

  Args:
    digests: of the rows' images: answers that are kept are of these.
    kinds: name -> what an image of that kind shows.
    batch_size: images that are asked about at once.

  Raises:
    UserError: an image cannot be read any more.
    ValueError: as `PolicySection.load`; other settings than those of the answers that are kept.
  """
  question = Question(STEM, tuple(kinds.values()), 0)
  cfg = AnswerConfig(permutations=len(kinds), none_of_above=False, batch_size=batch_size)
  mesh = sharding.make_mesh(mesh_section, jax.local_devices())
  sharding.check_batch_size(batch_size, mesh, "dataset.batch_size")
  section = section.settled()
  settings = section.identity() | {"kinds": dict(kinds), "seed": seed}
  names = [f"{row.name} {digest}" for row, digest in zip(rows, digests, strict=True)]
  asked = [QARow(row.image, (question,), row.name) for row in rows]
  job = ShardedJob(
    workdir / "image_kinds", asked, manifest(settings, names, SHARD_ROWS), host=0, hosts=1
  )
  job.open()
  with jax.set_mesh(mesh):
    job.run(lambda: KindAnswerer(section.load(mesh), cfg, mesh, seed), _answered, what="kinds")
  return [_likeliest(item.row["probabilities"], [*kinds]) for item in job.read()]


def _answered(
  answerer: KindAnswerer, rows: Sequence[tuple[int, QARow]]
) -> Iterator[list[RowResult]]:
  for batch in answerer(rows):
    for result in batch:
      if result.error is not None:
        raise UserError(str(result.error)) from result.error
    yield [
      RowResult(
        result.number,
        result.row,
        {"image": result.row.name, "probabilities": _checked(result.answers[0])},
        {},
      )
      for result in batch
    ]


def _checked(answer: VqaAnswer) -> list[float]:
  if answer.error or not isinstance(answer, _Probabilities):
    raise UserError(f"dataset.image_kinds: {answer.error}; use other words for the kinds")
  return [round(p, 6) for p in answer.of]


def _likeliest(probabilities: Sequence[float], names: Sequence[str]) -> ImageKind:
  best = int(np.argmax(probabilities))
  return ImageKind(names[best], probabilities[best])


def figures(found: Sequence[ImageKind], names: Sequence[str]) -> dict[str, Any]:
  """By kind: its images, their share, and how many the model was not sure of (below 0.9)."""
  count = Counter(kind.name for kind in found)
  unsure = Counter(kind.name for kind in found if kind.probability < 0.9)
  return {
    name: {
      "images": count[name],
      "share": count[name] / max(len(found), 1),
      "unsure": unsure[name],
    }
    for name in names
  }


def figures_text(by_kind: Mapping[str, Mapping[str, Any]]) -> str:
  """The same, as the log has it."""
  lines = [
    f"{cut(name, 24):<24}{one['images']:>10,} images {one['share']:>7.1%}, of which "
    f"{one['unsure']:,} the model was not sure of (below 0.9)"
    for name, one in by_kind.items()
  ]
  return "\n".join(lines)
