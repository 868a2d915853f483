"""The section `plan`."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
  """The section `plan`. The token counts are the largest that the data has.

  topology: a machine (v5e-16, H100x8), or as libtpu names one (v5p:2x2x2, v5e:1x1); auto: a table
    of the usual machines; None: the devices here.
  compile: also compile the step, in minutes, rather than only estimate what it takes, in seconds;
    None: where one TPU topology is named and libtpu is installed, and for the devices here.
  data: read the rows of `data.train` and the sizes of their images: then the largest of these is
    `image`, and the buckets of shapes (`data.shape_buckets`) are named. What is on the hub is
    downloaded for that.
  image: height and width of the largest image.
  prompt_tokens: of the instruction, the image's not counted.
  stem_tokens: of a question without its options.
  options: of a question.
  option_tokens: of one option.
  judge_prompt_tokens: around caption and question; the official prompt's by default.
  layers: of tower and decoders, to plan a shallower model of the same width; None: the real
    number.
  caption_tokens: mean length of the captions that are written, on which times depend; None: 0.15 of
    the limit, and 32 at least.
  images: of the run whose hours and cost are told beside those of `train.steps`; by default the
    three passes over CapRL-QA-75K's 75,285 images that CapRL-3B took.
  prices: US dollars per chip and hour, as "v5e=0.6,H100=2" or a JSON file with such pairs; None: a
    table that is dated and wrong some day (`modes/plan/chips.py`).
  """

  topology: str | None = "v5p:2x2x2"
  compile: bool | None = None
  data: bool = False
  image: tuple[int, ...] = (1000, 1000)
  prompt_tokens: int = 64  # the image's not counted
  stem_tokens: int = 48
  options: int = 4
  option_tokens: int = 16
  judge_prompt_tokens: int = 352  # the official prompt's
  layers: int | None = None
  caption_tokens: float | None = None
  images: int = 3 * 75_285
  prices: str | None = None

  def __post_init__(self):
    if self.caption_tokens is not None and self.caption_tokens < 1:
      raise ValueError(f"caption_tokens = {self.caption_tokens} must be at least 1")
    if self.images < 1:
      raise ValueError(f"images = {self.images} must be at least 1")
