"""The section `curate` of mode `curate`."""

import dataclasses
from typing import Literal

from caprl_jax.data.rows import BadRows
from caprl_jax.inference.vqa import AnswerConfig
from caprl_jax.modes.curate import perceptual_hash


@dataclasses.dataclass(frozen=True)
class CurateConfig:
  """The section `curate`.

  input: images (`readers.image_sources.list_images`); with questions "given", a QA source
    (`qa_sources.py`) to be filtered.
  output: FILE.jsonl, FILE.json, FILE.parquet or tfds:FOLDER.
  split, name: of the dataset, where the output has them.
  answers_output: FILE.jsonl or FILE.json for every question that was asked, kept or not, with each
    single answer, in the form of the released curation's third step (`released_rows.py`).
  questions: from the model of section `generator`, from an `endpoint`, or `given` in the input.
  prompt: what the generator is told: "ours", our words; "official", the released prompt to the
    byte, which is downloaded from the release once; a .py file: the SYS_PROMPT that it assigns, as
    a copy of CapRL's gen_qa.py does; another file: its text.
  max_tokens, temperature, repetition_penalty, batch_size: of the generator; CapRL's own by
    default.
  answers: how the questions are asked.
  min_visual: a question stays when the share of its orders answered right with the image is above
    this; CapRL: 0.75, of four. None: whatever it is.
  max_blind: and that without the image is below this; CapRL: 0.25. None: whatever it is.
  min_side: images smaller than this in pixels are left out.
  similar_bits: two images are alike when at most so many of the 64 bits of their perceptual
    hashes differ (`perceptual_hash.py`); None keeps all.
  benchmarks: sources of images; an image that is like one of these is left out.
  similar_questions: of an image's questions that share more than this part of their words, one
    stays; None keeps all.
  repeated_questions: keep a question that asks what an earlier one of the same reply asks, too,
    also where their answers differ.
  shard_rows: images that are one host's work at a time.
  bad_rows: "refuse" to go on while an image or a given row cannot be used (it cannot be decoded, or
    is too narrow for the models), or "drop" and list it. None: given rows are refused; images that
    were found are dropped, as there are always some.
  """

  input: str
  output: str
  split: str = "train"
  name: str = "curated"
  answers_output: str | None = None
  questions: Literal["generator", "endpoint", "given"] = "generator"
  prompt: str = "ours"
  max_tokens: int = 2048
  temperature: float = 0.1
  repetition_penalty: float = 1.05
  batch_size: int = 8
  answers: AnswerConfig = AnswerConfig()
  min_visual: float | None = 0.75
  max_blind: float | None = 0.25
  min_side: int = 28
  similar_bits: int | None = perceptual_hash.DEFAULT_BITS
  benchmarks: tuple[str, ...] = ()
  similar_questions: float | None = 0.8
  repeated_questions: bool = False
  shard_rows: int = 1000
  bad_rows: BadRows | None = None

  @property
  def bad_rows_rule(self) -> BadRows:
    """What `bad_rows` comes to."""
    return self.bad_rows or ("refuse" if self.questions == "given" else "drop")

  def __post_init__(self):
    if not all(share is None or 0 <= share <= 1 for share in (self.min_visual, self.max_blind)):
      raise ValueError(
        f"curate.min_visual = {self.min_visual} and max_blind = {self.max_blind} "
        "are shares, from 0 to 1"
      )
    if self.answers_output and not self.answers_output.endswith((".jsonl", ".json")):
      raise ValueError(
        f"curate.answers_output = {self.answers_output!r}: write FILE.jsonl or FILE.json"
      )
    if self.shard_rows < 1 or self.batch_size < 1:
      raise ValueError(
        f"curate.shard_rows = {self.shard_rows} and batch_size = "
        f"{self.batch_size} must be at least 1"
      )
