"""The section `prism`."""

import dataclasses
from typing import Literal

from caprl_jax.config.named_values import parse_named
from caprl_jax.data.rows import BadRows
from caprl_jax.modes.prism.evaluation import BLIND


@dataclasses.dataclass(frozen=True)
class PrismConfig:
  """The section `prism`.

  captioners: "name=checkpoint", joined by commas; the other settings are those of section
    `policy`. The others are compared with the first.
  benchmarks: "name=source", joined by commas: a file of CapRL-Evaluation-Files (lmm_eval_*.json),
    CaptionQA ("captionqa:natural" and other splits on the hub, or "captionqa:PATH"), or a QA source
    (`qa_sources.py`).
  image_root: folder or .zip with the images of such files.
  max_rows: of each benchmark.
  captions: captions per image; CapRL takes 4 at temperature 1 and reports their mean. 1 at
    temperature 0 is greedy.
  captions_per: "image": the questions about an image are answered from the same captions; or
    "question": each has captions of its own, as released, which takes longer where an image has
    several questions.
  temperature, top_p: of the captions.
  max_tokens: longest caption.
  batch_size: images that are captioned at once; when one is done, the next takes its place.
  answers: "write", as CapRL: the answering model (section `judge`) writes; or "read": its reading
    of the options, as in training (rows with lettered options only; the others are left out and
    counted). Reading also tells a caption that says nothing from one that misleads.
  answer_tokens: longest written answer.
  answer_temperature: of written answers.
  answer_batch_size: answers that are written at once, in the same way.
  blind: ask with an empty caption too, for the column `blind`.
  intervals: level of the confidence intervals.
  examples: questions on the page.
  gallery: images on a second page, gallery.html, with what each captioner wrote about them side by
    side: half of them drawn at random, half those where captioners differ most. 0: no such page.
  cache: folder of captions and answers; None: in the workdir.
  bad_rows: "refuse" to start while a question or its image cannot be used, or "drop" and log it;
    the figures say how many are left out.
  """

  captioners: str
  benchmarks: str
  image_root: str | None = None
  max_rows: int | None = None
  captions: int = 4
  captions_per: Literal["image", "question"] = "image"
  temperature: float = 1.0
  top_p: float = 1.0
  max_tokens: int = 2048
  batch_size: int = 8
  answers: Literal["write", "read"] = "write"
  answer_tokens: int = 2048
  answer_temperature: float = 1.0
  answer_batch_size: int = 16
  blind: bool = True
  intervals: float = 0.95
  examples: int = 24
  gallery: int = 0
  cache: str | None = None
  bad_rows: BadRows = "refuse"

  @property
  def checkpoints(self) -> dict[str, str]:
    """Captioner's name -> checkpoint. Raises ValueError for a text that is not `name=value,...`."""
    example = "before=configs/quickstart_policy,after=runs/quickstart/policy"
    return parse_named(self.captioners, key="prism.captioners", example=example)

  @property
  def sources(self) -> dict[str, str]:
    """Benchmark's name -> source. Raises ValueError for a text that is not `name=value,...`."""
    return parse_named(self.benchmarks, key="prism.benchmarks", example="easy=easy_vqa:test")

  def __post_init__(self):
    if not self.checkpoints or not self.sources:
      raise ValueError(
        "prism.captioners and prism.benchmarks must name one at least, as name=value"
      )
    if BLIND in self.checkpoints:
      raise ValueError(f"prism.captioners: the name {BLIND!r} stands for no caption; use another")
    for key, least in (
      ("captions", 1),
      ("batch_size", 1),
      ("answer_batch_size", 1),
      ("max_tokens", 1),
      ("answer_tokens", 1),
      ("temperature", 0),
      ("answer_temperature", 0),
      ("examples", 0),
      ("gallery", 0),
    ):
      if not getattr(self, key) >= least:
        raise ValueError(f"prism.{key} = {getattr(self, key)} must be at least {least}")
    if not 0 < self.top_p <= 1:
      raise ValueError(
        f"prism.top_p = {self.top_p} must be above 0 and at most 1, which draws from all tokens"
      )
    if not 0 < self.intervals < 1:
      raise ValueError(
        f"prism.intervals = {self.intervals} must be between 0 and 1, as 0.95 for 95%"
      )
    if self.captions > 1 and self.temperature == 0:
      raise ValueError(
        f"prism.captions = {self.captions} greedy captions of an image are all the "
        "same; set captions = 1, or a temperature"
      )
    if self.captions_per == "question" and self.temperature == 0:
      raise ValueError(
        "prism.captions_per = 'question' writes the same greedy caption for each question of an "
        "image; set captions_per = 'image', or a temperature"
      )
