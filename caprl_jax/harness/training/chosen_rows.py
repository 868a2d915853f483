"""Settings -> the rows of both splits that can be used, with the questions that can teach."""

import dataclasses
import pathlib
from collections.abc import Sequence

from caprl_jax.config.schema import to_plain
from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.image_check import ImageCheck
from caprl_jax.data.readers.qa_sources import Part, read_parts, read_qa_rows
from caprl_jax.data.rows import QARow
from caprl_jax.data.usable_rows import Check, fits, usable
from caprl_jax.harness.buckets.shared import saved_steps
from caprl_jax.harness.process.run_record import RunRecord
from caprl_jax.harness.question_filter import filter_questions, fixed_subset
from caprl_jax.harness.settings import Settings
from caprl_jax.harness.training.kept_questions import KeptQuestions, Split
from caprl_jax.harness.training.made_of import bind_held_out_rows
from caprl_jax.harness.training.row_digests import row_digests
from caprl_jax.inference.endpoint_judge import EndpointJudge
from caprl_jax.inference.image_judge import with_score
from caprl_jax.inference.judge import HostJudge


@dataclasses.dataclass(frozen=True)
class Data:
  """The rows of both splits, with the questions that are kept. train: (the source, its rows).
  bad, eval_bad: rows of either that could not be used."""

  train: list[tuple[Part, list[QARow]]]
  eval: list[QARow]
  bad: int = 0
  eval_bad: int = 0

  @property
  def train_rows(self) -> list[QARow]:
    """Of all sources, one after the other."""
    return [row for _, rows in self.train for row in rows]

  @property
  def mixture(self) -> tuple[tuple[int, float | None], ...]:
    """Rows and weight of each source of `train_rows`."""
    return tuple((len(rows), part.weight) for part, rows in self.train)

  def scored(self, scores: Sequence[str]) -> "Data":
    """With what a caption is worth in the place of each row's questions."""
    change = lambda rows: [with_score(row, scores) for row in rows]
    train = [(part, change(rows)) for part, rows in self.train]
    return dataclasses.replace(self, train=train, eval=change(self.eval))

  def checked(self, bad: BadRowList, images: ImageCheck, check: Check) -> "Data":
    """What is left when a check has been asked of every row; `bad` takes note of the others."""
    images([*self.train_rows, *self.eval])  # of both splits in one pass
    left = lambda rows: bad.check(usable(rows, images(rows), [check]))
    train, held_out = [(part, left(rows)) for part, rows in self.train], left(self.eval)
    gone = len(self.train_rows) - sum(len(rows) for _, rows in train)
    return Data(train, held_out, self.bad + gone, self.eval_bad + len(self.eval) - len(held_out))

  def counts(self) -> dict[str, int]:
    """How many rows there are, and were bad where any were."""
    rows = {"train_rows": len(self.train_rows), "eval_rows": len(self.eval)}
    bad = {"bad_rows": self.bad, "eval/bad_rows": self.eval_bad}
    return rows | {name: number for name, number in bad.items() if number}


def was_begun(workdir: pathlib.Path | None) -> bool:
  """Whether a folder has a checkpoint to go on from."""
  return workdir is not None and bool(saved_steps(workdir))


def _kept_questions(
  record: RunRecord, settings: Settings, workdir: pathlib.Path | None
) -> KeptQuestions | None:
  """The questions that the run has chosen; None where it chooses none."""
  chooses = settings.question_filter.informed or settings.data.questions_per_image is not None
  if workdir is None or not chooses:
    return None
  # and a place: none of them decides
  speed = ("source", "endpoint", "microbatches", "chunk_tokens", "gather_once", "attention")
  decides = {
    "filter": settings.question_filter,
    "questions_per_image": settings.data.questions_per_image,
    "judge": {key: value for key, value in to_plain(settings.judge).items() if key not in speed},
    "judge_sha256": record.digest("judge.source"),
    "seed": settings.seed,
  }
  return KeptQuestions(workdir, decides, goes_on=was_begun(workdir))


