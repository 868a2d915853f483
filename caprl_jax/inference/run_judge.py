"""A run's judge: a language model that answers questions, or a vision-language model that scores
captions beside their images.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax

from caprl_jax.data.judge_questions import QuestionTokenizer, TokenizedQuestion
from caprl_jax.data.rows import Question
from caprl_jax.hub.load import Loaded
from caprl_jax.inference.image_judge import ScorePrompt
from caprl_jax.inference.judge import Ask, HostJudge, JudgeSection, open_judge, question_tokenizer
from caprl_jax.types import JudgePrompt


@dataclasses.dataclass(frozen=True)
class RunJudge:
  """loaded: the model. tokenize: writes questions for it. host: asks it questions; None for one
  that sees the image, which has `score`, the prompt by which it scores captions.
  """

  loaded: Loaded
  tokenize: QuestionTokenizer
  host: HostJudge | None = None
  score: ScorePrompt | None = None

  @classmethod
  def open(
    cls,
    section: JudgeSection,
    *,
    kinds: Sequence[str],
    mesh: jax.sharding.Mesh,
    seed: int,
    compare: Sequence[Ask],
  ) -> "RunJudge":
    """Loads a config's judge; arguments and errors as of `open_judge`."""
    if section.sees_image:
      loaded = section.load(mesh)
      written = question_tokenizer(loaded, section, kinds)
      return cls(loaded, written, score=section.score_of(loaded))
    host = open_judge(section, kinds=kinds, mesh=mesh, seed=seed, compare=compare)
    return cls(host.judge, host.tokenize, host)

  def learn(self, questions: Iterable[Question]) -> None:
    """What `tokens` needs to know of the questions (`HostJudge.priors`)."""
    if self.host:
      self.host.priors(questions)

  def tokens(self, question: Question) -> TokenizedQuestion:
    """A question as batches hold it."""
    prior = self.host.prior_of(question) if self.host else None
    return self.tokenize(question, prior)

  def prompt(self, options: int, rows: int | None) -> JudgePrompt:
    """The prompt as the step reads it; arguments as of `QuestionTokenizer.prompt`."""
    return self.score.prompt if self.score else self.tokenize.prompt(options, rows)
