"""A question of a benchmark about an image, and the benchmarks' names."""

import dataclasses

from caprl_jax.data.rows import ImageSource, PixelLimits

# What a file holds, by its name without the suffix: the name that its figures are published under.
BENCHMARKS = {
  "lmm_eval_chartqa": "ChartQA",
  "lmm_eval_infovqa": "InfoVQA",
  "lmm_eval_MMStar": "MMStar",
  "lmm_eval_mmmu": "MMMU",
  "lmm_eval_CharXiv": "CharXiv",
  "lmm_eval_ChartQA_Pro": "ChartQAPro",
  "lmm_eval_MMMU_Pro": "MMMU-Pro",
  "lmm_eval_seed2k": "SEED",
  "lmm_eval_MathVerse_MINIVInt": "MathVerse",
  "lmm_eval_MathVision": "MathVision",
  "lmm_eval_WeMath": "WeMath",
  "lmm_eval_Visu": "VisuLogic",
}
QUESTIONS = "questions"  # the benchmark of rows that `from_qa_rows` makes
CAPTIONQA = "CaptionQA"  # and of those that `captionqa.read_captionqa` reads


@dataclasses.dataclass(frozen=True)
class BenchmarkRow:
  """A question of a benchmark about an image.

  `prompt` is the whole text that an answering model reads, with exactly one of PLACEHOLDERS where
  the caption goes. `gold` is the answer, or several that are all right, as the file writes it.
  `options` are the texts of lettered options that the prompt lists; () where it lists none, or none
  that the gold letter is of. `kind` is a group for metrics. `stem` is the question without these
  options, for who lists them anew. `years`: which of ChartQAPro's answers are years, where the row
  says so. `limits` are those of this image, where the row names any. `cannot` is the place among
  the options of the one that says that the caption does not tell, where there is one. `facts`: as
  those of `QARow`.
  """

  image: ImageSource
  prompt: str
  gold: str | tuple[str, ...]
  options: tuple[str, ...]
  benchmark: str
  name: str
  kind: str = ""
  stem: str = ""
  years: tuple[bool, ...] | None = None
  limits: PixelLimits | None = None
  cannot: int | None = None
  facts: dict[str, str] | None = None