def choose_questions(
  data: Data,
  images: ImageCheck,
  host_judge: HostJudge | EndpointJudge | None,
  settings: Settings,
  record: RunRecord | None,
  workdir: pathlib.Path | None,
) -> tuple[Data, dict[str, int]]:
  """As `_filter`; what was chosen at an earlier start of the run is chosen again, and the record
  gets the held-out rows."""
  if record is None:
    return _filter(data, host_judge, settings)
  kept = _kept_questions(record, settings, workdir)
  chosen, counts = _chosen_once(data, images, host_judge, settings, kept)
  bind_held_out_rows(record, chosen.eval, images(chosen.eval))
  return chosen, counts


def _chosen_once(
  data: Data,
  images: ImageCheck,
  host_judge: HostJudge | EndpointJudge | None,
  settings: Settings,
  kept: KeptQuestions | None,
) -> tuple[Data, dict[str, int]]:
  """As `_filter`, or as `kept` remembers."""
  if kept is None:
    return _filter(data, host_judge, settings)
  splits = [
    Split(rows, row_digests(rows, images(rows)))
    for rows in [*(rows for _, rows in data.train), data.eval]
  ]
  known = kept.recall(splits)
  if known is None:
    chosen, counts = _filter(data, host_judge, settings)
    kept.keep(splits, [*(rows for _, rows in chosen.train), chosen.eval], counts)
    return chosen, counts
  (*train, held_out), counts = known
  parts = [(part, rows) for (part, _), rows in zip(data.train, train, strict=True)]
  return dataclasses.replace(data, train=parts, eval=held_out), counts


def usable_data(
  settings: Settings, training: bool, workdir: pathlib.Path | None
) -> tuple[Data, ImageCheck, BadRowList]:
  """Both splits without the rows that cannot be used. Raises ValueError where such are refused."""
  listed = "bad_rows.jsonl" if training else "evaluation_bad_rows.jsonl"
  bad = BadRowList(settings.data.bad_rows, workdir and workdir / listed, "--config.data.bad_rows")
  images = ImageCheck(workdir, "" if training else "evaluation")
  read = _read_data(settings, training, bad)
  data = read.checked(bad, images, fits(settings.policy.pixels()))
  if settings.judge.sees_image:
    data = data.checked(bad, images, fits(settings.judge.pixels())).scored(settings.judge.scores)
  bad.settle()
  return data, images, bad


def _read_data(settings: Settings, training: bool, bad: BadRowList) -> Data:
  """Both splits as they are, without bad rows, which `bad` takes note of; the training split is
  empty where nothing is trained."""
  data, seed, asked = settings.data, settings.seed, settings.judge.named
  parts = []
  if training:
    drawn = data.draw_train_rows
    parts = read_parts(data.train, seed, data.max_train_rows, bad, asked, drawn=drawn)
  of_train = len(bad.rows)
  held_out = read_qa_rows(data.eval, seed, data.max_eval_rows, bad, asked)
  return Data(parts, held_out, of_train, len(bad.rows) - of_train)


def _filter(
  data: Data, host_judge: HostJudge | EndpointJudge | None, settings: Settings
) -> tuple[Data, dict[str, int]]:
  """The questions that can teach, and how many were kept and dropped of each kind; those of the
  held-out split are counted under eval/."""
  *train, (held_out, held_out_counts) = filter_questions(
    [
      *((part.source, rows) for part, rows in data.train),
      (settings.data.eval, data.eval),
    ],
    host_judge,
    settings.question_filter,
    settings.seed,
  )
  counts: dict[str, int] = {}
  for _, counted in train:
    for name, number in counted.items():
      counts[name] = counts.get(name, 0) + number
  counts |= {f"eval/{name}": number for name, number in held_out_counts.items()}
  parts = (part for part, _ in data.train)
  kept = [(part, rows) for part, (rows, _) in zip(parts, train, strict=True)]
  if (most := settings.data.questions_per_image) is not None:
    kept = [(part, fixed_subset(rows, most, settings.seed)) for part, rows in kept]
  return dataclasses.replace(data, train=kept, eval=held_out), counts
