"""The section `plan`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """The section `plan`. The token counts are the largest that the data has.

  topology: as libtpu names it ("v5p:2x2x2", "v5e:1x1"); None: the devices here.
  image: height and width of the largest image.
  prompt_tokens: of the instruction, the image's not counted.
  stem_tokens: of a question without its options.
  options: of a question.
  option_tokens: of one option.
  judge_prompt_tokens: around caption and question; the official prompt's by default.
  layers: of tower and decoders, to plan a shallower model of the same width; None: the real
    number.
  """

  topology: str | None = "v5p:2x2x2"
  image: tuple[int, ...] = (1000, 1000)
  prompt_tokens: int = 64  # the image's not counted
  stem_tokens: int = 48
  options: int = 4
  option_tokens: int = 16
  judge_prompt_tokens: int = 352  # the official prompt's
  layers: int | None = None
