"""The section `dataset`."""

import dataclasses
import re
from typing import Literal

from caprl_jax.data.rows import BadRows

KIND = "{kind}"  # of an output: where the name of the image's kind goes


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
  """The section `dataset`.

  input: a source or mixture (`qa_sources.py`).
  output: where to write the rows too, as FILE.jsonl or FILE.json (images in FILE_images/),
    FILE.parquet, or tfds:FOLDER; None only looks. With `image_kinds` a file for each kind, whose
    name stands in the place of {kind}.
  split, name: of the dataset in a tfds:FOLDER.
  bad_rows: "refuse" ends with an error when the table is printed and writes no output; "drop"
    leaves them out of it. Rows whose image the processor refuses are among them.
  repeated_questions: a row that asks the same thing twice is bad ("refuse"), or as good as others
    ("keep"): so it is in training.
  repeated_images: "keep" them, or "merge" their questions into the first row that has the image.
  max_rows: of each source.
  checkpoint: whose image processor counts tokens; None: Qwen2.5-VL's, with CapRL's limit of one
    million pixels.
  image_kinds: name of a kind of images -> what such an image shows. The model of section `answerer`
    says of each image which it is.
  batch_size: images that it is asked about at once.
  """

  input: str
  output: str | None = None
  split: str = "train"
  name: str = "default"
  bad_rows: BadRows = "refuse"
  repeated_questions: Literal["refuse", "keep"] = "refuse"
  repeated_images: Literal["keep", "merge"] = "keep"
  max_rows: int | None = None
  checkpoint: str | None = None
  image_kinds: dict[str, str] = dataclasses.field(default_factory=dict)
  batch_size: int = 8

  def __post_init__(self):
    kinds = self.image_kinds
    if kinds and not 2 <= len(kinds) <= 10:
      raise ValueError(f"dataset.image_kinds: name from 2 to 10 kinds, not {len(kinds)}")
    odd = [name for name in kinds if not re.fullmatch(r"[\w-]+", name)]
    told = [
      len({text.casefold().strip() for text in texts} - {""}) for texts in (kinds, kinds.values())
    ]
    if odd or min(told) < len(kinds):
      raise ValueError(
        f"dataset.image_kinds = {kinds}: names are of letters, digits, _ and -, since files are "
        "called by them; names, and what images of each kind show, must differ"
      )
    if not kinds and self.output is not None and KIND in self.output:
      raise ValueError(
        f"dataset.output = {self.output!r}: {KIND} stands for kinds of images, and "
        "dataset.image_kinds names none; configs/image_kinds.py does"
      )
    if kinds and self.output is not None and self.output.count(KIND) != 1:
      raise ValueError(
        f"dataset.output = {self.output!r}: with dataset.image_kinds each kind has a file of its "
        f"own; write {KIND} once where its name goes, as rows_{KIND}.parquet"
      )
    if self.batch_size < 1:
      raise ValueError(f"dataset.batch_size = {self.batch_size} must be at least 1")

  def outputs(self) -> dict[str, str]:
    """Name of a kind of images -> output; where there are no kinds, "" is the name of all."""
    if self.output is None:
      return {}
    if not self.image_kinds:
      return {"": self.output}
    return {name: self.output.replace(KIND, name) for name in self.image_kinds}
