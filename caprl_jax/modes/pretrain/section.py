"""The sections of mode `pretrain`, but for its model's (`policy.py`)."""

import dataclasses
from typing import Literal

from caprl_jax.config import schema as configuration
from caprl_jax.data.packing import PackConfig
from caprl_jax.data.question_texts import check_open_question
from caprl_jax.data.rows import BadRows
from caprl_jax.harness.checkpoints import CheckpointConfig
from caprl_jax.inference.vqa import AnswerConfig
from caprl_jax.modes.pretrain.record import TRAINING
from caprl_jax.rl.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """One stage of training.

  data: see `conversations.read_examples`; None skips the stage.
  optimizer: as the section `optimizer`.
  pack: how examples share rows.
  trained: which parameters are trained; the others have no gradient.
  steps, epochs: the length of the stage; set one of the two.
  batch_size, examples: rows per step, or examples per step; set one of the two. With `examples`, a
    step has as many rows as hold that many on average, rounded to a multiple of devices x
    microbatches: close to a published batch size where rows are packed.
  microbatches: parts that a batch is cut into, to save memory; the gradient is the same. It
    may be changed when a run goes on.
  instruction: what the user says where a row has a caption only.
  image_root: what images' paths are relative to; None: the file's folder or, where they are not
    there, the current one.
  max_rows: the first rows only, of each source.
  questions: questions about one image in one conversation; None: all of them.
  context_text: a template of facts: questions are asked after this text and without the image.
  kinds: kinds of questions that are asked; None: all.
  open_question: a wording in which no options are shown and the assistant says the right one;
    None: it says a letter.
  """

  data: str | None
  optimizer: OptimizerConfig
  pack: PackConfig
  trained: Literal["projector", "decoder", "full"] = "full"
  steps: int | None = None
  epochs: float | None = None
  batch_size: int | None = None
  examples: int | None = None
  microbatches: int = 1
  instruction: str = "Please describe this image in detail."
  image_root: str | None = None
  max_rows: int | None = None
  questions: int | None = None
  context_text: str | None = None
  kinds: tuple[str, ...] | None = None
  open_question: str | None = None

  def __post_init__(self):
    for first, second in (("steps", "epochs"), ("batch_size", "examples")):
      given = [getattr(self, name) for name in (first, second) if getattr(self, name) is not None]
      if len(given) != 1 or given[0] <= 0:
        raise ValueError(
          f"{first} = {getattr(self, first)}, {second} = {getattr(self, second)}: set one of "
          "them, to more than 0"
        )
    if self.microbatches < 1:
      raise ValueError(f"microbatches = {self.microbatches} must be at least 1")
    check_open_question(self.open_question)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """The section `pretrain`.

  stages: by name. Each one's model is written to `workdir/<name>`, in output_dtype, and the next
    one begins with what is written; its metrics are in `workdir/training/<name>`. If no stage has
    data, the model is not trained and only answers `eval`.
  order: which stages are run, one after the other.
  eval: multiple-choice questions (`qa_sources.py`) that the last model is asked, with the image
    and without, as `answer` says; None asks nothing.
  eval_rows: the first images only.
  eval_bad_rows: "refuse" to start while one of them cannot be used, or "drop" and log it; as
    `data.bad_rows`.
  eval_kinds: kinds of questions that are asked; None: all.
  eval_open_question: asks without showing the options, as a stage's `open_question`; what is
    written is right where it is the right option but for case, articles and punctuation. None: by
    letter.
  eval_max_tokens: longest answer to an open question.
  answer: how questions are asked by letter.
  output_dtype: of the models that are written.
  checkpoint_every_steps: steps from one checkpoint inside a stage to the next.
  checkpoint_every_minutes: one is also written when so many minutes are over since the last one;
    None: only by steps.
  chunk_tokens: tokens whose logits exist at once.
  """

  stages: dict[str, StageConfig]
  order: tuple[str, ...]
  eval: str | None = None
  eval_rows: int = 500
  eval_bad_rows: BadRows = "refuse"
  eval_kinds: tuple[str, ...] | None = None
  eval_open_question: str | None = None
  eval_max_tokens: int = 16
  answer: AnswerConfig = AnswerConfig(none_of_above=False)
  output_dtype: str = "float32"
  checkpoint_every_steps: int = 200
  checkpoint_every_minutes: float | None = None
  chunk_tokens: int = 1024  # tokens whose logits exist at once

  def __post_init__(self):
    for name in self.order:
      if name not in self.stages:
        raise ValueError(
          f"order names {name!r}, which is no "
          f"stage{configuration.did_you_mean(name, self.stages)} (stages: "
          f"{', '.join(self.stages)})"
        )
    check_open_question(self.eval_open_question)
    self.checkpoints()
    if self.answer.protocol != "letters":
      raise ValueError(
        f"answer.protocol = {self.answer.protocol!r} is for mode curate; use 'letters' here"
      )
    if self.eval_max_tokens < 1:
      raise ValueError(f"eval_max_tokens = {self.eval_max_tokens} must be at least 1")
    if not self.order or len(set(self.order)) < len(self.order) or TRAINING in self.order:
      raise ValueError(
        f"order = {self.order}: name each stage once; none may be called {TRAINING!r}"
      )

  def checkpoints(self) -> CheckpointConfig:
    """When checkpoints inside stages are written. Raises ValueError as it does."""
    return CheckpointConfig(self.checkpoint_every_steps, self.checkpoint_every_minutes)
